"""Measurements, as ratios against a named peer in one run. `make bench` writes them to `docs/benchmarks.md`."""
