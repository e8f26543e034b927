"""KV that is read sparsely: entries smaller than a page, of which each decoding step reads a few.

An entry is the KV of one token, or of a few tokens, in one layer. The ideas are those of the Swarm paper ("the paper"
in these modules); docs/log.md says what was measured. What was only built to compare with is in polder.bench.sparse.

    activations                          which entries were read together: recorded sets, one for each step
    clusters                             packs entries that are read together into the same pages
    placement                            puts pages that are read together on different disks
    reads, cost                          the requests of a step, and how long they take
    adaptation, hotset, prediction       when to pack again; what stays in memory; what to read ahead
    entry_*                              a store of entries that does all of this online, over a DiskStore
"""
