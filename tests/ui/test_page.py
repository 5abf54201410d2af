"""The page in a browser, with a real server."""

from __future__ import annotations

import base64
from dataclasses import asdict
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Browser, Locator, Page, Route, expect
from safetensors.torch import save_file

import camserve
from camserve.heatmaps import COLOURS
from camserve_server.config import Config, ModelConfig
from camserve_server.service.server import Server
from camserve_ui import image_files
from tests import nets
from tests.browser import contrast_ratios
from tests.conftest import serving
from tests.processes import ROOT, free_port
from tests.ui.conftest import Running, Visit, running_ui, visit

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "client" / "camserve_ui" / "examples"
CAT = EXAMPLES / "cat.jpg"


def card(page: Page, title: str) -> Locator:
    return page.locator(".card", has=page.get_by_role("heading", name=title, exact=True))


def pixels(canvas: Locator) -> list[int]:
    """Return the RGBA values of a canvas."""
    values: list[int] = canvas.evaluate(
        "e => [...e.getContext('2d').getImageData(0, 0, e.width, e.height).data]",
    )
    return values


def colours(saliency: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the colours, uint8 [H, W, 3], of `camserve.heatmaps` for a map."""
    indices = np.floor(255 * saliency.astype(np.float64) + 0.5).astype(int)
    return np.take(COLOURS, indices, axis=0)


def shows(canvas: Locator, saliency: NDArray[np.float32]) -> bool:
    """Return True if a canvas shows the colours of a map and nothing else."""
    shown = np.array(pixels(canvas), np.uint8).reshape(*saliency.shape, 4)
    return bool((shown[..., 3] == 255).all()) and np.array_equal(shown[..., :3], colours(saliency))


# ---- images ---------------------------------------------------------------------------------------------------------


def test_page_contacts_only_its_own_server(tab: Visit, ui: Running) -> None:
    tab.example()
    tab.explain("grad-cam")
    own = (ui.url, f"blob:{ui.url}")
    assert len(tab.requests) > 10
    assert [url for url in tab.requests if not url.startswith(own)] == []
    assert tab.messages == []


def drop_file(page: Page, path: Path) -> None:
    """Drop a file on the page, away from the field."""
    transfer = page.evaluate_handle(
        """([data, name]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
          return transfer;
        }""",
        [base64.b64encode(path.read_bytes()).decode(), path.name],
    )
    page.dispatch_event("#results", "drop", {"dataTransfer": transfer})


def paste_image(page: Page) -> None:
    """Copy an image to the clipboard and paste it with the keyboard."""
    page.evaluate(
        """async () => {
          const canvas = Object.assign(document.createElement("canvas"), { width: 40, height: 30 });
          const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
          await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }"""
    )
    page.keyboard.press("Control+V")


def test_images_are_chosen_dropped_pasted_or_examples(tab: Visit) -> None:
    shown = tab.page.locator("#loaded-text")
    tab.page.get_by_label("Image", exact=True).set_input_files(CAT)
    expect(shown).to_have_text("cat.jpg, 451 × 300 pixels")
    drop_file(tab.page, EXAMPLES / "coffee.jpg")
    expect(shown).to_have_text("coffee.jpg, 600 × 400 pixels")
    paste_image(tab.page)
    expect(shown).to_have_text("image.png, 40 × 30 pixels")
    tab.page.get_by_role("button", name="cameraman").click()
    expect(shown).to_have_text("cameraman.jpg, 512 × 512 pixels")
    expect(card(tab.page, "Original").get_by_role("img")).to_be_visible()


def test_photographs_are_shown_upright(tab: Visit, tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90°
    PIL.Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    tab.page.get_by_label("Image", exact=True).set_input_files(tmp_path / "turned.jpg")
    expect(tab.page.locator("#loaded-text")).to_have_text("turned.jpg, 40 × 60 pixels")


# ---- explanations ---------------------------------------------------------------------------------------------------


def test_methods_are_compared_and_poly_cam_is_refined(tab: Visit, server: Server) -> None:
    tab.page.get_by_label("Model").select_option("tiny")
    tab.example()
    tab.explain("poly-cam", "grad-cam")
    titles = tab.page.locator(".card h3").all_inner_texts()
    assert titles == ["Original", "Poly-CAM (PCAM±)", "Grad-CAM"]
    poly, grad = card(tab.page, "Poly-CAM (PCAM±)"), card(tab.page, "Grad-CAM")
    with camserve.Client(server.address) as client:
        events = list(client.explain_stream(CAT, model="tiny", method="poly-cam"))
    levels = [event for event in events if isinstance(event, camserve.Level)]
    explanation = events[-1]
    assert isinstance(explanation, camserve.Explanation)
    assert len(levels) == 3
    tab.page.get_by_label("Show").select_option("map")
    assert shows(poly.locator("canvas"), explanation.saliency)
    # The levels stay available, from coarse to fine.
    slider = poly.get_by_role("slider")
    assert slider.get_attribute("aria-valuetext") == "level 3 of 3 (r1)"
    slider.focus()
    tab.page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "level 1 of 3 (r3)"
    assert shows(poly.locator("canvas"), levels[0].saliency)
    expect(grad.locator(".level")).to_be_hidden()
    facts = dict(zip(poly.locator("dt").all_inner_texts(), poly.locator("dd").all_inner_texts(), strict=True))
    assert facts["Rows"] == f"{explanation.cost.rows}"
    assert {"Batches", "Queue", "Computation"} <= facts.keys()
    # The page also shows the predictions.
    rows = tab.page.locator("#predictions li").all_inner_texts()
    assert [f"class {each.index}" in row for each, row in zip(explanation.predictions, rows, strict=True)] == [True] * 5


def test_display_changes_without_a_request(tab: Visit, server: Server) -> None:
    tab.example()
    tab.explain("grad-cam")
    with camserve.Client(server.address) as client:
        saliency = client.explain(CAT, method="grad-cam").saliency
    canvas = card(tab.page, "Grad-CAM").locator("canvas")
    requests, first = len(tab.requests), pixels(canvas)
    tab.page.get_by_label("Opacity").focus()
    tab.page.keyboard.press("End")
    opaque = pixels(canvas)
    assert max(opaque[3::4]) == 255
    # The same opacities as in `camserve.heatmaps.overlay`.
    expected = np.floor(255 * 0.7 * np.sqrt(saliency.astype(np.float64)) + 0.5)
    assert first[3::4] == expected.astype(int).ravel().tolist()
    assert opaque[3::4] != first[3::4]
    tab.page.get_by_label("Colour map").select_option("Viridis")
    assert pixels(canvas)[0::4] != first[0::4]
    tab.page.get_by_label("Show").select_option("map")
    assert set(pixels(canvas)[3::4]) == {255}
    tab.page.get_by_label("Colour map").select_option("Default")
    assert shows(canvas, saliency)
    assert len(tab.requests) == requests


def test_target_is_the_predicted_class_a_probable_class_or_any_class(tab: Visit) -> None:
    tab.example()
    target, shown = tab.page.get_by_label("Class to explain"), card(tab.page, "Grad-CAM").locator(".target")
    probable = tab.page.locator("#target optgroup option").all_inner_texts()
    assert len(probable) == 5
    tab.explain("grad-cam")
    expect(shown).to_have_text(probable[0])
    target.select_option(label=probable[1])
    tab.explain("grad-cam")
    expect(shown).to_have_text(probable[1])
    target.select_option("other")
    field = tab.page.get_by_label("Label or index of the class")
    assert tab.page.locator("#labels option").count() == 1000
    for value in ("tabby", "281"):
        field.fill(value)
        tab.explain("grad-cam")
        expect(shown).to_contain_text("tabby (281)")
    field.fill("taby")
    tab.explain("grad-cam")
    problem = tab.page.locator("#target-problem")
    expect(problem).to_contain_text("The model does not have this class.")
    expect(problem).to_contain_text("tabby")  # a similar name
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(field).to_have_accessible_description(problem.inner_text().replace("\n", " "), ignore_case=True)
    field.fill("tabby")
    expect(problem).to_be_hidden()


def test_methods_that_the_model_lacks_are_listed_with_reasons(tab: Visit) -> None:
    assert tab.page.locator("#method-raw-attention").count() == 0
    tab.page.get_by_text("2 methods that this model does not offer").click()
    expect(tab.page.locator("#unavailable dl")).to_contain_text("Raw attention")
    expect(tab.page.locator("#unavailable dl")).to_contain_text("Not offered: it does not have global self-attention")
    expect(tab.page.locator("#methods .method", has_text="Grad-CAM").first).to_contain_text("2 rows")


def test_limit_of_rows_gives_a_partial_map_with_a_warning(tab: Visit) -> None:
    tab.page.get_by_label("Model").select_option("tiny")
    tab.example()
    tab.page.get_by_text("More options").click()
    tab.page.get_by_label("Limit of rows for each method").fill("30")
    tab.explain("poly-cam")
    expect(card(tab.page, "Poly-CAM (PCAM±)").locator(".warnings")).to_contain_text("The method stopped early")


def test_image_that_is_opened_while_methods_are_read_is_kept(tab: Visit) -> None:
    page = tab.page
    held: dict[str, Route] = {}

    def hold(route: Route) -> None:
        held[urlsplit(route.request.url).path] = route

    page.route("**/api/methods?*", hold)
    page.route("**/api/image", hold)
    with page.expect_request("**/api/methods?*"):
        page.get_by_label("Model").select_option("tiny")
    with page.expect_request("**/api/image"):
        page.get_by_role("button", name="cat").click()
    held["/api/methods"].continue_()
    expect(page.locator("#methods")).to_have_attribute("aria-busy", "false")
    tab.status("Loading cat.jpg")
    held["/api/image"].fulfill(
        json=asdict(image_files.load(CAT.read_bytes(), {}))
    )  # Chromium does not pass held bodies on
    tab.status("The image is loaded. Choose methods")
    expect(page.locator("#loaded-text")).to_contain_text("cat.jpg")
    tab.explain("grad-cam")
    expect(page.locator("#status")).to_have_text("Finished.")


# ---- scores and receipts --------------------------------------------------------------------------------------------


def test_maps_are_measured_with_insertion_and_deletion(tab: Visit, server: Server) -> None:
    tab.page.get_by_label("Model").select_option("tiny")
    tab.example()
    tab.explain("grad-cam", "layer-cam")
    tab.page.get_by_role("button", name="Insertion and deletion: Grad-CAM").click()
    grad = card(tab.page, "Grad-CAM")
    expect(grad.locator(".outcome")).to_contain_text("Measured with")
    with camserve.Client(server.address) as client:
        expected = client.explain(CAT, model="tiny", method="grad-cam", metrics=["insertion", "deletion"]).scores
    insertion, deletion = (f"{expected[name]:.3f}" for name in ("insertion", "deletion"))
    expect(grad.get_by_role("img", name=f"Curves: insertion {insertion}, deletion {deletion}")).to_be_visible()
    points = grad.locator("polyline.insertion").get_attribute("points")
    assert points is not None and len(points.split()) == len(expected["insertion"].curve)
    row = tab.page.locator("#comparison tr", has_text="Grad-CAM")
    assert row.locator("td").all_inner_texts()[:2] == [insertion, deletion]
    tab.page.get_by_role("button", name="Measure all maps").click()
    expect(card(tab.page, "Layer-CAM").locator(".outcome")).to_contain_text("Measured with")
    assert "–" not in tab.page.locator("#comparison tbody").inner_text()


def test_receipt_is_copied_and_replayed(tab: Visit, server: Server) -> None:
    tab.example()
    tab.explain("grad-cam")
    grad = card(tab.page, "Grad-CAM")
    grad.get_by_text("Receipt", exact=True).click()
    grad.get_by_role("button", name="Copy receipt: Grad-CAM").click()
    expect(tab.page.locator("#status")).to_have_text("The receipt is copied.")
    receipt = camserve.Receipt.from_json(tab.page.evaluate("navigator.clipboard.readText()"))
    with camserve.Client(server.address) as client:
        assert client.replay(receipt, CAT).same  # the page sends the file unchanged
    tab.page.get_by_role("button", name="Replay: Grad-CAM").click()
    expect(grad.locator(".outcome")).to_have_text("Replayed: the maps agree bit for bit.")


def test_picture_is_saved(tab: Visit, tmp_path: Path) -> None:
    tab.example()
    tab.explain("grad-cam")
    with tab.page.expect_download() as saved:
        tab.page.get_by_role("button", name="Save picture: Grad-CAM").click()
    assert saved.value.suggested_filename == "cat.grad-cam.png"
    saved.value.save_as(tmp_path / "saved.png")
    with PIL.Image.open(tmp_path / "saved.png") as picture, PIL.Image.open(CAT) as photograph:
        assert picture.size == photograph.size
        difference = np.abs(np.asarray(picture.convert("RGB"), int) - np.asarray(photograph, int)).mean(axis=2)
    assert difference.min() < 8 < 50 < difference.max()


def test_page_reconnects_to_a_restarted_server_and_replay_finds_other_weights(browser: Browser, tmp_path: Path) -> None:
    port = free_port()

    def config(seed: int) -> Config:
        weights = tmp_path / f"{seed}.safetensors"
        save_file(nets.tiny_cnn(seed).state_dict(), weights)
        source = "python:tests.nets:tiny_cnn"
        tiny = ModelConfig(name="tiny", source=source, weights=str(weights), input_size=(32, 32), batch_size=4)
        return Config(listen=f"127.0.0.1:{port}", models=[tiny])

    with running_ui(f"127.0.0.1:{port}", tmp_path) as ui:
        with serving(config(1)):
            tab = visit(browser, ui.url)
            tab.example()
            tab.explain("grad-cam")
        tab.page.get_by_role("button", name="Explain", exact=True).click()
        expect(tab.page.locator("#server")).to_contain_text(f"Not connected to 127.0.0.1:{port}; trying again")
        expect(card(tab.page, "Grad-CAM").locator(".problem")).to_contain_text("The server is not available.")
        with serving(config(1)):
            expect(tab.page.locator("#server")).to_contain_text("Connected to")
            expect(tab.page.locator("#problem")).to_be_hidden()
            tab.explain("grad-cam")
        with serving(config(2)):
            tab.page.get_by_role("button", name="Replay: Grad-CAM").click()
            outcome = card(tab.page, "Grad-CAM").locator(".outcome")
            expect(outcome).to_contain_text("Replayed: the maps do not agree.")
            expect(outcome).to_contain_text("model_digest: sha256:")
        tab.page.context.close()
        assert ui.log.read_text(encoding="utf-8") == ""


def test_page_names_the_server_of_a_restarted_process(browser: Browser, server: Server, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    listen = ("--listen", f"127.0.0.1:{free_port()}")
    with running_ui(server.address, tmp_path / "first", *listen) as ui:
        tab = visit(browser, ui.url)
    tab.page.get_by_role("button", name="cat").click()
    expect(tab.page.locator("#problem")).to_contain_text("camserve ui has stopped.")
    address = server.address.replace("127.0.0.1", "localhost")
    with running_ui(address, tmp_path / "second", *listen):
        expect(tab.page.locator("#server")).to_contain_text(f"Connected to {address}")
        tab.example()
    tab.page.context.close()


# ---- access ---------------------------------------------------------------------------------------------------------

FOCUSED = """() => {
  const e = document.activeElement;
  const name = e === document.body ? "" : e.id || e.className || e.textContent.trim().slice(0, 30);
  return [name, getComputedStyle(e).outlineStyle, e.matches(":focus-visible")];
}"""


def test_keyboard_reaches_and_operates_all_controls(tab: Visit) -> None:
    page = tab.page
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUSED)[0] == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUSED)[0] == "image"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the first example
    tab.status("The image is loaded. Choose methods")
    page.locator("#methods input").first.focus()
    for box in page.locator("#methods input").all():
        if box.is_checked() != (box.get_attribute("value") == "grad-cam"):
            box.press("Space")
    page.keyboard.press("Tab")
    page.locator("#explain").focus()
    page.keyboard.press("Enter")
    tab.status("Finished")
    # Each control that can be seen is reached by Tab, and shows that it has the focus.
    page.locator(".skip").focus()
    reached: list[str] = []
    for _ in range(200):
        name, outline, visible = page.evaluate(FOCUSED)
        if not name or name in reached[:1]:
            break
        assert visible and outline != "none", name
        page.evaluate("document.activeElement.setAttribute('data-reached', '')")
        reached.append(name)
        page.keyboard.press("Tab")
    missed = page.evaluate(
        """() => [...document.querySelectorAll("a, button, input, select, summary, [tabindex='0']")]
          .filter((e) => e.checkVisibility() && !e.disabled && !e.hasAttribute("data-reached"))
          .map((e) => e.outerHTML)"""
    )
    assert missed == []
    assert len(reached) > 40
    page.get_by_role("button", name="Replay: Grad-CAM").press("Enter")
    expect(card(page, "Grad-CAM").locator(".outcome")).to_contain_text("bit for bit")


def test_controls_and_images_have_names_for_screen_readers(tab: Visit) -> None:
    tab.example()
    tab.explain("grad-cam")
    for details in tab.page.locator("summary:visible").all():
        details.click()
    for role in ("button", "checkbox", "combobox", "slider", "spinbutton", "textbox", "img", "region"):
        for element in tab.page.get_by_role(role).all():
            expect(element).not_to_have_accessible_name("")
    assert (
        tab.page.locator("[role='group']:not([aria-label], [aria-labelledby]), fieldset:not(:has(legend))").count() == 0
    )
    expect(tab.page.get_by_role("img", name="Map by Grad-CAM for Egyptian cat")).to_be_visible()
    expect(tab.page.get_by_role("main")).to_be_visible()
    assert tab.page.locator("h1").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_sufficient_contrast(tab: Visit, scheme: Literal["light", "dark"]) -> None:
    tab.page.emulate_media(color_scheme=scheme)
    tab.example()
    tab.explain("grad-cam")
    ratios = contrast_ratios(tab.page)
    assert len(ratios) > 100
    assert min(ratios) >= 4.5


def test_narrow_screen_needs_no_horizontal_scrolling(tab: Visit) -> None:
    tab.page.set_viewport_size({"width": 375, "height": 740})
    tab.page.get_by_label("Model").select_option("tiny")
    tab.example()
    tab.explain("grad-cam", "poly-cam")
    tab.page.get_by_role("button", name="Measure all maps").click()
    expect(tab.page.locator(".outcome", has_text="Measured with")).to_have_count(2)
    tab.page.locator(".receipt summary").first.click()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 375
    assert tab.page.evaluate("getComputedStyle(document.querySelector('main')).gridTemplateColumns").count("px") == 1


# ---- privacy --------------------------------------------------------------------------------------------------------


def test_tabs_do_not_see_each_other_and_nothing_is_stored(
    browser: Browser, tab: Visit, ui: Running, tmp_path: Path
) -> None:
    PIL.Image.effect_noise((900, 900), 90).save(tmp_path / "confidential.png")
    assert (tmp_path / "confidential.png").stat().st_size > 500_000
    other = visit(browser, ui.url)
    tab.page.get_by_label("Image", exact=True).set_input_files(tmp_path / "confidential.png")
    tab.status("The image is loaded. Choose methods")
    other.example("coffee")
    tab.explain("grad-cam")
    other.explain("grad-cam")
    for page, name in ((tab.page, "confidential.png"), (other.page, "coffee.jpg")):
        assert name in page.locator("#loaded-text").inner_text()
        assert name in card(page, "Original").inner_text()
    assert "confidential" not in other.page.content()
    other.page.context.close()
    assert list(ui.temporary.iterdir()) == []
    assert ui.log.read_text(encoding="utf-8") == ""
    # The name of the file does not even reach the web server of the page.
    assert not any("confidential" in url for url in tab.requests)
