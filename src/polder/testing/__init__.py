"""Public fakes for tests of Polder and of what is built on it."""

from polder.testing.faulty import FaultyBackend, seeded_faults

__all__ = ["FaultyBackend", "seeded_faults"]
