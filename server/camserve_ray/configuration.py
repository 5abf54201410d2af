"""The configuration for processes on other nodes."""

from __future__ import annotations

from camserve_server.config import Config

__all__ = ["plain_config"]


def plain_config(config: Config) -> Config:
    """Return a configuration that other processes can unpickle, with absolute paths.

    `read_config` returns an object of a class that exists in one process only. Relative paths would start at the
    working directory of each process.
    """
    for model in config.models:
        model._folder = model._folder.absolute()
    return Config.model_construct(**dict(config))
