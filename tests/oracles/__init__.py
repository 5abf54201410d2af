"""Slow, plain re-implementations of the papers, sharing no code with the server that is tested against them."""
