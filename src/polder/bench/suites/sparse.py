"""`polder bench sparse`: what does it cost to read only a part of a long prefix?

One engine decodes the same texts densely and sparsely. The same tokens are forced in all arms, so their logits can be
compared at each place. Reads are copies from host memory into slots, counted in bytes as if each came from a disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple

from polder.bench.report.limits import Check, Limit, check, combined, highest
from polder.bench.report.metrics import Metrics
from polder.bench.report.result import BenchResult
from polder.bench.report.tables import Table, figures
from polder.bench.stages.quality import Decoded, DecodingEngine, VllmEngine, quality
from polder.bench.suites.base import Suite
from polder.bench.suites.plan import Plan, StageArms
from polder.bench.workloads.retrieval import KINDS, text_of

__all__ = ["SparsePlan", "SparseSuite"]

MODEL = "SmolLM2-135M-Instruct in float32"
BLOCK_TOKENS = 16
SLOTS = 2
METRICS = {
    "KL to dense": "kl_to_dense",
    "top-1 is dense's": "top1_agreement",
    "perplexity": "perplexity",
    "next token right": "exact_match",
    "read, bytes a token": "read_bytes_per_token",
    "units a token": "requests_per_token",
    "KV on the device, bytes": "device_kv_bytes",
    "time a token, ms": "token_ms",
}


class Arm(NamedTuple):
    budget: str = ""
    """Empty: dense."""
    method: str = "polder"
    slots: float = SLOTS

    @property
    def ask(self) -> dict[str, Any]:
        return {"sparse": self.budget, "method": self.method, "slots": self.slots} if self.budget else {}


ARMS = {
    "dense": Arm(),
    "polder-100": Arm("100%"),
    "polder-50": Arm("50%"),
    "polder-20": Arm("20%"),
    "polder-10": Arm("10%"),
    "polder-10-one": Arm("10%", slots=1),
    "polder-5": Arm("5%"),
    "polder-2": Arm("2%"),
    "quest-10": Arm("10%", "quest"),
    "medoid-10": Arm("10%", "medoid"),
}


@dataclass(frozen=True, kw_only=True)
class SparsePlan(Plan):
    choices: ClassVar[Mapping[str, StageArms]] = {"texts": StageArms(known=tuple(ARMS), always=("dense",))}
    stages: tuple[str, ...] = ("texts",)
    orders: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"texts": tuple(ARMS)})
    kinds: tuple[str, ...] = KINDS
    contexts: tuple[int, ...]
    """Tokens of the prompt."""
    tokens: int
    """Decoded, by force."""


class SparseSuite(Suite[SparsePlan]):
    """Decoding over a part of a stored prefix that each layer's own query selects, against dense."""

    name = "sparse"
    full = SparsePlan(name="full", contexts=(4096, 8000), tokens=100)
    quick = SparsePlan(
        name="quick", help="Contexts of 4,096 tokens alone, and 48 decoded.", contexts=(4096,), tokens=48
    )
    baselines: ClassVar = {"polder-10": ("quest-10", "medoid-10")}

    def texts(self) -> None:
        from polder.bench.workloads.checkpoints import SMOLLM2, ensure_checkpoint

        with TemporaryDirectory(prefix="polder-sparse-") as folder:
            with self.stage("the model and its engine"):
                engine = self.engine(ensure_checkpoint(SMOLLM2, self.models), Path(folder))
            try:
                for context in self.plan.contexts:
                    for kind in self.plan.kinds:
                        self._text(engine, kind, context)
            finally:
                engine.stop()

    def engine(self, model: Path, folder: Path) -> DecodingEngine:
        settings = {
            "POLDER_KV_BUDGET": "1GiB",
            "POLDER_PAGE": "192KiB",
            "POLDER_SPARSE": "1GiB",
            "POLDER_SPARSE_LEAST_TOKENS": "1024",
        }
        longest = max(self.plan.contexts) + self.plan.tokens + 1
        return VllmEngine(model, settings, folder, block_tokens=BLOCK_TOKENS, longest=longest)

    def _text(self, engine: DecodingEngine, kind: str, context: int) -> None:
        prompt, expected = text_of(kind, engine.tokenize, context, self.plan.tokens)
        with self.stage(f"{kind}, {context:,} tokens: dense"):
            dense = engine.decode(prompt, self.plan.tokens, expected, {})
        if expected is None:
            expected = dense.tokens
        suffix = "" if context == self.plan.contexts[0] else f"-{context // 1000}k"
        for name in self.plan.orders["texts"]:
            found = dense
            if ask := ARMS[name].ask:
                with self.stage(f"{kind}, {context:,} tokens: {name}"):
                    found = engine.decode(prompt, self.plan.tokens, expected, ask)
            of = quality(found, dense, expected) | _costs(engine, found, context, self.plan.tokens)
            self.arms.setdefault(name + suffix, {})[kind] = of
            self.note(f"{kind} {name}{suffix}: KL {of['kl_to_dense']:.4f}, top-1 {of['top1_agreement']:.3f}")

    # ------------------------------------------------------------------ limits and report

    @classmethod
    def checks(cls, result: BenchResult) -> Iterable[Check]:
        ten = [f"polder-10:{kind}" for kind in KINDS]
        yield check(
            "dense_at_100_percent", Limit(highest(f"polder-100:{kind}.kl_to_dense" for kind in KINDS), "<=", 1e-6)
        )
        yield check("kl_at_10_percent_at_most_0_01", Limit(highest(f"{of}.kl_to_dense" for of in ten), "<=", 0.01))
        yield check("top1_at_10_percent_at_least_0_97", *(f"{of}.top1_agreement >= 0.97" for of in ten))
        share = [
            Limit(
                combined(
                    "bytes a token over the prefix",
                    lambda of: of[0] / of[1],
                    f"{of}.read_bytes_per_token",
                    f"{of}.prefix_bytes",
                ),
                "<=",
                0.035,
            )
            for of in ten
        ]
        yield check("bytes_at_10_percent_at_most_0_035_of_the_prefix", *share)
        yield check(
            "kl_a_tenth_of_quests",
            *(f"polder-10/quest-10:{kind}.kl_to_dense <= 0.1" for kind in ("quote", "facts", "code")),
        )

    @classmethod
    def tables(cls, result: BenchResult) -> Iterator[Table]:
        suffixes = dict.fromkeys(("", *(arm.removeprefix("dense") for arm in result.arms if arm.startswith("dense"))))
        for suffix in suffixes:
            for kind in KINDS:
                arms = {arm: arm + suffix for arm in ARMS}
                yield from figures(result, f"{kind}{suffix}", arms, METRICS, partial(_key, kind))


def _key(kind: str, arm: str, metric: str) -> str:
    return f"{arm}:{kind}.{metric}"


def _costs(engine: DecodingEngine, found: Decoded, context: int, tokens: int) -> Metrics:
    """What the arm read in a token, and what its KV takes on the device at the end."""
    blocks = -(-(context + tokens) // engine.block_tokens)
    left_out = found.said.get("units", 0) - found.said.get("slots", 0)
    units = found.said.get("read_units", 0) / max(1, found.said.get("sparse_tokens", 0))
    return {
        "read_bytes_per_token": units * engine.block_bytes / engine.layers,
        "requests_per_token": units,
        "prefix_bytes": context // engine.block_tokens * engine.block_bytes,
        "device_kv_bytes": (blocks - left_out) * engine.block_bytes,
        "unread_estimate": found.said.get("unread", 0.0),
        "token_ms": found.token_ms,
    }
