"""Requests that read a part of their prefix: 100 % is dense, others beside them are stock's, nothing inexact is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from tests.engines.answers import varied
from tests.engines.controls import Switches
from tests.engines.harness import ORDINARY, SMALL_A, SMALL_VOCABULARY, Engine, prompts, wait_for

pytestmark = pytest.mark.engine

MODEL = replace(SMALL_A, name="varied-sparse", kv_heads=2)
BLOCK = 16
"""Tokens. A layer's block has 16 KiB, a page 4 of them: memory for 256 blocks."""
LONG, TOKENS, MANY = 1500, 24, 400
SETTINGS = {
    "POLDER_KV_BUDGET": "16MiB",
    "POLDER_PAGE": "64KiB",
    "POLDER_SPARSE": "64MiB",
    "POLDER_SPARSE_LEAST_TOKENS": "600",
}
OPTIONS: dict[str, Any] = {"max_model_len": 2000, "block_size": BLOCK}


class Answer(NamedTuple):
    tokens: list[int]
    said: dict[str, Any]
    """What the answer says about how it was made."""
    cached: int


@pytest.fixture(scope="module")
def switches(tmp_path_factory: pytest.TempPathFactory) -> Switches:
    return Switches(tmp_path_factory.mktemp("controls"))


@pytest.fixture(scope="module")
def sparse(switches: Switches) -> Iterator[Engine]:
    with switches.reaching_engines() as variables:
        engine = Engine.start("sparse", MODEL, SETTINGS | variables, like=ORDINARY, **OPTIONS)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    """The same without sparse reading: exact, as others of these tests show."""
    settings = {name: value for name, value in SETTINGS.items() if "SPARSE" not in name}
    engine = Engine.start("plain", MODEL, settings, like=ORDINARY, max_model_len=2000)
    yield engine
    engine.stop()


