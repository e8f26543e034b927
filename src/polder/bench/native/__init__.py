"""vLLM's own offloading on the CPU platform: the arms to compare with."""
