"""The configuration: a TOML file, `CAMSERVE_…` environment variables, flags; each overrides the one before."""

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


def _one_or_three(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) not in (1, 3):
        raise ValueError(f"{len(values)} numbers; expected three, or one for a network of grey-scale pictures")
    return values


Address = Annotated[str, AfterValidator(require_host_port)]
Numbers = Annotated[tuple[float, ...], AfterValidator(_one_or_three)]
NumbersAbove0 = Annotated[tuple[Annotated[float, Field(gt=0)], ...], AfterValidator(_one_or_three)]


class _Table(BaseModel):
    """A table that names files. Relative paths are looked up beside the configuration file."""

    model_config = ConfigDict(extra="forbid")

    _folder: Path = Path()

    def resolve(self, path: str) -> Path:
        """The path, looked up beside the configuration file."""
        return self._folder / path


class ModelConfig(_Table):
    """One `[[models]]` table."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="What callers ask for.")]
    source: Annotated[
        str,
        Field(
            pattern=r"^(embedded|torchvision|timm|python):.+$",
            description="embedded:efficientnet-lite0, torchvision:NAME, timm:NAME or python:package.module:factory.",
        ),
    ]
    weights: Annotated[
        str | None,
        Field(description='A .safetensors, .pt or .pth file, a torchvision name of weights, or timm\'s "pretrained".'),
    ] = None
    weights_sha256: Annotated[
        Sha256 | None, Field(description="Of the file of weights, in hexadecimal; another file is refused.")
    ] = None
    allow_random_weights: Annotated[bool, Field(description="Serve a network of torchvision or timm untrained.")] = (
        False
    )
    layers: Annotated[
        list[str] | None, Field(min_length=1, description="Fine to coarse; found by itself if left out.")
    ] = None
    layer: Annotated[
        str | None, Field(description="For methods that look at one layer; found by itself if left out.")
    ] = None
    token_grid: Annotated[
        tuple[Positive, Positive] | None,
        Field(description="[height, width] of a transformer's patches; found by itself if left out."),
    ] = None
    head: Annotated[
        Literal["softmax", "sigmoid"] | None, Field(description="softmax, or sigmoid for one logit, if left out.")
    ] = None
    classes: Annotated[
        int | None, Field(ge=1, description="Of a network of torchvision or timm; its own number if left out.")
    ] = None
    labels: Annotated[str | None, Field(description='"imagenet", or a file with one label a line.')] = None
    input_size: Annotated[tuple[Positive, Positive], Field(description="[height, width] in pixels.")] = (224, 224)
    mean: Annotated[Numbers, Field(description="Per channel, of pixels in [0, 1].")] = (0.485, 0.456, 0.406)
    std: Annotated[NumbersAbove0, Field(description="Per channel, of pixels in [0, 1].")] = (0.229, 0.224, 0.225)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    precision: Annotated[
        tuple[Literal["fp32", "tf32", "bf16", "fp64"], ...],
        BeforeValidator(lambda given: (given,) if isinstance(given, str) else given),
        Field(
            min_length=1, description="Arithmetic of the network; of several, requests may choose, the first if not."
        ),
    ] = ("fp32",)
    fold_batch_norm: Annotated[
        bool,
        Field(
            description="Compute convolutions and the batch norms after them in one step; but for rounding, the same."
        ),
    ] = True
    compile: Annotated[
        bool, Field(description="Compile the forward pass at load, by torch.compile: on CPUs it needs a C++ compiler.")
    ] = False
    batch_size: Annotated[
        int | None, Field(ge=1, le=1024, description="Of every lane; measured at warm-up if left out.")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _know_the_embedded_one(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Whoever names the embedded model gets its preprocessing and labels, and cannot change its weights."""
        if data.get("source") != "embedded:efficientnet-lite0":
            return data
        if data.get("weights") is not None or data.get("allow_random_weights"):
            raise ValueError("the embedded model has weights of its own")
        grey, half = (127 / 255,) * 3, (128 / 255,) * 3
        return {"labels": "imagenet", "mean": grey, "std": half, "interpolation": "bicubic", **data}

    @model_validator(mode="after")
    def _know_whose_classes_can_be_chosen(self) -> Self:
        if self.classes is not None and not self.source.startswith(("timm:", "torchvision:")):
            raise ValueError("classes: only networks of torchvision and timm are made for a number of classes")
        return self

    @property
    def weights_file(self) -> Path | None:
        """The file that `weights` names, if it is one."""
        path = None if self.weights is None else self.resolve(self.weights)
        return path if path is not None and path.is_file() else None

    def check_pin(self) -> None:
        """Raises ConfigError unless the file of weights is the one that `weights_sha256` pins, if it pins one."""
        if self.weights_sha256 is None:
            return
        where = f"models.{self.name}.weights_sha256"
        if self.weights_file is None:
            raise ConfigError(f"{where}: only a file can be pinned, and weights names none that is there")
        with self.weights_file.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.weights_sha256:
            raise ConfigError(f"{where}: {self.weights} is another file: its sha256 is {found}")


