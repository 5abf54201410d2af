"""Measurements, as ratios against a named peer in one run. `make bench` writes them to `docs/benchmarks.md`."""

import os

# Servers measure their batch sizes anew, and leave the user's cache folder as it is.
os.environ.setdefault("CAMSERVE_CACHE_DIR", "")
