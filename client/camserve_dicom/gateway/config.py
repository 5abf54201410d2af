"""The gateway's configuration: a TOML file. Every error names the key."""

from __future__ import annotations

import ssl
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from camserve.addresses import is_loopback, require_host_port
from camserve_dicom.derivation import DEFAULT_CHECK, check_metrics

__all__ = ["Config", "ConfigError", "PacsConfig", "Rule", "ServerConfig", "TLSConfig", "read"]

Address = Annotated[str, AfterValidator(require_host_port)]
Positive = Annotated[int, Field(ge=1)]
# What the standard lets an application entity call itself: no backslash, no space at either end.
AETitle = Annotated[str, Field(pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$")]


def _code_strings(given: Any) -> Any:
    """One or several of them, compared as they stand in headers: in capitals."""
    several = [given] if isinstance(given, str) else given
    return [each.strip().upper() if isinstance(each, str) else each for each in several]


CodeStrings = Annotated[list[str], BeforeValidator(_code_strings), Field(min_length=1)]


class ConfigError(ValueError):
    """The configuration is wrong; the message names the key."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TLSConfig(_Table):
    """The `[tls]` table: of the listener, and of connections to a PACS with `tls = true`."""

    certificate: Annotated[Path, Field(description="A PEM file: the gateway's certificate, then those up to the CA.")]
    key: Annotated[Path, Field(description="A PEM file: the certificate's private key, not encrypted.")]
    ca: Annotated[Path, Field(description="A PEM file of CAs. Both who calls and the PACS need a certificate of one.")]

    def listening(self) -> ssl.SSLContext:
        """For those who call. Raises ConfigError."""
        return self._filled(_ListenerContext(ssl.PROTOCOL_TLS_SERVER))

    def calling(self) -> ssl.SSLContext:
        """For calls to the PACS. Raises ConfigError."""
        return self._filled(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def _filled(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.verify_mode = ssl.CERT_REQUIRED
        for name, path in self:
            _readable(path, f"tls.{name}")
        try:
            context.load_verify_locations(self.ca)
        except ssl.SSLError as error:
            raise ConfigError(f"tls.ca: {self.ca} holds no certificate in PEM format") from error
        try:
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise ConfigError(f"tls.key: {self.key} is not the key of the certificate") from error
            raise ConfigError("tls.key: no certificate and key in PEM format, or the key is encrypted") from error
        return context


class _ListenerContext(ssl.SSLContext):
    """Shakes hands when a connection is first read, on its own thread: who never does must not keep others waiting."""

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        return super().wrap_socket(*args, **kwargs | {"do_handshake_on_connect": False})


class ServerConfig(_Table):
    """The `[server]` table: which camserve server explains."""

    address: Annotated[str, Field(description="HOST:PORT.")] = "127.0.0.1:50051"
    timeout_s: Annotated[float, Field(gt=0, description="Of each explanation.")] = 300.0
    tls: Annotated[bool, Field(description="Use TLS; `ca` and `certificate` do, too.")] = False
    ca: Annotated[Path | None, Field(description="A PEM file: whom to trust.")] = None
    certificate: Annotated[Path | None, Field(description="A PEM file: who the gateway is, for mutual TLS.")] = None
    key: Annotated[Path | None, Field(description="A PEM file: the key of `certificate`.")] = None
    token_file: Annotated[Path | None, Field(description="A file that holds the token.")] = None


class PacsConfig(_Table):
    """The `[pacs]` table: where results go."""

    ae_title: Annotated[AETitle | None, Field(description="Of the PACS.")] = None
    address: Annotated[Address | None, Field(description="HOST:PORT of the PACS's DIMSE listener.")] = None
    tls: Annotated[bool, Field(description="Call it by TLS, with the files of [tls].")] = False
    commitment: Annotated[bool, Field(description="Delete results only once the PACS commits itself to them.")] = True
    commitment_timeout_s: Annotated[float, Field(gt=0, description="After which it is asked again.")] = 3600.0
    commitment_ae_title: Annotated[
        AETitle | None, Field(description="With which it says what it has committed itself to, if not its own.")
    ] = None
    stow_url: Annotated[
        str | None, Field(pattern="^https?://.+$", description="Of DICOMweb's studies, instead of `address`.")
    ] = None
    stow_ca: Annotated[Path | None, Field(description="A PEM file: whom to trust by https.")] = None
    stow_authorization_file: Annotated[
        Path | None, Field(description="Holds what the Authorization header says, such as Bearer and a token.")
    ] = None
    timeout_s: Annotated[float, Field(gt=0, description="To connect, and for each answer.")] = 60.0

    @model_validator(mode="after")
    def _know_one_way(self) -> Self:
        if (self.address is None) == (self.stow_url is None):
            raise ValueError("give either address or stow_url, where results go")
        if self.address is not None and self.ae_title is None:
            raise ValueError("ae_title: a PACS that is called by DIMSE has one")
        return self

    @property
    def committers(self) -> set[str]:
        """AE titles that may say what the PACS has committed itself to."""
        return {*filter(None, (self.ae_title, self.commitment_ae_title))}

    @property
    def commits(self) -> bool:
        """Whether storage commitment is asked for: DICOMweb has none."""
        return self.commitment and self.stow_url is None


class Rule(_Table):
    """One `[[rules]]` table: what to do with the objects that it fits. The first that fits is taken."""

    modality: Annotated[CodeStrings | None, Field(description="Modality, such as CR: one or several.")] = None
    body_part: Annotated[CodeStrings | None, Field(description="BodyPartExamined, such as CHEST.")] = None
    callers: Annotated[list[AETitle] | None, Field(min_length=1, description="AE titles of who sent it.")] = None
    ignore: Annotated[bool, Field(description="Do nothing with it.")] = False
    model: Annotated[str | None, Field(description="The server's first if left out.")] = None
    method: str = "poly-cam"
    parameters: Annotated[dict[str, Any], Field(description="Of the method.")] = {}
    target: Annotated[int | str | None, Field(description="A class index or label; the predicted one if left out.")] = (
        None
    )
    metrics: Annotated[list[str], Field(description="How faithful the map is, in the report.")] = [
        "insertion",
        "deletion",
        "average-gain",
    ]
    outputs: Annotated[list[Literal["sc", "sr", "pm", "seg", "gsps"]], Field(min_length=1)] = ["sc", "sr"]
    check: Annotated[
        str, Field(description="What scores must keep, or the overlay is withheld; empty for nothing.")
    ] = DEFAULT_CHECK
    frame: Annotated[int, Field(ge=0, description="Of a multi-frame image.")] = 0
    window: Annotated[
        tuple[float, float] | None, Field(description="(centre, width) of the grey levels, instead of the header's.")
    ] = None
    regions: Annotated[Literal["refuse", "crop", "ignore"], Field(description="Of ultrasound images.")] = "refuse"
    burned_in: Annotated[
        Literal["refuse", "ignore"], Field(description="What to do if the header says that text is in the pixels.")
    ] = "refuse"

    @model_validator(mode="after")
    def _know_what_is_checked(self) -> Self:
        if lacking := [name for name in check_metrics(self.check or None) if name not in self.metrics]:
            raise ValueError(f"check: it needs the metric {lacking[0]}; add it to metrics")
        return self

    def fits(self, modality: str, body_part: str, caller: str) -> bool:
        """Whether the rule is for such an object; a condition that is left out fits any."""
        conditions = ((self.modality, modality), (self.body_part, body_part), (self.callers, caller))
        return all(wanted is None or found in wanted for wanted, found in conditions)

    def asked(self) -> dict[str, Any]:
        """What `camserve_dicom.explain` is asked for."""
        asked = self.model_dump(exclude={"modality", "body_part", "callers", "ignore"})
        return asked | {"check": self.check or None}


class Config(_Table):
    """Everything that can be set."""

    spool: Annotated[Path, Field(description="The folder of what is under way; made if it is not there.")]
    ae_title: Annotated[AETitle, Field(description="The gateway's own.")] = "CAMSERVE"
    listen: Annotated[Address, Field(description="HOST:PORT of the DIMSE listener; port 0 takes a free one.")] = (
        "127.0.0.1:11112"
    )
    monitor_listen: Annotated[Address | None, Field(description="HOST:PORT of /health and /metrics, in plaintext.")] = (
        None
    )
    monitor_insecure: Annotated[bool, Field(description="Let other machines reach monitor_listen.")] = False
    insecure: Annotated[bool, Field(description="Let images leave and enter this machine without TLS.")] = False
    callers: Annotated[list[AETitle], Field(min_length=1, description="AE titles that may send images.")]
    max_associations: Annotated[Positive, Field(description="At a time.")] = 10
    max_object_bytes: Annotated[Positive, Field(description="Of one object; a larger one is aborted.")] = 512 << 20
    max_waiting: Annotated[Positive, Field(description="Objects to explain; beyond it, senders are refused.")] = 10_000
    min_free_bytes: Annotated[int, Field(ge=0, description="On the spool's disk; below it, senders are refused.")] = (
        1 << 30
    )
    idle_s: Annotated[float, Field(gt=0, description="After which a silent association is aborted.")] = 60.0
    retention_h: Annotated[float, Field(gt=0, description="How long anything may stay in a stage of the spool.")] = (
        168.0
    )
    workers: Annotated[Positive, Field(description="Objects that are explained at a time.")] = 2
    grace_s: Annotated[float, Field(ge=0, description="How long what runs may take after SIGTERM.")] = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    tls: TLSConfig | None = None
    server: ServerConfig = ServerConfig()
    pacs: PacsConfig
    rules: Annotated[list[Rule], Field(min_length=1, description="What fits none of them is ignored.")] = [Rule()]

    @model_validator(mode="after")
    def _keep_plaintext_at_home(self) -> Self:
        if self.pacs.tls and self.tls is None:
            raise ValueError("pacs.tls: give [tls] with the files for it")
        secured = {"listen": self.tls is not None, "pacs.address": self.pacs.tls}
        addresses = {"listen": self.listen, "pacs.address": self.pacs.address}
        server = self.server
        if not (server.tls or server.ca or server.certificate or is_loopback(server.address)):
            secured["server.address"], addresses["server.address"] = False, server.address
        if self.pacs.stow_url is not None and urlsplit(self.pacs.stow_url).scheme == "http":
            # The host alone: a URL may hold a user name before it, as in http://localhost@pacs.example.
            host = urlsplit(self.pacs.stow_url).hostname or ""
            secured["pacs.stow_url"], addresses["pacs.stow_url"] = False, host
        for key, address in addresses.items():
            if address is not None and not secured[key] and not self.insecure and not is_loopback(address):
                raise ValueError(
                    f"{key}: {address} is beyond this machine, and there is no TLS; give [tls], use 127.0.0.1, or set "
                    "insecure = true if you trust the network"
                )
        return self

    @model_validator(mode="after")
    def _keep_the_monitor_at_home(self) -> Self:
        if self.monitor_listen is not None and not self.monitor_insecure and not is_loopback(self.monitor_listen):
            raise ValueError(
                f"monitor_listen: {self.monitor_listen} can be reached from other machines, and what it answers is "
                "plaintext; listen on 127.0.0.1, or set monitor_insecure = true if you trust the network"
            )
        return self

    def rule(self, modality: str, body_part: str, caller: str) -> Rule | None:
        """The first rule that fits; None where none does, or it says to ignore."""
        found = next((rule for rule in self.rules if rule.fits(modality, body_part, caller)), None)
        return None if found is None or found.ignore else found

    def check_files(self) -> None:
        """Whether the files that it names can be read. Raises ConfigError, naming the key."""
        if self.tls is not None:
            self.tls.listening()
        for table in ("server", "pacs"):
            for name, value in getattr(self, table):
                if isinstance(value, Path):
                    _readable(value, f"{table}.{name}")


def read(path: Path) -> Config:
    """The configuration from a TOML file; relative paths in it are looked up beside it. Raises ConfigError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        config = Config(**data)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        raise ConfigError("; ".join(map(_line, error.errors()))) from error
    for table in filter(None, (config, config.tls, config.server, config.pacs)):
        for name, value in table:
            if isinstance(value, Path):
                setattr(table, name, path.parent / value)
    return config


def _line(detail: Any) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    return ": ".join(filter(None, (".".join(map(str, detail["loc"])), message)))


def _readable(path: Path, key: str) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{key}: {error}") from error
