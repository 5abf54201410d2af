"""Methods that mask the image by channels, PCAM± and Score-CAM, compared with plain passes and other libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import engine_runs, peers, separate_process
from benchmarks.bench_setup import Bench
from benchmarks.engine_runs import TimedJob
from benchmarks.peers import Library
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.subjects import Subject, at_equal_terms
from benchmarks.timing import Rates, Timed, run_on_thread
from camserve_server.maps.channels import select_channels
from camserve_server.models.layers import Layer
from camserve_server.request_result import RequestResult

LOOP = "official loop"
SHARE_AIM = 0.95
DENSE_AIM = 2.0  # if all channels are non-zero; proportionally higher if fewer are
TRAINED_AIM = {"efficientnet-lite0": 4.0}  # for the non-zero channels of the photograph
SCORE_AIM = 2.0
POLY_TEXT = (
    "One image, level by level. The official loop is a transcription of the [authors' "
    "code](https://github.com/andralex8/polycam): batches of {batch}, contiguous, all masks of a level at once, all "
    "channels. Each side runs a limited number of rows per level; the time of a whole image is extrapolated. PCAM± "
    "runs no rows for channels that are zero everywhere. The share of the plain pass weights the levels by their "
    "channels. Maps are compared for the strongest channels of the last layer; tests compare whole maps on a small "
    "network."
)
SCORE_TEXT = (
    "One image, last layer. Each library uses its fastest batch size and a limited number of channels; the time of a "
    "whole image is extrapolated. Channels that are constant share one row in camserve. The equations of the "
    "libraries differ, so maps of the same channels are compared by correlation; tests compare camserve with a "
    "reference implementation."
)
PEER_SIZES = {"cpu": (8, 16, 32), "cuda": (16, 32, 64, 128, 256)}


@dataclass(frozen=True)
class Level:
    """Rates of one layer.

    Attributes:
        layer: The layer.
        run: Number of channels that PCAM± must run, because they are not zero everywhere.
        rates: Rate of each side.
    """

    layer: Layer
    run: int
    rates: dict[str, Rates]

    def rows(self, live: bool) -> int:
        """Return two rows for each channel: of the non-zero channels, or of all."""
        return 2 * (self.run if live else self.layer.channels)


def ratio(levels: Sequence[Level], slow: str, fast: str, *, live: bool = False) -> float:
    """Return the duration of one side divided by that of another one, as the median over the rounds."""
    rounds = range(len(levels[0].rates[slow].rounds))
    return median(seconds(levels, slow, i) / seconds(levels, fast, i, live=live) for i in rounds)


def seconds(levels: Sequence[Level], side: str, turn: int, *, live: bool = False) -> float:
    """Return the duration of one image, extrapolated from the rates of one round."""
    return sum(level.rows(live) / level.rates[side].rounds[turn] for level in levels)


# ---- PCAM± -----------------------------------------------------------------------------------------------------------


def poly(bench: Bench) -> Result:
    """Compare PCAM±, its official variant, the official loop and the plain pass, level by level."""
    findings = Findings()
    for subject in bench.subjects():
        agree = run_on_thread(poly_agreement, subject, bench.channels)
        A = run_on_thread(subject.activations, subject.model.layers)
        levels = []
        for layer, a in reversed([*zip(subject.model.layers, A, strict=True)]):
            rates = bench.alternate(f"{subject.name}: PCAM±, {layer.name}", _poly_sides(bench, subject, layer, a))
            levels.append(Level(layer, run_on_thread(to_run, a, False), rates))
        _poly_findings(findings, subject, levels, agree)
    return Result(
        "PCAM±",
        POLY_TEXT.format(batch=bench.channels),
        claims=findings.claims,
        tables=[
            Table(
                "Rows per second, median of the rounds:",
                [
                    "model",
                    "layer",
                    "channels",
                    "non-zero",
                    "plain pass",
                    "PCAM±",
                    "share",
                    "official variant",
                    LOOP,
                    at_equal_terms(LOOP, bench.device),
                ],
                findings.rows,
            )
        ],
        charts=[Chart("PCAM±, one image", "seconds", findings.bars, logarithmic=True)],
    )


def _poly_sides(bench: Bench, subject: Subject, layer: Layer, a: Tensor) -> dict[str, Callable[[], Timed]]:
    net, x, rows = subject.at_precision, subject.image.tensor[None], round(subject.limit.rate * bench.seconds)
    n = max(1, rows // 2 // bench.channels) * bench.channels
    return {
        "plain pass": subject.limit.side(bench.seconds),
        "camserve": lambda: _poly_run(subject, layer, rows, "paper").timed,
        "official variant": lambda: _poly_run(subject, layer, rows, "official").timed,
        LOOP: lambda: bench.separate(separate_process.poly_cam, subject.config, layer.name, n),
        at_equal_terms(LOOP, subject.model.device): lambda: subject.alike(peers.timed_poly_cam, net, x, a[:n]),
    }


def _poly_run(subject: Subject, layer: Layer, rows: int, variant: str) -> TimedJob:
    call = subject.call("poly-cam", (layer.name,), variant=variant)
    return engine_runs.run(subject.model, subject.x, call, budget=2 + _whole(rows, lane(subject)))


def lane(subject: Subject) -> int:
    """Return the batch size of the engine's forward lane."""
    return subject.model.batch_sizes["forward"]


