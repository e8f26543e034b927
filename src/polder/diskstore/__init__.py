"""A store of pages on several disks, bounded in size, that survives restarts and never returns wrong bytes.

It is a cache: it may lose a page at any time, but what it returns is what was written. The layers, from the bottom:

    layout, directory   what lies in a disk's directory; opening, resizing and mending it
    io, engine, aio     aligned memory, files past the page cache, engines that move many pieces at once
    keys, slots, index  which page lies in which slot, in memory and in SQLite
    pieces, health      checksums of parts of pages; when a disk is used no more
    disk, store         one disk; all disks together
    model, schedule     how fast disks are; which copy of each page is read
    fsck                checks and repairs a directory that no store uses
"""
