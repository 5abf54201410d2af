"""The server's certificate and the CAs of its clients. The files may change while the server runs."""

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
    """Return the credentials of a port. A changed file is read again at the next handshake.

    Args:
        tls: The configured files.

    Raises:
        ConfigError: A file cannot be read or is invalid; the message begins with its key.
    """
    reload: Any = _Reload(tls)  # the stubs of grpcio do not allow None as its result
    return grpc.dynamic_ssl_server_credentials(certificates(tls), reload, tls.client_ca is not None)


def certificates(tls: TLSConfig) -> grpc.ServerCertificateConfiguration:
    """Read and check the files.

    Args:
        tls: The configured files.

    Raises:
        ConfigError: A file cannot be read or is invalid; the message begins with its key.
    """
    pem = {key: _read(path, key) for key, path in paths(tls).items()}
    _check(tls)
    return grpc.ssl_server_certificate_configuration([(pem["key"], pem["certificate"])], pem.get("client_ca"))


class _Reload:
    """Returns the certificates if the files have changed, else None. gRPC calls it at each handshake, on a thread."""

    def __init__(self, tls: TLSConfig) -> None:
        self._tls = tls
        self._seen = self._stamps()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        stamps = self._stamps()
        if stamps == self._seen:
            return None
        self._seen = stamps  # set before reading, so that a change during the read is noticed at the next handshake
        try:
            fresh = certificates(self._tls)
        except ConfigError as error:
            log.warning(
                "changed TLS files are invalid; the previous ones stay in use", key=str(error).partition(":")[0]
            )
            return None
        log.info("TLS files read again")
        return fresh

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in paths(self._tls).values()]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:  # the file is being replaced
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def paths(tls: TLSConfig) -> dict[str, Path]:
    """Return the configured files by their key."""
    files = {"certificate": tls.certificate, "key": tls.key, "client_ca": tls.client_ca}
    return {key: tls.resolve(path) for key, path in files.items() if path is not None}


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"tls.{key}: {error}") from error


def _check(tls: TLSConfig) -> None:
    """Check the contents of the files. gRPC reports any invalid file only as a port that cannot be bound."""
    trial, files = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), paths(tls)
    for key in files.keys() - {"key"}:
        try:
            trial.load_verify_locations(files[key])
        except ssl.SSLError as error:
            raise ConfigError(f"tls.{key}: {files[key]} contains no certificate; expected PEM format") from error
    try:
        trial.load_cert_chain(
            files["certificate"], files["key"], password=lambda: ""
        )  # without it, OpenSSL would prompt
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"tls.key: {files['key']} does not belong to tls.certificate; configure the key of this certificate"
            ) from error
        raise ConfigError(
            f"tls.key: {files['key']} contains no usable private key; expected PEM format without encryption"
        ) from error
