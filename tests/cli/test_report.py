"""Report of a study: its statistics against scipy, and its page as text and in a browser."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import pytest
import scipy.stats
from playwright.sync_api import Page
from typer.testing import CliRunner

import camserve
from camserve import catalogue
from camserve.v1 import explain_pb2 as pb
from camserve_cli import report
from camserve_cli.app import app
from camserve_cli.report import statistics
from camserve_cli.study import map_archive, run, score_csv
from tests.browser import contrast_ratios, launched
from tests.client.fake_server import Servicer

HOSTILE = "<script>document.title = 'broken'<.png"
LAYERS = ("fine", "middle", "coarse")
METHODS = ("poly-cam", "grad-cam:<b>=1", "fake-cam")
LEFT_OUT = [
    {"layer": "bn1", "channels": 7, "rows": 14, "error": 0.05},
    {"layer": "bn2", "channels": 2, "rows": 4, "error": 0.125},
]
METRICS = {
    "insertion": ("Insertion", "1", True),
    "deletion": ("Deletion", "1", False),
    "average-drop": ("Average drop", "%", False),
    "randomisation-cascading": ("Randomisation", "1", False),
}

# ---- statistics -----------------------------------------------------------------------------------------------------


def test_interval_agrees_with_the_percentile_bootstrap_of_scipy() -> None:
    values = np.random.default_rng(1).gamma(2, size=30)
    ours = statistics.interval(values)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=2)
    np.testing.assert_allclose(ours, theirs.confidence_interval, rtol=0.02)
    columns = np.stack([values, 3 * values + 1], 1)
    np.testing.assert_allclose(statistics.interval(columns), np.stack([ours, 3 * np.array(ours) + 1], 1))
    assert [*map(float, statistics.interval(values))] == [*map(float, ours)]
    assert [*map(float, statistics.interval(np.array([0.5])))] == [0.5, 0.5]


@pytest.mark.parametrize("count", [2, 7, 13, 25])
def test_sign_flip_agrees_with_the_permutation_test_of_scipy(count: int) -> None:
    differences = np.random.default_rng(count).normal(0.4, 1, count)
    theirs = scipy.stats.permutation_test(
        (differences, np.zeros(count)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10_000,
        rng=3,
    ).pvalue
    exact = 2**count <= statistics.RESAMPLES
    assert statistics.sign_flip(differences) == pytest.approx(theirs, abs=1e-12 if exact else 0.02)
    assert statistics.sign_flip(np.zeros(count)) == statistics.sign_flip(differences[:1]) == 1


def test_holm_adjusts_by_rank_and_never_decreases() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1, 1]
    assert statistics.holm([]) == []


# ---- a study --------------------------------------------------------------------------------------------------------


def catalogue_of_study() -> dict[str, Any]:
    """Return the descriptions of the models, methods and metrics of the study."""
    layers = [pb.Layer(name=name, height=side, width=side) for name, side in zip(LAYERS, (28, 14, 7), strict=True)]
    model = pb.Model(name="first", source="torchvision:x", layers=layers, named_layers=layers, random_weights=True)
    methods = [
        pb.Method(name=name, title=name.title(), summary="It explains.", layers="many")
        for name in ("poly-cam", "grad-cam", "fake-cam")
    ]
    metrics = [
        pb.Metric(name=name, title=title, unit=unit, higher_is_better=higher)
        for name, (title, unit, higher) in METRICS.items()
    ]
    return {
        "models": catalogue.models(pb.ListModelsResponse(models=[model])),
        "methods": catalogue.methods(pb.ListMethodsResponse(methods=methods)),
        "metrics": catalogue.metrics(pb.ListMetricsResponse(metrics=metrics)),
    }


def write_study(folder: Path, images: int = 12, models: Sequence[str] = ("first",)) -> dict[str, Any]:
    """Write the files of a study and return their paths.

    Poly-CAM has the best scores except for average drop, and Grad-CAM failed for one image.
    """
    random = np.random.default_rng(0)
    names = [str(folder / (HOSTILE if i == 3 else f"{i:02}.png")) for i in range(images)]
    for name in names:
        PIL.Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(name)
    scores = score_csv.ScoreCsv(folder / "s.csv", list(METRICS))
    maps = map_archive.MapWriter(folder / "s.npz")
    rows = []
    labels = [*METHODS, *(f"poly-cam@{name}" for name in ("coarse", "middle+", "fine+"))]
    for i, image in enumerate(names):
        for model, (j, label) in itertools.product(models, enumerate(labels)):
            row = dict.fromkeys(scores.columns, "") | {"image": image, "model": model, "method": label}
            rows.append(row)
            if (i, j) == (5, 1):
                row["error"] = "the image <i>cannot</i> be read"
                continue
            quality = (0.6, 0.4, 0.2, 0.1, 0.3, 0.5)[j] + 0.01 * i
            curves = {"insertion": [0, quality, 1], "randomisation-cascading": [0.5, quality]}
            receipt = {"method": label.partition(":")[0].partition("@")[0], "model": model, "seed": 0}
            digests = {"model_digest": "sha256:ab", "input_digest": f"sha256:{i}", "map_digests": [f"sha256:{i}{j}"]}
            fixed = {"precision": "fp32", "device": "cpu", "preprocessing": "squash", "versions": {"torch": "2"}}
            row |= {
                "insertion": str(quality),
                "deletion": str(1 - quality),
                "average-drop": str(100 * quality),
                "randomisation-cascading": str(quality),
                "target": "281",
                "label": "tabby, cat",
                "probability": "0.75",
                "rows": str(10 ** (j + 1)),
                "compute_ms": "20",
                "share": "0.5" if j == 0 else "1",
                "warnings": "degenerate: nearly even" if j == 2 else "",
                "left_out": json.dumps(LEFT_OUT) if j == 0 else "[]",
                "receipt": json.dumps(receipt | digests | fixed),
                "curves": json.dumps(curves),
            }
            maps.add(f"{Path(image).name}/{model}/{label}", random.random((8, 8), dtype=np.float32))
    scores.write(rows)
    maps.finish(f"{Path(row['image']).name}/{row['model']}/{row['method']}" for row in rows if not row["error"])
    return {"csv": folder / "s.csv", "npz": folder / "s.npz"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def written(folder: Path) -> Path:
    report.write(
        folder / "r.html",
        **write_study(folder),
        **catalogue_of_study(),
        order=METHODS,
        command="camserve evaluate '<b>'",
    )
    return folder / "r.html"


@pytest.fixture(scope="module")
def text(written: Path) -> str:
    return written.read_text(encoding="utf-8")


def plain(html: str) -> str:
    """Return the text without tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html.replace("</t", " </t")))


