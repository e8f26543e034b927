"""Decisions as pure functions of measured times: load or compute, stream or keep, whose weights go; and `polder
plan`."""
