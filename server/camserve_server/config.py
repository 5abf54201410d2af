"""The configuration of the server.

Values come from a TOML file, from `CAMSERVE_…` environment variables and from command-line flags. A flag overrides an
environment variable, and an environment variable overrides the file.
"""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from camserve.addresses import is_loopback, require_host_port
from camserve_server.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _per_channel(values: tuple[float, ...]) -> tuple[float, ...]:
    if not 1 <= len(values) <= 16:
        raise ValueError(f"{len(values)} numbers; expected three, one for grey-scale images, or up to 16 for tensors")
    return values


Address = Annotated[str, AfterValidator(require_host_port)]
Numbers = Annotated[tuple[float, ...], AfterValidator(_per_channel)]
NumbersAbove0 = Annotated[tuple[Annotated[float, Field(gt=0)], ...], AfterValidator(_per_channel)]


class _Table(BaseModel):
    """A table that names files. Relative paths start at the folder of the configuration file."""

    model_config = ConfigDict(extra="forbid")

    _folder: Path = Path()

    def resolve(self, path: str) -> Path:
        """Return a path that is absolute or relative to the folder of the configuration file."""
        return self._folder / path


class ModelConfig(_Table):
    """One `[[models]]` table, which configures a model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Name that requests use.")]
    source: Annotated[
        str,
        Field(
            pattern=r"^(embedded|torchvision|timm|python|onnx|huggingface|torchscript|export):.+$",
            description="embedded:efficientnet-lite0, torchvision:NAME, timm:NAME, python:package.module:factory, "
            "onnx:FILE, huggingface:DIR_OR_NAME, torchscript:FILE or export:FILE.",
        ),
    ]
    weights: Annotated[
        str | None,
        Field(description='A .safetensors, .pt or .pth file, a name of torchvision weights, or "pretrained" for timm.'),
    ] = None
    weights_key: Annotated[
        str | None,
        Field(
            description="Entry of a checkpoint, or first part of its keys, such as state_dict_ema; if omitted, found."
        ),
    ] = None
    weights_sha256: Annotated[
        Sha256 | None, Field(description="SHA-256 of the weights file in hexadecimal; any other file is refused.")
    ] = None
    allow_random_weights: Annotated[
        bool, Field(description="Serve a torchvision or timm network with random weights.")
    ] = False
    allow_code: Annotated[
        bool, Field(description="Load a file of torchscript: or export:, whose code then runs in the server.")
    ] = False
    layers: Annotated[
        list[str] | None,
        Field(min_length=1, description="Layers, fine to coarse, for methods that use several; detected if omitted."),
    ] = None
    layer: Annotated[str | None, Field(description="Layer for methods that use one; detected if omitted.")] = None
    token_grid: Annotated[
        tuple[Positive, Positive] | None,
        Field(description="[height, width] of a transformer's grid of patch tokens; detected if omitted."),
    ] = None
    head: Annotated[
        Literal["softmax", "sigmoid", "probabilities"] | None,
        Field(
            description="How outputs become probabilities; if omitted, detected, else sigmoid for one, else softmax."
        ),
    ] = None
    classes: Annotated[
        int | None,
        Field(ge=1, description="Number of classes of the network; that of the network if omitted."),
    ] = None
    labels: Annotated[str | None, Field(description='"imagenet", or a file with one label per line.')] = None
    input_size: Annotated[tuple[Positive, Positive], Field(description="[height, width] of the input in pixels.")] = (
        224,
        224,
    )
    mean: Annotated[Numbers, Field(description="Mean of each channel, for pixels in [0, 1].")] = (0.485, 0.456, 0.406)
    std: Annotated[NumbersAbove0, Field(description="Standard deviation of each channel, for pixels in [0, 1].")] = (
        0.229,
        0.224,
        0.225,
    )
    interpolation: Annotated[
        Literal["nearest", "bilinear", "bicubic", "lanczos"],
        Field(description="Filter that resizes the whole image to the input size."),
    ] = "bilinear"
    precision: Annotated[
        tuple[Literal["fp32", "tf32", "bf16", "fp64"], ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
        Field(
            min_length=1,
            description="Arithmetic of the network; requests choose among several; the first is the default.",
        ),
    ] = ("fp32",)
    fold_batch_norm: Annotated[
        bool,
        Field(description="Merge convolutions with the batch norms after them; the result is equal up to rounding."),
    ] = True
    compile: Annotated[
        bool,
        Field(description="Compile the forward pass with torch.compile at load; on a CPU, this needs a C++ compiler."),
    ] = False
    batch_size: Annotated[
        int | None,
        Field(ge=1, le=1024, description="Batch size of every kind of lane; measured at warm-up if omitted."),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _complete_embedded_model(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Add the preprocessing and the labels of the embedded model, and refuse other weights for it."""
        if data.get("source") != "embedded:efficientnet-lite0":
            return data
        if data.get("weights") is not None or data.get("allow_random_weights"):
            raise ValueError("the embedded model has weights of its own; remove weights and allow_random_weights")
        grey, half = (127 / 255,) * 3, (128 / 255,) * 3
        return {"labels": "imagenet", "mean": grey, "std": half, "interpolation": "bicubic", **data}

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if self.classes is not None and self.source.startswith("embedded:"):
            raise ValueError("classes: the embedded model has 1000 classes; remove the key")
        return self

    @model_validator(mode="after")
    def _check_own_weights(self) -> Self:
        kind = self.source.partition(":")[0]
        if kind in ("onnx", "huggingface", "torchscript", "export"):
            for key in ("weights", "weights_key", "allow_random_weights"):
                if key in self.model_fields_set:
                    raise ValueError(f"{key}: the source {kind}: contains its weights; remove the key")
        if self.allow_code and kind not in ("torchscript", "export"):
            raise ValueError("allow_code: only the sources torchscript: and export: need it; remove the key")
        return self

    @property
    def source_file(self) -> Path | None:
        """The file that contains the network with its weights; None for other sources."""
        kind, _, name = self.source.partition(":")
        return self.resolve(name) if kind in ("onnx", "torchscript", "export") else None

    @property
    def weights_file(self) -> Path | None:
        """The file that `weights` names, or None if it does not name an existing file."""
        path = None if self.weights is None else self.resolve(self.weights)
        return path if path is not None and path.is_file() else None

    def check_pin(self) -> None:
        """Check the weights file against `weights_sha256`, if it is set.

        Raises:
            ConfigError: The weights are not a file, or their SHA-256 is different.
        """
        if self.weights_sha256 is None:
            return
        key = f"models.{self.name}.weights_sha256"
        path = self.source_file or self.weights_file
        if path is None:
            raise ConfigError(f"{key}: it applies to a weights file, but weights does not name an existing file")
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != self.weights_sha256:
            named = self.weights or self.source.partition(":")[2]
            raise ConfigError(f"{key}: expected {self.weights_sha256}, but {named} differs: its sha256 is {actual}")