def row_of(method: str, text: str) -> str:
    row = re.search(rf'<th scope="row">{re.escape(method)}.*?</tr>', text, re.DOTALL)
    assert row
    return plain(row[0])


# ---- the page as text -----------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Headings and ids of a page, and elements that lack a required attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.wrong: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if has.get("id"):
            self.ids.append(str(has["id"]))
        required = {"img": "alt", "th": "scope", "svg": "aria-label", "section": "aria-labelledby", "html": "lang"}
        if tag in required and not has.get(required[tag]):
            self.wrong.append((tag, has))
        urls = [str(value) for name, value in attrs if name in ("src", "href", "action") and value]
        if any(not url.startswith(("data:image/", "#")) for url in urls):
            self.wrong.append((tag, has))


def test_page_is_well_formed_and_self_contained(text: str) -> None:
    outline = Outline()
    outline.feed(text)
    assert outline.wrong == []
    assert outline.headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(outline.ids) == len(set(outline.ids))
    assert text.count("<table") == text.count("<caption")
    assert "http://" not in text
    assert "https://" not in text


def test_table_shows_means_intervals_and_the_best_method(text: str) -> None:
    assert row_of("poly-cam", text).split(" [")[0] == "poly-cam (reference) 0.655 best"
    assert "115.5" not in row_of("poly-cam", text)
    assert row_of("grad-cam:&lt;b&gt;=1", text).startswith("grad-cam:&lt;b&gt;=1 0.455▼ worse [0.43")
    drops = [row_of(method, text) for method in ("poly-cam", "grad-cam:&lt;b&gt;=1", "fake-cam")]
    assert "45.5 best▲ better" in drops[1]
    assert "25.5▲ better" in drops[2], "a control is never marked as the best"
    assert text.index("Controls (they explain nothing)") < text.index('<th scope="row">fake-cam')


def test_mean_of_a_single_image_has_no_interval(tmp_path: Path) -> None:
    files = write_study(tmp_path, images=1)
    report.write(tmp_path / "r.html", **files, **catalogue_of_study(), order=METHODS, command="camserve evaluate")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert 'class="interval"' not in text
    assert row_of("poly-cam", text).split()[:5] == ["poly-cam", "(reference)", "0.600", "best", "0.400"]
    assert "Scores of one image" in plain(text)
    assert "The scores of a single image have no confidence intervals." in plain(text)


