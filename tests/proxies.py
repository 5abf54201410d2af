"""Real proxies in front of camserve servers: nginx and HAProxy of Debian."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL

import pytest

from tests.http2 import wait_until
from tests.processes import free_port, started

NGINX = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
worker_processes 1;
user root;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream camserve {{ {servers} }}
  server {{
    listen 127.0.0.1:{port} http2{ssl};
    {certificate}
    client_max_body_size {max_body};
    grpc_read_timeout {timeout_s}s;
    location / {{ grpc_pass grpc://camserve; }}
    {watch}
  }}
}}
"""
HAPROXY = """
global
  maxconn 64
  tune.bufsize 4194304
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server {timeout_ms}
frontend callers
  bind 127.0.0.1:{port} {bind}
  {watch}
  option http-buffer-request
  http-request deny deny_status 413 if {{ req.body_size gt {max_body} }}
  default_backend camserve
backend camserve
  balance roundrobin
  {servers}
"""


@dataclass(frozen=True)
class Settings:
    """Settings of a proxy.

    Attributes:
        max_body: Limit for the bodies of requests in bytes.
        timeout_s: Seconds without data from the server after which the proxy ends a call.
        watch: HTTP status with which the proxy refuses Health/Watch, or None to forward it.
        tls: Key and certificate chain of the proxy in PEM format, or None for plaintext.
    """

    max_body: int = 64 << 20
    timeout_s: int = 60
    watch: int | None = None
    tls: tuple[bytes, bytes] | None = None


def needs(proxy: str) -> None:
    """Skip the test if the proxy is not installed."""
    if shutil.which(proxy) is None:
        pytest.skip(f"needs {proxy}, a Debian package")


@contextmanager
def proxied(kind: str, backends: Sequence[str], folder: Path, settings: Settings) -> Iterator[str]:
    """Run a proxy and yield its address.

    Args:
        kind: "nginx" or "haproxy".
        backends: Addresses of the servers. The proxy uses them in turn.
        folder: Folder for the files of the proxy.
        settings: What the proxy does with the calls.
    """
    needs(kind)
    folder.mkdir(parents=True, exist_ok=True)
    port, certificate = free_port(), folder / "proxy.pem"
    if settings.tls is not None:
        certificate.write_bytes(settings.tls[0] + settings.tls[1])
    config = folder / f"{kind}.conf"
    config.write_text(_nginx(port, backends, folder, settings, certificate) if kind == "nginx" else "")
    if kind == "haproxy":
        config.write_text(_haproxy(port, backends, settings, certificate))
    options = ["-e", str(folder / "error.log"), "-c"] if kind == "nginx" else ["-db", "-f"]
    with started([kind, *options, config], stdout=DEVNULL, stderr=DEVNULL) as process:

        def accepts() -> bool:
            assert process.poll() is None, f"{kind} ended; see {folder}"
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(accepts)
        try:
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()  # nginx then ends its worker, which would survive SIGKILL
            process.wait()


def _nginx(port: int, backends: Sequence[str], folder: Path, settings: Settings, certificate: Path) -> str:
    refused = f"location = /grpc.health.v1.Health/Watch {{ return {settings.watch}; }}"
    secured = f"ssl_certificate {certificate}; ssl_certificate_key {certificate};"
    return NGINX.format(
        folder=folder,
        port=port,
        servers=" ".join(f"server {each};" for each in backends),
        ssl=" ssl" if settings.tls else "",
        certificate=secured if settings.tls else "",
        max_body=settings.max_body,
        timeout_s=settings.timeout_s,
        watch=refused if settings.watch else "",
    )


def _haproxy(port: int, backends: Sequence[str], settings: Settings, certificate: Path) -> str:
    refused = f"http-request deny deny_status {settings.watch} if {{ path /grpc.health.v1.Health/Watch }}"
    return HAPROXY.format(
        port=port,
        servers="\n  ".join(f"server s{i} {each} proto h2" for i, each in enumerate(backends)),
        bind=f"ssl crt {certificate} alpn h2" if settings.tls else "proto h2",
        max_body=settings.max_body,
        timeout_ms=1000 * settings.timeout_s,
        watch=refused if settings.watch else "",
    )
