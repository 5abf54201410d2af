"""The tables of the configuration: models, TLS, tokens and the result cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from camserve.addresses import is_loopback, require_host_port
from camserve_server.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _per_channel(values: tuple[float, ...]) -> tuple[float, ...]:
    if not 1 <= len(values) <= 16:
        raise ValueError(f"{len(values)} numbers; expected three, one for grey-scale images, or up to 16 for tensors")
    return values


Numbers = Annotated[tuple[float, ...], AfterValidator(_per_channel)]
NumbersAbove0 = Annotated[tuple[Annotated[float, Field(gt=0)], ...], AfterValidator(_per_channel)]


class ConfigTable(BaseModel):
    """A table that names files. Relative paths start at the folder of the configuration file."""

    model_config = ConfigDict(extra="forbid")

    _folder: Path = Path()

    def resolve(self, path: str) -> Path:
        """Return a path that is absolute or relative to the folder of the configuration file."""
        return self._folder / path


class ModelConfig(ConfigTable):
    """One `[[models]]` table, which configures a model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Name that requests use.")]
    source: Annotated[
        str,
        Field(
            pattern=r"^(embedded|torchvision|timm|python|onnx|huggingface|torchscript|export|triton):.+$",
            description="embedded:efficientnet-lite0, torchvision:NAME, timm:NAME, python:package.module:factory, "
            "onnx:FILE, huggingface:DIR, huggingface:NAME@REVISION, torchscript:FILE, "
            "export:FILE or triton:HOST:PORT/MODEL.",
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
    remote_ca: Annotated[
        str | None,
        Field(description="PEM file with the root certificates of a remote server; plaintext if omitted."),
    ] = None
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
        tuple[Literal["fp32", "tf32", "bf16", "fp16", "fp64"], ...] | None,
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
        Field(
            min_length=1,
            description="Arithmetic of the network; requests choose among several; the first is the default. Without "
            "this key: tf32 on GPUs, otherwise fp32.",
        ),
    ] = None
    fold_batch_norm: Annotated[
        bool,
        Field(description="Merge convolutions with the batch norms after them; the result is equal up to rounding."),
    ] = True
    compile: Annotated[
        bool | Literal["auto"],
        Field(
            description="Compile the forward pass with torch.compile at load; auto does it on GPUs if there is a C "
            "compiler. On a CPU, true needs a C++ compiler."
        ),
    ] = "auto"
    openvino: Annotated[
        bool,
        Field(
            description="Run the forward pass in OpenVINO on a CPU if that is at least 1.15 times as fast and agrees; "
            "this needs `camserve[openvino]`."
        ),
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
        if kind in ("onnx", "huggingface", "torchscript", "export", "triton"):
            for key in ("weights", "weights_key", "allow_random_weights"):
                if key in self.model_fields_set:
                    raise ValueError(f"{key}: the source {kind}: contains its weights; remove the key")
        if self.allow_code and kind not in ("torchscript", "export"):
            raise ValueError("allow_code: only the sources torchscript: and export: need it; remove the key")
        return self

    @model_validator(mode="after")
    def _check_forward_pass(self) -> Self:
        if self.compile is True and self.openvino:
            raise ValueError("openvino: it takes the place of torch.compile; remove the key openvino or compile")
        return self

    @model_validator(mode="after")
    def _check_remote(self) -> Self:
        if self.remote is None:
            if self.remote_ca is not None:
                raise ValueError("remote_ca: only the source triton: needs it; remove the key")
            return self
        address, model = self.remote
        try:
            require_host_port(address)
        except ValueError as error:
            raise ValueError(f"source: {error}; expected triton:HOST:PORT/MODEL") from error
        if not model:
            raise ValueError("source: the name of the model is missing; expected triton:HOST:PORT/MODEL")
        if self.precision not in (None, ("fp32",)) or self.compile is True or self.openvino:
            raise ValueError(
                "precision: a remote server chooses its own arithmetic; remove the keys precision, compile and openvino"
            )
        return self

    @property
    def remote(self) -> tuple[str, str] | None:
        """Address HOST:PORT of the server of a remote model, and the name of the model; None for other sources."""
        kind, _, rest = self.source.partition(":")
        address, _, model = rest.partition("/")
        return (address, model) if kind == "triton" else None

    @property
    def images_leave(self) -> bool:
        """True if the server of a remote model may be on another machine."""
        return self.remote is not None and not is_loopback(self.remote[0])

    @property
    def source_file(self) -> Path | None:
        """The file of the source that contains the weights; None for other sources and for names of the Hub."""
        kind, _, name = self.source.partition(":")
        path = self.resolve(name)
        if kind == "huggingface":
            return path / "model.safetensors" if path.is_dir() else None
        return path if kind in ("onnx", "torchscript", "export") else None

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
        if path is None and self.source.startswith("huggingface:"):
            raise ConfigError(
                f"{key}: it applies to the model.safetensors of a directory; remove the key, and pin a name of the Hub "
                "by its commit: huggingface:NAME@COMMIT"
            )
        if path is None:
            raise ConfigError(f"{key}: it applies to a weights file, but weights does not name an existing file")
        if not path.is_file():
            raise ConfigError(f"{key}: there is no file {path}, to which it applies; add the file or remove the key")
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != self.weights_sha256:
            named = self.weights or self.source.partition(":")[2]
            raise ConfigError(f"{key}: expected {self.weights_sha256}, but {named} differs: its sha256 is {actual}")


class TLSConfig(ConfigTable):
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


class CacheConfig(BaseModel):
    """The `[cache]` table, which enables the result cache."""

    model_config = ConfigDict(extra="forbid")

    max_bytes: Annotated[
        int, Field(ge=0, description="Most bytes of responses in the memory of the server; 0 for Redis only.")
    ] = 268_435_456
    redis_url: Annotated[
        str | None,
        Field(
            repr=False,
            description="redis://, rediss:// or unix:// URL of a Redis or Valkey server that replicas share.",
        ),
    ] = None
    # Redis has no larger times than 2**63 milliseconds after 1970. This one has a century.
    ttl_s: Annotated[
        float, Field(ge=1, le=3.2e9, description="Seconds after which a stored response is not used any more.")
    ] = 86400.0
    shared: Annotated[bool, Field(description="Use the responses of a caller for all other callers, too.")] = False

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, url: str | None) -> str | None:
        """Check the URL. The errors do not quote it, because it can contain a password."""
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            place = parts.path if parts.scheme == "unix" else parts.hostname
            valid = bool(parts.scheme in ("redis", "rediss", "unix") and place and parts.port != 0)
        except ValueError:  # of the port
            valid = False
        if not valid:
            raise ValueError(
                "the URL is invalid; expected redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE], rediss://… for TLS, or "
                "unix://[USER:PASSWORD@]/PATH; write special characters of a password in percent-encoding"
            )
        return url

    @model_validator(mode="after")
    def _check_storage(self) -> Self:
        if not self.max_bytes and self.redis_url is None:
            raise ValueError("max_bytes: a cache of 0 bytes stores nothing; set max_bytes or redis_url")
        return self