def test_page_shows_warnings_failures_layers_and_provenance(text: str) -> None:
    content = plain(text)
    for expected in [
        "3 methods on 12 images",
        "first has random weights.",
        "Limits of average drop and average increase",
        "better and ▼ worse than poly-cam on the same images",
        "stopped early: 50% of its sum",
        "left out 9 channels and 18 rows; the sum of a layer has an error of at most 12.5%",
        "degenerate: nearly even 12 fake-cam (12)",
        "tabby, cat (281), probability 0.750",
        "steps of randomisation, from the last layer",
        "on the two coarsest layers, and so on up to all layers",
        "&lt;i&gt;cannot&lt;/i&gt;",
        "camserve evaluate &#39;&lt;b&gt;&#39;",
        "sha256:ab",
    ]:
        assert expected in content, expected
    layers = [row_of(name, text[text.index('id="layers"') :]) for name in reversed(LAYERS)]
    assert [row.split()[:4] for row in layers] == [
        ["coarse", "7", "×", "7"],
        ["middle", "14", "×", "14"],
        ["fine", "28", "×", "28"],
    ]
    assert [row.split()[5] for row in layers] == ["0.155", "0.355", "0.555"]
    assert text.count('<ol class="strip"') == 4
    assert text.count('<li class="item"') == 12


@pytest.mark.slow
def test_same_files_give_the_same_bytes(written: Path, folder: Path) -> None:
    files: dict[str, Any] = {"csv": folder / "s.csv", "npz": folder / "s.npz"}
    report.write(
        folder / "again.html", **files, **catalogue_of_study(), order=METHODS, command="camserve evaluate '<b>'"
    )
    assert (folder / "again.html").read_bytes() == written.read_bytes()


def test_files_that_are_not_a_study_raise(folder: Path, written: Path, tmp_path: Path) -> None:
    files: dict[str, Any] = {"csv": folder / "s.csv", "npz": folder / "s.npz"}
    with pytest.raises(camserve.InvalidArgument, match="no method 'cam' to compare with"):
        report.write(tmp_path / "r.html", **files, **catalogue_of_study(), against="cam")
    with pytest.raises(camserve.InvalidArgument, match="is not a CSV file"):
        report.write(tmp_path / "r.html", **files | {"csv": written}, **catalogue_of_study())
    with pytest.raises(camserve.InvalidArgument, match="is not an npz file"):
        report.write(tmp_path / "r.html", **files | {"npz": written}, **catalogue_of_study())
    with pytest.raises(camserve.InvalidArgument, match="which the server does not have"):
        report.write(tmp_path / "r.html", **files, **catalogue_of_study() | {"metrics": []})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_maps_are_shown_if_images_are_missing(tmp_path: Path) -> None:
    files = write_study(tmp_path, images=2)
    for image in tmp_path.glob("*.png"):
        image.unlink()
    report.write(tmp_path / "r.html", **files, **catalogue_of_study(), most_images=1)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "The image file cannot be read." in text
    assert "The first 1 of 2 images are shown." in plain(text)
    assert text.count('alt="Map by') == 3


@pytest.mark.slow
@pytest.mark.parametrize(("models", "tables"), [("ab", 1), ("abc", 3)])
def test_models_share_a_table_if_they_fit(tmp_path: Path, models: str, tables: int) -> None:
    report.write(tmp_path / "r.html", **write_study(tmp_path, images=2, models=models), **catalogue_of_study())
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    groups = re.findall(r'<th scope="colgroup" colspan="4" class="group">(.)</th>', text)
    assert groups == (list(models) if tables == 1 else [])
    assert text.count("<caption>Means over images") == tables
    assert text.count('<li class="item"') == 2 * len(models)


# ---- in a browser ---------------------------------------------------------------------------------------------------


@dataclass
class Visit:
    """Page in a browser, the addresses that it loaded, and its errors and messages."""

    page: Page
    urls: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def visit(written: Path) -> Iterator[Visit]:
    with launched() as browser:
        visit = Visit(browser.new_page())
        visit.page.on("request", lambda request: visit.urls.append(request.url))
        visit.page.on("console", lambda message: visit.messages.append(message.text))
        visit.page.on("pageerror", lambda error: visit.messages.append(str(error)))
        visit.page.goto(written.as_uri())
        yield visit


@pytest.fixture
def page(visit: Visit) -> Page:
    return visit.page


def shown(page: Page) -> list[str]:
    return [name.strip() for name in page.locator(".item h3").all_inner_texts()]


@pytest.mark.slow
def test_page_loads_nothing_and_escapes_names(visit: Visit, written: Path) -> None:
    page = visit.page
    assert [url for url in visit.urls if not url.startswith("data:")] == [written.as_uri()]
    assert visit.messages == []
    assert page.title() == "camserve: 3 methods on 12 images"
    assert HOSTILE in shown(page)


