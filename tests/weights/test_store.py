"""The store: layers that come and go under tensors that never move."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from polder.emulation.backends import FaultyBackend, PacedBackend
from polder.errors import ConfigError, EnvironmentFault, IntegrityError, OutOfPages, UsageError
from polder.memory import _libc
from polder.memory.cpu import CpuBackend
from polder.weights.host_copy import HostCopy
from polder.weights.rotation import Rotation
from polder.weights.store import WeightStore
from tests.weights.models import PAGE, Model, random_layers


def test_an_adopted_model_sleeps_and_runs_when_it_has_all_segments(model: Model) -> None:
    assert model.store.rotation is None
    assert model.store.statistics().segments == 0
    model.give(8)
    model.run()
    model.check()
    statistics = model.store.statistics()
    assert (statistics.segments, statistics.won, statistics.stream.loads) == (8, 0, 8)
    assert statistics.layer_load_s > 0


def test_tensors_keep_address_shape_strides_and_ties_for_life(model: Model) -> None:
    before = [{name: t.data_ptr() for name, t in layer.items()} for layer in model.store.tensors]
    model.give(5)
    model.run()
    model.take(2)
    model.run()
    for layer, (tensors, originals) in enumerate(zip(model.store.tensors, model.original, strict=True)):
        assert set(tensors) == set(originals) - {"bias"}
        assert {name: t.data_ptr() for name, t in tensors.items()} == before[layer]
        assert tensors["qkv.tied"].data_ptr() == tensors["qkv.weight"].data_ptr()
        assert tensors["up.weight"].stride() == originals["up.weight"].stride()
    assert model.store.layout.resident["3.bias"] == "empty"


@pytest.mark.parametrize("segments", range(1, 9))
def test_every_pass_is_right_in_any_number_of_segments(model: Model, segments: int) -> None:
    model.give(segments)
    for _ in range(3):
        model.run()
    model.check()
    rotation = model.store.rotation
    assert rotation is not None
    assert rotation.segments == segments
    if rotation.won:
        model.store.wait_all()
        # Each pass fetches each rotating layer once, and at its end the first ones for a next pass.
        assert model.store.statistics().stream.loads == segments + 3 * len(rotation.rotating)


def test_giving_up_segments_copies_nothing_and_a_resident_layer_that_stays_is_not_fetched(model: Model) -> None:
    model.give(8)
    model.run()
    loads = model.store.statistics().stream.loads
    model.take(3)
    model.store.wait_all()
    assert model.store.statistics().stream.loads == loads
    model.give(3)
    rotation = Rotation.holding(8, 5)
    away = set(rotation.rotating) - set(rotation.homes)
    assert model.store.statistics().stream.loads == loads + len(away)


def test_the_first_pass_waits_layer_by_layer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, real = threading.Semaphore(0), _libc.copy_bytes
    monkeypatch.setattr(_libc, "copy_bytes", lambda *a: (steps.acquire(timeout=30), real(*a)))
    model.give(8)
    for layer in range(8):
        assert model.store.statistics().stream.loads == 8, "all are submitted"
        steps.release()
        model.store.before(layer)
        assert model.right(layer)
        assert not any(model.right(later) for later in range(layer + 1, 8))
        model.store.after(layer)


def test_waiting_for_everything_first_is_possible(model: Model) -> None:
    model.give(8)
    model.store.wait_all()
    assert all(model.right(layer) for layer in range(8))
    stalls = model.store.statistics().stream.stalls
    model.run()
    assert model.store.statistics().stream.stalls == stalls


def test_not_streaming_gives_wrong_weights(model: Model) -> None:
    """The control: over a slot that nobody fills, layers read each other's bytes."""
    model.give(4)
    model.store.wait_all()
    rotation = model.store.rotation
    assert rotation is not None
    wrong = [layer for layer in range(8) if not model.right(layer)]
    assert wrong == [layer for layer in range(8) if rotation.homes[layer] != layer]


def test_asleep_it_has_nothing_mapped_and_refuses_to_run(model: Model) -> None:
    model.give(8)
    model.run()
    model.take(8)
    model.check()
    assert len(model.free) == 8
    with pytest.raises(IntegrityError, match="asleep"):
        model.store.before(0)
    model.give(1)
    model.run()


def test_a_chosen_rotation_takes_what_it_needs_and_returns_the_rest(model: Model) -> None:
    model.give(8)
    model.run()
    model.returned(model.store.rotate(Rotation.winning(8, 3, slots=1)))
    assert len(model.free) == 3
    model.run()
    model.returned(model.store.rotate(Rotation.winning(8, 4, slots=2)))
    model.run()
    model.check()
    assert len(model.free) == 4
    model.returned(model.store.rotate(Rotation.winning(8, 3, slots=2), model.some(1)))
    del model.free[:1]
    model.run()
    model.check()


