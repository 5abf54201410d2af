"""The report of a run: its statistics against scipy, its page as text, and in a browser where there is one."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import scipy.stats
from playwright.sync_api import Page, sync_playwright
from typer.testing import CliRunner

import camserve
from camserve import catalogue
from camserve.v1 import explain_pb2 as pb
from camserve_cli import report
from camserve_cli.app import app
from camserve_cli.report import statistics
from camserve_cli.study import map_archive, run, score_csv

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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


def test_the_interval_is_that_of_a_percentile_bootstrap():
    values = np.random.default_rng(1).gamma(2, size=30)
    ours = statistics.interval(values)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=2)
    np.testing.assert_allclose(ours, theirs.confidence_interval, rtol=0.02)
    columns = np.stack([values, 3 * values + 1], 1)
    np.testing.assert_allclose(statistics.interval(columns), np.stack([ours, 3 * np.array(ours) + 1], 1))
    assert statistics.interval(values) == ours
    assert statistics.interval(np.array([0.5])) == (0.5, 0.5)


@pytest.mark.parametrize("count", [2, 7, 13, 25])
def test_the_sign_flips_are_those_of_a_paired_permutation_test(count):
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


def test_holm_orders_and_never_falls():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1, 1]
    assert statistics.holm([]) == []


# ---- a run ----------------------------------------------------------------------------------------------------------


def known() -> dict[str, Any]:
    """What a server says of what is in the run."""
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


def write_run(folder: Path, images: int = 12, models: Sequence[str] = ("first",)) -> dict[str, Path]:
    """The files of a run in which poly-cam is the best but for average drop, and one image has failed by grad-cam."""
    random = np.random.default_rng(0)
    names = [str(folder / (HOSTILE if i == 3 else f"{i:02}.png")) for i in range(images)]
    for name in names:
        PIL.Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(name)
    made = score_csv.ScoreCsv(folder / "s.csv", list(METRICS))
    maps = map_archive.MapWriter(folder / "s.npz")
    rows = []
    labels = [*METHODS, *(f"poly-cam@{name}" for name in ("coarse", "middle+", "fine+"))]
    for i, image in enumerate(names):
        for model, (j, label) in itertools.product(models, enumerate(labels)):
            row = dict.fromkeys(made.columns, "") | {"image": image, "model": model, "method": label}
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
    made.write(rows)
    maps.finish(f"{Path(row['image']).name}/{row['model']}/{row['method']}" for row in rows if not row["error"])
    return {"csv": folder / "s.csv", "npz": folder / "s.npz"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def written(folder: Path) -> Path:
    report.write(folder / "r.html", **write_run(folder), **known(), order=METHODS, command="camserve evaluate '<b>'")
    return folder / "r.html"


@pytest.fixture(scope="module")
def text(written: Path) -> str:
    return written.read_text(encoding="utf-8")


def plain(html: str) -> str:
    """Without its tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html.replace("</t", " </t")))


def row_of(method: str, text: str) -> str:
    return plain(re.search(rf'<th scope="row">{re.escape(method)}.*?</tr>', text, re.DOTALL)[0])


# ---- the page as text -----------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Headings, ids, and what stands in an element without its due."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.wrong: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        has = dict(attributes)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if has.get("id"):
            self.ids.append(str(has["id"]))
        due = {"img": "alt", "th": "scope", "svg": "aria-label", "section": "aria-labelledby", "html": "lang"}
        if tag in due and not has.get(due[tag]):
            self.wrong.append((tag, has))
        urls = [str(value) for name, value in attributes if name in ("src", "href", "action") and value]
        if any(not url.startswith(("data:image/", "#")) for url in urls):
            self.wrong.append((tag, has))


def test_the_page_is_well_formed_and_by_itself(text):
    outline = Outline()
    outline.feed(text)
    assert outline.wrong == []
    assert outline.headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(outline.ids) == len(set(outline.ids))
    assert text.count("<table") == text.count("<caption")
    assert "http://" not in text
    assert "https://" not in text


