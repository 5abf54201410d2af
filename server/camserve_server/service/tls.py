"""The server's certificate and the CAs of its clients, from files that may change while it runs."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import grpc
import structlog

from camserve_server.config import TLSConfig
from camserve_server.errors import ConfigError

log = structlog.get_logger()


def credentials(tls: TLSConfig) -> grpc.ServerCredentials:
    """For a port. Files that change are read again at the next handshake. Raises ConfigError."""
    renewed: Any = _Renewed(tls)  # grpcio's stubs forget that it may give None
    return grpc.dynamic_ssl_server_credentials(certificates(tls), renewed, tls.client_ca is not None)


def certificates(tls: TLSConfig) -> grpc.ServerCertificateConfiguration:
    """What the files hold. Raises ConfigError, naming the key of a file that cannot be read or does not fit."""
    pem = {key: _read(path, key) for key, path in _paths(tls).items()}
    _check(tls)
    return grpc.ssl_server_certificate_configuration([(pem["key"], pem["certificate"])], pem.get("client_ca"))


class _Renewed:
    """What gRPC asks, on a thread of its own, at each handshake: the certificates if they are new, or None."""

    def __init__(self, tls: TLSConfig) -> None:
        self._tls = tls
        self._seen = self._stamps()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        stamps = self._stamps()
        if stamps == self._seen:
            return None
        self._seen = stamps  # before they are read: what changes meanwhile is read at the next handshake
        try:
            fresh = certificates(self._tls)
        except ConfigError as error:
            log.warning("changed TLS files do not fit; the old ones stay", key=str(error).partition(":")[0])
            return None
        log.info("TLS files read again")
        return fresh

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in _paths(self._tls).values()]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:  # between the old one and the new one
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _paths(tls: TLSConfig) -> dict[str, Path]:
    named = {"certificate": tls.certificate, "key": tls.key, "client_ca": tls.client_ca}
    return {key: tls.resolve(path) for key, path in named.items() if path is not None}


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"tls.{key}: {error}") from error


def _check(tls: TLSConfig) -> None:
    """Whether the files are what they should be: gRPC says of a wrong one only that the port cannot be bound."""
    trial, paths = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), _paths(tls)
    for key in paths.keys() - {"key"}:
        try:
            trial.load_verify_locations(paths[key])
        except ssl.SSLError as error:
            raise ConfigError(f"tls.{key}: {paths[key]} holds no certificate in PEM format") from error
    try:
        trial.load_cert_chain(paths["certificate"], paths["key"], password=lambda: "")  # rather than ask a person
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"tls.key: {paths['key']} is not the key of the certificate") from error
        raise ConfigError(f"tls.key: {paths['key']} holds no private key in PEM format, or an encrypted one") from error