@pytest.mark.slow
def test_keyboard_sorts_images_and_announces_the_order(page: Page) -> None:
    original = shown(page)
    page.locator("#sort-method").focus()
    for key in ("ArrowDown", "Tab", "ArrowDown", "Tab"):  # the second method, the second metric
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.textContent") == "Worst first"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    # Deletion decreases from image to image. This method failed for the sixth image.
    order = [HOSTILE if i == 3 else f"{i:02}.png" for i in range(12) if i != 5] + ["05.png"]
    assert shown(page) == order
    assert page.locator("#sorted").inner_text() == f"Worst first, by Deletion of grad-cam:<b>=1: {order[0]}."
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert shown(page) == [*reversed(order[:-1]), order[-1]]
    assert page.locator('[aria-pressed="true"]').all_inner_texts() == ["Best first"]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert shown(page) == original


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_sufficient_contrast(page: Page, scheme: Literal["light", "dark"]) -> None:
    page.emulate_media(color_scheme=scheme)
    ratios = contrast_ratios(page)
    page.emulate_media(color_scheme="light")
    assert len(ratios) > 100
    assert min(ratios) >= 4.5


@pytest.mark.slow
def test_page_fits_a_narrow_screen_and_a_printer(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 696, "height": 1000})  # A4 without its margins
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 696
    assert page.locator("details:not([open])").count() == 0
    assert page.locator(".facts dd", has_text="sha256:ab").last.is_visible()
    assert page.locator(".sorting").is_hidden()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    page.emulate_media(media="screen")


# ---- the command line -----------------------------------------------------------------------------------------------


def evaluate(address: str, *options: object) -> Any:
    line = ["evaluate", *map(str, options), "--address", address, "--metric", "insertion"]
    return CliRunner().invoke(app, line, env={"COLUMNS": "200"})


@pytest.mark.slow
def test_report_is_written_beside_its_files_and_again_with_resume(
    address: str, servicer: Servicer, photo: Path, other_photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["camserve", "evaluate", "here"])
    path = photo.parent / "out" / "r.html"
    options = (photo, other_photo, "--method", "fake-cam", "--per-layer", "opti-cam:steps=2", "--report", path)
    ran = evaluate(address, *options)
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert sorted(each.name for each in path.parent.iterdir()) == ["r.csv", "r.html", "r.npz"]
    rows = score_csv.ScoreCsv(path.with_suffix(".csv"), ["insertion"]).rows()
    assert {method for _, _, method in rows} == {
        "fake-cam",
        "opti-cam:steps=2@shallow",
        "opti-cam:steps=2@deep[1]",
    }
    first = path.read_bytes()
    path.unlink()
    count = len(servicer.requests)
    monkeypatch.setattr(sys, "argv", ["camserve", "evaluate", "here", "--resume"])
    assert evaluate(address, *options, "--resume").exit_code == 0
    assert path.read_bytes() == first
    assert not any(hasattr(request, "image") for request in servicer.requests[count:])


@pytest.mark.slow
def test_wrong_usage_is_reported_before_any_request(address: str, servicer: Servicer, photo: Path) -> None:
    path = photo.parent / "r.html"
    for options, code, message in [
        (("--against", "cam", "--report", path), 2, "one of the values of --method"),
        (("--against", "fake-cam", "--csv", path), 2, "--report"),
        (("--report", path.with_suffix(".csv")), 2, "another file"),
        (("--report", photo, "--csv", path), 1, "cat.jpg exists"),
        (("--per-layer", "fake-cam", "--report", path), 1, "fake-cam uses no layers"),
        (("--per-layer", "cam", "--report", path), 1, "there is no method 'cam'"),
    ]:
        ran = evaluate(address, photo, "--method", "fake-cam", *options)
        assert ran.exit_code == code
        assert message in ran.stderr
    assert evaluate(address, photo, "--method", "fake-cam", "--per-layer", "opti-cam").exit_code == 2
    assert not path.with_suffix(".csv").exists()
    assert not any(hasattr(request, "image") for request in servicer.requests)


def test_layer_study_adds_layers_from_the_coarsest() -> None:
    [model], methods = catalogue_of_study()["models"], {each.name: each for each in catalogue_of_study()["methods"]}
    variants = run.by_layer(camserve.Variant("p", "poly-cam", {"a": 1}), methods["poly-cam"], model)
    assert [(each.label, each.layers, each.parameters) for each in variants] == [
        ("p@coarse", ["coarse"], {"a": 1}),
        ("p@middle+", ["middle", "coarse"], {"a": 1}),
        ("p@fine+", ["fine", "middle", "coarse"], {"a": 1}),
    ]