def _whole(rows: int, batch: int) -> int:
    """Round the number of rows down to whole batches, at least two."""
    return max(2, rows // batch) * batch


def to_run(a: Tensor, include_zero: bool) -> int:
    """Return the number of channels of a [K, h, w] that a method must run."""
    return len(select_channels(a, include_zero=include_zero))


def poly_agreement(subject: Subject, n: int) -> float:
    """Return the largest difference to the map of the official loop, for the n strongest channels of the last layer."""
    layer = subject.model.layers[-1]
    timed_job = engine_runs.run(
        subject.model, subject.x, subject.call("poly-cam", (layer.name,), variant="official"), budget=2 + 2 * n
    )
    x = subject.image.tensor[None]
    (a,) = subject.activations([layer])
    chosen = a[select_channels(a, include_zero=False).indices[:n]]
    theirs = peers.poly_cam(subject.made, x, [chosen], timed_job.result.targets.index[0])
    return float((timed_job.result.maps[0] - theirs.cpu()).abs().max())


def _poly_findings(findings: Findings, subject: Subject, levels: Sequence[Level], agree: float) -> None:
    owed, run = sum(level.layer.channels for level in levels), sum(level.run for level in levels)
    share, equal = ratio(levels, "plain pass", "camserve"), at_equal_terms(LOOP, subject.model.device)
    dense, photo = (ratio(levels, LOOP, "official variant", live=live) for live in (False, True))
    kept_dense, kept_photo = (ratio(levels, equal, "official variant", live=live) for live in (False, True))
    name, maps = f"PCAM±, {subject.name}", f"maps within {agree:.0e}"
    whole = f"{name}, one image, {run} non-zero of {owed} channels"
    claims = [Claim(f"{name}, rate", "plain pass", share, SHARE_AIM, "share")]
    if subject.name in TRAINED_AIM:
        claims.append(Claim(whole, LOOP, photo, TRAINED_AIM[subject.name], "×", maps))
        claims.append(Claim(whole, equal, kept_photo, None, "×", maps))
    else:
        claims.append(Claim(f"{name}, one image, all channels", LOOP, dense, DENSE_AIM, "×", maps))
        claims.append(Claim(f"{name}, one image, all channels", equal, kept_dense, None, "×", maps))
        if run < owed:
            claims.append(Claim(whole, LOOP, photo, DENSE_AIM * owed / run, "×", maps))
    budget = 2 + _whole(round(subject.limit.rate * subject.seconds), lane(subject))
    findings.claims += explained_by(
        claims, lambda: engine_runs.time_profile(subject.model, subject.x, subject.call("poly-cam"), budget=budget)
    )
    findings.bars[subject.name] = {
        "plain passes, all channels": seconds(levels, "plain pass", -1),
        LOOP: seconds(levels, LOOP, -1),
        equal: seconds(levels, equal, -1),
        "camserve, all channels": seconds(levels, "official variant", -1),
        "camserve, non-zero channels": seconds(levels, "official variant", -1, live=True),
    }
    for level in levels:
        rate = {side: f"{rates.rate:.1f}" for side, rates in level.rates.items()}
        share = level.rates["camserve"].over(level.rates["plain pass"])
        cells = [level.layer.name, str(level.layer.channels), str(level.run), rate["plain pass"], rate["camserve"]]
        findings.rows.append([subject.name, *cells, f"{share:.2f}", rate["official variant"], rate[LOOP], rate[equal]])


# ---- Score-CAM -------------------------------------------------------------------------------------------------------


def score(bench: Bench) -> Result:
    """Compare Score-CAM with the plain pass, torchcam and pytorch-grad-cam."""
    findings = Findings()
    for subject in bench.subjects():
        libraries = () if subject.name == "efficientnet-lite0" else peers.LIBRARIES.values()
        _score_findings(bench, findings, subject, [each for each in libraries if peers.importable(each)])
    return Result(
        "Score-CAM",
        SCORE_TEXT,
        claims=findings.claims,
        tables=[
            Table(
                "Rows per second, median of the rounds, and seconds per image:",
                ["model", "layer", "side", "batch", "channels run", "rows/s", "share of plain pass", "one image (s)"],
                findings.rows,
            )
        ],
        charts=[Chart("Score-CAM, one image", "seconds", findings.bars)],
    )


def _score_findings(bench: Bench, findings: Findings, subject: Subject, libraries: Sequence[type[Library]]) -> None:
    (layer,) = subject.model.default_layers(many=False)
    rows = _whole(round(subject.limit.rate * bench.seconds), lane(subject))
    runs: list[TimedJob] = []

    def ours_side() -> Timed:
        runs.append(engine_runs.run(subject.model, subject.x, subject.call("score-cam"), budget=2 + rows))
        return runs[-1].timed

    (a,) = run_on_thread(subject.activations, [layer])
    run = run_on_thread(to_run, a, True)
    sides = {"plain pass": subject.limit.side(bench.seconds), "camserve": ours_side}
    sizes: dict[str, int] = {}
    agree: dict[str, str] = {}
    cams: list[Library] = []
    for library in libraries:
        cam = subject.alike(_library, library, subject, layer.name)
        cams.append(cam)

        def there(n: int, batch: int, name: str = library.name) -> Timed:
            return bench.separate(separate_process.score_cam, subject.config, name, layer.name, n, batch)

        def here(n: int, batch: int, cam: Library = cam) -> Timed:
            return subject.alike(peers.timed_weights, cam, a[:n], 0, batch)

        r = subject.alike(score_agreement, subject, cam, a, bench.channels)
        ways: dict[str, Callable[[int, int], Timed]] = {
            library.name: there,
            at_equal_terms(library.name, subject.model.device): here,
        }
        for name, way in ways.items():
            bench.step(f"{subject.name}: the best batch of {name}")
            sizes[name] = best = best_size(way, len(a), PEER_SIZES[bench.device.type])
            sides[name] = partial(way, min(len(a), max(1, rows // best) * best), best)
            agree[name] = f"correlation of maps {r:.3f}; {cam.differs}"
    rates = bench.alternate(f"{subject.name}: Score-CAM", sides)
    for cam in cams:
        cam.close()

    before_s = min(timed_job.before_s for timed_job in runs)
    seconds = {"camserve": before_s + run / rates["camserve"].rate}
    seconds |= {name: (len(a) + 2) / rates[name].rate for name in sizes}
    share = rates["camserve"].over(rates["plain pass"])
    claims = [Claim(f"Score-CAM, {subject.name}, rate", "plain pass", share, None, "share")]
    for name in sizes:
        what = f"Score-CAM, {subject.name}, one image, {run} of {len(a)} channels"
        aim = SCORE_AIM if name in peers.LIBRARIES else None
        claims.append(Claim(what, name, seconds[name] / seconds["camserve"], aim, "×", agree[name]))
    findings.claims += explained_by(
        claims, lambda: engine_runs.time_profile(subject.model, subject.x, subject.call("score-cam"), budget=2 + rows)
    )
    findings.bars[subject.name] = {"plain passes": len(a) / rates["plain pass"].rate, **seconds}
    form, size = subject.limit.best
    batches = {"plain pass": f"{size}, {form}", "camserve": str(lane(subject)), **{k: str(v) for k, v in sizes.items()}}
    for side, of in rates.items():
        cells = [subject.name, layer.name, side, batches[side], str(run if side == "camserve" else len(a))]
        image = f"{seconds[side]:.1f}" if side in seconds else f"{len(a) / of.rate:.1f}"
        findings.rows.append([*cells, f"{of.rate:.1f}", f"{of.over(rates['plain pass']):.2f}", image])


def _library(library: type[Library], subject: Subject, layer: str) -> Library:
    return library(subject.at_precision, layer, subject.image.tensor)


def explained_by(claims: Sequence[Claim], why: Callable[[], str]) -> list[Claim]:
    """Add a reason to all missed claims. The reason is computed once, and only if a claim is missed."""
    because = "" if all(claim.reached for claim in claims) else why()
    return [claim if claim.reached else replace(claim, because=because) for claim in claims]


def best_size(side: Callable[[int, int], Timed], channels: int, sizes: Sequence[int]) -> int:
    """Return the batch size with the highest rate. `side` runs a number of channels in batches of a size."""
    n = min(channels, max(sizes))
    side(min(n, *sizes), min(sizes))
    rates = {size: n / side(n, size).seconds for size in sizes if size <= n}
    return max(rates, key=lambda size: rates[size]) if rates else n


def score_agreement(subject: Subject, cam: Library, a: Tensor, n: int) -> float:
    """Return the correlation with the map of a library, both computed from the n strongest channels."""
    timed_job = engine_runs.run(subject.model, subject.x, subject.call("score-cam"), budget=2 + n)
    chosen = a[select_channels(a, include_zero=True).indices[:n]]
    explained: RequestResult = timed_job.result
    w = cam.weights(chosen, explained.targets.index[0], n)
    S = torch.einsum("k,khw->hw", w, chosen).relu()
    theirs = F.interpolate(S[None, None], explained.maps.shape[-2:], mode="bilinear", align_corners=False).cpu()
    both = torch.stack([explained.maps.flatten(), theirs.flatten()]).double()
    return float(torch.corrcoef(both)[0, 1])
