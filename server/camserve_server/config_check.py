"""Checks of a configuration that need no network, for `camserve config check`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from camserve_server.config import CacheConfig, Config, ModelConfig, TokenConfig, read_config
from camserve_server.errors import ConfigError
from camserve_server.models.load import read_labels
from camserve_server.models.sources import check_source
from camserve_server.service.tls import certificates

_SECRETS = {(TokenConfig, "sha256"), (CacheConfig, "redis_url")}


def check_config(path: Path | None) -> tuple[list[tuple[str, str]], list[str]]:
    """Check a configuration without starting a server.

    The check reads the named files. It builds no network, binds no port and looks for no device, because the
    configuration may be meant for another machine.

    Args:
        path: The TOML file; None for the environment and the defaults only.

    Returns:
        The keys with their values, without secrets; and the errors, each of which begins with its key. There are no
        keys if the file is invalid.
    """
    try:
        config = read_config(path)
    except ConfigError as error:
        return [], str(error).splitlines()
    return [*_values(config)], [*_errors(config)]


def _errors(config: Config) -> Iterator[str]:
    if config.tls is not None:
        try:
            certificates(config.tls)
        except ConfigError as error:
            yield str(error)
    for model in config.models:
        key = f"models.{model.name}"
        for check in (check_source, _check_labels):
            try:
                check(model, key)
            except ConfigError as error:
                yield str(error)


def _check_labels(model: ModelConfig, key: str) -> None:
    if model.labels not in (None, "imagenet"):
        read_labels(model.resolve(model.labels), key)


def _values(config: Config) -> Iterator[tuple[str, str]]:
    for key, value in config:
        tables: dict[str, BaseModel] = {}
        match value:
            case BaseModel():
                tables = {key: value}
            case [BaseModel(), *_]:
                tables = {f"{key}.{table.name}": table for table in value}
            case _:
                yield key, _format(value)
        for where, table in tables.items():
            for name, entry in table:
                if (type(table), name) in _SECRETS and entry is not None:
                    yield f"{where}.{name}", "set"
                elif name != "name" and entry is not None:
                    yield f"{where}.{name}", _format(entry)


def _format(value: object) -> str:
    return "–" if value is None or value == [] else json.dumps(value, ensure_ascii=False)