class TLSConfig(_Table):
    """The `[tls]` table."""

    certificate: Annotated[
        str, Field(description="A PEM file: the server's certificate, then those between it and the CA.")
    ]
    key: Annotated[str, Field(description="A PEM file: the certificate's private key, not encrypted.")]
    client_ca: Annotated[
        str | None,
        Field(description="A PEM file of CAs. If given, callers need a certificate that one of them signed."),
    ] = None
    allowed_subjects: Annotated[
        list[str] | None,
        Field(
            min_length=1,
            description="Common names or DNS names of the clients that may call; all of the CA's if left out.",
        ),
    ] = None

    @model_validator(mode="after")
    def _know_subjects_by_their_certificates(self) -> Self:
        if self.allowed_subjects is not None and self.client_ca is None:
            raise ValueError("allowed_subjects: without client_ca no caller shows a certificate")
        return self


class TokenConfig(BaseModel):
    """One `[[tokens]]` table: a bearer token, of which only the hash is known."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Of the caller.")]
    sha256: Annotated[
        Sha256, Field(description="Of the token, in hexadecimal, as `camserve token` prints it.", repr=False)
    ]
    admin: Annotated[bool, Field(description="Whether it may also call the AdminService.")] = False
    max_rows_owed: Annotated[
        Positive | None, Field(description="Of all its requests together; max_rows_owed_per_caller if left out.")
    ] = None
    priority: Annotated[
        Literal["low", "normal", "high"], Field(description="The highest that its requests can have.")
    ] = "high"


def embedded() -> ModelConfig:
    """The model that is served where the configuration names none: EfficientNet-Lite0 with its ImageNet weights."""
    return ModelConfig(name="efficientnet-lite0", source="embedded:efficientnet-lite0")


class Config(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(env_prefix="CAMSERVE_", extra="forbid")

    listen: Annotated[Address, Field(description="HOST:PORT; port 0 takes a free one.")] = "127.0.0.1:50051"
    insecure: Annotated[bool, Field(description="Let others than this machine's processes call without TLS.")] = False
    tls: Annotated[TLSConfig | None, Field(description="Encrypt, and know callers by certificates.")] = None
    tokens: Annotated[list[TokenConfig], Field(description="Bearer tokens; if there are any, calls need one.")] = []
    health_listen: Annotated[
        Address | None, Field(description="A second, plaintext listener, which serves Health only, for probes.")
    ] = None
    metrics_listen: Annotated[Address | None, Field(description="A listener for Prometheus, in plaintext.")] = None
    admin_listen: Annotated[
        Address | None, Field(description="A listener of its own for operators, who load and unload models.")
    ] = None
    reflection: Annotated[bool, Field(description="Serve gRPC server reflection.")] = True
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto takes a GPU if any.")] = "auto"
    models: Annotated[list[ModelConfig], Field(description="The embedded model if there are none.")] = []
    threads: Annotated[
        int | None, Field(ge=1, description="CPU threads of the engine; torch's own choice if none.")
    ] = None
    batch_invariant: Annotated[
        bool, Field(description="Pad every batch to its lane's size, so that a map does not depend on its neighbours.")
    ] = True
    max_rows_owed: Annotated[Positive, Field(description="Requests beyond it are refused until rows are done.")] = (
        200_000
    )
    max_rows_owed_per_caller: Annotated[
        Positive | None, Field(description="Of all requests of a caller together; tokens may say otherwise.")
    ] = None
    max_model_bytes: Annotated[
        Positive | None, Field(description="Of the weights of all loaded models; the least recently used makes room.")
    ] = None
    max_image_pixels: Annotated[Positive, Field(description="Of an image before it is resized.")] = 50_000_000
    max_message_bytes: Annotated[Positive, Field(description="Of a gRPC message in either direction.")] = 64 << 20
    grace_s: Annotated[float, Field(ge=0, description="How long running requests may take after SIGTERM.")] = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    _file: Path | None = None
    _flags: dict[str, Any] = {}

    def models_now(self) -> list[ModelConfig]:
        """The models as the configuration file has them by now. Raises ConfigError."""
        return read(self._file, **self._flags).models if self._file else self.models

    @model_validator(mode="after")
    def _unique_names(self) -> Self:
        names = [model.name for model in self.models]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"models: the name {twice.pop()!r} is given twice")
        return self

    @model_validator(mode="after")
    def _tell_tokens_apart(self) -> Self:
        for key in ("name", "sha256"):
            if len({getattr(token, key) for token in self.tokens}) < len(self.tokens):
                raise ValueError(f"tokens: two have the same {key}")
        return self

    @model_validator(mode="after")
    def _keep_plaintext_at_home(self) -> Self:
        """But for Health, which probes ask for that know nothing of certificates."""
        if self.metrics_listen is not None and not self.insecure and not is_loopback(self.metrics_listen):
            raise ValueError(
                f"metrics_listen: {self.metrics_listen} can be reached from other machines, and metrics are plaintext; "
                "listen on 127.0.0.1, or set insecure = true if you trust the network"
            )
        for key, address in (("listen", self.listen), ("admin_listen", self.admin_listen)):
            if address and self.tls is None and not self.insecure and not is_loopback(address):
                raise ValueError(
                    f"{key}: {address} can be reached from other machines, and there is no TLS; give [tls] with a "
                    "certificate and a key, listen on 127.0.0.1, or set insecure = true (CAMSERVE_INSECURE=true, "
                    "--insecure) if you trust the network"
                )
        return self

    @model_validator(mode="after")
    def _keep_strangers_from_models(self) -> Self:
        known = any(token.admin for token in self.tokens) or (not self.tokens and self.tls and self.tls.client_ca)
        if self.admin_listen and not known and not self.insecure and not is_loopback(self.admin_listen):
            raise ValueError(
                f"admin_listen: anybody who reaches {self.admin_listen} could unload models; give [[tokens]] with "
                "admin = true, or client_ca in [tls], or listen on 127.0.0.1"
            )
        return self


def read(path: Path | None = None, **flags: Any) -> Config:
    """The configuration from a file, the environment and those `flags` that are not None.

    Raises ConfigError, with a line for each fault that names its key.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8")) if path else {}
        config = _with_file(data)(**{key: value for key, value in flags.items() if value is not None})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        raise ConfigError("\n".join(_line(detail, data) for detail in error.errors())) from error
    config.models = config.models or [embedded()]
    config._file, config._flags = path, flags
    folder = path.parent if path else Path()
    for table in (*config.models, *([config.tls] if config.tls else [])):
        table._folder = folder
    return config


def _with_file(data: dict[str, Any]) -> type[Config]:
    class WithFile(Config):
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

    return WithFile


def _line(detail: Any, data: dict[str, Any]) -> str:
    match detail["loc"]:
        case ("models" | "tokens" as tables, int(i), *rest):
            place: tuple[Any, ...] = (tables, _name(data, tables, i), *rest)
        case place:
            pass
    # Errors of the whole configuration name the key themselves.
    return ": ".join(filter(None, (".".join(map(str, place)), detail["msg"].removeprefix("Value error, "))))


def _name(data: dict[str, Any], tables: str, i: int) -> str | int:
    """Of the i-th table in the file, as other errors call it; its number if it has none."""
    try:
        return str(data[tables][i]["name"])
    except (KeyError, IndexError, TypeError):  # from the environment, or not yet checked to be a table
        return i