def test_means_intervals_and_what_is_best(text):
    assert row_of("poly-cam", text).split(" [")[0] == "poly-cam (compared with) 0.655 best"
    assert "115.5" not in row_of("poly-cam", text)
    assert row_of("grad-cam:&lt;b&gt;=1", text).startswith("grad-cam:&lt;b&gt;=1 0.455▼ worse [0.43")
    drops = [row_of(method, text) for method in ("poly-cam", "grad-cam:&lt;b&gt;=1", "fake-cam")]
    assert "45.5 best▲ better" in drops[1]
    assert "25.5▲ better" in drops[2], "a control is not best"
    assert text.index("Controls, which explain nothing") < text.index('<th scope="row">fake-cam')


def test_it_says_what_is_to_be_known(text):
    said = plain(text)
    for expected in [
        "3 methods on 12 images",
        "first has random weights.",
        "Average drop and average increase can be fooled",
        "better and ▼ worse than poly-cam on the same images",
        "cut short: 50% of its sum",
        "left out 9 channels, 18 rows; a layer's sum is off by 12.5% at most",
        "degenerate: nearly even 12 fake-cam (12)",
        "tabby, cat (281), probability 0.750",
        "steps of randomisation, from the last layer",
        "on the two coarsest, and so on until it has all",
        "&lt;i&gt;cannot&lt;/i&gt;",
        "camserve evaluate &#39;&lt;b&gt;&#39;",
        "sha256:ab",
    ]:
        assert expected in said, expected
    layers = [row_of(name, text[text.index('id="layers"') :]) for name in reversed(LAYERS)]
    assert [row.split()[:4] for row in layers] == [
        ["coarse", "7", "×", "7"],
        ["middle", "14", "×", "14"],
        ["fine", "28", "×", "28"],
    ]
    assert [row.split()[5] for row in layers] == ["0.155", "0.355", "0.555"]
    assert text.count('<ol class="strip"') == 4
    assert text.count('<li class="item"') == 12


def test_the_same_files_give_the_same_bytes(written, folder):
    files = {"csv": folder / "s.csv", "npz": folder / "s.npz"}
    report.write(folder / "again.html", **files, **known(), order=METHODS, command="camserve evaluate '<b>'")
    assert (folder / "again.html").read_bytes() == written.read_bytes()


def test_what_is_no_run_is_said(folder, written, tmp_path):
    files = {"csv": folder / "s.csv", "npz": folder / "s.npz"}
    with pytest.raises(camserve.InvalidArgument, match="no method 'cam' to compare with"):
        report.write(tmp_path / "r.html", **files, **known(), against="cam")
    with pytest.raises(camserve.InvalidArgument, match="is not a CSV file"):
        report.write(tmp_path / "r.html", **files | {"csv": written}, **known())
    with pytest.raises(camserve.InvalidArgument, match="is not an npz file"):
        report.write(tmp_path / "r.html", **files | {"npz": written}, **known())
    with pytest.raises(camserve.InvalidArgument, match="which the server does not know"):
        report.write(tmp_path / "r.html", **files, **known() | {"metrics": []})
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_gone_leave_their_maps(tmp_path):
    files = write_run(tmp_path, images=2)
    for image in tmp_path.glob("*.png"):
        image.unlink()
    report.write(tmp_path / "r.html", **files, **known(), most_images=1)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "The image cannot be read any more." in text
    assert "These are the first 1 of 2 images." in plain(text)
    assert text.count('alt="Map by') == 3


@pytest.mark.parametrize(("models", "tables"), [("ab", 1), ("abc", 3)])
def test_models_stand_side_by_side_as_far_as_they_fit(tmp_path, models, tables):
    report.write(tmp_path / "r.html", **write_run(tmp_path, images=2, models=models), **known())
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    groups = re.findall(r'<th scope="colgroup" colspan="4" class="group">(.)</th>', text)
    assert groups == (list(models) if tables == 1 else [])
    assert text.count("<caption>Means over images") == tables
    assert text.count('<li class="item"') == 2 * len(models)


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(written: Path) -> Iterator[Page]:
    if not CHROMIUM:
        pytest.skip("there is no Chromium here")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet, timeout=120_000)
        page = browser.new_page()
        page.requests, page.complaints = [], []  # type: ignore[attr-defined]
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(written.as_uri())
        yield page
        browser.close()


def shown(page: Page) -> list[str]:
    return [name.strip() for name in page.locator(".item h3").all_inner_texts()]


