"""Version of the camserve distribution."""

__version__ = "0.2.0"
