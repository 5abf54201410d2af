"""Simulation of many replicas with the scheduler and the admission control of the server."""