def test_nothing_leaves_the_page_and_no_name_does_harm(page, written):
    assert [url for url in page.requests if not url.startswith("data:")] == [written.as_uri()]
    assert page.complaints == []
    assert page.title() == "camserve: 3 methods on 12 images"
    assert HOSTILE in shown(page)


def test_images_are_sorted_by_keyboard_and_it_is_said(page):
    given = shown(page)
    page.locator("#sort-method").focus()
    for key in ("ArrowDown", "Tab", "ArrowDown", "Tab"):  # the second method, the second metric
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.textContent") == "Worst first"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    # Deletion falls from image to image; the sixth has failed by this method.
    order = [HOSTILE if i == 3 else f"{i:02}.png" for i in range(12) if i != 5] + ["05.png"]
    assert shown(page) == order
    assert page.locator("#sorted").inner_text() == f"Worst first, by Deletion of grad-cam:<b>=1: {order[0]}."
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert shown(page) == [*reversed(order[:-1]), order[-1]]
    assert page.locator('[aria-pressed="true"]').all_inner_texts() == ["Best first"]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert shown(page) == given


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_told_from_its_ground(page, scheme):
    page.emulate_media(color_scheme=scheme)
    ratios = page.evaluate(
        """() => {
          const light = (colour) => {
            const [r, g, b] = colour.match(/[\\d.]+/g).map((x) => x / 255)
              .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ground = (e) => {
            const colour = getComputedStyle(e).backgroundColor;
            return colour === "rgba(0, 0, 0, 0)" ? ground(e.parentElement) : colour;
          };
          return [...document.querySelectorAll("body *:not(svg *)")]
            .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
            .map((e) => {
              const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
              return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            });
        }"""
    )
    page.emulate_media(color_scheme="light")
    assert len(ratios) > 100
    assert min(ratios) >= 4.5


def test_it_fits_a_narrow_screen_and_a_printer(page):
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 696, "height": 1000})  # of A4 between its margins
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


def test_a_report_lies_beside_its_files_and_is_made_anew_from_them(address, servicer, photo, other, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["camserve", "evaluate", "here"])
    path = photo.parent / "out" / "r.html"
    options = (photo, other, "--method", "fake-cam", "--per-layer", "opti-cam:steps=2", "--report", path)
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
    asked = len(servicer.requests)
    monkeypatch.setattr(sys, "argv", ["camserve", "evaluate", "here", "--resume"])
    assert evaluate(address, *options, "--resume").exit_code == 0
    assert path.read_bytes() == first
    assert not any(hasattr(request, "image") for request in servicer.requests[asked:])


def test_wrong_usage_is_said_before_any_work(address, servicer, photo):
    path = photo.parent / "r.html"
    for options, code, said in [
        (("--against", "cam", "--report", path), 2, "one of the values of --method"),
        (("--against", "fake-cam", "--csv", path), 2, "--report"),
        (("--report", path.with_suffix(".csv")), 2, "another file"),
        (("--report", photo, "--csv", path), 1, "cat.jpg exists"),
        (("--per-layer", "fake-cam", "--report", path), 1, "fake-cam uses no layers"),
        (("--per-layer", "cam", "--report", path), 1, "there is no method 'cam'"),
    ]:
        ran = evaluate(address, photo, "--method", "fake-cam", *options)
        assert ran.exit_code == code
        assert said in ran.stderr
    assert evaluate(address, photo, "--method", "fake-cam", "--per-layer", "opti-cam").exit_code == 2
    assert not path.with_suffix(".csv").exists()
    assert not any(hasattr(request, "image") for request in servicer.requests)


def test_layers_of_methods_of_one_and_of_many():
    [model], methods = known()["models"], {each.name: each for each in known()["methods"]}
    variants = run.by_layer(camserve.Variant("p", "poly-cam", {"a": 1}), methods["poly-cam"], model)
    assert [(each.label, each.layers, each.parameters) for each in variants] == [
        ("p@coarse", ["coarse"], {"a": 1}),
        ("p@middle+", ["middle", "coarse"], {"a": 1}),
        ("p@fine+", ["fine", "middle", "coarse"], {"a": 1}),
    ]
