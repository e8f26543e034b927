"""Decoding over a long prefix by reading only what each layer's own query needs: selection of KV by query.

A prefix is stored once, layer by layer, as units of one KV block each; a step reads few of them. Nothing here knows
vLLM, and nothing does I/O. docs/sparse.md says what was measured.

    budget       how much of a prefix a request reads, and which of its tokens are units
    compiled     how functions are compiled
    ordering     which tokens make a unit: key bisection in the metric of the prefix's own last queries
    codes        keys with 4 bits a channel: the index by which units are selected
    selection    a query's share of attention for each unit, in one compiled call
    methods      the same by other means, to compare with
    slots        which unit lies in which slot of a layer
"""
