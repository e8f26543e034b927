"""How many of its layers a model that serves can stream, by the times of its last steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from polder.engines.vllm.plans import WeightsFound
from polder.planner.rotation_cost import choose_rotation, pass_seconds
from polder.stream.pipeline import RECENT_PASSES

__all__ = ["Streaming"]

SLOWDOWN = 0.02
"""What streaming may cost: steps may be so much longer, as a part of their time."""


class Streaming:
    def __init__(self, found: WeightsFound) -> None:
        self._found = found
        self._steps: deque[float] = deque(maxlen=RECENT_PASSES)
        self._unexplained = True
        """The workers were not asked since steps began to run with the segments that there are now."""
        self._stall_s = 0.0
        self._loads = self._copy_s = 0.0
        self.layer_load_s = 0.0
        """Seconds that a load took, of those since the workers were asked before."""

    def changed(self) -> None:
        """Steps run with other segments from now on."""
        self._steps.clear()
        self._unexplained = True

    def note_step(self, seconds: float) -> None:
        self._steps.append(seconds)

    def learn(self, figures: Mapping[str, float]) -> None:
        """What the workers say, see weights/calls.figures."""
        self._unexplained = not self._steps
        self._stall_s = figures["weights_pass_stall_seconds"]
        loads, copy_s = figures["weights_loads_total"], figures["weights_copy_seconds_total"]
        if loads > self._loads:
            self.layer_load_s = (copy_s - self._copy_s) / (loads - self._loads)
        self._loads, self._copy_s = loads, copy_s

    def winnable(self) -> int | None:
        """Segments in all that the formula lets it win. None: no step was measured since the last change."""
        found, compute_s = self._found, self._compute_s()
        if not found.streams:
            return 0
        if compute_s is None:
            return None
        return choose_rotation(found.layers, compute_s, self.layer_load_s, SLOWDOWN, found.copy_share).alpha

    def slots(self, won: int) -> int:
        """Slots of a rotation that wins `won` segments: whichever number is expected to be faster; 0: it is
        impossible."""
        found, layers, step_s = self._found, self._found.layers, self._compute_s() or 0.0
        possible = [slots for slots in (1, 2) if won + slots <= layers and won + slots >= 2 * slots and found.streams]
        seconds = {
            slots: pass_seconds(layers, won + slots, slots, step_s, self.layer_load_s, found.copy_share)
            for slots in possible
        }
        return min(possible, key=lambda slots: (seconds[slots], slots), default=0)

    def _compute_s(self) -> float | None:
        """What the shortest of the last steps would take with all layers resident.

        Steps that stood still for a load are longer for it: what they waited must not make room for more loads. Workers
        tell how long that was when they are asked; until then, after a change, nothing is known.
        """
        if not self._steps or self._unexplained:
            return None
        return max(0.0, min(self._steps) - self._stall_s)
