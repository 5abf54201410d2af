"""Slow and simple implementations of the papers, without code of the server that they test."""
