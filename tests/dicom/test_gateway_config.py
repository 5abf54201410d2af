"""The configuration of the gateway and its error messages."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import trustme
from pydantic import BaseModel

from camserve_dicom.gateway.config import Config, ConfigError, PacsConfig, ServerConfig, TLSConfig, read
from camserve_dicom.gateway.notification_config import Notification
from camserve_dicom.gateway.rules import ClassConfig, FlagConfig, Rule, StudyConfig
from camserve_dicom.gateway.worklist_config import WorklistConfig
from tests.processes import CAMSERVE, ROOT, completed

MINIMAL = """
spool = "spool"
callers = ["MODALITY"]

[pacs]
ae_title = "PACS"
address = "127.0.0.1:104"
"""
PAGE = (ROOT / "docs" / "pacs.md").read_text(encoding="utf-8")


def stow(url: str) -> tuple[str, str]:
    """Return the change of MINIMAL that stores results at a DICOMweb URL."""
    return 'address = "127.0.0.1:104"', f'stow_url = "{url}"'


def notified(lines: str) -> tuple[str, str]:
    """Return the change that adds a notification with these lines."""
    return "[pacs]", f'[[notifications]]\nname = "ris"\n{lines}\n[pacs]'


def worklist(lines: str) -> tuple[str, str]:
    """Return the change that adds a worklist with these lines."""
    return "[pacs]", f"[worklist]\n{lines}\n[pacs]"


def check(path: Path) -> subprocess.CompletedProcess[str]:
    """Run `camserve dicom gateway --check`."""
    return completed([*CAMSERVE, "dicom", "gateway", "--config", str(path), "--check"])


@pytest.mark.slow
def test_check_option_shows_the_configuration_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(MINIMAL)
    ran = check(path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.search(r"^pacs.address +\"127.0.0.1:104\" *$", ran.stdout, re.MULTILINE)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("spool", "spol"), "spool: Field required\nspol: Extra inputs"),
        (('callers = ["MODALITY"]', "callers = []"), "callers: List should have at least 1 item"),
        (('["MODALITY"]', '["a title that is too long"]'), "callers.0: String should match"),
        (('ae_title = "PACS"', ""), "pacs.ae_title: required with address"),
        (('address = "127.0.0.1:104"', ""), "pacs.address: expected either address or stow_url; found neither"),
        (("127.0.0.1:104", "pacs.example.org:104"), "pacs.address: pacs.example.org:104 is not a loopback address"),
        (("[pacs]", 'listen = "0.0.0.0:104"\n[pacs]'), "listen: 0.0.0.0:104 is not a loopback address"),
        (("[pacs]", 'listen = "::1:104"\n[pacs]'), "listen: '::1:104' is not HOST:PORT"),
        (("[pacs]", 'monitor_listen = "::1:80"\n[pacs]'), "monitor_listen: '::1:80' is not HOST:PORT"),
        (("127.0.0.1:104", "::1:104"), "pacs.address: '::1:104' is not HOST:PORT"),
        (("[pacs]", '[server]\naddress = "::1:5005"\n[pacs]'), "server.address: ::1:5005 is not a loopback address"),
        (stow("http://pacs.example.org/dicom-web"), "pacs.stow_url: pacs.example.org is not a loopback address"),
        (stow("HTTP://pacs.example.org/dicom-web"), "pacs.stow_url: "),
        (stow("http://localhost@pacs.example.org/"), "pacs.stow_url: pacs.example.org is not a loopback address"),
        (stow("http://localhost:80@pacs.example.org/"), "pacs.stow_url: pacs.example.org is not a loopback address"),
        (
            ("[pacs]", 'insecure = true\nmonitor_listen = "0.0.0.0:80"\n[pacs]'),
            "monitor_listen: 0.0.0.0:80 can be reached from other machines",
        ),
        (
            ("[pacs]", 'monitor_insecure = true\nmonitor_listen = "0.0.0.0:80"\nlisten = "0.0.0.0:104"\n[pacs]'),
            "listen: 0.0.0.0:104 is not a loopback address",
        ),
        (("[pacs]", "[pacs]\ntls = true"), "pacs.tls: it needs the files of [tls]"),
        (
            ("[pacs]", '[server]\naddress = "camserve.example.org:1"\n[pacs]'),
            "server.address: camserve.example.org:1 is",
        ),
        (("[pacs]", '[tls]\ncertificate = "a"\nkey = "b"\nca = "c"\n[pacs]'), "tls.certificate: "),
        (("[pacs]", '[server]\ntoken_file = "none"\n[pacs]'), "server.token_file: "),
        (("[pacs]", '[[rules]]\noutputs = ["jpeg"]\n[pacs]'), "rules.0.outputs.0: "),
        (("[pacs]", '[[rules]]\ncheck = "nonsense"\n[pacs]'), "rules.0.check: is 'nonsense'; expected a comparison"),
        (("[pacs]", '[[rules]]\ncheck = "road>0"\n[pacs]'), "rules.0.check: it needs the metric road"),
        (notified(""), "notifications.0.url: expected either url or mllp"),
        (notified('url = "http://127.0.0.1:1/"\ntls = true'), "notifications.0.tls: it does not apply to url"),
        (notified('mllp = "127.0.0.1:1"\nca = "ca.pem"'), "notifications.0.ca: it does not apply to mllp"),
        (notified('mllp = "ris.example.org:1"'), "notifications.0.mllp: ris.example.org:1 is not a loopback address"),
        (notified('url = "http://ris.example.org/"'), "notifications.0.url: ris.example.org is not a loopback address"),
        (notified('mllp = "127.0.0.1:1"\ntls = true'), "notifications.0.tls: it needs the files of [tls]"),
        (notified('url = "https://127.0.0.1:1/"\nca = "none.pem"'), "notifications.0.ca: "),
        (notified('url = "http://127.0.0.1:1/"\nattributes = ["PatientId"]'), "attributes: 'PatientId' is not the key"),
        (notified('url = "http://127.0.0.1:1/"\nattributes = ["PixelData"]'), "attributes: 'PixelData' is not the key"),
        (notified('mllp = "127.0.0.1:1"\nattributes = ["Modality"]'), "attributes: an HL7 message has no place for "),
        (notified('mllp = "127.0.0.1:1"\nattributes = ["PatientSex"]'), "attributes: HL7 requires PatientID with "),
        (notified('mllp = "127.0.0.1:1"\nsending_facility = "a^b"'), "notifications.0.sending_facility: String should"),
        (
            notified('mllp = "127.0.0.1:1"\n[[notifications]]\nname = "ris"\nmllp = "127.0.0.1:2"'),
            "notifications: two of them have the name 'ris'",
        ),
        (worklist('url = "https://ups.example.org/"'), "worklist.station: expected at least one of station, "),
        (worklist('label = "AI"'), "worklist.url: Field required"),
        (
            worklist('label = "AI"\nurl = "http://ups.example.org/"'),
            "worklist.url: ups.example.org is not a loopback address",
        ),
        (
            worklist('label = "AI"\nurl = "http://127.0.0.1/"\nretrieve_url = "http://pacs.example.org/"'),
            "worklist.retrieve_url: pacs.example.org is not a loopback address",
        ),
        (worklist('label = "AI"\nurl = "https://127.0.0.1/"\nca = "none.pem"'), "worklist.ca: "),
        (worklist('label = "AI"\nurl = "https://127.0.0.1/"\nauthorization_file = "none"'), "worklist.authorization_f"),
        (("[pacs]", "[pacs"), "gateway.toml: "),
    ],
)
def test_error_messages_begin_with_the_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(MINIMAL.replace(*change))
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(path).check_files()


@pytest.mark.slow
def test_command_prints_a_line_for_each_fault(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(MINIMAL.replace("[pacs]", 'listen = "0.0.0.0:104"\nmonitor_listen = "0.0.0.0:80"\n[pacs]'))
    ran = check(path)
    assert ran.returncode == 2
    assert [line.partition(" 0.0.0.0")[0] for line in ran.stderr.splitlines()] == [
        "error: listen:",
        "error: monitor_listen:",
    ]


def test_monitor_insecure_does_not_require_insecure(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(MINIMAL.replace("[pacs]", 'monitor_insecure = true\nmonitor_listen = "0.0.0.0:80"\n[pacs]'))
    assert read(path).monitor_listen == "0.0.0.0:80"


def test_tls_errors_name_the_key(tmp_path: Path) -> None:
    ca, certificate, other = trustme.CA(), trustme.CA().issue_cert("localhost"), trustme.CA().issue_cert("localhost")
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    other.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    tls = TLSConfig(certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem", ca=tmp_path / "ca.pem")
    with pytest.raises(ValueError, match=r"tls\.key: .* is not the key of "):
        tls.server_context()
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(ValueError, match=r"tls\.ca: .* contains no certificate"):
        tls.server_context()


@pytest.mark.parametrize(
    "kind",
    [
        Config,
        TLSConfig,
        ServerConfig,
        PacsConfig,
        Rule,
        StudyConfig,
        FlagConfig,
        ClassConfig,
        Notification,
        WorklistConfig,
    ],
)
def test_every_key_is_documented_with_its_default(kind: type[BaseModel]) -> None:
    for name, field in kind.model_fields.items():
        rows = [line for line in PAGE.splitlines() if re.match(rf"\| `{name}` \|", line)]
        assert rows, name
        defaults = [row.split(" | ")[2] for row in rows]
        match field.default:
            case bool() as value:
                assert f"`{str(value).lower()}`" in defaults, name
            case str() | int() | float() as value:
                assert {f"`{value}`", f'`"{value}"`'} & {*defaults}, name
            case _:  # required, or without a default value
                pass


def test_configurations_of_the_documentation_are_valid(tmp_path: Path) -> None:
    found = re.findall(r"^```toml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert found
    for i, text in enumerate([*found, (ROOT / "deploy" / "orthanc" / "gateway.toml").read_text()]):
        path = tmp_path / f"{i}.toml"
        path.write_text(text)
        assert read(path).callers
