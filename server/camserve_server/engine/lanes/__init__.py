"""Lanes: how queries run on the device."""
