"""Weights of decoder layers as memory that can be given away and streamed back just in time."""
