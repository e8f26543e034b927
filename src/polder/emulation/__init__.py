"""Emulated hardware: links and disks that are as slow as they are told to be, and tiers and devices that fail on
purpose.

A development machine has one kind of memory and one disk. With an emulated link or disk the differences between tiers
can be seen there: the bytes really move, and the caller waits until the emulated hardware would be done. Engines use it
only when POLDER_LINKS or POLDER_FAULTS is set; `factory` builds all of it from these two settings.
"""
