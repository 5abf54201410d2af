"""Execution of queries on the device, by kind of lane."""
