"""Arms that come up when they are needed, a few at a time: more engines than a machine holds can still be compared."""

from __future__ import annotations

from collections.abc import Callable

from polder.bench.harness.arms import Arm

__all__ = ["ArmPool"]


class ArmPool:
    """Keeps at most `at_most` arms up. An arm that is up and not asked takes memory and no CPU. Not thread-safe."""

    def __init__(self, make: Callable[[str], Arm], prepare: Callable[[Arm], None], *, at_most: int) -> None:
        """`make(name)`: an arm, not started. `prepare`: called once for every started arm, before its first use."""
        self._make = make
        self._prepare = prepare
        self._at_most = at_most
        self._up: dict[str, Arm] = {}
        """Least recently asked for first."""

    def get(self, name: str) -> Arm:
        """The arm, up and prepared. May stop the one that was asked for longest ago. Raises EnvironmentFault."""
        arm = self._up.pop(name, None)
        if arm is None:
            while len(self._up) >= self._at_most:
                self._stop(next(iter(self._up)))
            arm = self._make(name)
            self._up[name] = arm  # before it starts: whatever happens, close() ends it
            arm.start()
            arm.wait_ready()
            self._prepare(arm)
        self._up[name] = arm
        return arm

    def close(self) -> None:
        """Ends every arm that is up."""
        while self._up:
            self._stop(next(iter(self._up)))

    def _stop(self, name: str) -> None:
        self._up.pop(name).stop()