def test_what_cannot_be_is_refused_and_changes_nothing(model: Model) -> None:
    model.give(6)
    model.run()
    with pytest.raises(UsageError, match="7 segments asked for of 6"):
        model.store.take(7)
    with pytest.raises(UsageError, match="needs 8 segments, and there are 6"):
        model.store.rotate(Rotation(layers=8))
    with pytest.raises(UsageError, match="for a model of 8"):
        model.store.rotate(Rotation(layers=4))
    with pytest.raises(ConfigError, match="hold 1 to 8"):
        model.store.give([*model.some(2), model.store.segments[0]])
    with pytest.raises(IntegrityError, match="a page twice"):
        model.store.give([model.store.segments[0]])
    with pytest.raises(IntegrityError, match="not of"):
        model.store.give([model.free[0][:1]])
    model.check()
    model.run()


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("call", ["map", "unmap"])
def test_when_mapping_fails_the_store_is_as_it_was(model: Model, backend: FaultyBackend, call: str, nth: int) -> None:
    model.give(6)
    model.run()
    before = model.store.rotation, model.store.segments
    backend.fail_next(call, nth)
    with pytest.raises(OutOfPages):
        model.give(2)
    model.check()
    assert (model.store.rotation, model.store.segments) == before
    model.run()
    backend.forgive()
    model.give(2)
    model.run()


def test_when_it_cannot_be_as_it_was_it_is_asleep_with_its_segments(model: Model, backend: FaultyBackend) -> None:
    model.give(6)
    model.run()
    for nth in (1, 2):
        backend.fail_next("map", nth)
    with pytest.raises(OutOfPages):
        model.take(1)
    assert model.store.rotation is None
    assert len(model.store.segments) == 6
    model.check()
    with pytest.raises(IntegrityError, match="asleep"):
        model.store.before(0)
    model.take(2)
    model.run()
    model.check()


def test_a_copy_that_fails_is_raised_by_its_layer_and_done_anew(model: Model, backend: FaultyBackend) -> None:
    backend.fail_next("copy", 3)
    model.give(8)
    model.run(until=2)
    with pytest.raises(EnvironmentFault, match="injected"):
        model.store.before(2)
    model.run()


def test_a_failed_copy_does_not_stop_giving_up(model: Model, backend: FaultyBackend) -> None:
    backend.fail_next("copy", 8)
    model.give(8)
    model.take(2)
    model.run()
    model.check()


def test_two_stores_of_the_same_weights_share_one_host_copy(model: Model, backend: FaultyBackend) -> None:
    store = model.store
    size = store.layout.layer_pages * PAGE
    shared = HostCopy.open(store.host.fd, 8, size)
    second = WeightStore(backend, random_layers(8), shared=shared)
    assert second.host is shared
    second.give(model.some(3))
    for layer in range(8):
        second.before(layer)
        assert torch.equal(second.tensors[layer]["qkv.weight"], model.original[layer]["qkv.weight"])
        second.after(layer)
    second.close()
    with pytest.raises(UsageError, match="other weights"):
        WeightStore(backend, random_layers(8, seed=1), shared=(other := HostCopy.open(store.host.fd, 8, size)))
    other.close()


def test_a_host_copy_is_made_in_the_file_that_others_will_share(backend: FaultyBackend) -> None:
    file = os.memfd_create("shared", os.MFD_ALLOW_SEALING)
    store = WeightStore(backend, random_layers(4), file=file)
    size = store.layout.layer_pages * PAGE
    shared = HostCopy.open(file, 4, size)
    os.close(file)
    assert shared.digest() == store.host.digest()
    shared.close()
    store.close()


def test_a_tensor_shared_with_the_rest_of_the_model_stays(backend: FaultyBackend) -> None:
    layers = random_layers(2)
    store = WeightStore(backend, layers, outside={"lm_head": layers[1]["qkv.weight"][:2]})
    assert sorted(store.layout.resident) == ["0.bias", "1.bias", "1.qkv.tied", "1.qkv.weight"]
    assert store.statistics().resident_bytes == layers[1]["qkv.weight"].nbytes
    assert "qkv.weight" not in store.tensors[1]
    store.close()


def test_a_slow_link_is_seen_in_the_statistics() -> None:
    size = random_layers(1)[0]["qkv.weight"].nbytes
    model = Model(PacedBackend(CpuBackend(page_bytes=PAGE), size / 0.05), 4)
    model.give(4)
    model.run()
    statistics = model.store.statistics()
    assert statistics.layer_load_s >= 0.05
    assert 1 <= statistics.stream.stalls <= 4, "on a loaded machine a layer may come before it is asked for"
    assert statistics.stream.overlap < 1.0
    model.close()


def test_the_host_copy_is_pinned_while_it_is_writable_and_read_only_afterwards(
    backend: FaultyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(backend, "pin", lambda address, size: seen.append(permissions(address)))
    monkeypatch.setattr(backend, "unpin", lambda address: None)
    store = WeightStore(backend, random_layers(2))
    assert seen == ["rw-s"], "drivers refuse to register memory that the process may not write to"
    assert permissions(store.host.address(0)) == "r--s"
    store.close()


def test_a_host_copy_that_cannot_be_pinned_is_told_and_used(
    backend: FaultyBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.fail_next("pin")
    model = Model(backend, 2)
    assert "cannot be pinned" in caplog.text
    model.give(2)
    model.run()
    model.close()


def permissions(address: int) -> str:
    """Of the mapping that holds this address, as /proc says it: "rw-s"."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, flags = line.split()[:2]
        first, end = (int(number, 16) for number in place.split("-"))
        if first <= address < end:
            return flags
    return ""
