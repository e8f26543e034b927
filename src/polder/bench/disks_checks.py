"""What `polder bench disks` is to show, each as a name and a computed truth. What was not run leaves its checks out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from polder.bench.checks import Check
from polder.bench.disks_plan import CO_ACTIVATED, DISKS, SETS, engine_of
from polder.bench.report.metrics import Metric
from polder.bench.report.result import Arms
from polder.bench.stages.live import LIVE_ARMS, LIVE_DISKS, LIVE_SETS

__all__ = ["disks_checks"]

IO_TIME, BANDWIDTH = 2.41, 2.72
"""Swarm's means over its three baselines, sections 1 and 8."""
BASELINES = ("no-cluster", "fixed-blocks", "cluster-per-disk")
PAPERS_DISKS = "8"
PAGES = "sticky-64k"
"""The same kind of set where every block is a page: what is left without packing."""


def disks_checks(arms: Arms, ratios: Mapping[str, float]) -> list[Check]:
    return [*_bound(arms), *_papers(ratios), *_one_disk(ratios), *_random(ratios), *_wall(arms), *_live(arms)]


def _bound(arms: Arms) -> Iterator[Check]:
    for disks in ("4", "8", "4-slow", "8-slow"):
        label = disks.replace("-", "_")
        pages = arms.get("polder-pages", {}).get(engine_of(CO_ACTIVATED, disks))
        if pages is not None:
            over, whole = _number(pages["over_bound"]), _number(pages["over_whole_page_bound"])
            yield Check(
                name=f"over_bound_at_most_1_02_on_{label}",
                passed=over <= 1.02,
                detail=f"{over:.4f}, whole pages (limit 1.02; {whole:.4f} over what whole pages could do)",
            )
        parts = arms.get("polder", {}).get(engine_of(CO_ACTIVATED, disks))
        if parts is not None:
            over, bytes_alone = _number(parts["over_even"]), _number(parts["over_bound"])
            yield Check(
                name=f"parts_over_even_at_most_1_02_on_{label}",
                passed=over <= 1.02,
                detail=f"{over:.4f} over the same requests, evenly on all disks (limit 1.02; {bytes_alone:.4f} over wanted "
                "bytes alone)",
            )


def _papers(ratios: Mapping[str, float]) -> Iterator[Check]:
    """Over the paper's kinds of baseline as the paper counts, and against each alone; on as many disks as it had."""
    for metric, name, asked in (
        ("io_time_s", "io_time_at_least_2_41_times_lower", IO_TIME),
        ("bandwidth_bytes_per_s", "bandwidth_at_least_2_72_times_higher", BANDWIDTH),
    ):
        of_each = [_gain(ratios, baseline, metric, CO_ACTIVATED, PAPERS_DISKS) for baseline in BASELINES]
        known = [gain for gain in of_each if gain is not None]
        if len(known) == len(BASELINES):
            mean = sum(known) / len(known)
            each = ", ".join(f"{baseline}: {gain:.2f}" for baseline, gain in zip(BASELINES, known, strict=True))
            yield Check(
                name=f"{name}_as_the_paper_counts",
                passed=mean >= asked,
                detail=f"{mean:.2f} on {PAPERS_DISKS} disks, the mean of three baselines (asked {asked}; {each})",
            )
        for baseline in BASELINES:
            gains = {disks: _gain(ratios, baseline, metric, CO_ACTIVATED, disks) for disks in DISKS}
            gain = gains.pop(PAPERS_DISKS)
            if gain is None:
                continue
            beside = dict(gains)
            beside["blocks of 64 KiB"] = _gain(ratios, baseline, metric, PAGES, PAPERS_DISKS)
            if metric == "io_time_s":
                beside["with the host's time for requests"] = _gain(
                    ratios, baseline, "io_time_with_host_s", CO_ACTIVATED, PAPERS_DISKS
                )
            others = ", ".join(f"{what}: {of:.2f}" for what, of in beside.items() if of is not None)
            yield Check(
                name=f"{name}_than_{baseline.replace('-', '_')}",
                passed=gain >= asked,
                detail=f"{gain:.2f} on {PAPERS_DISKS} disks (asked {asked}; {others})",
            )


def _one_disk(ratios: Mapping[str, float]) -> Iterator[Check]:
    """The plain stores are `sequential` and `hash`."""
    found = _ratios(ratios, [(access_set, "1") for access_set in SETS], ("sequential", "hash"))
    if found:
        worst = max(found, key=lambda key: found[key])
        yield Check(
            name="one_disk_no_worse_than_the_plain_store",
            passed=found[worst] <= 1 + 1e-6,
            detail=f"I/O time at most {found[worst]:.4f} of it ({worst}; limit 1)",
        )


