"""What can be said of a configuration before a network is made: `camserve config check`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from camserve_server.config import Config, ModelConfig, TokenConfig, read
from camserve_server.errors import ConfigError
from camserve_server.models.load import read_labels
from camserve_server.models.sources import check_source
from camserve_server.service.tls import certificates


def check(path: Path | None) -> tuple[list[tuple[str, str]], list[str]]:
    """What was understood, key by key, with secrets left out; and what is wrong, each naming its key.

    Files are read; no network is made, no port bound and no device looked for, for it may be another machine's.
    """
    try:
        config = read(path)
    except ConfigError as error:
        return [], str(error).splitlines()
    return [*_understood(config)], [*_wrong(config)]


def _wrong(config: Config) -> Iterator[str]:
    if config.tls is not None:
        try:
            certificates(config.tls)
        except ConfigError as error:
            yield str(error)
    for model in config.models:
        where = f"models.{model.name}"
        for look in (check_source, _check_labels):
            try:
                look(model, where)
            except ConfigError as error:
                yield str(error)


def _check_labels(model: ModelConfig, where: str) -> None:
    if model.labels not in (None, "imagenet"):
        read_labels(model.resolve(model.labels), where)


def _understood(config: Config) -> Iterator[tuple[str, str]]:
    for key, value in config:
        tables: dict[str, BaseModel] = {}
        match value:
            case BaseModel():
                tables = {key: value}
            case [BaseModel(), *_]:
                tables = {f"{key}.{table.name}": table for table in value}
            case _:
                yield key, _shown(value)
        for where, table in tables.items():
            for name, entry in table:
                if name == "sha256" and isinstance(table, TokenConfig):
                    yield f"{where}.{name}", "set"
                elif name != "name" and entry is not None:
                    yield f"{where}.{name}", _shown(entry)


def _shown(value: object) -> str:
    return "–" if value is None or value == [] else json.dumps(value, ensure_ascii=False)
