"""Fixtures of the client's tests."""

from tests.client.fake_server import address, authority, certificate, client, other_photo, photo, pixels, ramp, servicer

__all__ = ["address", "authority", "certificate", "client", "other_photo", "photo", "pixels", "ramp", "servicer"]
