"""Elastic KV memory for vLLM: plugin.py is the entry point, elastic.py the scheduler's side, worker.py the memory's side."""
