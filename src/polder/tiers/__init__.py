"""Tiers behind an engine's KV cache: lent memory of other engines (peer/), host memory (host.py), and disks (disk/).

When the engine's own cache has no room for a block, the block is copied to a tier; when a request needs it again, it is
loaded from there instead of being computed. Each tier has two halves. One lives in the scheduler's process and decides:
tierset.py -> index.py -> table.py, over the `Slots` of each tier. The other lives in each worker and copies: worker.py,
over the memory of each tier. Jobs (jobs.py) travel from the first to the second, and results back. eviction/ decides
which blocks are worth their place.
"""
