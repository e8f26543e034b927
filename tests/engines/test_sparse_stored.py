"""The core's book of stored prefixes: found by content, never over its limit, never evicted while read; and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.engines.vllm.settings import read_settings
from polder.engines.vllm.sparse.ask import Ask, ask_of
from polder.engines.vllm.sparse.limits import check_sparse
from polder.engines.vllm.sparse.stored import Entry, StoredPrefixes
from polder.errors import ConfigError
from polder.sparse.budget import Budget, Layout
from tests.conftest import examples


def layout(units: int) -> Layout:
    return Layout(sink_blocks=2, units=units, unit_tokens=16)


def hashes(text: int, blocks: int) -> list[bytes]:
    """Each stands for all blocks up to it, of a text."""
    return [f"{text}-{number}".encode() for number in range(blocks)]


def test_a_prefix_is_found_again_by_a_longer_prompt_and_not_by_another_text_method_or_a_much_longer_one() -> None:
    stored = StoredPrefixes(10**6, 100)
    key, _ = stored.add(hashes(1, 40), layout(30), "polder", "r")
    assert stored.find(hashes(1, 40), layout(30), "polder") == (key, layout(30))
    assert stored.find(hashes(1, 45), layout(33), "polder") == (key, layout(30))
    assert stored.find(hashes(2, 40), layout(30), "polder") is None
    assert stored.find(hashes(1, 40), layout(30), "quest") is None
    assert stored.find(hashes(1, 90), layout(60), "polder") is None
    assert stored.find(hashes(1, 40), layout(20), "polder") is None


@examples(40)
@given(data=st.data())
def test_the_limit_is_kept_and_what_is_read_stays(data: st.DataObject) -> None:
    stored, readers = StoredPrefixes(5000, 100), dict[bytes, Entry]()
    for text in range(30):
        units = data.draw(st.integers(1, 60))
        key, evicted = stored.add(hashes(text, units + 2), layout(units), "polder", f"{text}")
        assert stored.used_bytes <= 5000
        assert not set(evicted) & set(readers)
        if key and data.draw(st.booleans()):
            readers[key] = stored.use(key)
        elif not key:
            assert readers or units * 112 > 5000
        if readers and data.draw(st.booleans()):
            readers.pop(next(iter(readers))).readers -= 1
    assert set(readers) <= set(stored.clear())
    assert not stored.used_bytes


def params(**extra: Any) -> SimpleNamespace:
    return SimpleNamespace(extra_args=extra or None)


def test_a_request_asks_by_either_field() -> None:
    assert ask_of(params()) is None
    assert ask_of(params(kv_transfer_params={"do_remote_prefill": True})) is None
    expected = Ask(budget=Budget(share=0.1))
    assert ask_of(params(polder_sparse="10%")) == expected
    assert ask_of(params(kv_transfer_params={"polder": {"sparse": "10%"}})) == expected


@pytest.mark.parametrize("polder", [{"sparse": "x"}, {"sparse": 5, "slots": 0}, {"sparse": 5, "method": "best"}])
def test_what_cannot_be_read_is_refused(polder: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="write"):
        ask_of(params(kv_transfer_params={"polder": polder}))


SPARSE = {"POLDER_KV_BUDGET": "1GiB", "POLDER_SPARSE": "1GiB"}


def engine(**changes: Any) -> Any:
    parts: dict[str, Any] = {
        "speculative_config": None,
        "device_config": SimpleNamespace(device_type="cpu"),
        "use_v2_model_runner": False,
        "parallel_config": SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
    }
    return SimpleNamespace(**(parts | changes))


@pytest.mark.parametrize(
    ("variables", "changes", "what"),
    [
        ({"POLDER_WINDOW": "1GiB"}, {}, "POLDER_WINDOW"),
        ({"POLDER_LEND": "1GiB"}, {}, "POLDER_LEND"),
        ({"POLDER_TIERS": "host", "POLDER_HOST": "1GiB"}, {}, "POLDER_TIERS"),
        ({}, {"speculative_config": 1}, "speculative"),
        ({}, {"use_v2_model_runner": True}, "V1"),
        ({}, {"device_config": SimpleNamespace(device_type="cuda")}, "CPU"),
    ],
)
def test_what_sparse_reading_does_not_work_with_is_refused(
    variables: dict[str, str], changes: dict[str, Any], what: str
) -> None:
    settings = read_settings({}, "m", SPARSE | variables)
    assert settings is not None
    with pytest.raises(ConfigError, match=what):
        check_sparse(engine(**changes), settings)
    settings = read_settings({}, "m", SPARSE)
    assert settings is not None
    check_sparse(engine(), settings)


def test_a_length_or_bound_without_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="POLDER_SPARSE"):
        read_settings({}, "m", {"POLDER_KV_BUDGET": "1GiB", "POLDER_SPARSE_LEAST_TOKENS": "100"})
