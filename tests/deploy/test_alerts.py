"""The alert rules and the board use metrics that exist, and each alert fires when it should and not before."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from polder import metrics
from tests.test_documents import ROOT, anchor

DEPLOY = ROOT / "deploy"
RULES: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"][0]["rules"]
BOARD: dict[str, Any] = json.loads((DEPLOY / "grafana.json").read_text())
DECLARED = {
    *(f"polder_{metric.name}" for metric in metrics.BROKER),
    *(f"polder_child_{metric.name}" for metric in metrics.CHILD),
    *(f"polder_device_{metric.name}" for metric in metrics.DEVICE),
    *(f"polder_engine_{metric.name}" for metric in (*metrics.STATUS, *metrics.ENGINE)),
    f"polder_engine_{metrics.GIVEBACK.name}_bucket",
}
LABELS = {"engine", "device", "child", "tier", "state", "use", "point", "le"}
HEALTHY = {
    "polder_broker_up": "1x60",
    'polder_child_ready{child="a"}': "1x60",
    'polder_child_ready{child="broker"}': "1x60",
    'polder_child_restarts_total{child="a"}': "1x60",
    'polder_engine_giveback_seconds_bucket{engine="a",le="1.0"}': "512x60",
    'polder_engine_giveback_seconds_bucket{engine="a",le="5.0"}': "512x60",
    'polder_engine_giveback_seconds_bucket{engine="a",le="+Inf"}': "512x60",
    "polder_recalls_total": "0+10x60",
    "polder_overdue_recalls_total": "0x60",
    'polder_engine_giveback_preemptions_total{engine="a"}': "0x60",
    'polder_engine_wake_seconds_total{engine="a"}': "0+1x60",
    'polder_engine_wakes_total{engine="a"}': "0+1x60",
    'polder_engine_late_steps_total{engine="a"}': "0+1x60",
    'polder_engine_steps_total{engine="a"}': "0+100x60",
    'polder_engine_tier_corrupt_blocks_total{engine="a",tier="host"}': "0x60",
    'polder_engine_tier_failed_blocks_total{engine="a",tier="host"}': "0x60",
    'polder_engine_disk_disks_ok{engine="a"}': "2x60",
    'polder_engine_window_failures_total{engine="a"}': "0x60",
    "polder_refused_messages_total": "0x60",
}
"""Series of an hour, in promtool's notation."""
ILL = {
    "PolderDown": {"polder_broker_up": "_x60"},
    "PolderBrokerDown": {"polder_broker_up": "0x60"},
    "PolderModelDown": {'polder_child_ready{child="a"}': "0x60"},
    "PolderRestarts": {'polder_child_restarts_total{child="a"}': "0+1x60"},
    "PolderOwnerWaits": {'polder_engine_giveback_seconds_bucket{engine="a",le="1.0"}': "100x60"},
    "PolderRecallsOverdue": {"polder_overdue_recalls_total": "0+2x60"},
    "PolderPreempts": {'polder_engine_giveback_preemptions_total{engine="a"}': "0+30x60"},
    "PolderWakesSlowly": {'polder_engine_wake_seconds_total{engine="a"}': "0+20x60"},
    "PolderStepsLate": {'polder_engine_late_steps_total{engine="a"}': "0+10x60"},
    "PolderBlocksCorrupt": {'polder_engine_tier_corrupt_blocks_total{engine="a",tier="host"}': "0x40 1x20"},
    "PolderLoadsFail": {'polder_engine_tier_failed_blocks_total{engine="a",tier="host"}': "0+1x60"},
    "PolderDiskOut": {'polder_engine_disk_disks_ok{engine="a"}': "2x30 1x30"},
    "PolderWindowFails": {'polder_engine_window_failures_total{engine="a"}': "0+1x60"},
    "PolderMessagesRefused": {"polder_refused_messages_total": "0+1x60"},
}
"""What differs when the alert must fire."""


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in RULES)
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"].replace("$__rate_interval", "5m").replace("$engine", ".*")


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    """All that the expression reads. Raises ValueError when it is not PromQL."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


@pytest.fixture(scope="module")
def vllms_own() -> set[str]:
    vllm = find_spec("vllm")  # importing it takes seconds
    assert vllm is not None
    assert vllm.origin is not None
    loggers = (Path(vllm.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    return set(re.findall(r'name="(vllm:\w+)"', loggers))


def test_each_metric_of_the_rules_and_the_board_is_declared(vllms_own: set[str]) -> None:
    for expression in expressions():
        read = selectors(expression)
        assert read, expression
        for selector in read:
            name = str(selector.name)
            own = re.sub(r"_(total|bucket)$", "", name)
            assert name in DECLARED or own in vllms_own, name
            assert {matcher.name for matcher in selector.matchers.matchers} <= LABELS, expression


def test_each_legend_and_each_alert_names_labels_that_there_are() -> None:
    texts = [target["legendFormat"] for panel in BOARD["panels"] for target in panel.get("targets", ())]
    texts += [rule["annotations"]["summary"].replace("$labels.", "") for rule in RULES]
    assert {label for text in texts for label in re.findall(r"\{\{ ?(\w+) ?\}\}", text)} <= LABELS


def test_each_alert_leads_to_what_polder_does_then() -> None:
    for rule in RULES:
        name, _, section = rule["annotations"]["see"].partition("#")
        headings = re.findall(r"^#+ (.*)$", (ROOT / name).read_text(), re.MULTILINE)
        assert not section or section in map(anchor, headings), rule["alert"]


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in BOARD["panels"]):
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_each_alert_fires_when_it_should_and_not_before(tmp_path: Path) -> None:
    promtool = shutil.which("promtool", path=f"{ROOT / 'out' / 'tools' / 'usr' / 'bin'}:{os.environ['PATH']}")
    if promtool is None:
        pytest.skip("no promtool here: it is in Debian's package prometheus")

    def case(series: dict[str, str], fires: list[str]) -> dict[str, Any]:
        return {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {
                    "expr": 'group by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": "50m",
                    "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in fires],
                }
            ],
        }

    assert ILL.keys() == {rule["alert"] for rule in RULES}
    cases = [case(HEALTHY, []), *(case(HEALTHY | differs, [name]) for name, differs in ILL.items())]
    tests = tmp_path / "alerts.test.yaml"
    tests.write_text(yaml.safe_dump({"rule_files": [str(DEPLOY / "alerts.yaml")], "tests": cases}))
    for command in (["check", "rules", str(DEPLOY / "alerts.yaml")], ["test", "rules", str(tests)]):
        done = subprocess.run([promtool, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
