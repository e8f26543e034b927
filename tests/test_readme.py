"""README.md says what the result files, the code and the refusals say."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest

from polder.bench.report.result import read_result
from polder.demo.__main__ import PANELS
from polder.engines.vllm import compat
from polder.engines.vllm.rank.geometry import TensorPlace, least_bytes
from polder.memory.page import PAGE_BYTES
from polder.planner.model_shape import model_shape
from polder.serve import arguments
from polder.units import parse_bytes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FIGURES = tomllib.loads((ROOT / "tests" / "readme.toml").read_text())
MEASURED = ("What it brings", "Against kvcached, LMCache and vLLM's own offloading")
"""Sections in which each number is a figure of a result file, or one of CONDITIONS."""
CONDITIONS = {
    *("320", "2", "8", "4", "p50", "p99", "95", "1", "400", "16"),
    *("0.32", "0.33", "0.32.0", "0.5.6", "100", "2", "28", "8B"),
}
"""Numbers there that nothing was measured by: sizes, versions, and what others publish."""


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


@pytest.mark.parametrize("file", FIGURES)
def test_each_figure_is_that_of_its_file(file: str) -> None:
    result = read_result(ROOT / "docs" / "results" / f"{file}.json")
    assert f"docs/results/{file}.json" in README
    for text, key in FIGURES[file]["figures"]:
        end, _, figure = key.rpartition(" ")
        value = result.figure(figure)
        if end:
            interval = result.interval(figure)
            assert interval is not None, key
            value = interval[end == "high"]
        assert value is not None, key
        number, _, unit = text.partition(" ")
        scale = {"s": 1e-3, "%": 100}.get(unit, 1)
        digits = len(number.partition(".")[2])
        assert f"{value * scale:,.{digits}f}" == number, f"{key} is {value}"
        assert re.search(rf"(?<![\d.]){re.escape(text)}(?![\d])", README), f"{text} is not in README.md"


@pytest.mark.parametrize("title", MEASURED)
def test_each_number_that_was_measured_has_its_file(title: str) -> None:
    known = {text.partition(" ")[0] for of in FIGURES.values() for text, _ in of["figures"]} | CONDITIONS
    prose = re.sub(r"\]\([^)]*\)|`[^`]*`", "", section(title))
    prose = re.sub(r"\b(vLLM's|Llama|Qwen\d|A100|e8e64063)\b", "", prose)
    found = set(re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)*", prose))
    assert found <= known, sorted(found - known)


def test_links_lead_to_what_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert (ROOT / target).exists(), target


def test_the_picture_is_the_demos_and_small() -> None:
    picture = (ROOT / "docs" / "demo.svg").read_text()
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert all(title in picture for title in PANELS.values())
    assert len(picture) < 150_000


# ---------------------------------------------------------------------- what works with what


class Cell(NamedTuple):
    word: str
    tests: tuple[str, ...] = ()
    """Of "tested": their names."""
    refusal: str = ""
    """Of "refused": a key of REFUSALS."""


ELASTIC = Cell("tested", ("test_growing_from_the_floor_by_demand_gives_the_tokens_of_stock",))
HYBRID = Cell("tested", ("test_blocks_of_windows_and_of_full_attention_move_and_come_back_from_a_tier",))
WEIGHTS = Cell("tested", ("test_layers_taken_streamed_and_returned_in_mid_request_change_no_token",))
NOT_TRIED = Cell("not tried")
COLUMNS = ("KV moves between engines", "tiers `peer`, `host`", "tier `disk`", "elastic weights", "window")
MATRIX: dict[str, tuple[Cell, ...]] = {
    "full attention (Llama, Qwen3)": (
        ELASTIC,
        Cell("tested", ("test_conversations_come_back_from_both_tiers_with_the_same_tokens",)),
        Cell("tested", ("test_a_restarted_engine_hits_from_its_first_request_and_spoilt_pages_cost_no_token",)),
        WEIGHTS,
        Cell("tested", ("test_contexts_up_to_nine_tenths_of_layers_over_window_times_stocks_have_its_tokens",)),
    ),
    "full attention, experts (Qwen2-MoE)": (NOT_TRIED, NOT_TRIED, NOT_TRIED, WEIGHTS, NOT_TRIED),
    "sliding windows and full attention (Gemma 3)": (
        HYBRID,
        Cell("tested, `host`", ("test_answers_are_those_of_stock_and_come_from_the_tier",)),
        NOT_TRIED,
        NOT_TRIED,
        Cell("refused", refusal="hybrid"),
    ),
    "MLA (DeepSeek)": (
        NOT_TRIED,
        Cell(
            "tested, `host`, on CPUs with AMX; refused on others",
            ("test_answers_with_mla_are_those_of_stock_and_come_from_the_tier",),
            refusal="uncached",
        ),
        NOT_TRIED,
        NOT_TRIED,
        Cell("refused", refusal="MLA"),
    ),
    "hybrids with Mamba layers": (
        NOT_TRIED,
        Cell("refused if block sizes differ", refusal="block sizes"),
        NOT_TRIED,
        NOT_TRIED,
        Cell("refused", refusal="hybrid"),
    ),
    "layouts without a view for each layer; HiSparse": tuple(Cell("refused", refusal="no view") for _ in COLUMNS),
    "no KV cache (BERT)": (
        Cell("served as stock", ("test_a_model_without_a_kv_cache_is_served_and_the_broker_knows",)),
        *4 * (Cell("-"),),
    ),
}


def matrix() -> str:
    rows = [f"| attention | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    rows += [f"| {kind} | {' | '.join(cell.word for cell in cells)} |" for kind, cells in MATRIX.items()]
    return "\n".join(rows)


def test_the_matrix_is_shown() -> None:
    assert matrix() in README, f"put this into README.md:\n\n{matrix()}"


def test_what_is_called_tested_has_its_tests() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests" / "engines").glob("*.py"))
    for kind, cells in MATRIX.items():
        for cell in cells:
            assert bool(cell.tests) == (cell.word.startswith("tested") or cell.word == "served as stock"), kind
            assert all(f"def {name}(" in sources for name in cell.tests), cell.tests
    assert '"moe": ModelRecipe(' in sources, "the weights' test has experts"


def _refusals() -> dict[str, Callable[[], None]]:
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    from polder.engines.vllm.start.limits import check_kv_cache
    from polder.engines.vllm.tiers.agreement import check_caching
    from tests.engines import test_limits, test_window_agreement
    from tests.engines.test_window_agreement import SIZES, config, names, tensor

    layers = tensor(names(0, 1, 2, 3), 8)
    mla = config([layers], 8, spec=MLAAttentionSpec(**SIZES))
    hybrid = config([layers, tensor(names(4, 5, 6, 7), 8, offset=layers.size)], 8, groups=2)
    window = test_window_agreement.in_a_mebibyte
    return {
        "MLA": partial(window, mla, test_window_agreement.settings()),
        "hybrid": partial(window, hybrid, test_window_agreement.settings()),
        "no view": partial(check_kv_cache, test_limits.config(), test_limits.cache(test_limits.Packed)),
        "uncached": partial(check_caching, [True, False]),
        "block sizes": _tiers_of_two_block_sizes,
    }


def _tiers_of_two_block_sizes() -> None:
    """A KV cache whose groups have blocks of 16 and 32 tokens."""
    from polder.engines.vllm.tiers.agreement import agree_on_tiers

    def rpc(*_: object) -> list[Any]:
        return [True]

    groups = [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=size)) for size in (16, 32)]
    given: Any = SimpleNamespace(
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config={}),
    )
    other: Any = SimpleNamespace(tiers=("host",), devices=["cpu:0"], size_bytes=1, num_blocks=1)
    agree_on_tiers(given, other, SimpleNamespace(kv_cache_groups=groups), other, other, Path(), other, rpc)


@pytest.mark.parametrize("what", sorted({cell.refusal for cells in MATRIX.values() for cell in cells} - {""}))
def test_what_is_called_refused_is(what: str) -> None:
    from polder.errors import ConfigError

    pytest.importorskip("vllm")
    with pytest.raises(ConfigError):
        _refusals()[what]()


def test_the_releases_are_those_that_are_not_refused() -> None:
    rows = "\n".join(f"| {version} | {ran} |" for version, ran in compat.TESTED.items())
    assert rows in README, f"put this into README.md:\n\n{rows}"


# ---------------------------------------------------------------------- flags, and the sum


def _flags(row: str) -> set[str]:
    (line,) = [
        line for line in section("What happens to your `vllm serve` flags").splitlines() if line.startswith(f"| {row}")
    ]
    return set(re.findall(r"--[\w-]+", line))


def test_flags_are_taken_over_and_refused_as_the_fleet_file_does() -> None:
    long = {name for name in arguments._ONE_RANK if name.startswith("--")} | {"--tensor-parallel-size"}
    assert _flags("refused by `polder serve`") == set(arguments._REFUSED) | long
    assert _flags("set by `polder serve`") == set(arguments._OURS)


def test_flags_that_an_elastic_engine_refuses_are_named() -> None:
    source = (ROOT / "src" / "polder" / "engines" / "vllm" / "start" / "limits.py").read_text()
    for flag in _flags("refused by an elastic engine"):
        assert flag in source or flag.strip("-").replace("-", "_") in source, flag


def test_the_sum_of_the_gpus_memory_is_one() -> None:
    rows = re.findall(r"^\| (.*) \| \**([\d.]+)\** \|$", section("Quickstart on a GPU"), re.MULTILINE)
    (_, whole), *parts, (_, left) = rows
    assert round(float(whole) - sum(float(size) for _, size in parts), 1) == float(left)
    for name, (_, size) in zip(("Llama-3.1-8B", "Qwen3-8B"), parts, strict=False):
        assert f"{model_shape(name).weight_bytes / 2**30:.1f}" == size, name
    text = section("Quickstart on a GPU")
    budget = parse_bytes(tomllib.loads(text.split("```toml")[1].split("```")[0])["memory"]["kv_budget"], what="budget")
    assert budget < float(left) * 2**30
    floors = [_floor_bytes(name) for name in ("Llama-3.1-8B", "Qwen3-8B")]
    for size in (f"{floors[0] / 2**30:.1f} GiB on `chat`", f"{floors[1] / 2**30:.1f} GiB on `code`"):
        assert size in text
    assert f"The other {(budget - sum(floors)) / 2**30:.0f} GiB move" in text


def _floor_bytes(name: str) -> int:
    """KV memory of one request of 32,768 tokens in blocks of 16, in units of 2 MiB in each layer."""
    shape = model_shape(name)
    block_bytes = 16 * shape.kv_bytes_of_layer
    place = TensorPlace(offset=0, layers=shape.layers, layer_stride=block_bytes, block_stride=block_bytes)
    return least_bytes(32768, [16], [place], PAGE_BYTES)
