"""Addresses are split as gRPC splits them, and only addresses of this machine are loopback."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import camserve
from camserve.addresses import is_loopback, is_loopback_host, require_host_port, split_host_port

LOOPBACK = [
    "127.0.0.1:1",
    "127.9.9.9:1",
    "127.0.0.1",
    "localhost:1",
    "LOCALHOST:1",
    "localhost",
    "[::1]:1",
    "[::1]",
    "::1",
    "[::ffff:127.0.0.1]:1",
    "dns:///localhost:1",
    "dns:127.9.9.9:1",
    "ipv4:127.0.0.1:1,127.0.0.1:2",
    "ipv6:[::1]:1",
    "unix:/run/camserve",
    "unix:///run/camserve",
    "unix-abstract:camserve",
]
ELSEWHERE = [
    "",
    ":1",
    "::1:5005",  # gRPC takes all of it as an IPv6 host
    "ipv6:::1:5005",
    "dns:///::1:5005",
    "[::1:5005",
    "[::1]x:5005",
    "[localhost]:1",
    "[127.0.0.1]:1",
    "[[::1]]:1",
    "10.0.0.1:1",
    "0.0.0.0:1",
    "[::]:1",
    "[2001:db8::1]:1",
    "[::ffff:10.0.0.1]:1",
    "127.1:1",
    "0127.0.0.1:1",
    "explain:1",
    "explain",
    "localhost.example:1",
    "localhost@explain.example",
    "localhost:1@explain.example",
    "localhost:1/explain.example",
    "explain.example:1,localhost:1",
    "localhost:1,explain.example:1",
    "ipv4:127.0.0.1:1,10.0.0.1:2",
    "dns:///explain.example:1",
    "dns://127.0.0.1/explain.example:1",
    "dns://8.8.8.8/localhost:1",
    "DNS:///localhost:1",
    "xds:///localhost",
    "http://localhost:1",
]


@pytest.mark.parametrize("address", LOOPBACK)
def test_address_of_this_machine_is_loopback(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize("address", ELSEWHERE)
def test_any_other_address_is_not_loopback(address: str) -> None:
    assert not is_loopback(address)


def test_names_of_hosts_are_not_forms_of_grpc_targets() -> None:
    """A machine of the network may have the name unix."""
    for address in (
        "unix:80",
        "unix-abstract:80",
        "unix:///run/camserve.sock",
        "dns:localhost",
        "localhost:1,[::1]:1",
        "",
    ):
        assert not is_loopback_host(address)
    for address in ("localhost", "LOCALHOST:80", "127.0.0.1:80", "[::1]:80"):
        assert is_loopback_host(address)


@pytest.mark.parametrize("address", [each for each in ELSEWHERE if each])
def test_client_refuses_to_send_a_token_in_plaintext_off_loopback(address: str) -> None:
    with pytest.raises(camserve.InvalidArgument) as caught:
        camserve.Client(address, token="secret")
    assert caught.value.field in ("token", "address")  # an IPv6 host without brackets is refused in any case


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("127.0.0.1:1", "127.0.0.1", "1"),
        ("explain:https", "explain", "https"),
        ("explain", "explain", ""),
        ("[::1]:1", "::1", "1"),
        ("[::1]", "::1", ""),
        ("::1:5005", "::1:5005", ""),
        ("[::1:5005", "", ""),
        ("[explain]:1", "", ""),
    ],
)
def test_address_is_split_into_host_and_port(address: str, host: str, port: str) -> None:
    assert split_host_port(address) == (host, port)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "explain:65535", "[::1]:50051", "[::]:1"])
def test_host_and_port_are_accepted(address: str) -> None:
    assert require_host_port(address) == address


@pytest.mark.parametrize(
    "address", ["", "1", ":1", "explain", "explain:", "explain:https", "explain:65536", "::1:5005", "[::1:1", "[::1]"]
)
def test_address_without_host_or_port_is_an_error(address: str) -> None:
    with pytest.raises(ValueError, match=r"is not HOST:PORT; write an IPv6 host in brackets"):
        require_host_port(address)


@given(st.text(alphabet="localhst127.:[]@,/%?# ", max_size=20))
def test_loopback_hosts_are_localhost_or_ip_addresses(address: str) -> None:
    """Check addresses that a careless parser could take for loopback against the first host that gRPC would see."""
    if is_loopback(address):
        for target in address.split(","):
            host, port = split_host_port(target)
            assert host.lower() == "localhost" or host.startswith("127.") or set(host) <= set("0123456789abcdef:.")
            assert not port or port.isalnum()


@pytest.mark.slow
@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_grpc_does_not_connect_to_the_port_of_an_unbracketed_ipv6_address() -> None:
    """Show why "::1:5005" is not loopback: gRPC does not reach the server that listens on port 5005 of ::1."""
    server = grpc.server(ThreadPoolExecutor(1))
    try:
        port = server.add_insecure_port("[::1]:0")
    except RuntimeError:
        pytest.skip("this machine has no IPv6 loopback interface")
    server.start()
    try:
        with grpc.insecure_channel(f"[::1]:{port}") as channel:
            grpc.channel_ready_future(channel).result(timeout=60)
        with grpc.insecure_channel(f"::1:{port}") as channel:
            states: list[grpc.ChannelConnectivity] = []
            channel.subscribe(states.append, try_to_connect=True)
            with pytest.raises(grpc.FutureTimeoutError):
                grpc.channel_ready_future(channel).result(timeout=2)
            assert grpc.ChannelConnectivity.READY not in states
    finally:
        server.stop(None)
