"""Authentication of callers by TLS, client certificates and tokens, over real connections."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import skimage.data
import trustme
from cryptography import x509
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

import camserve
from camserve.v1 import admin_pb2, admin_pb2_grpc
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve_server.__main__ import serve
from camserve_server.config import Config, ModelConfig, TLSConfig, TokenConfig, read_config
from camserve_server.errors import ConfigError
from camserve_server.service import security
from camserve_server.service.load_reports.reports import SERVICE as LOAD_REPORTS
from camserve_server.service.prometheus import Metrics
from camserve_server.service.tls import credentials
from tests.conftest import serving
from tests.credentials import certify, hashed
from tests.processes import LIMIT_S, TINY, patient_client, served

MODEL = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
LOCAL: dict[str, Any] = {"listen": "127.0.0.1:0", "models": [MODEL], "device": "cpu"}
SECRET, ADMIN_SECRET = "camserve_triage-0123456789", "camserve_admin-0123456789"


TOKENS = [
    TokenConfig(name="triage", sha256=hashed(SECRET)),
    TokenConfig(name="operator", sha256=hashed(ADMIN_SECRET), admin=True),
]


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


def tls(folder: Path, **more: Any) -> TLSConfig:
    return TLSConfig(certificate=str(folder / "server.pem"), key=str(folder / "server.key"), **more)


def mutual(folder: Path, **more: Any) -> TLSConfig:
    return tls(folder, client_ca=str(folder / "ca.pem"), **more)


def channel(address: str, ca: trustme.CA, certificate: trustme.LeafCert | None = None) -> grpc.Channel:
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()) if certificate else ()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca.cert_pem.bytes(), *pair))


def code(error: pytest.ExceptionInfo[grpc.RpcError]) -> str:
    assert isinstance(error.value, grpc.Call)
    name: str = error.value.code().name
    return name


def reason(error: pytest.ExceptionInfo[grpc.RpcError]) -> str:
    """Return the reason in the details of the error, which must also contain the id of the request."""
    status = rpc_status.from_call(error.value)
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.RequestInfo()
    assert status.details[0].Unpack(info)
    assert status.details[-1].Unpack(request)
    assert request.request_id
    reason: str = info.reason
    return reason


def load_report(channel: grpc.Channel) -> bytes:
    """Return the first load report of a server."""
    read: Any = channel.unary_stream(f"/{LOAD_REPORTS}/StreamCoreMetrics")
    stream = read(b"", timeout=LIMIT_S)
    report: bytes = next(stream)
    stream.cancel()
    return report


def every_kind_of_call(channel: grpc.Channel, metadata: Any = ()) -> list[Any]:
    """Return calls of each kind: unary, streaming in one direction, and streaming in both directions."""
    stub = ExplainServiceStub(channel)
    reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    request = pb.ExplainRequest(
        image=pb.Image(pixels=pb.Pixels(height=1, width=1, data=b"rgb")), method=pb.MethodSpec(name="grad-cam")
    )
    return [
        lambda: stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
        lambda: stub.Explain(request, metadata=metadata),
        lambda: [*stub.ExplainStream(pb.ExplainStreamRequest(request=request), metadata=metadata)],
        lambda: [*reflect(iter([question]), metadata=metadata)],
    ]


# ---- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1"])
def test_loopback_needs_no_tls(address: str) -> None:
    assert read_config(listen=address, admin_listen=address).listen == address


@pytest.mark.parametrize("key", ["listen", "admin_listen"])
@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "192.168.1.5:1", "camserve.example:1"])
def test_plaintext_beyond_loopback_is_refused(key: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {key: address}
    with pytest.raises(ConfigError, match=rf"^{key}: .*insecure = true"):
        read_config(**options)
    with_tls: dict[str, Any] = {"tls": {"certificate": "server.pem", "key": "server.key"}, "tokens": [TOKENS[1]]}
    assert read_config(**options, **with_tls).tls
    assert read_config(**options, insecure=True).insecure
    monkeypatch.setenv("CAMSERVE_INSECURE", "true")
    assert read_config(**options).insecure


@pytest.mark.parametrize("key", ["listen", "admin_listen", "metrics_listen", "health_listen"])
@pytest.mark.parametrize("address", ["::1:1", "[::1:1", "localhost", "127.0.0.1:65536"])
def test_listener_needs_a_host_and_a_port(key: str, address: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: .* is not HOST:PORT; write an IPv6 host in brackets"):
        read_config(**dict[str, Any]({key: address}))


def test_plaintext_beyond_loopback_is_an_error_at_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(listen="0.0.0.0:0") == 2
    assert capsys.readouterr().err.startswith("error: listen: 0.0.0.0:0 can be reached from other machines")


def test_admin_address_beyond_loopback_requires_authentication() -> None:
    files: dict[str, Any] = {"certificate": "server.pem", "key": "server.key"}
    with pytest.raises(ConfigError, match=r"^admin_listen: .*admin = true"):
        read_config(admin_listen="0.0.0.0:1", tls=files, tokens=TOKENS[:1])
    assert read_config(admin_listen="0.0.0.0:1", tls={**files, "client_ca": "ca.pem"})


# ---- TLS -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_configuration_file_sets_tls_subjects_and_tokens(tmp_path: Path, ca: trustme.CA) -> None:
    """A server process finds the files beside its configuration."""
    certify(ca, tmp_path)
    config = tmp_path / "camserve.toml"
    config.write_text(
        'listen = "127.0.0.1:0"\nhealth_listen = "127.0.0.1:0"\ndevice = "cpu"\n'
        '[tls]\ncertificate = "server.pem"\nkey = "server.key"\nclient_ca = "ca.pem"\nallowed_subjects = ["pacs"]\n'
        f'[[tokens]]\nname = "triage"\nsha256 = "{hashed(SECRET)}"\n{TINY}'
    )
    certificate = ca.issue_cert("pacs.example", common_name="pacs")
    options = {
        "ca": tmp_path / "ca.pem",
        "certificate": certificate.cert_chain_pems[0].bytes(),
        "key": certificate.private_key_pem.bytes(),
    }
    with served(config) as server:
        with patient_client(server.address, **options, token=SECRET) as client:
            assert client.explain(skimage.data.chelsea(), method="grad-cam").saliency.shape == (32, 32)
        with (
            patient_client(server.address, **options, token="camserve_guessed") as client,
            pytest.raises(camserve.Unauthenticated),
        ):
            client.models()
        with grpc.insecure_channel(server.health_address) as probes:
            assert health_pb2_grpc.HealthStub(probes).Check(health_pb2.HealthCheckRequest()).status
        log = server.stderr()
    assert '"UNAUTHENTICATED"' in log
    for secret in (SECRET, hashed(SECRET), "camserve_guessed", hashed("camserve_guessed")):
        assert secret not in log


@pytest.mark.slow
def test_connections_without_a_trusted_certificate_fail(tmp_path: Path, ca: trustme.CA) -> None:
    certify(ca, tmp_path)
    ours, theirs = ca.issue_cert("pacs.example"), trustme.CA().issue_cert("pacs.example")
    with serving(Config(**LOCAL, tls=mutual(tmp_path))) as server:
        with channel(server.address, ca, ours) as known:
            assert ExplainServiceStub(known).ListModels(pb.ListModelsRequest()).models
        for untrusted in (
            grpc.insecure_channel(server.address),
            channel(server.address, ca),
            channel(server.address, ca, theirs),
            channel(server.address, trustme.CA(), ours),
        ):
            with untrusted, pytest.raises(grpc.RpcError) as refused:
                ExplainServiceStub(untrusted).ListModels(pb.ListModelsRequest())
            assert code(refused) == "UNAVAILABLE"


@pytest.mark.slow
def test_changed_certificates_are_used_without_a_restart(tmp_path: Path, ca: trustme.CA) -> None:
    def served_serial() -> int:
        trusts = ssl.create_default_context(cadata=ca.cert_pem.bytes().decode())
        trusts.set_alpn_protocols(["h2"])
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port))) as raw, trusts.wrap_socket(raw, server_hostname=host) as wire:
            certificate = wire.getpeercert()
        assert certificate
        return int(str(certificate["serialNumber"]), 16)

    first = certify(ca, tmp_path)
    with serving(Config(**LOCAL, tls=tls(tmp_path))) as server:
        assert served_serial() == serial(first)
        second = certify(ca, tmp_path)
        assert served_serial() == serial(second)
        # The last valid pair stays in use while the key does not match, and while a file is invalid or missing.
        certify(ca, tmp_path, "other")
        (tmp_path / "other.pem").replace(tmp_path / "server.pem")
        assert served_serial() == serial(second)
        (tmp_path / "server.pem").write_text("half a certific")
        assert served_serial() == serial(second)
        (tmp_path / "server.pem").unlink()
        assert served_serial() == serial(second)
        third = certify(ca, tmp_path)
        assert served_serial() == serial(third)


def serial(certificate: trustme.LeafCert) -> int:
    return x509.load_pem_x509_certificate(certificate.cert_chain_pems[0].bytes()).serial_number


@pytest.mark.slow
def test_other_subjects_are_refused(tmp_path: Path, ca: trustme.CA) -> None:
    certify(ca, tmp_path)
    config = Config(**LOCAL, tls=mutual(tmp_path, allowed_subjects=["pacs", "triage.example"]))
    allowed = [
        ca.issue_cert("any.example", common_name="pacs"),
        ca.issue_cert("one.example", "triage.example", common_name="x"),
    ]
    with serving(config) as server:
        for certificate in allowed:
            with channel(server.address, ca, certificate) as known:
                for call in every_kind_of_call(known):
                    assert call()
        with channel(server.address, ca, ca.issue_cert("pacs.example", common_name="triage")) as other:
            for call in every_kind_of_call(other):
                with pytest.raises(grpc.RpcError) as refused:
                    call()
                assert (code(refused), reason(refused)) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
            assert load_report(other)
            assert health_pb2_grpc.HealthStub(other).Check(health_pb2.HealthCheckRequest()).status


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tokens() -> Iterator[tuple[grpc.Channel, grpc.Channel]]:
    """Run a server with tokens, and yield channels to it and to its listener for operators."""
    config = Config(**LOCAL, admin_listen="127.0.0.1:0", tokens=TOKENS)
    with (
        serving(config) as server,
        grpc.insecure_channel(server.address) as calls,
        grpc.insecure_channel(server.admin_address) as operations,
    ):
        yield calls, operations


def bearer(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        bearer("guessed"),
        bearer(""),
        bearer(hashed(SECRET)),
        bearer(SECRET[:-1]),
        (("authorization", SECRET),),
        (("authorization", f"Basic {SECRET}"),),
        bearer("guessed") + bearer(SECRET),
    ],
)
def test_only_health_and_load_reports_need_no_valid_token(
    with_tokens: tuple[grpc.Channel, grpc.Channel], metadata: Any
) -> None:
    calls, operations = with_tokens
    admin = admin_pb2_grpc.AdminServiceStub(operations).LoadModel
    for call in [
        *every_kind_of_call(calls, metadata),
        lambda: admin(admin_pb2.LoadModelRequest(model="tiny"), metadata=metadata),
    ]:
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert (code(refused), reason(refused)) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
        assert SECRET not in str(refused.value.details())
    assert health_pb2_grpc.HealthStub(calls).Check(health_pb2.HealthCheckRequest()).status
    assert load_report(calls)


@pytest.mark.parametrize("secret", [SECRET, ADMIN_SECRET])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_valid_token_allows_calls_of_each_kind(
    with_tokens: tuple[grpc.Channel, grpc.Channel], secret: str, scheme: str
) -> None:
    for call in every_kind_of_call(with_tokens[0], (("authorization", f"{scheme} {secret}"),)):
        assert call()


def test_loading_models_requires_an_admin_token(with_tokens: tuple[grpc.Channel, grpc.Channel]) -> None:
    load = admin_pb2_grpc.AdminServiceStub(with_tokens[1]).LoadModel
    with pytest.raises(grpc.RpcError) as refused:
        load(admin_pb2.LoadModelRequest(model="tiny"), metadata=bearer(SECRET))
    assert (code(refused), reason(refused)) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert load(admin_pb2.LoadModelRequest(model="tiny"), metadata=bearer(ADMIN_SECRET)).model.name == "tiny"


def test_messages_without_a_valid_token_are_not_parsed(with_tokens: tuple[grpc.Channel, grpc.Channel]) -> None:
    """Parsing bytes that are not a message gives another error."""
    send: grpc.UnaryUnaryMultiCallable[bytes, bytes]
    send = with_tokens[0].unary_unary("/camserve.v1.ExplainService/Explain")
    cases: list[tuple[tuple[tuple[str, str], ...], str]]
    cases = [((), "UNAUTHENTICATED"), (bearer(SECRET), "INVALID_ARGUMENT")]
    for metadata, expected in cases:
        with pytest.raises(grpc.RpcError) as refused:
            send(b"\xff" * 99, metadata=metadata)
        assert code(refused) == expected


CALLERS = {
    # tokens, mutual TLS, common name → name of the caller
    "a token": (TOKENS, False, None, "triage"),
    "a token before a certificate": (TOKENS, True, "pacs", "triage"),
    "a common name": ([], True, "pacs", "pacs"),
    "a DNS name": ([], True, None, "pacs.example"),
    "nobody": ([], False, None, ""),
}


@pytest.mark.parametrize(("tokens", "by_certificate", "common_name", "expected"), CALLERS.values(), ids=CALLERS)
def test_name_of_the_caller(
    tokens: list[TokenConfig],
    by_certificate: bool,
    common_name: str | None,
    expected: str,
    tmp_path: Path,
    ca: trustme.CA,
) -> None:
    """A service of the test returns the name in calls of each kind."""
    certificate = ca.issue_cert("pacs.example", common_name=common_name)
    certify(ca, tmp_path)
    config = Config(tokens=tokens, tls=mutual(tmp_path, allowed_subjects=["pacs.example"]) if by_certificate else None)

    async def one(_: Any, context: Any) -> bytes:
        return security.caller(context).encode()

    async def many(_: Any, context: Any) -> AsyncIterator[bytes]:
        yield security.caller(context).encode()

    kinds = {"unary_unary": one, "stream_unary": one, "unary_stream": many, "stream_stream": many}
    handlers = {kind: getattr(grpc, f"{kind}_rpc_method_handler")(answer) for kind, answer in kinds.items()}

    async def call_each_kind() -> list[bytes]:
        server = grpc.aio.server(interceptors=[security.Guard(config, Metrics().refused)])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Who", handlers),))
        if config.tls:
            port = server.add_secure_port("127.0.0.1:0", credentials(config.tls))
        else:
            port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        trusts = grpc.ssl_channel_credentials(
            ca.cert_pem.bytes(), certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()
        )
        address, answers = f"127.0.0.1:{port}", []
        async with (
            grpc.aio.secure_channel(address, trusts) if config.tls else grpc.aio.insecure_channel(address)
        ) as connection:
            for kind in kinds:
                request = iter([b""]) if kind.startswith("stream") else b""
                call = getattr(connection, kind)(f"/test.Who/{kind}")(request, metadata=bearer(SECRET))
                answers += [each async for each in call] if kind.endswith("stream") else [await call]
        await server.stop(0)
        return answers

    assert asyncio.run(call_each_kind()) == [expected.encode()] * 4


def test_names_and_secrets_of_tokens_are_unique() -> None:
    for key, other in (("name", {"sha256": hashed("other")}), ("sha256", {"name": "other"})):
        with pytest.raises(ConfigError, match=f"^tokens: two tokens have the same {key}"):
            read_config(tokens=[TOKENS[0], TOKENS[0].model_copy(update=other)])
