"""The paper's own clustering (section 5): medoids by density, and clusters that may overlap. A reference to compare
with.

Equations (2) and (3) use Jaccard's distance here, 1 - f_ij / (f_i + f_j - f_ij). As printed, (2) divides by the sum
over all pairs, so every distance would be near 1. A block that no step read is in no cluster. The paper gives no value
for the radius; with 0.6, clusters of generator.py's sets have 11 to 16 blocks, and the paper's table 4 implies about
ten.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polder.arrays import BoolArray, IntArray
from polder.errors import ConfigError
from polder.swarm.activations import Profile, Signatures

__all__ = ["Clusters", "CoAccess", "co_access", "medoid_clusters"]

_ROWS = 1024
"""Ids whose co-access with all others is worked out at a time."""


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Cluster c is `members[starts[c] : starts[c + 1]]`, with its medoid first. A block can be in several clusters."""

    starts: IntArray
    """[clusters + 1]"""
    members: IntArray

    @property
    def count(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> IntArray:
        return np.diff(self.starts)

    @property
    def medoids(self) -> IntArray:
        return self.members[self.starts[:-1]]


def medoid_clusters(profile: Profile, *, radius: float = 0.6) -> Clusters:
    """The paper's algorithm 1. `radius`: tau, at least 0 and below 1.

    Density, (4): how many others are within the radius. In falling order of density each block that no cluster covers
    becomes a medoid. Its candidates are all blocks within the radius, covered ones too, nearest first; one is admitted
    when its mean distance to the members so far is within the radius, (5). Raises ConfigError for a radius that is
    none.
    """
    near = co_access(profile, max_distance=radius)
    density = np.diff(near.starts)
    counts = profile.counts()
    signatures = profile.signatures()
    covered = counts == 0
    clusters: list[IntArray] = []
    for medoid in np.argsort(-density, kind="stable").tolist():
        if covered[medoid]:
            continue
        found = near.of(medoid)
        candidates = near.others[found]
        admitted = _admitted(signatures[candidates], counts[candidates], near.distances[found], radius)
        members = np.concatenate(([medoid], candidates[admitted]))
        covered[members] = True
        clusters.append(members)
    starts = np.concatenate(([0], np.cumsum([len(members) for members in clusters], dtype=np.int64)))
    return Clusters(starts=starts, members=np.concatenate(clusters) if clusters else np.empty(0, dtype=np.int64))


def _admitted(
    signatures: Signatures,
    counts: IntArray,
    to_medoid: npt.NDArray[np.float32],
    radius: float,
) -> BoolArray:
    """Which candidates become members; the nearest to the medoid come first."""
    total = to_medoid.astype(np.float64)  # of each candidate to all members so far
    admitted = np.zeros(len(counts), dtype=np.bool_)
    members = 1
    for candidate in range(len(counts)):
        if total[candidate] <= radius * members + 1e-6:
            admitted[candidate] = True
            members += 1
            later = slice(candidate + 1, None)
            both = np.bitwise_count(signatures[later] & signatures[candidate]).sum(axis=1, dtype=np.int64)
            total[later] += 1 - both / (counts[later] + counts[candidate] - both)
    return admitted


@dataclass(frozen=True, kw_only=True)
class CoAccess:
    """For each id the others that are read with it: `others[starts[i] : starts[i + 1]]`, the nearest first."""

    starts: IntArray
    """[size + 1]"""
    others: IntArray
    distances: npt.NDArray[np.float32]
    """1 - f(i, j) / (f(i) + f(j) - f(i, j))."""

    def of(self, item: int) -> slice:
        return slice(int(self.starts[item]), int(self.starts[item + 1]))


def co_access(profile: Profile, *, max_distance: float) -> CoAccess:
    """Pairs of ids at most `max_distance` (below 1) apart, each in both directions. O(size^2 steps).

    The distance is Jaccard's: equation (2) divides by the sum over all pairs, which puts all distances near 1 and makes
    the radius depend on the number of blocks.
    """
    if not 0 <= max_distance < 1:
        raise ConfigError(f"co-access: a distance of {max_distance}; write a number from 0 to below 1")
    dense = np.zeros((profile.size, profile.steps), dtype=np.float32)
    dense[profile.items, profile.step_of_items()] = 1
    counts = profile.counts().astype(np.float32)
    parts: list[tuple[IntArray, IntArray, npt.NDArray[np.float32]]] = []
    for first in range(0, profile.size, _ROWS):
        both = dense[first : first + _ROWS] @ dense.T
        either = counts[first : first + _ROWS, None] + counts[None, :] - both
        distance = 1 - both / np.maximum(either, 1)
        row, other = np.nonzero((distance <= max_distance) & (both > 0))
        apart = first + row != other
        row, other = row[apart], other[apart]
        near = distance[row, other]
        order = np.lexsort((near, row))
        row, other = row[order], other[order]
        parts.append((first + row, other, near[order]))
    rows, others, distances = (np.concatenate(column) for column in zip(*parts, strict=True))
    starts = np.searchsorted(rows, np.arange(profile.size + 1))
    return CoAccess(starts=starts, others=others, distances=distances)