def _random(ratios: Mapping[str, float]) -> Iterator[Check]:
    found = _ratios(ratios, [("random", disks) for disks in DISKS], ("hash",))
    if found:
        worst = max(found, key=lambda key: found[key])
        yield Check(
            name="random_no_worse_than_hash_by_2_percent",
            passed=found[worst] <= 1.02,
            detail=f"I/O time at most {found[worst]:.4f} of it ({worst}; limit 1.02)",
        )


def _wall(arms: Arms) -> Iterator[Check]:
    found = {
        f"{arm}, {engine.removeprefix('wall-')}": {name: _number(value) for name, value in metrics.items()}
        for arm, engines in arms.items()
        for engine, metrics in engines.items()
        if engine.startswith("wall-")
    }
    if not found:
        return
    worst = max(found, key=lambda key: abs(found[key]["wall_over_modelled"] - 1))
    late, steps = (sum(of[name] for of in found.values()) for name in ("late_steps", "steps"))
    on_time = [of["wall_over_modelled_on_time"] for of in found.values() if "wall_over_modelled_on_time" in of]
    alone = f"; without them {max(on_time, key=lambda ratio: abs(ratio - 1)):.4f} at worst" if late and on_time else ""
    yield Check(
        name="wall_within_5_percent_of_modelled",
        passed=abs(found[worst]["wall_over_modelled"] - 1) <= 0.05,
        detail=f"{found[worst]['wall_over_modelled']:.4f} at worst ({worst}; limit 1.05; {late:.0f} of {steps:.0f} steps "
        f"late, counted in{alone})",
    )
    planned, read, missed = (
        sum(of[name] for of in found.values()) for name in ("planned_bytes", "read_bytes", "missed_units")
    )
    yield Check(
        name="bytes_read_as_planned",
        passed=missed == 0 and all(of["planned_bytes"] == of["read_bytes"] for of in found.values()),
        detail=f"{read:.0f} read, {planned:.0f} planned, {missed:.0f} units missed",
    )


def _live(arms: Arms) -> Iterator[Check]:
    """Upkeep against none. Every byte was compared while it ran."""
    found = {
        (arm, engine): {name: _number(value) for name, value in metrics.items()}
        for arm in LIVE_ARMS
        for engine, metrics in arms.get(arm, {}).items()
    }
    if not found:
        return
    lost = sum(of["lost"] for of in found.values())
    steps = sum(of["steps"] for of in found.values())
    yield Check(name="live_no_entry_lost", passed=lost == 0, detail=f"{lost:.0f} in {steps:.0f} steps; none was wrong")
    for name in LIVE_SETS:
        ours, without = (found[arm, engine_of(name, LIVE_DISKS)] for arm in ("live", "live-no-packing"))
        times = ours["io_time_packed_s"] / without["io_time_packed_s"]
        yield Check(
            name=f"live_packing_shortens_steps_of_{name}",
            passed=times < 1,
            detail=f"I/O time {times:.2f} of that without",
        )
    ours, once = (found[arm, engine_of("drift", LIVE_DISKS)] for arm in ("live", "live-packed-once"))
    yield Check(
        name="live_packs_again_what_has_aged",
        passed=ours["packed"] > 1 and ours["io_time_last_s"] <= once["io_time_last_s"],
        detail=f"packed {ours['packed']:.0f} times; I/O time of the last steps "
        f"{ours['io_time_last_s'] / once['io_time_last_s']:.2f} of that after one packing",
    )


def _gain(ratios: Mapping[str, float], baseline: str, metric: str, access_set: str, disks: str) -> float | None:
    """How many times better: times lower, bandwidths higher."""
    ratio = ratios.get(f"polder/{baseline}:{engine_of(access_set, disks)}.{metric}")
    return ratio if ratio is None or metric == "bandwidth_bytes_per_s" else 1 / ratio


def _ratios(
    ratios: Mapping[str, float], engines: list[tuple[str, str]], baselines: tuple[str, ...]
) -> dict[str, float]:
    """Of I/O time, by what was compared."""
    found = {}
    for access_set, disks in engines:
        for baseline in baselines:
            ratio = ratios.get(f"polder/{baseline}:{engine_of(access_set, disks)}.io_time_s")
            if ratio is not None:
                found[f"{access_set}-{disks}, {baseline}"] = ratio
    return found


def _number(metric: Metric) -> float:
    assert not isinstance(metric, dict)
    return metric
