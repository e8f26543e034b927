"""Elastic weights: the engine core's half and the workers' half."""