def ask(engine: Engine, asked: list[list[int]], budgets: list[Any], tokens: int = TOKENS) -> list[Answer]:
    """All at once; a budget of None is an ordinary request."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, extra_args=_extra(budget))
        for budget in budgets
    ]
    outputs = engine.llm.generate([{"prompt_token_ids": prompt} for prompt in asked], parameters, use_tqdm=False)
    return [
        Answer(list(of.outputs[0].token_ids), (of.kv_transfer_params or {}).get("polder", {}), of.num_cached_tokens)
        for of in outputs
    ]


def _extra(budget: Any) -> dict[str, Any] | None:
    if budget is None:
        return None
    return {"kv_transfer_params": {"polder": budget if isinstance(budget, dict) else {"sparse": budget}}}


def long_prompt(seed: int, length: int = LONG) -> list[int]:
    return prompts(1, length, seed=seed, vocabulary=SMALL_VOCABULARY)[0]


def counted(engine: Engine) -> dict[str, float]:
    """Checks all laws, and returns the counters."""
    found: dict[str, float] = engine.utility("polder_check")
    return found


def test_100_percent_through_slots_is_dense(sparse: Engine, plain: Engine) -> None:
    asked = [long_prompt(1), long_prompt(2, 1100)]
    stock = varied([one.tokens for one in ask(plain, asked, [None, None])])
    before = counted(sparse)
    for length, found in zip((LONG, 1100), ask(sparse, asked, ["100%", "100%"]), strict=True):
        assert found.said["units"] == found.said["slots"] == found.said["selected_units"] == (length - 256) // BLOCK - 2
        assert found.said["unread"] == 0
        assert found.said["sparse_tokens"] >= TOKENS - 2
    assert [one.tokens for one in ask(sparse, asked, ["100%", "100%"])] == stock
    after = counted(sparse)
    assert after["sparse_requests_total"] == before["sparse_requests_total"] + 4
    assert after["sparse_reused_total"] == before["sparse_reused_total"] + 2
    wait_for(lambda: counted(sparse)["sparse_running_requests"] == 0, "the last step to be taken note of")


def test_a_part_is_read_and_the_answer_says_so(sparse: Engine) -> None:
    before = counted(sparse)
    (found,) = ask(sparse, [long_prompt(3)], ["25%"])
    units = (LONG - 256) // BLOCK - 2
    assert found.said["sparse"] == "25%"
    assert found.said["selected_units"] == round(units / 4)
    assert found.said["slots"] == 2 * round(units / 4)
    assert 0 < found.said["unread"] <= found.said["unread_most"] < 0.6
    after = counted(sparse)
    layers = MODEL.layers * found.said["sparse_tokens"]
    assert after["sparse_wanted_units_total"] - before["sparse_wanted_units_total"] == layers * round(units / 4)
    assert 0 < after["sparse_read_units_total"] - before["sparse_read_units_total"] < layers * round(units / 4)


def test_a_wrong_selection_changes_tokens(sparse: Engine, plain: Engine, switches: Switches) -> None:
    asked = [long_prompt(4)]
    (stock,) = ask(plain, asked, [None])
    (right,) = ask(sparse, asked, ["100%"])
    assert right.tokens == stock.tokens
    with switches.on("one unit is read in place of all"):
        (wrong,) = ask(sparse, asked, ["100%"])
    assert wrong.tokens != stock.tokens
    with switches.on("the worst units are selected"):
        (worst,) = ask(sparse, asked, [{"sparse": "25%", "slots": 1}])
    (best,) = ask(sparse, asked, [{"sparse": "25%", "slots": 1}])
    assert worst.tokens != stock.tokens
    assert worst.said["unread"] > best.said["unread"]


def test_dense_requests_beside_sparse_ones_are_stocks(sparse: Engine, plain: Engine) -> None:
    asked = [long_prompt(11), long_prompt(12, 900), long_prompt(13, 300), long_prompt(14, 40), long_prompt(11)]
    stock = [one.tokens for one in ask(plain, asked[:4], [None] * 4)]
    found = ask(sparse, asked, ["20%", None, None, None, None])
    assert found[0].said["sparse"] == "20%"
    assert [one.tokens for one in found[1:]] == [*stock[1:], stock[0]]
    assert not any(one.said for one in found[1:])


def test_nothing_that_was_computed_sparsely_is_in_the_prefix_cache(sparse: Engine, plain: Engine) -> None:
    prompt = long_prompt(21)
    (first,) = ask(sparse, [prompt], [{"sparse": "5%", "slots": 1}], tokens=64)
    again = [*prompt, *first.tokens]
    (stock,) = ask(plain, [again], [None])
    (found,) = ask(sparse, [again], [None])
    assert found.tokens == stock.tokens
    assert found.cached <= LONG + BLOCK


def test_short_prompts_and_unreadable_budgets_stay_dense_and_the_answer_says_why(sparse: Engine, plain: Engine) -> None:
    asked = [long_prompt(31, 500), long_prompt(32)]
    stock = [one.tokens for one in ask(plain, asked, [None, None])]
    short, unreadable = ask(sparse, asked, ["10%", "ten"])
    assert [short.tokens, unreadable.tokens] == stock
    assert short.said == {"dense": "the prompt has 500 tokens"}
    assert "write a share" in unreadable.said["dense"]


def test_a_question_on_a_stored_document_reuses_its_units(sparse: Engine, plain: Engine) -> None:
    document = long_prompt(41)
    asked = [[*document, *long_prompt(seed, 30)] for seed in (42, 43)]
    before = counted(sparse)
    first, second = (ask(sparse, [prompt], ["100%"])[0] for prompt in asked)
    after = counted(sparse)
    assert after["sparse_reused_total"] - before["sparse_reused_total"] == 1
    assert second.said["units"] == first.said["units"]
    assert [first.tokens, second.tokens] == [one.tokens for one in ask(plain, asked, [None, None])]


def test_preempted_requests_are_computed_again_and_aborted_ones_leave_nothing_behind(
    sparse: Engine, plain: Engine
) -> None:
    from vllm import SamplingParams

    asked, engine = [long_prompt(51), long_prompt(52, 880)], sparse.llm.llm_engine
    stock = [one.tokens for one in ask(plain, asked, [None] * 2, tokens=MANY)]

    def begin(name: str, prompt: list[int], budget: str, tokens: int) -> None:
        parameters = SamplingParams(
            max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, extra_args=_extra(budget)
        )
        engine.add_request(name, {"prompt_token_ids": prompt}, parameters)

    def step_until_reading(count: int) -> None:
        """The engine runs on meanwhile, so answers are long."""
        while counted(sparse)["sparse_running_requests"] < count:
            assert engine.has_unfinished_requests()
            engine.step()

    before = counted(sparse)
    for number, prompt in enumerate(asked):
        begin(f"preempted-{number}", prompt, "100%", MANY)
    step_until_reading(2)
    assert sparse.utility("reset_prefix_cache", True, False), "preempts all that run"
    done = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output for output in engine.step() if output.finished}
    assert [list(done[f"preempted-{number}"].outputs[0].token_ids) for number in range(2)] == stock
    after = counted(sparse)
    assert after["preemptions_total"] - before["preemptions_total"] == 2
    assert after["sparse_requests_total"] - before["sparse_requests_total"] == 4
    assert after["sparse_reused_total"] == before["sparse_reused_total"], "reset, so nothing is found again"

    begin("aborted", asked[0], "20%", MANY)
    step_until_reading(1)
    sparse.abort("aborted")
    ask(sparse, [long_prompt(60, 40)], [None], tokens=4)
    wait_for(lambda: counted(sparse)["running_requests"] == 0, "the request to end")
    assert counted(sparse)["sparse_running_requests"] == 0


def test_an_engine_without_the_setting_has_no_hook(sparse: Engine, plain: Engine) -> None:
    """What sparse reading replaces is vLLM's own there, in the process that computes, and a request may ask in vain."""
    (answer,) = ask(plain, [long_prompt(1)], ["10%"])
    assert not answer.said
    assert not [name for name in counted(plain) if name.startswith("sparse_")]
    assert {"_model_forward", "forward", "sample_tokens"} <= set(sparse.llm.collective_rpc("replaced")[0])
    assert not {"_model_forward", "forward", "sample_tokens"} & set(plain.llm.collective_rpc("replaced")[0])
