"""Certificates and tokens for tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import trustme


def hashed(secret: str) -> str:
    """Return the SHA-256 of a token in hexadecimal, as a server's configuration contains it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def certify(ca: trustme.CA, folder: Path, name: str = "server") -> trustme.LeafCert:
    """Issue a certificate for this machine; write it to NAME.pem and NAME.key, and the CA's certificate to ca.pem."""
    certificate = ca.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / f"{name}.key")
    (folder / f"{name}.pem").write_bytes(b"".join(each.bytes() for each in certificate.cert_chain_pems))
    ca.cert_pem.write_to_path(folder / "ca.pem")
    return certificate
