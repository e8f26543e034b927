"""Tiers behind an engine's KV cache: lent memory of other engines, host memory, and disks.

When the engine's own cache has no room for a block, the block is copied to a tier; when a request needs it again, it is
loaded from there instead of being computed. Each tier has two halves. One lives in the scheduler's process and decides
(tierset.py, index.py, slots.py, borrowing.py, disk_slots.py, spill.py); the other lives in each worker and copies
(transfer.py, memories.py, disk_memory.py). Jobs travel from the first to the second, and results back.
"""
