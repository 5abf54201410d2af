"""The listener of the metrics."""

from __future__ import annotations

import socket
import threading
import urllib.request

import pytest
from prometheus_client import CollectorRegistry

from camserve_server.service import prometheus
from tests.support import TIMEOUT_S


def test_silent_peer_keeps_no_thread(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(prometheus, "IDLE_S", 0.1)
    before = {*threading.enumerate()}
    listener = prometheus.Listener(CollectorRegistry(), "127.0.0.1:0")
    try:
        host, _, port = listener.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as silent:
            assert silent.recv(1) == b"", "the listener closes the connection"
        with urllib.request.urlopen(f"http://{listener.address}/metrics", timeout=TIMEOUT_S) as response:
            assert response.status == 200
    finally:
        listener.close()
    for thread in {*threading.enumerate()} - before:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    assert capsys.readouterr().err == ""
