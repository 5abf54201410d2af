"""Files that the charts mount."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from tests.credentials import certify


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Create the files that the values in ci/ mount: certificates, weights, code and secrets."""
    ca = trustme.CA()
    for folder in ("tls", "models/chest", "models/skin/skin", "secrets/camserve-token", "secrets/worklist-token"):
        (tmp_path / folder).mkdir(parents=True)
    certify(ca, tmp_path / "tls")
    for old, new in {"server.pem": "tls.crt", "server.key": "tls.key", "ca.pem": "ca.crt"}.items():
        (tmp_path / "tls" / old).rename(tmp_path / "tls" / new)
    (tmp_path / "models/chest/chest.safetensors").touch()
    (tmp_path / "models/chest/labels.txt").write_text("\n".join(f"finding {i}" for i in range(14)))
    (tmp_path / "models/skin/skin.pt").touch()
    (tmp_path / "models/skin/skin/network.py").write_text("def factory(): ...\n")
    (tmp_path / "secrets/camserve-token/token").write_text("camserve_gateway-0123456789")
    (tmp_path / "secrets/worklist-token/authorization").write_text("Bearer 0123456789")
    return tmp_path
