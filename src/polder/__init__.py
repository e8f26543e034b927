"""Polder wins memory back for vLLM's KV cache. docs/structures.md is the map."""

__version__ = "0.1.0"
