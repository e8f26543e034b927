"""The disk tier: pages written from host memory in the background, and read from all disks at once.

slots.py, spill.py and admission.py belong to the scheduler; memory.py, mirror.py, reads.py and striping.py to each
worker.
"""
