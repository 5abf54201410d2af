"""Checks of the documentation: its code runs, its links are valid, and it is complete."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import PIL.Image
import pytest
import skimage
from pydantic import BaseModel
from pydicom.data import get_testdata_file
from typer.main import get_command
from typer.testing import CliRunner

from camserve_cli.app import app
from camserve_server import registry
from camserve_server.config import CacheConfig, Config, ModelConfig, TLSConfig, embedded_model, read_config
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.processes import ROOT, completed

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
DOCUMENTED_ADDRESS = "127.0.0.1:50051"
# Pages of the documentation site refer to other files of the repository by their address.
REPOSITORY = "https://github.com/camserve/camserve/(?:blob|tree)/main/"

registry.discover()


def blocks(language: str, pages: Sequence[Path] = PAGES) -> list[object]:
    """Return each fenced block of the language as a parameter named after its page and position."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [
        pytest.param(text, id=f"{path.relative_to(ROOT)}:{i}")
        for path in pages
        for i, text in enumerate(fence.findall(path.read_text(encoding="utf-8")), 1)
    ]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def section(name: str, of: str) -> str:
    """Return the first section of the page that contains `name` in backticks."""
    sections = re.split(r"^(?=#{1,2} )", page(of), flags=re.MULTILINE)
    return next(text for text in sections[2:] if f"`{name}`" in text and "| [`" not in text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a working directory with the files that the documentation uses: a photograph and a CT image."""
    photograph = Path(skimage.__file__).parent / "data" / "chelsea.png"
    (tmp_path / "dog.jpg").write_bytes(photograph.read_bytes())
    (tmp_path / "image.dcm").write_bytes(Path(str(get_testdata_file("CT_small.dcm", download=False))).read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Run a server with the embedded network and a small input; Poly-CAM reads two of its five layers.

    The three coarsest layers have nine tenths of all channels, and each channel takes two rows.
    """
    layers = ["blocks.1.0.bn1", "blocks.2.0.bn1"]
    model = embedded_model().model_copy(update={"input_size": (96, 96), "batch_size": 4, "layers": layers})
    with serving(Config(listen="127.0.0.1:0", models=[model])) as running:
        yield running


# ---- code and commands -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str, server: Server, folder: Path) -> None:
    assert DOCUMENTED_ADDRESS in code
    ran = completed([sys.executable, "-W", "error", "-c", code.replace(DOCUMENTED_ADDRESS, server.address)])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout or (folder / "overlay.png").exists()


@pytest.mark.slow
def test_commands_run(server: Server, folder: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8") + page("quickstart.md")
    commands = re.findall(r"^\$ camserve ((?:list|explain|evaluate|replay|dicom explain) .*)$", text, re.MULTILINE)
    assert {command.split()[0] for command in commands} == {"list", "explain", "evaluate", "replay", "dicom"}
    for command in commands:
        result = CliRunner().invoke(app, [*shlex.split(command), "--address", server.address])
        assert result.exit_code == 0, f"{command}: {result.output}"
    assert (folder / "maps" / "dog.npy").exists()
    assert (folder / "maps" / "dog.png").exists()
    assert (folder / "results" / "image.sr.dcm").exists()


@pytest.mark.parametrize("text", blocks("console"))
def test_commands_use_existing_options(text: str) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for line in re.findall(r"^\$ camserve (.*)$", text.replace("\\\n", " "), re.MULTILINE):
        name, *arguments = shlex.split(line, comments=True)
        command = commands[name]
        if hasattr(command, "commands"):
            command = command.commands[arguments[0]]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {a for a in arguments if a.startswith("--")} <= options


def test_operations_page_names_existing_tests() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", page("operations.md"))
    assert len(named) > 30
    for path, name in named:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), name


@pytest.mark.parametrize(
    "text", blocks("toml", [path for path in PAGES if path.name not in ("add-a-method.md", "pacs.md")])
)
def test_toml_blocks_are_valid_configurations(text: str, tmp_path: Path) -> None:
    path = tmp_path / "camserve.toml"
    path.write_text(text, encoding="utf-8")
    assert read_config(path).models


def test_documented_default_configuration_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "camserve.toml"
    path.write_text(re.findall(r"```toml\n(.*?)```", page("configuration.md"), re.DOTALL)[0], encoding="utf-8")
    assert read_config(path).model_dump() == read_config().model_dump()


def test_documented_environment_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    [line] = re.findall(r"^\$ export (CAMSERVE_DEVICE.*)$", page("configuration.md"), re.MULTILINE)
    [models] = re.findall(r"^\$ export (CAMSERVE_MODELS.*)$", page("configuration.md"), re.MULTILINE)
    for assignment in [*shlex.split(line), *shlex.split(models)]:
        monkeypatch.setenv(*assignment.split("=", 1))
    config = read_config()
    assert (config.device, config.threads, config.grace_s, config.models[0].name) == ("cpu", 4, 10.0, "vgg16")


# ---- completeness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Config, ModelConfig, TLSConfig, CacheConfig])
def test_each_key_is_documented_with_its_default(kind: type[BaseModel]) -> None:
    for name, field in kind.model_fields.items():
        rows = [line for line in page("configuration.md").splitlines() if line.startswith(f"| `{name}` |")]
        assert len(rows) == 1, name
        default = rows[0].split(" | ")[-2]
        match field.default:
            case bool() as value:
                assert default == f"`{str(value).lower()}`", name
            case str() | int() | float() as value:
                assert default in (f"`{value}`", f'`"{value}"`'), name
            case tuple() as values:
                assert default == f"`{json.dumps(values)}`", name
            case _:  # required, or the server determines it
                assert not default.startswith("`"), name


@pytest.mark.slow
def test_page_of_methods_is_up_to_date(tmp_path: Path) -> None:
    made = tmp_path / "methods.md"
    command = [sys.executable, str(ROOT / "examples" / "methods_page.py"), "--out", str(made)]
    ran = completed(command)
    assert ran.returncode == 0, ran.stderr
    assert made.read_text(encoding="utf-8") == page("methods.md"), (
        "docs/methods.md is out of date: run make methods-page"
    )


@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_each_method_has_an_image_or_a_reason_for_having_none(name: str) -> None:
    sections = re.split(r"^### ", page("methods.md"), flags=re.MULTILINE)
    [text] = [text for text in sections if text.startswith(f"`{name}`")]
    picture = ROOT / "docs" / "pictures" / f"{name}.jpg"
    if "No image: " in text:
        assert not picture.exists()
        return
    assert f"(pictures/{name}.jpg)" in text
    assert picture.stat().st_size < 30_000  # noise takes the most
    with PIL.Image.open(picture) as image:
        assert 224 <= max(image.size) <= 300


def test_headings_of_methods_have_anchors_of_their_own() -> None:
    """GitHub and MkDocs number equal anchors differently, so a link to such an anchor works in one of them only."""
    headings = re.findall(r"^#+ (.*)$", page("methods.md"), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    assert len(plain) == len(set(plain))


@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_readme_lists_each_method(name: str) -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Methods\n")[2].partition("\n## ")[0]
    assert f"`{name}`" in table


def test_each_image_is_used() -> None:
    pages = {"bench": "benchmarks.md", "simulation": "simulation.md"}
    for path in (ROOT / "docs" / "pictures").iterdir():
        where = pages.get(path.name.partition("-")[0], "methods.md")
        assert f"(pictures/{path.name})" in page(where)


@pytest.mark.parametrize("name", sorted(registry.METRICS))
def test_each_metric_is_documented_with_its_parameters(name: str) -> None:
    metric = registry.METRICS[name]
    assert f"| [`{name}`](#" in page("metrics.md")
    text = section(name, "metrics.md")
    assert metric.paper in text
    for parameter in metric.parameters:
        default = str(parameter.default).lower() if isinstance(parameter.default, bool) else str(parameter.default)
        [row] = [line for line in text.splitlines() if line.startswith(f"| `{parameter.name}` | `{default}` |")]
        missing = [choice for choice in parameter.choices if f"`{choice}`" not in row]
        assert not missing


def test_quoted_code_is_part_of_the_linked_file() -> None:
    """On docs/add-a-method.md, each block of code quotes the file of the last link before it."""
    quoted = re.findall(
        rf"\]\({REPOSITORY}([\w./]+\.(?:py|toml))\)[^\]`]*?```(?:py|toml)\n(.*?)```", page("add-a-method.md"), re.DOTALL
    )
    assert len(quoted) == len(re.findall(r"^```(?:py|toml)$", page("add-a-method.md"), re.MULTILINE)) == 4
    for file, code in quoted:
        assert code in (ROOT / file).read_text(encoding="utf-8"), (
            f"docs/add-a-method.md quotes {file}: bring it up to date"
        )


def test_each_error_is_documented() -> None:
    from camserve import errors

    for kind in errors.CamserveError.__subclasses__():
        assert f"`{kind.__name__}`" in page("client.md")
        assert kind.code.name in page("client.md")


def test_each_decision_is_listed() -> None:
    listed = page("decisions/README.md")
    for decision in (ROOT / "docs" / "decisions").glob("[0-9]*.md"):
        assert f"({decision.name})" in listed


# ---- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_are_valid(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if in_repository := re.match(REPOSITORY, link):
            assert (ROOT / link[in_repository.end() :]).exists(), link
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_files_named_on_the_design_page_exist() -> None:
    """Paths on the page are relative to the repository or to the package of the server."""
    named = set(re.findall(r"`((?:[\w.]+/)+(?:[\w.]+\.(?:py|proto))?)`", page("design.md")))
    assert len(named) > 20
    folders = (ROOT, ROOT / "server" / "camserve_server")
    assert not [name for name in named if not any((folder / name).exists() for folder in folders)]


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes for the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in headings:
        plain = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{plain}-{seen[plain]}" if seen[plain] else plain)
        seen[plain] += 1
    return found
