"""Commands and imports in an interpreter in which packages of an extra are not installed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.processes import completed

# Each command that needs an extra, with its arguments, the extra, and packages that the test hides one at a time.
COMMANDS = [
    ("camserve", [], "cli", ["typer", "rich"]),
    ("camserve serve", [], "server", ["torch", "pydantic_settings"]),
    ("camserve config check", [], "server", ["pydantic_settings"]),
    ("camserve models probe", ["timm:resnet18"], "server", ["torch"]),
    ("camserve dicom explain", ["image.dcm", "--out", "out"], "dicom", ["pydicom", "highdicom"]),
    (
        "camserve dicom gateway",
        ["--config", "gateway.toml"],
        "gateway",
        ["pynetdicom", "pydicom"],
    ),
    (
        "camserve evaluate --report",
        ["report.html", "image.jpg", "--method", "cam"],
        "report",
        ["jinja2", "matplotlib"],
    ),
    (
        "camserve evaluate --ray",
        ["auto", "image.jpg", "--out", "out", "--method", "cam"],
        "ray",
        ["ray", "pyarrow", "torch"],
    ),
    ("camserve kserve", [], "kserve", ["kserve", "grpc_health", "opentelemetry"]),
    ("camserve bench --report", ["report.html"], "report", ["jinja2"]),
    ("camserve ray serve", [], "ray", ["ray", "torch"]),
    ("camserve ui", ["--no-browser"], "ui", ["starlette", "uvicorn"]),
]


def run_without(package: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new interpreter in which the import package `package` cannot be found."""
    hide = f"""
import sys
class Hidden:
    def find_spec(name, path=None, target=None):
        if name == {package!r} or name.startswith({package + "."!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden)
"""
    return completed([sys.executable, "-c", hide + code], env={**os.environ})


def run_command_without(package: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = ["camserve", *arguments]
    return run_without(package, f"sys.argv = {line!r}\nfrom camserve_cli.__main__ import main\nmain()")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "arguments", "extra", "package"),
    [
        pytest.param(command, arguments, extra, package, id=f"{command} without {package}")
        for command, arguments, extra, packages in COMMANDS
        for package in packages
    ],
)
def test_missing_extra_is_reported_with_its_installation(
    command: str, arguments: list[str], extra: str, package: str
) -> None:
    done = run_command_without(package, *command.split()[1:], *arguments)
    assert done.stderr == (
        f"error: `{command}` needs the package {package}, which is not installed; "
        f"install it with: pip install 'camserve[{extra}]'\n"
    )
    assert done.returncode == 2
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "arguments", "module"),
    [
        ("camserve", [], "camserve_cli.app"),
        ("camserve serve", [], "camserve_server.service.server"),
        ("camserve config check", [], "camserve_server.config"),
        ("camserve models probe", ["timm:resnet18"], "camserve_server.config"),
        ("camserve dicom explain", ["image.dcm", "--out", "out"], "camserve_dicom.errors"),
        ("camserve dicom gateway", ["--config", "gateway.toml"], "camserve_dicom.gateway.config"),
        ("camserve evaluate --report", ["report.html", "image.jpg", "--method", "cam"], "camserve_cli.report.records"),
        ("camserve bench --report", ["report.html"], "camserve_cli.report.records"),
        ("camserve ray serve", [], "camserve_ray.connection"),
        ("camserve ui", ["--no-browser"], "camserve_ui.app"),
    ],
)
def test_missing_module_of_camserve_is_not_reported_as_an_extra(
    command: str, arguments: list[str], module: str
) -> None:
    done = run_command_without(module, *command.split()[1:], *arguments)
    assert done.returncode == 1
    assert f"ModuleNotFoundError: No module named '{module}'" in done.stderr
    assert "pip install" not in done.stderr


@pytest.mark.slow
def test_help_needs_only_the_cli_extra() -> None:
    hidden = ("torch", "structlog", "pydicom", "pynetdicom", "jinja2", "matplotlib", "prometheus_client", "starlette")
    code = (
        f"for name in {hidden!r}: sys.modules[name] = None\n"
        "sys.argv = ['camserve', 'dicom', '--help']\nfrom camserve_cli.__main__ import main\nmain()"
    )
    done = run_without("camserve_server", code)
    assert done.returncode == 0, done.stderr
    assert "gateway" in done.stdout


@pytest.mark.slow
def test_importing_the_client_imports_no_optional_package() -> None:
    optional = ("torch", "torchvision", "typer", "rich", "camserve_server", "google.rpc", "grpc_status", "skimage")
    done = run_without("", f"import camserve; print([name for name in {optional!r} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr
