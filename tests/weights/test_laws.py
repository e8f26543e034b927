"""Random lives of a store: segments given, taken and rotated, passes between them, and failures of mapping and copying."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from polder.emulation.backends import FaultyBackend
from polder.errors import EnvironmentFault, IntegrityError, OutOfPages
from polder.memory.cpu import CpuBackend
from polder.weights.rotation import Rotation
from tests.conftest import examples
from tests.weights.models import PAGE, Model

LAYERS = 6


class Lives(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.backend = FaultyBackend(CpuBackend(page_bytes=PAGE))
        self.model = Model(self.backend, LAYERS, spare=2)

    @property
    def held(self) -> int:
        return len(self.model.store.segments)

    # ------------------------------------------------------------------ what may happen

    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        self.model.give(data.draw(st.integers(0, LAYERS - self.held)))

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        self.model.take(data.draw(st.integers(0, self.held)))

    @rule(data=st.data())
    def rotate(self, data: st.DataObject) -> None:
        rotation, incoming = self.a_rotation(data)
        self.model.returned(self.rotated(rotation, incoming))

    @rule(data=st.data(), nth=st.integers(1, 5), in_a_row=st.integers(1, 2), call=st.sampled_from(["map", "unmap"]))
    def rotate_fails(self, data: st.DataObject, nth: int, in_a_row: int, call: str) -> None:
        rotation, incoming = self.a_rotation(data)
        before = self.model.store.rotation, set(self.model.store.segments)
        for n in range(in_a_row):
            self.backend.fail_next(call, nth + n)
        try:
            returned = self.rotated(rotation, incoming)
        except OutOfPages:
            returned = []
            assert set(self.model.store.segments) == before[1]
            assert self.model.store.rotation in (before[0], None)
        self.backend.forgive()
        self.model.returned(returned)

    @precondition(lambda self: self.model.store.rotation)
    @rule(until=st.integers(0, LAYERS))
    def run(self, until: int) -> None:
        self.model.run(until=until)

    @precondition(lambda self: self.model.store.rotation)
    @rule(nth=st.integers(1, 2 * LAYERS))
    def copies_fail(self, nth: int) -> None:
        store = self.model.store
        self.backend.fail_next("copy", nth)
        for layer in [*range(LAYERS)] * 2:
            try:
                store.before(layer)
            except EnvironmentFault:
                store.before(layer)
            assert self.model.right(layer)
            store.after(layer)
        with contextlib.suppress(
            EnvironmentFault
        ):  # the one that failed may be for the next pass: it is fetched again then
            store.wait_all()
        self.backend.forgive()

    @precondition(lambda self: not self.model.store.rotation)
    @rule(layer=st.integers(0, LAYERS - 1))
    def run_asleep(self, layer: int) -> None:
        with pytest.raises(IntegrityError):
            self.model.store.before(layer)

    @rule()
    def wait_all(self) -> None:
        try:
            self.model.store.wait_all()
        except EnvironmentFault:
            self.model.store.wait_all()

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def segments_add_up(self) -> None:
        self.model.check()

    def teardown(self) -> None:
        self.model.close()
        assert self.backend.resident_bytes() == 0
        self.backend.close()

    # ------------------------------------------------------------------ choices

    def a_rotation(self, data: st.DataObject) -> tuple[Rotation | None, int]:
        """A rotation that the segments suffice for, and how many of the free ones come with it."""
        incoming = data.draw(st.integers(0, len(self.model.free)))
        there = self.held + incoming
        choices = [None, Rotation(layers=LAYERS)]
        choices += [Rotation.winning(LAYERS, won, slots=1) for won in range(1, LAYERS)]
        choices += [Rotation.winning(LAYERS, won, slots=2) for won in range(2, LAYERS - 1)]
        fitting = [rotation for rotation in choices if rotation is None or rotation.segments <= there]
        return data.draw(st.sampled_from(fitting)), incoming

    def rotated(self, rotation: Rotation | None, incoming: int) -> list[tuple]:
        returned = self.model.store.rotate(rotation, self.model.some(incoming))
        del self.model.free[:incoming]
        return returned


def test_the_laws_hold_after_every_step() -> None:
    run_state_machine_as_test(
        Lives,
        settings=examples(60, steps=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]),
    )
