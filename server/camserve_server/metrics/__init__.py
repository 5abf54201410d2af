"""Metrics, one paper per file. A file contains equations: it yields queries, and the engine answers them."""
