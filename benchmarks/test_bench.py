"""Tests of the benchmarks: all sections on a tiny network, and the agreement of the compared implementations."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks import __main__ as bench_main
from benchmarks import (
    approximations,
    bench_setup,
    busy_machine,
    channel_masking,
    engine_runs,
    host,
    insertion_deletion,
    limit,
    load_time,
    mixed_load,
    openvino_pass,
    opti_cam,
    page,
    peers,
    savings,
    separate_process,
    service,
    start_time,
    subjects,
)
from benchmarks.bench_setup import Bench
from benchmarks.results import Claim, Findings, Result
from benchmarks.subjects import TINY, Subject
from benchmarks.timing import Rates, Timed, alternate, percentile
from camserve_server.config import Config, ModelConfig
from tests.conftest import serving
from tests.oracles import insertion_deletion as oracle
from tests.oracles import poly_cam

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subjects.from_config(TINY, CPU, 0.01)


@pytest.fixture(scope="module")
def bench(subject: Subject) -> Iterator[Bench]:
    small = Bench(CPU, seconds=0.01, rounds=2, channels=4, images=3, callers=3, names=["tiny"])
    small.loaded["tiny"] = subject
    yield small
    small.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "section",
    [
        limit.section,
        channel_masking.poly,
        channel_masking.score,
        opti_cam.section,
        insertion_deletion.section,
        savings.section,
        approximations.section,
        openvino_pass.section,
        mixed_load.section,
        busy_machine.section,
        host.section,
        load_time.section,
        start_time.section,
    ],
)
def test_section_gives_a_complete_result(
    section: object, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "FRONT_ENDS", (1, 2))  # fewer processes
    monkeypatch.setattr(load_time, "CONFIGS", {"tiny": TINY.model_dump(mode="json", exclude_unset=True)})
    result = section(bench)  # type: ignore[operator]
    assert ("grad-cam" if section is host.section else "tiny") in page.page(_facts(), {"it": result}, [], tmp_path)
    assert [*tmp_path.glob("*.svg")]
    for claim in result.claims:
        assert math.isfinite(claim.figure) and claim.figure > 0
        assert claim.reached or claim.because
    for table in result.tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}


@pytest.mark.slow
def test_service_and_engine_give_identical_maps(bench: Bench, subject: Subject) -> None:
    findings = Findings()
    with serving(Config(listen="127.0.0.1:0", models=[TINY])) as server:
        service.measure(bench, findings, subject, server.address)
    assert [claim.agree for claim in findings.claims] == ["maps within 0e+00", "maps within 0e+00"]


@pytest.mark.slow
def test_sections_of_two_runs_are_combined_into_one_page(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_setup, "from_config", lambda *_: subject)
    for names in (["limit"], ["curves"]):
        arguments = [*names, "--models", "tiny", "--seconds", "0.01", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        assert bench_main.main() == 0
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert text.index("## Plain passes") < text.index("## Insertion and deletion")
    assert "$ python -m benchmarks limit --models tiny" in text
    assert "Not measured: poly, score, opti, savings, shortcuts, openvino, service, mixed" in text
    for chart in ("bench-limit.svg", "bench-curves.svg"):
        assert f"(pictures/{chart})" in text
        assert (tmp_path / "pictures" / chart).stat().st_size < 50_000
    printed = capsys.readouterr()
    assert "Insertion and deletion, tiny" in printed.out
    assert " s, curves: tiny: " in printed.err, "without a terminal, each step is a line"

    (tmp_path / "benchmarks.md").unlink()
    monkeypatch.setattr(sys, "argv", ["bench", "--render", "--out", str(tmp_path)])
    assert bench_main.main() == 0
    assert (tmp_path / "benchmarks.md").read_text(encoding="utf-8") == text


# ---- agreement of the compared implementations -----------------------------------------------------------------------


@pytest.mark.slow
def test_separate_process_runs_the_same_network(bench: Bench, subject: Subject) -> None:
    net, x = subject.made, subject.image.tensor[None]
    torch.testing.assert_close(torch.from_numpy(bench.separate(_logits, TINY)), net(x), rtol=0, atol=0)


def _logits(config: ModelConfig, device: str) -> NDArray[np.float32]:
    net, image = separate_process.made(config, device)
    with torch.no_grad():
        logits: Tensor = net(image.tensor[None])
    return logits.numpy()


def test_official_poly_cam_agrees_with_oracle_and_engine(subject: Subject) -> None:
    x = subject.image.tensor[None]
    A = subject.activations(subject.model.layers)
    mine = engine_runs.run(subject.model, subject.x, subject.call("poly-cam", variant="official")).result
    c = mine.targets.index[0]
    theirs = peers.poly_cam(subject.made, x, A, c, batch=5)
    slow = poly_cam.poly_cam(subject.made, x, A, c, "pm", "official").map
    torch.testing.assert_close(theirs, slow, rtol=0, atol=1e-5)
    torch.testing.assert_close(mine.maps[0], theirs, rtol=0, atol=1e-5)
    assert channel_masking.poly_agreement(subject, 4) < 1e-5


@pytest.mark.slow
def test_official_opti_cam_agrees_with_engine(subject: Subject) -> None:
    assert opti_cam.agreement(subject.in_float64(), 20) < 1e-6


def test_simple_loop_of_curves_agrees_with_oracle(subject: Subject) -> None:
    x = subject.image.tensor
    S = torch.rand(32, 32, generator=torch.Generator().manual_seed(0))
    slow = oracle.insertion_deletion(subject.made, x[None], S, 3, steps=10)
    blurred = oracle.gaussian_blur(x[None])[0]
    torch.testing.assert_close(peers.curve(subject.made, blurred, x, S, 3, 10, 4), slow.insertion)
    torch.testing.assert_close(peers.curve(subject.made, x, blurred, S, 3, 10, 4), slow.deletion)


def test_folding_batch_norm_keeps_the_logits() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)).eval()
    net.requires_grad_(False)
    x = torch.randn(1, 3, 8, 8)
    formats, difference = limit.in_formats(net, net, x)
    assert difference < 1e-5
    assert set(formats) == {"contiguous", "contiguous, folded", "channels-last", "channels-last, folded"}
    assert [type(m).__name__ for m in formats["contiguous, folded"].children()].count(
        "BatchNorm2d"
    ) == 1  # The batch norm after the ReLU cannot be folded.
    assert set(limit.in_formats(net[2:], net[2:], torch.randn(1, 4, 6, 6))[0]) == {"contiguous", "channels-last"}


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.importable(peers.Torchcam)
    monkeypatch.setattr(peers.Torchcam, "package", "no_such_package")
    assert not peers.importable(peers.Torchcam)
    assert capsys.readouterr().err == "not measured: torchcam: No module named 'no_such_package'\n"


# ---- measurements ----------------------------------------------------------------------------------------------------


def test_sides_alternate() -> None:
    turns: list[str] = []

    def side(name: str, seconds: float) -> Timed:
        turns.append(name)
        return Timed(10, seconds * len(turns))  # The machine slows down from turn to turn.

    rates = alternate({"a": lambda: side("a", 1), "b": lambda: side("b", 2)}, 3)
    assert "".join(turns) == "ababab"
    assert rates["a"].over(rates["b"]) == pytest.approx(2 * 4 / 3)
    assert Rates((1.0, 5.0, 2.0)).rate == 2


def test_percentile_is_the_nearest_rank() -> None:
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([7], 0.99) == 7


def test_first_come_scheduler_finishes_the_oldest_request_first() -> None:
    scheduler = mixed_load.FirstCome[str](lambda lane: 4)
    scheduler.add(1, "a", 6)
    scheduler.add(2, "a", 1)
    scheduler.add(3, "b", 5, max_per_batch=2)
    batches = []
    while (batch := scheduler.next_batch()) is not None:
        (rows,) = batch.ranges
        batches.append((batch.lane, rows.job, rows.start, rows.stop))
        if rows.job == 3:
            scheduler.remove(3)
    assert batches == [("a", 1, 0, 4), ("a", 1, 4, 6), ("a", 2, 0, 1), ("b", 3, 0, 2)]


def test_results_of_another_machine_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.json"
    result = Result("It", "text", claims=[Claim("what", "peer", 1.0, 2.0, because="so")], seconds=3.0, command="make")
    page.write(path, _facts(), {"it": result})
    assert page.read(path, _facts(date="tomorrow", commit="2")) == {"it": Result.from_json(result.as_json())}
    for other in ({"machine": "3"}, {"threads": "4"}):
        assert page.read(path, _facts(**other)) == {}


@pytest.mark.slow
def test_page_gives_each_reason_once(tmp_path: Path) -> None:
    missed = Claim("a", "peer", 1.0, 2.0, because="so slow")
    claims = [missed, replace(missed, what="b"), Claim("c", "peer", 3.0, 2.0)]
    text = page.page(_facts(), {"it": Result("It", "text", claims=claims)}, [], tmp_path)
    assert text.count("so slow") == 1
    assert (text.count("| missed |"), text.count("| met |")) == (2, 1)


def _facts(**given: str) -> dict[str, str]:
    names = ("machine", "device", "precision", "threads", "torch", "python", "commit", "date")
    return dict.fromkeys(names, "1") | given
