"""Metrics, one paper or topic per file. A file contains equations: it yields queries, and the engine answers them."""
