"""vLLM's KV connector over Polder's tiers: the scheduler's half and the workers' half."""
