"""A worker's side: the memory under one rank's KV cache."""
