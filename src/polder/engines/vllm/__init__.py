"""Elastic KV memory for vLLM. `plugin` is the entry point; each folder is one part of the work, in the engine core or
in the workers."""
