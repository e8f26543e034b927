"""Policies of the Swarm paper and others to compare with polder.swarm, and synthetic access sets. Only benchmarks use
them."""
