"""The report from canned data: a page that stands alone and says what was missed."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from polder.bench.checks import Check
from polder.bench.elastic_report import print_report, render_html
from polder.bench.harness.driver import RequestRecord
from polder.bench.harness.progress import reporter_for
from polder.bench.harness.runs import Run, arm_metrics
from polder.bench.harness.timeline import MemorySample, Timeline
from polder.bench.report.result import BenchResult, ratios_over


def canned_run(arm: str, speed: float) -> Run:
    def records(engine: str, count: int) -> list[RequestRecord]:
        return [
            RequestRecord(
                key=f"{engine}{i}",
                scheduled_s=i,
                sent_s=i,
                token_s=[i + 0.1 * speed, i + 0.12 * speed],
                end_s=i + 0.12 * speed,
                prompt_tokens=100,
                cached_tokens=int(80 / speed),
            )
            for i in range(count)
        ]

    samples = [
        MemorySample(
            t_s=1000 + 0.2 * i,
            free_bytes=8 << 20,
            held_bytes={"A": (200 + i) << 20, "B": (112 - i) << 20},
            busy_bytes={"A": 100 << 20, "B": 50 << 20},
        )
        for i in range(100)
    ]
    return Run(
        arm=arm,
        started_at=1000.0,
        wall_s=30.0,
        client_cpu_s=1.0,
        load_before=0.5,
        load_after=2.0,
        records={"A": records("A", 30), "B": records("B", 20)},
        preemptions={"A": 0.0, "B": 0.0},
        timeline=Timeline(samples=samples, giveback_ms={"B": [20.0, 40.0]}, recalls=2)
        if arm == "polder"
        else Timeline(),
    )


@pytest.fixture(scope="module")
def canned() -> tuple[BenchResult, list[Check], list[Run]]:
    runs = [canned_run("stock", 4.0), canned_run("polder", 1.0)]
    arms = {run.arm: arm_metrics([run], ideal_hit_ratio=0.9) for run in runs}
    arms["polder-resize"] = {"A": {"shrink_p50_ms": 12.0}}
    checks = [
        Check(name="a_ttft_p99_ratio_at_most_0_31", passed=True, detail="0.250"),
        Check(name="tokens_equal", passed=False, detail="1 of 36 answers <differ>"),
    ]
    result = BenchResult(
        bench="elastic",
        conditions={
            "machine": {"cpu": "Some <CPU>", "cores": 2},
            "order": ["stock", "polder"],
            "intervals": {"polder/stock:A.ttft_p99_ms": [0.2, 0.3]},
        },
        arms=arms,
        ratios=ratios_over(arms, arm="polder", baseline="stock"),
        checks={check.name: check.passed for check in checks},
    )
    return result, checks, runs


def test_arm_metrics_hold_givebacks_only_where_there_is_a_broker(
    canned: tuple[BenchResult, list[Check], list[Run]],
) -> None:
    arms = canned[0].arms
    assert arms["polder"]["B"]["givebacks"] == 2
    assert arms["polder"]["B"]["giveback_p99_ms"] == pytest.approx(39.8)
    assert "givebacks" not in arms["stock"]["B"]
    assert arms["polder"]["A"]["hit_ratio_of_ideal"] == pytest.approx(0.8 / 0.9)


def test_the_page_stands_alone(canned: tuple[BenchResult, list[Check], list[Run]]) -> None:
    page = render_html(*canned)
    assert page.count("<svg") == 3
    assert not re.search(r"(?:src|href)=[\"'](?!#)", page), "nothing is fetched"
    assert "$" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL), "every field is filled"


def test_the_page_escapes_and_names_what_was_missed(canned: tuple[BenchResult, list[Check], list[Run]]) -> None:
    page = render_html(*canned)
    assert "Some &lt;CPU&gt;" in page
    assert "<td class='no'>missed</td><td class='text'><code>tokens_equal</code></td>" in page
    assert "4.0×" in page
    assert "20 → 80 %" in page
    assert "0.250 (0.20-0.30)" in page


def test_the_same_data_give_the_same_page(canned: tuple[BenchResult, list[Check], list[Run]]) -> None:
    assert render_html(*canned) == render_html(*canned)


def test_a_page_without_runs_has_tables_only(canned: tuple[BenchResult, list[Check], list[Run]]) -> None:
    result, checks, _ = canned
    assert "<svg" not in render_html(result, checks, [])


def test_the_terminal_s_table_shows_both_arms_and_the_missed_check(
    canned: tuple[BenchResult, list[Check], list[Run]],
) -> None:
    console = Console(file=io.StringIO(), width=120)
    print_report(console, canned[0], canned[1])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "TTFT p99, ms" in text
    assert "MISSED tokens_equal: 1 of 36" in text


def test_progress_is_plain_lines_when_nobody_watches() -> None:
    console = Console(file=io.StringIO(), width=120)
    with reporter_for(console).stage("Stage one") as stage:
        stage.update(1, 2)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split("] ")[1] for line in lines] == ["Stage one ...", "Stage one: done in 0 s"]
