"""What is kept and what is written: eviction policies, the statistics they learn from, and admission to the tiers."""
