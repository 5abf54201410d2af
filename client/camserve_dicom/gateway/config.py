"""The configuration of the gateway, a TOML file."""

from __future__ import annotations

import re
import ssl
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, model_validator
from pydicom import Dataset

from camserve.addresses import is_loopback, is_loopback_host
from camserve.errors import InvalidArgument
from camserve_dicom.class_codes import ClassCode
from camserve_dicom.gateway.config_types import Address, Url
from camserve_dicom.gateway.notification_config import Notification
from camserve_dicom.gateway.rules import AETitle, ClassConfig, FlagConfig, ImageAttributes, Rule, StudyConfig, Table
from camserve_dicom.gateway.worklist_config import WorklistConfig
from camserve_dicom.pdf_report import require_fonts

__all__ = ["Config", "ConfigError", "PacsConfig", "Rule", "ServerConfig", "TLSConfig", "read"]

Positive = Annotated[int, Field(ge=1)]


class ConfigError(ValueError):
    """An invalid configuration. The message has a line for each fault, which begins with the key."""


class TLSConfig(Table):
    """The `[tls]` table: TLS of the listener, and of connections to a PACS with `tls = true`."""

    certificate: Annotated[Path, Field(description="A PEM file: the gateway's certificate and intermediate ones.")]
    key: Annotated[Path, Field(description="A PEM file: the private key of the certificate, not encrypted.")]
    ca: Annotated[Path, Field(description="A PEM file of the CAs that issue the certificates of callers and the PACS.")]

    def server_context(self) -> ssl.SSLContext:
        """Return the TLS context of the listener.

        Raises:
            ConfigError: If a file cannot be read or is invalid.
        """
        return self._load_files(_ListenerContext(ssl.PROTOCOL_TLS_SERVER))

    def client_context(self) -> ssl.SSLContext:
        """Return the TLS context of connections to the PACS.

        Raises:
            ConfigError: If a file cannot be read or is invalid.
        """
        return self._load_files(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def _load_files(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.verify_mode = ssl.CERT_REQUIRED
        for name, path in self:
            _require_readable(path, f"tls.{name}")
        try:
            context.load_verify_locations(self.ca)
        except ssl.SSLError as error:
            raise ConfigError(f"tls.ca: {self.ca} contains no certificate in PEM format") from error
        try:
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise ConfigError(f"tls.key: {self.key} is not the key of {self.certificate}") from error
            raise ConfigError(
                f"tls.key: {self.key} or {self.certificate} is not in PEM format, or the key is encrypted; expected an "
                "unencrypted key"
            ) from error
        return context


class _ListenerContext(ssl.SSLContext):
    """TLS context that performs the handshake when a connection is first read, on the thread of the connection.

    Otherwise a peer that does not complete its handshake would block the thread that accepts connections.
    """

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        return super().wrap_socket(*args, **kwargs | {"do_handshake_on_connect": False})


class ServerConfig(Table):
    """The `[server]` table: the camserve server that explains images."""

    address: Annotated[str, Field(description="HOST:PORT.")] = "127.0.0.1:50051"
    timeout_s: Annotated[float, Field(gt=0, description="Timeout of an explanation in seconds.")] = 300.0
    tls: Annotated[bool, Field(description="Use TLS. It is implied by `ca` and `certificate`.")] = False
    ca: Annotated[Path | None, Field(description="A PEM file: CAs of the server's certificate.")] = None
    certificate: Annotated[Path | None, Field(description="A PEM file: the gateway's certificate for mutual TLS.")] = (
        None
    )
    key: Annotated[Path | None, Field(description="A PEM file: the private key of `certificate`.")] = None
    token_file: Annotated[Path | None, Field(description="A file with the bearer token.")] = None


class PacsConfig(Table):
    """The `[pacs]` table: the PACS that stores results."""

    ae_title: Annotated[AETitle | None, Field(description="AE title of the PACS; required with `address`.")] = None
    address: Annotated[Address | None, Field(description="HOST:PORT of the DIMSE listener of the PACS.")] = None
    tls: Annotated[bool, Field(description="Connect with TLS, with the files of [tls].")] = False
    commitment: Annotated[
        bool, Field(description="Request storage commitment, and keep results until the PACS has committed.")
    ] = True
    commitment_timeout_s: Annotated[float, Field(gt=0, description="Seconds until the request is repeated.")] = 3600.0
    commitment_ae_title: Annotated[
        AETitle | None, Field(description="AE title that reports commitments, if it differs from `ae_title`.")
    ] = None
    stow_url: Annotated[Url | None, Field(description="URL of DICOMweb studies, instead of `address`.")] = None
    stow_ca: Annotated[Path | None, Field(description="A PEM file: CAs of the certificate of `stow_url`.")] = None
    stow_authorization_file: Annotated[
        Path | None, Field(description="A file with the Authorization header, such as Bearer and a token.")
    ] = None
    timeout_s: Annotated[float, Field(gt=0, description="Seconds to connect, and for each response.")] = 60.0

    @model_validator(mode="after")
    def _require_one_destination(self) -> Self:
        if (self.address is None) == (self.stow_url is None):
            found = "neither" if self.address is None else "both"
            raise ValueError(f"address: expected either address or stow_url; found {found}")
        if self.address is not None and self.ae_title is None:
            raise ValueError("ae_title: required with address; set it to the AE title of the PACS")
        return self

    @property
    def commitment_ae_titles(self) -> set[str]:
        """AE titles that may report storage commitments."""
        return {*filter(None, (self.ae_title, self.commitment_ae_title))}

    @property
    def requests_commitment(self) -> bool:
        """True if storage commitment is requested. DICOMweb does not support it."""
        return self.commitment and self.stow_url is None


class Config(Table):
    """The configuration of the gateway. `docs/pacs.md` describes the keys."""

    spool: Annotated[Path, Field(description="The folder of objects in progress, which is created if necessary.")]
    ae_title: Annotated[AETitle, Field(description="AE title of the gateway.")] = "CAMSERVE"
    listen: Annotated[Address, Field(description="HOST:PORT of the DIMSE listener. Port 0 selects a free port.")] = (
        "127.0.0.1:11112"
    )
    monitor_listen: Annotated[Address | None, Field(description="HOST:PORT of /health and /metrics, in plaintext.")] = (
        None
    )
    monitor_insecure: Annotated[bool, Field(description="Allow other machines to reach monitor_listen.")] = False
    insecure: Annotated[bool, Field(description="Allow plaintext connections to and from other machines.")] = False
    callers: Annotated[list[AETitle], Field(min_length=1, description="AE titles that may send images.")]
    max_associations: Annotated[Positive, Field(description="Maximum number of concurrent associations.")] = 10
    max_object_bytes: Annotated[Positive, Field(description="Maximum size of an object.")] = 512 << 20
    max_waiting: Annotated[Positive, Field(description="Maximum number of objects that wait for explanation.")] = 10_000
    min_free_bytes: Annotated[int, Field(ge=0, description="Free space on the spool's disk that stays unused.")] = (
        1 << 30
    )
    idle_s: Annotated[float, Field(gt=0, description="Seconds until an idle association is aborted.")] = 60.0
    retention_h: Annotated[float, Field(gt=0, description="Hours that an object may stay in a stage of the spool.")] = (
        168.0
    )
    workers: Annotated[Positive, Field(description="Number of concurrent explanations.")] = 2
    grace_s: Annotated[float, Field(ge=0, description="Seconds that running steps may take after SIGTERM.")] = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    tls: TLSConfig | None = None
    server: ServerConfig = ServerConfig()
    pacs: PacsConfig
    notifications: Annotated[
        tuple[Notification, ...], Field(description="Systems that get a message about results.")
    ] = ()
    worklist: Annotated[WorklistConfig | None, Field(description="Perform the workitems of a worklist.")] = None
    study: Annotated[StudyConfig | None, Field(description="Make a report of each study.")] = None
    flags: Annotated[
        tuple[FlagConfig, ...], Field(description="Conditions on images that a Key Object Selection names.")
    ] = ()
    classes: Annotated[tuple[ClassConfig, ...], Field(description="Codes of classes.")] = ()
    pdf_fonts: Annotated[tuple[Path, ...], Field(description="Font files for characters that DejaVu Sans lacks.")] = ()
    rules: Annotated[
        tuple[Rule, ...], Field(min_length=1, description="An object that no rule matches is ignored.")
    ] = (Rule(),)

    @model_validator(mode="after")
    def _require_tls_off_loopback(self) -> Self:
        """Check that images and tokens leave this machine only with TLS, and that the monitor is local."""
        faults = []
        if self.pacs.tls and self.tls is None:
            faults.append("pacs.tls: it needs the files of [tls]; add this table")
        names = [each.name for each in self.notifications]
        faults += [f"notifications: two of them have the name {name!r}" for name in {*names} if names.count(name) > 1]
        server = self.server
        plaintext = {
            "listen": None if self.tls else self.listen,
            "pacs.address": None if self.pacs.tls else self.pacs.address,
            "server.address": None if server.tls or server.ca or server.certificate else server.address,
            "pacs.stow_url": _plaintext_host(self.pacs.stow_url),
        }
        remedies = {
            "listen": "add [tls], listen on 127.0.0.1",
            "pacs.address": "set pacs.tls = true, use 127.0.0.1",
            "server.address": "set server.tls = true or server.ca, use 127.0.0.1",
            "pacs.stow_url": "use https, use 127.0.0.1",
        }
        for name in ("url", "retrieve_url"):
            plaintext[f"worklist.{name}"] = _plaintext_host(getattr(self.worklist, name, None))
            remedies[f"worklist.{name}"] = "use https, use 127.0.0.1"
        for index, each in enumerate(self.notifications):
            if each.tls and self.tls is None:
                faults.append(f"notifications.{index}.tls: it needs the files of [tls]; add this table")
            plaintext[f"notifications.{index}.mllp"] = None if each.tls else each.mllp
            plaintext[f"notifications.{index}.url"] = _plaintext_host(each.url)
            remedies |= {
                f"notifications.{index}.mllp": f"set tls = true for {each.name}, use 127.0.0.1",
                f"notifications.{index}.url": "use https, use 127.0.0.1",
            }
        faults += [
            f"{key}: {address} is not a loopback address, and there is no TLS; {remedies[key]}, or "
            "set insecure = true if you trust the network"
            for key, address in plaintext.items()
            if address is not None and not self.insecure and not is_loopback(address)
        ]
        if self.monitor_listen is not None and not self.monitor_insecure and not is_loopback_host(self.monitor_listen):
            faults.append(
                f"monitor_listen: {self.monitor_listen} can be reached from other machines, and its responses are "
                "plaintext; listen on 127.0.0.1, or set monitor_insecure = true if you trust the network"
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @model_validator(mode="after")
    def _require_consistent_tables(self) -> Self:
        if self.flags and self.study is None:
            raise ValueError("flags: flagged images are selected when a study is complete; add [study]")
        for number, notification in enumerate(self.notifications):
            if notification.about == ["studies"] and self.study is None:
                raise ValueError(
                    f"notifications.{number}.about: studies are reported only with [study]; add this table"
                )
        named = [(each.target, each.model) for each in self.classes]
        for number, each in enumerate(named):
            if each in named[:number]:
                raise ValueError(f"classes.{number}.target: {each[0]!r} has a code already; remove one of the tables")
        return self

    @property
    def class_codes(self) -> list[ClassCode]:
        """The codes of classes, those of a certain model first."""
        return sorted((each.class_code() for each in self.classes), key=lambda each: each.model is None)

    def rule(self, header: Dataset, caller: str) -> Rule | None:
        """Return the first rule that matches an object, or None if there is none or it ignores the object.

        Args:
            header: The header of the object, with at least the elements `rules.COMPARED`.
            caller: AE title of the sender.
        """
        image = ImageAttributes.of(header)
        found = next((rule for rule in self.rules if rule.matches(image, caller)), None)
        return None if found is None or found.ignore else found

    def check_files(self) -> None:
        """Check that the files of the configuration can be read.

        Raises:
            ConfigError: If a file cannot be read or is invalid. The message begins with its key.
        """
        if self.tls is not None:
            self.tls.server_context()
        tables: dict[str, Table | Notification] = {
            f"notifications.{index}": table for index, table in enumerate(self.notifications)
        }
        if self.worklist is not None:
            tables["worklist"] = self.worklist
        for key, table in ({"server": self.server, "pacs": self.pacs} | tables).items():
            for name, value in table:
                if isinstance(value, Path):
                    _require_readable(value, f"{key}.{name}")
        if self.pdf_fonts:
            try:
                require_fonts(self.pdf_fonts)
            except InvalidArgument as error:
                raise ConfigError(f"pdf_fonts: {error.message}") from error


def read(path: Path) -> Config:
    """Read the configuration from a TOML file.

    Args:
        path: The TOML file. Relative paths in it refer to its folder.

    Raises:
        ConfigError: If the file cannot be read, or for invalid keys, with a line for each.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        config = Config(**data)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        raise ConfigError("\n".join(map(_fault, error.errors()))) from error
    for table in filter(None, (config, config.tls, config.server, config.pacs, config.worklist, *config.notifications)):
        for name, value in table:
            if isinstance(value, Path):
                setattr(table, name, path.parent / value)
    config.pdf_fonts = tuple(path.parent / each for each in config.pdf_fonts)
    return config


def _plaintext_host(url: str | None) -> str | None:
    """Return the host of a URL without TLS, otherwise None."""
    parts = urlsplit(url or "")
    # Only the host: a user name may precede it, as in http://localhost@pacs.example.
    return parts.hostname or "" if parts.scheme == "http" else None


def _fault(detail: Any) -> str:
    """Format a validation error as "KEY: MESSAGE". Validators of whole tables begin their messages with a key."""
    keys, message = [*map(str, detail["loc"])], detail["msg"].removeprefix("Value error, ")
    if keys and (own_key := re.match(r"([a-z_]+): ", message)):
        keys.append(own_key[1])
        message = message[own_key.end() :]
    return ": ".join(filter(None, (".".join(keys), message)))


def _require_readable(path: Path, key: str) -> None:
    """Raise ConfigError, with the key in the message, if the file cannot be opened."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{key}: {error}") from error
