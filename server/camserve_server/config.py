"""The configuration of the server.

Values come from a TOML file, from `CAMSERVE_…` environment variables and from command-line flags. A flag overrides an
environment variable, and an environment variable overrides the file.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from camserve.addresses import is_loopback, is_loopback_host, require_host_port, require_listener, socket_path
from camserve_server.config_tables import CacheConfig, ModelConfig, Positive, TLSConfig, TokenConfig
from camserve_server.errors import ConfigError

__all__ = ["CacheConfig", "Config", "ModelConfig", "TLSConfig", "TokenConfig", "embedded_model", "read_config"]

Address = Annotated[str, AfterValidator(require_host_port)]
Listener = Annotated[str, AfterValidator(require_listener)]


def embedded_model() -> ModelConfig:
    """Return the configuration of the default model, EfficientNet-Lite0 with its ImageNet weights."""
    return ModelConfig(name="efficientnet-lite0", source="embedded:efficientnet-lite0")


def _require_device(value: str) -> str:
    match = re.fullmatch(r"auto|all|cpu|cuda|(cuda|cpu):(\d+(?:,\d+)*)", value)
    numbers = [int(each) for each in match[2].split(",")] if match and match[2] else []
    if match is None or (match[1] == "cpu" and len(numbers) == 1):
        raise ValueError(
            f'{value!r} is not a device; expected "auto", "cpu", "cuda", "all" for all GPUs, one or several GPUs such '
            'as "cuda:0" or "cuda:0,1", or several engines on the CPU such as "cpu:0,1"'
        )
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{value!r} names a device twice; name each device once")
    return value


class Config(BaseSettings):
    """All settings of the server."""

    model_config = SettingsConfigDict(env_prefix="CAMSERVE_", extra="forbid")

    listen: Annotated[
        Listener,
        Field(
            description="Address of the server: HOST:PORT, port 0 selects a free port, or unix:///PATH for a socket."
        ),
    ] = "127.0.0.1:50051"
    socket_mode: Annotated[str, Field(pattern=r"^0?[0-7]{3}$", description="File mode of Unix sockets, in octal.")] = (
        "600"
    )
    frontends: Annotated[
        int,
        Field(ge=1, le=64, description="Processes that accept connections, decode images and encode responses."),
    ] = 1
    insecure: Annotated[bool, Field(description="Allow listeners without TLS that other machines can reach.")] = False
    tls: Annotated[TLSConfig | None, Field(description="Enables TLS, and client certificates if client_ca is set.")] = (
        None
    )
    tokens: Annotated[list[TokenConfig], Field(description="Bearer tokens; if any is configured, calls need one.")] = []
    cache: Annotated[CacheConfig | None, Field(description="Enables the result cache.")] = None
    health_listen: Annotated[
        Listener | None, Field(description="Second listener, in plaintext, that serves Health only.")
    ] = None
    metrics_listen: Annotated[Address | None, Field(description="Listener for Prometheus, in plaintext.")] = None
    admin_listen: Annotated[
        Listener | None, Field(description="Separate listener for AdminService, which loads and unloads models.")
    ] = None
    reflection: Annotated[bool, Field(description="Serve gRPC server reflection.")] = True
    open_inference: Annotated[
        bool, Field(description="Serve the Open Inference Protocol, for clients of Triton and KServe.")
    ] = True
    device: Annotated[
        str,
        AfterValidator(_require_device),
        Field(description="auto selects a GPU if torch finds one; cuda:0,1 and all use several."),
    ] = "auto"
    models: Annotated[list[ModelConfig], Field(description="Models to serve; the embedded model if omitted.")] = []
    threads: Annotated[
        int | None, Field(ge=1, description="CPU threads of each engine; the default of torch if omitted.")
    ] = None
    batch_invariant: Annotated[
        bool, Field(description="Pad every batch to its lane's size, so that a map does not depend on other requests.")
    ] = True
    max_rows_owed: Annotated[
        Positive, Field(description="Most rows that may run before a request ends; more requests are refused.")
    ] = 200_000
    max_rows_owed_per_caller: Annotated[
        Positive | None, Field(description="Most rows that all requests of a caller may owe; a token can override it.")
    ] = None
    max_model_bytes: Annotated[
        Positive | None,
        Field(description="Most bytes of weights of all loaded models; the least recently used are unloaded."),
    ] = None
    max_image_pixels: Annotated[Positive, Field(description="Most pixels of an image, before it is resized.")] = (
        50_000_000
    )
    max_message_bytes: Annotated[Positive, Field(description="Most bytes of a gRPC message in either direction.")] = (
        64 << 20
    )
    cache_dir: Annotated[
        str | None,
        Field(
            description="Folder that keeps measured batch sizes and compiled code between starts; empty for none; the "
            "user's cache folder if omitted."
        ),
    ] = None
    grace_s: Annotated[float, Field(ge=0, description="Seconds that running requests may take after SIGTERM.")] = 30.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="Lowest level of the log on stderr.")
    ] = "info"

    _file: Path | None = None
    _flags: dict[str, Any] = {}

    def models_now(self) -> list[ModelConfig]:
        """Read the configuration file again, if there is one, and return its models.

        Raises:
            ConfigError: The file is missing or invalid.
        """
        return read_config(self._file, **self._flags).models if self._file else self.models

    @property
    def cache_path(self) -> Path | None:
        """The folder of `cache_dir`, by default that of the XDG Base Directory Specification; None for none."""
        if self.cache_dir is not None:
            return Path(self.cache_dir) if self.cache_dir else None
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if base.is_absolute():  # the specification says that other values are invalid
            return base / "camserve"
        try:
            return Path.home() / ".cache" / "camserve"
        except RuntimeError:  # the user has no home
            return None

    @model_validator(mode="after")
    def _check_model_names(self) -> Self:
        names = [model.name for model in self.models]
        duplicates = {name for name in names if names.count(name) > 1}
        if duplicates:
            raise ValueError(f"models: two models have the name {duplicates.pop()!r}; rename one of them")
        return self

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        for key in ("name", "sha256"):
            if len({getattr(token, key) for token in self.tokens}) < len(self.tokens):
                raise ValueError(f"tokens: two tokens have the same {key}; each needs its own")
        return self

    @model_validator(mode="after")
    def _check_socket(self) -> Self:
        if self.frontends > 1 and socket_path(self.listen) is not None:
            raise ValueError(
                "listen: several front ends cannot share a Unix socket; set frontends = 1 or use HOST:PORT"
            )
        return self

    @model_validator(mode="after")
    def _require_tls_off_loopback(self) -> Self:
        """Refuse plaintext listeners that other machines can reach, except for Health, whose probes have no TLS."""
        if self.metrics_listen is not None and not self.insecure and not is_loopback_host(self.metrics_listen):
            raise ValueError(
                f"metrics_listen: {self.metrics_listen} can be reached from other machines, and metrics are "
                "not encrypted; listen on 127.0.0.1, or set insecure = true if you trust the network"
            )
        for key, address in (("listen", self.listen), ("admin_listen", self.admin_listen)):
            if address and self.tls is None and not self.insecure and not is_loopback(address):
                raise ValueError(
                    f"{key}: {address} can be reached from other machines, and TLS is off; add [tls] with a "
                    "certificate and a key, listen on 127.0.0.1, or set insecure = true (CAMSERVE_INSECURE=true, "
                    "--insecure) if you trust the network"
                )
        return self

    @model_validator(mode="after")
    def _require_admin_credentials(self) -> Self:
        checked = any(token.admin for token in self.tokens) or (not self.tokens and self.tls and self.tls.client_ca)
        if self.admin_listen and not checked and not self.insecure and not is_loopback(self.admin_listen):
            raise ValueError(
                f"admin_listen: every machine that reaches {self.admin_listen} could unload models; add "
                "[[tokens]] with admin = true, set client_ca in [tls], or listen on 127.0.0.1"
            )
        return self


def read_config(path: Path | None = None, **flags: Any) -> Config:
    """Read the configuration from a file, the environment and command-line flags.

    Args:
        path: The TOML file; None for no file.
        flags: Values of the command line by key; None for a flag that is not set.

    Returns:
        The configuration, with the embedded model if no model is configured.

    Raises:
        ConfigError: A value is invalid, or the file cannot be read. The message has one line for each error, which
            begins with the key.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8")) if path else {}
        config = _config_class(data)(**{key: value for key, value in flags.items() if value is not None})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        raise ConfigError("\n".join(_error_line(detail, data) for detail in error.errors())) from error
    config.models = config.models or [embedded_model()]
    config._file, config._flags = path, flags
    folder = path.parent if path else Path()
    if config.cache_dir:
        try:
            config.cache_dir = str((folder / Path(config.cache_dir).expanduser()).absolute())
        except RuntimeError as error:
            raise ConfigError(f"cache_dir: {config.cache_dir}: {error}; name another folder") from error
    for table in (*config.models, *([config.tls] if config.tls else [])):
        table._folder = folder
    return config


def _config_class(data: dict[str, Any]) -> type[Config]:
    """Return a Config class with the contents of a file as its last source."""

    class ConfigWithFile(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings, env_settings, InitSettingsSource(settings_cls, data))

    return ConfigWithFile


def _error_line(detail: Any, data: dict[str, Any]) -> str:
    match detail["loc"]:
        case ("models" | "tokens" as tables, int(i), *rest):
            place: tuple[Any, ...] = (tables, _table_name(data, tables, i), *rest)
        case place:
            pass
    # The messages of validators that see several keys begin with the key.
    return ": ".join(filter(None, (".".join(map(str, place)), detail["msg"].removeprefix("Value error, "))))


def _table_name(data: dict[str, Any], tables: str, i: int) -> str | int:
    """Return the name of the i-th table, which other errors use too, or i if it has no name."""
    try:
        return str(data[tables][i]["name"])
    except (KeyError, IndexError, TypeError):  # the table comes from the environment or is not a table
        return i
