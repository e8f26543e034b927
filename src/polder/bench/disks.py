"""`polder bench disks`: pages of KV on several disks. What does a layout cost or save, and how near is it to the physical bound?

Layouts are made from the first part of an access set and measured on the rest. Disk times are modelled, so they are the same on
every machine; in the wall stage the same steps are really read, from a store on emulated disks.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console

from polder.bench.checks import Check
from polder.bench.disks_checks import disks_checks
from polder.bench.disks_plan import CO_ACTIVATED, DISKS, PAGE_BYTES, DisksPlan, disks_of, engine_of, wall_engine_of
from polder.bench.harness.machine import describe_machine, describe_versions, load_average
from polder.bench.harness.progress import Reporter, reporter_for
from polder.bench.report.result import Arms, BenchResult, ratios_over, write_result
from polder.bench.sparse.modelled import Modelled
from polder.bench.stages.access_sets import DESCRIPTIONS, access_sets
from polder.bench.stages.layouts import PARTS, Layouts, metrics_of, modelled, together
from polder.bench.stages.live import LIVE_ARMS, LIVE_DISKS, LIVE_SETS, live_run, live_set
from polder.bench.stages.wall import LATENCY_S, wall_metrics, wall_steps
from polder.diskstore.model import PM9A3
from polder.emulation.disks import Clock, RealClock

__all__ = ["DisksBench"]

LEAST_GAIN = 1.02
"""Below it there is nothing to have a share of."""
COMPARED = ("io_time_s", "io_time_with_host_s", "bandwidth_bytes_per_s")


class DisksBench:
    """One run of the bench."""

    def __init__(
        self, plan: DisksPlan, *, workdir: Path, console: Console | None = None, clock: Clock | None = None
    ) -> None:
        """`clock`: of the wall stage."""
        self.plan = plan
        self._console = console or Console()
        self._report: Reporter = reporter_for(self._console)
        self._workdir, self._clock = workdir, clock or RealClock()
        self._arms: Arms = {arm: {} for arm in plan.arms}
        self._sets: dict[str, Any] = {}
        self._loads: list[float] = []
        self._started = time.monotonic()
        self._started_at = datetime.now(UTC)

    def run(self, json_file: Path, html_file: Path | None = None) -> BenchResult:
        """Runs all stages, writes the files, prints the tables. Raises PolderError when a stage cannot run."""
        from polder.bench.disks_report import print_disks, write_disks_html

        for path in filter(None, (json_file, html_file)):
            path.parent.mkdir(parents=True, exist_ok=True)
        if {"model", "shares"} & set(self.plan.stages):
            for name in self.plan.sets:
                self._model(name)
        if "wall" in self.plan.stages and self.plan.wall_arms:
            self._wall()
        if "live" in self.plan.stages:
            self._live()
        result, checks = self._result()
        write_result(result, json_file)
        if html_file is not None:
            write_disks_html(html_file, result, checks)
        print_disks(self._console, result, checks)
        for path in filter(None, (json_file, html_file)):
            self._report.note(f"written: {path}")
        return result

    # ------------------------------------------------------------------ stages

    def _model(self, name: str) -> None:
        """All layouts of one access set on all disks, on modelled disks."""
        with self._report.stage(f"layouts, modelled: {name}") as stage:
            sets = [Layouts(of, replica_share=self.plan.replica_share) for of in access_sets(name, self.plan)]
            self._sets[name] = {
                "what": DESCRIPTIONS[name],
                "blocks": [layouts.of.known.size for layouts in sets],
                "known_steps": [layouts.of.known.steps for layouts in sets],
                "measured_steps": [layouts.of.measured.steps for layouts in sets],
                "reads_a_step": round(
                    float(np.mean([np.diff(layouts.of.measured.starts).mean() for layouts in sets])), 1
                ),
                # What was never read before is where it was put when it was written.
                "measured_reads_of_blocks_read_before": round(
                    float(np.mean([(s.of.known.counts()[s.of.measured.items] > 0).mean() for s in sets])), 3
                ),
            }
            for number, disks in enumerate(DISKS):
                if "model" in self.plan.stages:
                    for arm in self.plan.arms:
                        self._modelled(sets, arm, name, disks)
                if "shares" in self.plan.stages and len(DISKS[disks]) > 1:
                    self._shares(sets, name, disks)
                stage.update(number + 1, len(DISKS))

    def _modelled(self, sets: Sequence[Layouts], arm: str, name: str, disks: str) -> None:
        models = disks_of(disks)
        runs: list[Modelled] = []
        with_host: list[Modelled] = []
        stored = 0
        for layouts in sets:
            layout = layouts.build(arm, models)
            stored += layout.stored_bytes
            runs.append(modelled(layout, layouts.of, models, arm=arm))
            with_host.append(
                modelled(layout, layouts.of, models, arm=arm, host_s_per_request=self.plan.host_s_per_request)
            )
        self._arms[arm][engine_of(name, disks)] = metrics_of(together(runs), together(with_host)) | {
            "stored_bytes": stored / len(sets)
        }

    def _shares(self, sets: Sequence[Layouts], name: str, disks: str) -> None:
        """Parts of polder one after another, each alone with what came before it: how many times shorter it makes a step."""
        models = disks_of(disks)
        seconds = dict.fromkeys(("striped", *PARTS), 0.0)
        for layouts in sets:
            built = layouts.stages(models)
            of = {"schedule": "replicas", **{name: name for name in ("striped", "packing", "placement", "parts")}}
            for part, layout in of.items():
                seconds[part] += float(modelled(built[layout], layouts.of, models, arm="polder").seconds.sum())
            greedily = modelled(built["replicas"], layouts.of, models, arm="replicas-greedy")
            seconds["replicas"] += float(greedily.seconds.sum())
        steps = sum(layouts.of.measured.steps for layouts in sets)
        chain = list(seconds)
        factors = {part: seconds[before] / seconds[part] for before, part in itertools.pairwise(chain)}
        gain = seconds["striped"] / seconds["parts"]
        shares = (
            {part: math.log(factor) / math.log(gain) for part, factor in factors.items()} if gain >= LEAST_GAIN else {}
        )
        engine = engine_of(name, disks)
        for part, taken in seconds.items():
            self._arms.setdefault(f"stage-{part}", {})[engine] = {"io_time_s": taken / steps}
        self._arms["stage-parts"][engine] |= {
            "gain": gain,
            **{f"{part}_factor": factor for part, factor in factors.items()},
            **{f"{part}_share": share for part, share in shares.items()},
        }

    def _wall(self) -> None:
        plan = self.plan
        of = access_sets(CO_ACTIVATED, plan)[0]
        layouts = Layouts(of, replica_share=plan.replica_share)
        steps = of.measured.part(0, plan.wall_steps)
        with self._report.stage("layouts, really read from emulated disks") as stage:
            done = 0
            for disks in plan.wall_disks:
                models = disks_of(disks, plan.wall_model(disks))
                for arm in plan.wall_arms:
                    self._loads.append(load_average())
                    layout = layouts.build(arm, models)
                    with TemporaryDirectory(prefix="polder-disks-", dir=_made(self._workdir)) as folder:
                        found = wall_steps(layout, steps, models, folder=Path(folder), clock=self._clock)
                    self._arms[arm][wall_engine_of(CO_ACTIVATED, disks)] = wall_metrics(found)
                    done += 1
                    stage.update(done, len(plan.wall_disks) * len(plan.wall_arms))

    def _live(self) -> None:
        with self._report.stage("an entry store at work") as stage:
            for number, (name, arm) in enumerate(itertools.product(LIVE_SETS, LIVE_ARMS)):
                with TemporaryDirectory(prefix="polder-disks-", dir=_made(self._workdir)) as folder:
                    found = live_run(arm, live_set(name, self.plan), self.plan, folder=Path(folder))
                self._arms.setdefault(arm, {})[engine_of(name, LIVE_DISKS)] = found
                stage.update(number + 1, len(LIVE_SETS) * len(LIVE_ARMS))

    # ------------------------------------------------------------------ result

    def _result(self) -> tuple[BenchResult, list[Check]]:
        arms: Arms = {arm: found for arm, found in self._arms.items() if found}
        ratios: dict[str, float] = {}
        for baseline in self.plan.arms:
            if baseline != "polder" and {"polder", baseline} <= arms.keys():
                ratios |= {
                    key: ratio
                    for key, ratio in ratios_over(arms, arm="polder", baseline=baseline).items()
                    if key.rpartition(".")[2] in COMPARED
                }
        checks = disks_checks(arms, ratios)
        result = BenchResult(
            bench="disks",
            conditions=self._conditions(),
            arms=arms,
            ratios=ratios,
            checks={check.name: check.passed for check in checks},
        )
        return result, checks

    def _conditions(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "plan": {
                "name": plan.name,
                "stages": plan.stages,
                "arms": plan.arms,
                "seeds": plan.seeds,
                "replica_share": plan.replica_share,
                "page_bytes": PAGE_BYTES,
            },
            "sets": self._sets,
            "measured": "layouts are made from the known steps of a set; all figures are of the steps after them",
            "disks": {name: list(speeds) for name, speeds in DISKS.items()},
            "disk_model": f"PM9A3 as published: {PM9A3.bytes_per_s / 1e9:g} GB/s, {PM9A3.requests_per_s / 1e6:g} M requests/s; "
            "a request takes the longer of its bytes and its turn; modelled, no clock is read",
            "io_time_s": "of one step, mean; each step alone on the disks, over when the last disk is",
            "io_time_with_host_s": f"the same, and no shorter than {plan.host_s_per_request * 1e6:g} us of one host core a request",
            "bandwidth_bytes_per_s": "wanted bytes over I/O time; all layouts want the same, so it is the I/O time's inverse",
            "schedule": "exact; swarm is read by the paper's greedy one",
            "gaps": "of units below 64 KiB the cheapest of 0 to 15 unwanted ones are read over, for every layout, a step at a time",
            "one_disk": "no replicas",
            "shares": "striped pages of successive blocks, then packing, placement, replicas read greedily, the exact schedule, "
            "wanted parts of pages alone; "
            "a share is the logarithm of its factor over that of the gain; where a block is a page, packing is only their order",
            "wall": {
                "set": CO_ACTIVATED,
                "disks": plan.wall_disks,
                "arms": plan.wall_arms,
                "steps": plan.wall_steps,
                "bytes_per_s_of_all_disks": plan.wall_bytes_per_s,
                "why_so_slow": "so that real reads of a shared machine are faster than the emulated disks; steps where they were "
                "not are counted as late, and counted in",
                "latency_s": LATENCY_S,
                "load_before_each": self._loads,
            },
            "live": {
                "sets": LIVE_SETS,
                "disks": LIVE_DISKS,
                "what": "bytes are read and compared, times are the modelled disks'",
            },
            "machine": describe_machine(),
            "versions": describe_versions(),
            "started": self._started_at.isoformat(timespec="seconds"),
            "total_seconds": round(time.monotonic() - self._started),
        }


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
