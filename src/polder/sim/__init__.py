"""Polder's decisions on real traces, at sizes that no test machine has: traces, replay of a cache, Belady's ceiling."""
