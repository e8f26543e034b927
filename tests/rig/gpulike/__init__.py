"""vLLM's GPU defaults on a CPU. README.md beside this package says what each word means and what is emulated.

vLLM finds the platform below by the `dist-info` beside this package, so the folder above belongs on the path. The variable GPULIKE
names what an engine gets; without it the platform is vLLM's own CPU platform.
"""

from __future__ import annotations

import os

__all__ = ["WORDS", "environment", "platform", "wanted", "words"]

WORDS = ("v2", "async", "uni", "warmup", "graphs", "compiled", "late", "driver")


def words(like: str) -> frozenset[str]:
    """The words of a list separated by commas. Raises ValueError if one is unknown."""
    names = frozenset(filter(None, like.split(",")))
    if unknown := names.difference(WORDS):
        raise ValueError(f"gpulike: {', '.join(sorted(unknown))} unknown: use some of {','.join(WORDS)}")
    if "graphs" in names and "v2" not in names:
        raise ValueError("gpulike: graphs are emulated for the V2 model runner only: add v2")
    if names & {"late", "driver"} and "async" not in names:
        raise ValueError("gpulike: without asynchronous scheduling nothing is done before a step has ended: add async")
    if {"late", "driver"} <= names:
        raise ValueError("gpulike: driver has a device thread of its own: leave late out")
    return names


def wanted() -> frozenset[str]:
    """What this process was asked for."""
    return words(os.environ.get("GPULIKE", ""))


def environment(like: str) -> dict[str, str]:
    """The variables that must be set while an engine starts that is to be `like` a GPU's."""
    names = words(like)
    values = {"GPULIKE": ",".join(sorted(names)), "OMP_NUM_THREADS": "1"}
    if "v2" in names:
        values |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    return values


def platform() -> str:
    """vLLM's entry point: the platform's class. vLLM calls it before it looks for Triton, in every process."""
    if "v2" in wanted():
        from triton.backends import Backend, backends

        from gpulike.interpreted import InterpretedBackend, InterpretedDriver

        # vLLM's CPU build uses Triton only if it has a backend of this name.
        backends["cpu"] = Backend(compiler=InterpretedBackend, driver=InterpretedDriver)
    return "gpulike.platform.GpuLikePlatform"
