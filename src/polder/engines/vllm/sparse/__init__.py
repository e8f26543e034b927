"""Requests that decode over a part of their prefix, selected by each layer's own query. docs/sparse.md has the method."""
