"""Sweep over published networks: what the server makes of them, and whether its results agree with other code."""