class TLSConfig(_Table):
    """The `[tls]` table, which enables TLS."""

    certificate: Annotated[
        str, Field(description="PEM file: the server's certificate, followed by intermediate certificates.")
    ]
    key: Annotated[str, Field(description="PEM file: the private key of the certificate, not encrypted.")]
    client_ca: Annotated[
        str | None,
        Field(description="PEM file of CAs; if set, callers need a certificate that one of them signed."),
    ] = None
    allowed_subjects: Annotated[
        list[str] | None,
        Field(
            min_length=1,
            description="Common names or DNS names of certificates that may call; all of the CAs' if omitted.",
        ),
    ] = None

    @model_validator(mode="after")
    def _require_client_ca_for_subjects(self) -> Self:
        if self.allowed_subjects is not None and self.client_ca is None:
            raise ValueError("allowed_subjects: callers send no certificate without client_ca; set client_ca, too")
        return self


class TokenConfig(BaseModel):
    """One `[[tokens]]` table: the hash and the rights of a bearer token."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Name of the caller.")]
    sha256: Annotated[
        Sha256, Field(description="SHA-256 of the token in hexadecimal, as `camserve token` prints it.", repr=False)
    ]
    admin: Annotated[bool, Field(description="Allow calls of AdminService, too.")] = False
    max_rows_owed: Annotated[
        Positive | None, Field(description="Most rows that the caller may owe; max_rows_owed_per_caller if omitted.")
    ] = None
    priority: Annotated[
        Literal["low", "normal", "high"], Field(description="Highest priority of the caller's requests.")
    ] = "high"


def embedded_model() -> ModelConfig:
    """Return the configuration of the default model, EfficientNet-Lite0 with its ImageNet weights."""
    return ModelConfig(name="efficientnet-lite0", source="embedded:efficientnet-lite0")


class Config(BaseSettings):
    """All settings of the server."""

    model_config = SettingsConfigDict(env_prefix="CAMSERVE_", extra="forbid")

    listen: Annotated[Address, Field(description="Address of the server, HOST:PORT; port 0 selects a free port.")] = (
        "127.0.0.1:50051"
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
    health_listen: Annotated[
        Address | None, Field(description="Second listener, in plaintext, that serves Health only.")
    ] = None
    metrics_listen: Annotated[Address | None, Field(description="Listener for Prometheus, in plaintext.")] = None
    admin_listen: Annotated[
        Address | None, Field(description="Separate listener for AdminService, which loads and unloads models.")
    ] = None
    reflection: Annotated[bool, Field(description="Serve gRPC server reflection.")] = True
    device: Annotated[
        str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto selects a GPU if torch finds one.")
    ] = "auto"
    models: Annotated[list[ModelConfig], Field(description="Models to serve; the embedded model if omitted.")] = []
    threads: Annotated[
        int | None, Field(ge=1, description="CPU threads of the engine; the default of torch if omitted.")
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
    def _require_tls_off_loopback(self) -> Self:
        """Refuse plaintext listeners that other machines can reach, except for Health, whose probes have no TLS."""
        if self.metrics_listen is not None and not self.insecure and not is_loopback(self.metrics_listen):
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
