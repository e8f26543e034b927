"""One comparison of seconds for every choice: reload from there, stream, or recompute."""
