"""Errors, cancellation, credentials and DICOM files on the page, with a fake server."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import PIL.Image
import pytest
import trustme
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from playwright.sync_api import Browser, Route, expect
from pydicom import Dataset

from camserve.v1 import explain_pb2 as pb
from tests.client import fake_server
from tests.client.fake_server import RAMP, WAIT_S, Servicer, listening
from tests.client.test_errors import abort
from tests.dicom.samples import SECRETS, data_of, image
from tests.ui.conftest import Fake, Visit, running_ui, visit

pytestmark = pytest.mark.slow

CODE = grpc.StatusCode


def reason(name: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=name, domain="camserve")


def field(name: str) -> error_details_pb2.BadRequest:
    violation = error_details_pb2.BadRequest.FieldViolation(field=name, description="?")
    return error_details_pb2.BadRequest(field_violations=[violation])


RETRY = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=7))
REQUEST = error_details_pb2.RequestInfo(request_id="r-17")


@pytest.mark.parametrize(
    ("failure", "where", "said"),
    [
        (
            abort(CODE.RESOURCE_EXHAUSTED, "the queue has 500 rows", reason("QUEUE_FULL"), RETRY),
            ".card .problem",
            ["The server is busy: its queue is full.", "Try again in about 7 seconds"],
        ),
        (
            abort(CODE.RESOURCE_EXHAUSTED, "one row needs 2 GiB", reason("OUT_OF_MEMORY")),
            ".card .problem",
            ["does not have enough memory"],
        ),
        (
            abort(CODE.NOT_FOUND, "there is no model 'first'; there are: second", field("model")),
            "#model-problem",
            ["The server does not have this model.", "There is no model 'first'; there are: second."],
        ),
        (
            abort(CODE.INVALID_ARGUMENT, "poly-cam takes at least 4 rows", field("budget")),
            "#budget-problem",
            ["The limit of rows is too small.", "poly-cam takes at least 4 rows."],
        ),
        (
            abort(CODE.INVALID_ARGUMENT, "the image cannot be read", field("image.encoded")),
            "#image-problem",
            ["The image cannot be used."],
        ),
        (
            abort(CODE.UNAUTHENTICATED, "the call has no token"),
            ".card .problem",
            ["The server does not accept the credentials.", "--token-file"],
        ),
        (
            abort(CODE.DEADLINE_EXCEEDED, "the deadline has passed"),
            ".card .problem",
            ["The server did not finish in time.", "--timeout"],
        ),
        (
            abort(CODE.INTERNAL, "the server has a bug", reason("INTERNAL"), REQUEST),
            ".card .problem",
            ["The server has failed.", "Request id: r-17"],
        ),
    ],
    ids=["queue full", "memory", "model", "budget", "image", "token", "deadline", "bug"],
)
def test_errors_are_shown_in_plain_words_beside_their_field(
    fake: Fake, fake_tab: Visit, failure: Any, where: str, said: list[str]
) -> None:
    fake_tab.example()
    fake_tab.select_methods("opti-cam")
    fake.servicer.before = failure
    fake_tab.page.get_by_role("button", name="Explain", exact=True).click()
    problem = fake_tab.page.locator(where)
    for text in said:
        expect(problem).to_contain_text(text)
    expect(problem).to_have_attribute("role", "alert")
    fake_tab.status("Finished; 1 of 1 methods failed.")


def test_models_are_described_after_the_server_has_loaded_them(browser: Browser, fake: Fake) -> None:
    page = browser.new_context().new_page()
    answers: list[dict[str, Any]] = []

    def waiting_at_first(route: Route) -> None:
        [model] = route.fetch().json()
        answers.append(model if answers else {**model, "state": "waiting", "classes": 0, "labels": []})
        route.fulfill(json=answers[-1:])

    page.route("**/api/models", waiting_at_first)
    page.goto(fake.ui.url)
    expect(page.locator("#model-facts")).to_have_text("The server loads this model at the first request.")
    tab = Visit(page)
    tab.example()
    tab.explain("fake-cam")
    expect(page.locator("#model-facts")).to_contain_text("3 classes")
    page.context.close()


def test_form_errors_need_no_request(fake: Fake, fake_tab: Visit) -> None:
    page = fake_tab.page
    page.get_by_role("button", name="Explain", exact=True).click()
    expect(page.locator("#image-problem")).to_contain_text("There is no image.")
    expect(page.get_by_label("Image", exact=True)).to_be_focused()
    fake_tab.example()
    count = len(fake.servicer.requests)
    fake_tab.select_methods()
    page.get_by_role("button", name="Explain", exact=True).click()
    expect(page.locator("#methods-problem")).to_contain_text("Select at least one method.")
    fake_tab.select_methods("opti-cam")
    expect(page.locator("#methods-problem")).to_be_hidden()
    page.get_by_text("More options").click()
    page.get_by_label("Limit of rows for each method").fill("1.5")
    page.get_by_role("button", name="Explain", exact=True).click()
    expect(page.locator("#budget-problem")).to_contain_text("Enter a whole number from 1 up.")
    expect(page.get_by_label("Limit of rows for each method")).to_have_attribute("aria-invalid", "true")
    assert len(fake.servicer.requests) == count


def test_files_that_are_no_images_are_refused(fake_tab: Visit, tmp_path: Path) -> None:
    for name, content in (("empty.png", b""), ("notes.txt", b"patient: Wintersohn " * 20), ("cut.png", b"\x89PNG\r\n")):
        (tmp_path / name).write_bytes(content)
        fake_tab.page.get_by_label("Image", exact=True).set_input_files(tmp_path / name)
        expect(fake_tab.page.locator("#image-problem")).to_contain_text("The image cannot be used.")
        fake_tab.status("The image cannot be used.")
    expect(fake_tab.page.locator("#image-problem")).to_contain_text("JPEG, PNG, WebP, BMP, GIF or TIFF, or DICOM")


# ---- servers that are not trusted -----------------------------------------------------------------------------------


def test_labels_of_the_server_are_text(fake: Fake, fake_tab: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    label = """<img src="x" onerror="document.title = 'changed'"><b>cat</b>"""
    monkeypatch.setitem(fake_server.LABELS, 281, label)
    fake_tab.page.reload()
    fake_tab.example()
    fake_tab.explain("opti-cam")
    expect(fake_tab.page.locator(".card .target")).to_contain_text(label)
    expect(fake_tab.page.locator("#predictions")).to_contain_text(label)
    expect(fake_tab.page.locator("b")).to_have_count(0)
    expect(fake_tab.page).to_have_title("camserve")
    assert fake_tab.messages == []


@pytest.mark.parametrize(
    ("saliency", "probability", "said"),
    [
        (RAMP * np.float32(np.nan), 0.5, "The map is empty or has values outside [0, 1]."),
        (RAMP * 2, 0.5, "The map is empty or has values outside [0, 1]."),
        (RAMP[:0], 0.5, "The map is empty or has values outside [0, 1]."),
        (RAMP, np.nan, "The response contains NaN or infinity"),
    ],
    ids=["NaN", "above 1", "empty", "probability"],
)
def test_wrong_numbers_of_the_server_are_errors(
    fake: Fake, fake_tab: Visit, monkeypatch: pytest.MonkeyPatch, saliency: Any, probability: float, said: str
) -> None:
    fake_tab.example()
    fake.servicer.saliency = saliency
    wrong = pb.Prediction(index=281, probability=probability)
    monkeypatch.setattr(fake_server, "prediction", lambda index: wrong)
    fake_tab.explain("opti-cam")
    problem = fake_tab.page.locator(".card .problem")
    expect(problem).to_contain_text("The server has failed.")
    expect(problem).to_contain_text(said)
    assert fake_tab.messages == []


# ---- cancellation ---------------------------------------------------------------------------------------------------


class Blocked:
    """Calls that do not return before they are cancelled."""

    def __init__(self, servicer: Servicer) -> None:
        self.started, self.cancelled = threading.Event(), threading.Event()
        servicer.before = self._wait

    def _wait(self, context: grpc.ServicerContext) -> None:
        if not context.add_callback(self.cancelled.set):
            self.cancelled.set()
        self.started.set()
        self.cancelled.wait(WAIT_S)


def test_cancel_ends_the_calls_on_the_server(fake: Fake, fake_tab: Visit) -> None:
    fake_tab.example()
    blocked = Blocked(fake.servicer)
    fake_tab.select_methods("opti-cam")
    fake_tab.page.get_by_role("button", name="Explain", exact=True).press("Enter")
    assert blocked.started.wait(WAIT_S)
    expect(fake_tab.page.get_by_role("progressbar")).to_be_visible()
    fake_tab.page.locator("#cancel").press("Enter")
    assert blocked.cancelled.wait(WAIT_S)
    fake_tab.status("Cancelled.")
    expect(fake_tab.page.locator(".card .outcome")).to_have_text("Cancelled.")
    expect(fake_tab.page.get_by_role("button", name="Explain", exact=True)).to_be_focused()
    fake.servicer.before = lambda context: None
    fake_tab.explain("opti-cam")


@pytest.mark.parametrize("button", ["Insertion and deletion", "Replay"])
def test_cancel_ends_scores_and_replays(fake: Fake, fake_tab: Visit, button: str) -> None:
    fake_tab.example()
    fake_tab.explain("opti-cam")
    blocked = Blocked(fake.servicer)
    fake_tab.page.get_by_role("button", name=f"{button}: Opti-CAM").click()
    assert blocked.started.wait(WAIT_S)
    fake_tab.page.get_by_role("button", name="Cancel: Opti-CAM").click()
    assert blocked.cancelled.wait(WAIT_S)
    expect(fake_tab.page.locator(".card .outcome")).to_have_text("Cancelled.")


def test_another_image_ends_the_calls_for_the_previous_one(fake: Fake, fake_tab: Visit) -> None:
    fake_tab.example()
    fake_tab.explain("opti-cam")
    blocked = Blocked(fake.servicer)
    fake_tab.page.get_by_role("button", name="Replay: Opti-CAM").click()
    assert blocked.started.wait(WAIT_S)
    fake_tab.page.get_by_role("button", name="coffee").click()
    assert blocked.cancelled.wait(WAIT_S)
    expect(fake_tab.page.locator(".card")).to_have_count(1)


def test_closing_the_tab_ends_its_calls(browser: Browser, fake: Fake) -> None:
    tab = visit(browser, fake.ui.url)
    tab.example()
    blocked = Blocked(fake.servicer)
    tab.select_methods("opti-cam")
    tab.page.get_by_role("button", name="Explain", exact=True).click()
    assert blocked.started.wait(WAIT_S)
    tab.page.context.close()
    assert blocked.cancelled.wait(WAIT_S)


# ---- credentials ----------------------------------------------------------------------------------------------------


def test_page_uses_tls_and_the_token(
    browser: Browser, authority: trustme.CA, certificate: tuple[bytes, bytes], tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_bytes(authority.cert_pem.bytes())
    (tmp_path / "token").write_text("from-file\n")
    servicer = Servicer()
    options = ("--ca", str(tmp_path / "ca.pem"), "--token-file", str(tmp_path / "token"))
    with (
        listening(servicer, grpc.ssl_server_credentials([certificate])) as address,
        running_ui(address, tmp_path, *options) as ui,
    ):
        tab = visit(browser, ui.url)
        tab.example()
        tab.explain("fake-cam")
        assert servicer.metadata["authorization"] == "Bearer from-file"
        tab.page.context.close()


# ---- DICOM ----------------------------------------------------------------------------------------------------------


def ct(**attributes: Any) -> bytes:
    pixels = (np.arange(3 * 64 * 80, dtype=np.uint16) % 251).reshape(3, 64, 80) * 16
    return data_of(image(pixels, **attributes))


def test_dicom_files_are_explained_without_their_header(fake: Fake, fake_tab: Visit, tmp_path: Path) -> None:
    page = fake_tab.page
    bodies: list[bytes] = []
    page.on("request", lambda request: bodies.append(request.post_data_buffer or b""))
    expect(page.get_by_text("Research use only. Not for diagnosis.")).to_be_visible()
    (tmp_path / "image.dcm").write_bytes(ct())
    page.get_by_label("Image", exact=True).set_input_files(tmp_path / "image.dcm")
    fake_tab.status("The image is loaded. Choose methods")
    expect(page.locator("#loaded-text")).to_have_text("image.dcm, 80 × 64 pixels, DICOM")
    page.get_by_text("How the pixels were made").click()
    assert page.locator("#image-notes li").count() > 0
    fake_tab.explain("opti-cam")
    expect(page.locator(".card .target")).to_contain_text("tabby")
    requests = [each.SerializeToString() for each in fake.servicer.requests]
    page_text, log = page.content(), fake.ui.log.read_text(encoding="utf-8")
    for secret in SECRETS.values():
        assert not any(secret.encode() in each for each in requests)
        assert secret not in page_text + log
    sent = [each for each in fake.servicer.requests if isinstance(each, pb.ExplainRequest)]
    assert sent and all(each.image.encoded.startswith(b"\x89PNG") for each in sent)
    assert list(fake.ui.temporary.iterdir()) == []


def test_frame_of_a_dicom_file_is_selected(fake: Fake, fake_tab: Visit, tmp_path: Path) -> None:
    (tmp_path / "image.dcm").write_bytes(ct())
    fake_tab.page.get_by_label("Image", exact=True).set_input_files(tmp_path / "image.dcm")
    fake_tab.status("The image is loaded. Choose methods")
    frame = fake_tab.page.get_by_label("Frame")
    expect(fake_tab.page.locator("#frame-range")).to_have_text("0 to 2")
    first = fake.servicer.requests[-1].image.encoded
    frame.fill("2")
    frame.blur()
    fake_tab.status("The image is loaded. Choose methods")
    expect(frame).to_have_value("2")
    assert fake.servicer.requests[-1].image.encoded != first
    frame.fill("7")
    frame.blur()
    expect(fake_tab.page.locator("#frame-problem")).to_contain_text("The image does not have this frame.")
    expect(fake_tab.page.locator("#frame-problem")).to_contain_text("expected 0 to 2")


@pytest.mark.parametrize(
    ("attributes", "said", "choice"),
    [
        ({"BurnedInAnnotation": "YES"}, "text burned into its pixels", "Use the image with its text"),
        ({"SequenceOfUltrasoundRegions": [Dataset()]}, "ultrasound regions", "Use the whole image"),
        ({"Modality": "SEG"}, "is a Segmentation", "Use it as an image"),
    ],
    ids=["burned in", "regions", "not an image"],
)
def test_refused_dicom_files_can_be_used_anyway(
    fake: Fake, fake_tab: Visit, tmp_path: Path, attributes: dict[str, Any], said: str, choice: str
) -> None:
    (tmp_path / "image.dcm").write_bytes(ct(**attributes))
    fake_tab.page.get_by_label("Image", exact=True).set_input_files(tmp_path / "image.dcm")
    problem = fake_tab.page.locator("#image-problem")
    expect(problem).to_contain_text(said)
    assert "=" not in problem.inner_text()  # no arguments of Python functions
    assert not any(isinstance(each, pb.ExplainRequest) for each in fake.servicer.requests)
    fake_tab.page.get_by_role("button", name=choice).press("Enter")
    fake_tab.status("The image is loaded. Choose methods")
    expect(problem).to_be_hidden()


def test_warnings_about_dicom_pixels_are_shown(fake_tab: Visit, tmp_path: Path) -> None:
    (tmp_path / "black.dcm").write_bytes(data_of(image(np.zeros((20, 30), np.uint16))))
    fake_tab.page.get_by_label("Image", exact=True).set_input_files(tmp_path / "black.dcm")
    expect(fake_tab.page.locator("#image-warnings")).to_contain_text("the image is constant")
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "other.png")
    fake_tab.page.get_by_label("Image", exact=True).set_input_files(tmp_path / "other.png")
    expect(fake_tab.page.locator("#image-warnings")).to_be_hidden()
