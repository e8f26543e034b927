"""Engines of an arm, the load on them, and what is seen of both."""
