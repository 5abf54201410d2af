"""Methods that mask the image by channel: PCAM± and Score-CAM, against the plain forward pass and against others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import apart, ours, peers
from benchmarks.ours import Watched
from benchmarks.peers import GradCam, Library, Torchcam
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.subjects import Subject
from benchmarks.timing import Rates, Timed, alone
from benchmarks.work import Bench
from camserve_server.maps.channels import select_channels
from camserve_server.models.layers import Layer
from camserve_server.request_plan import RequestResult

LOOP, KEPT = "official loop", "official loop, our allocator"
SHARE_AIM = 0.95
DENSE_AIM = 2.0  # where all channels are live, and in proportion where fewer are
TRAINED_AIM = {"efficientnet-lite0": 4.0}  # on the photograph
SCORE_AIM = 2.0
PEER_SIZES = {"cpu": (8, 16, 32), "cuda": (16, 32, 64, 128, 256)}


@dataclass(frozen=True)
class Level:
    """One layer: its channels, those that have to be run, and the rates of the sides."""

    layer: Layer
    run: int
    rates: dict[str, Rates]

    def rows(self, live: bool) -> int:
        """Two a channel: of those that are live on the photograph, or of all."""
        return 2 * (self.run if live else self.layer.channels)


def ratio(levels: Sequence[Level], slow: str, fast: str, *, live: bool = False) -> float:
    """How many times longer one side takes for all channels than another does: the median over the rounds."""
    rounds = range(len(levels[0].rates[slow].rounds))
    return median(seconds(levels, slow, i) / seconds(levels, fast, i, live=live) for i in rounds)


def seconds(levels: Sequence[Level], side: str, turn: int, *, live: bool = False) -> float:
    """For one image, by the rates of one round."""
    return sum(level.rows(live) / level.rates[side].rounds[turn] for level in levels)


# ---- PCAM± -----------------------------------------------------------------------------------------------------------


def poly(bench: Bench) -> Result:
    """PCAM± level by level: plain forward pass, ours, ours in the official variant, the official loop, in turn."""
    found = Findings()
    for subject in bench.subjects():
        agree = alone(poly_agreement, subject, bench.channels)
        A = alone(subject.activations, subject.model.layers)
        levels = []
        for layer, a in reversed([*zip(subject.model.layers, A, strict=True)]):
            rates = bench.alternate(f"{subject.name}: PCAM±, {layer.name}", _poly_sides(bench, subject, layer, a))
            levels.append(Level(layer, alone(to_run, a, False), rates))
        _poly_findings(found, subject, levels, agree)
    return Result(
        "PCAM± against the plain forward pass and the official loop",
        "One image, level by level. The sides are the plain forward pass at its best; ours through the engine, masks "
        "made, multiplied, run and weighed; ours with `variant=official`; and a transcription of the "
        f"[official loop](https://github.com/andralex8/polycam): batches of {bench.channels}, contiguous, all masks of "
        "a level at once, two passes a batch, no channel left out; once as it is, once with our allocator's settings. "
        "Each side runs a bounded number of rows of every "
        "level, in turn; the time of a whole image is extrapolated from them, in proportion to the level's rows. "
        "*Dense* takes all channels as live, *photograph* those that are on this one: a channel that is zero "
        "everywhere owes us no rows, and the loop two. The share of the plain forward pass weighs the levels by their "
        "channels. Maps are compared over the strongest channels of the last layer; whole maps in the tests, on a "
        "small network.",
        claims=found.claims,
        tables=[
            Table(
                "Rows a second, median of the rounds:",
                ["model", "layer", "channels", "to be run", "plain", "PCAM±", "share", "official variant", LOOP, KEPT],
                found.rows,
            )
        ],
        charts=[Chart("PCAM±, one image", "seconds", found.bars, logarithmic=True)],
    )


def _poly_sides(bench: Bench, subject: Subject, layer: Layer, a: Tensor) -> dict[str, Callable[[], Timed]]:
    net, x, rows = subject.made, subject.image.tensor[None], round(subject.limit.rate * bench.seconds)
    n = max(1, rows // 2 // bench.channels) * bench.channels
    return {
        "plain": subject.limit.side(bench.seconds),
        "ours": lambda: _poly_run(subject, layer, rows, "paper").timed,
        "official variant": lambda: _poly_run(subject, layer, rows, "official").timed,
        LOOP: lambda: bench.apart(apart.poly_cam, subject.config, layer.name, n),
        KEPT: lambda: alone(peers.timed_poly_cam, net, x, a[:n]),
    }


def _poly_run(subject: Subject, layer: Layer, rows: int, variant: str) -> Watched:
    call = subject.call("poly-cam", (layer.name,), variant=variant)
    return ours.run(subject.model, subject.x, call, budget=2 + _whole(rows, lane(subject)))


def lane(subject: Subject) -> int:
    """The engine's batch size: rows are measured in whole batches."""
    return subject.model.batch_sizes["forward"]


def _whole(rows: int, batch: int) -> int:
    """So many, in whole batches, but at least two of these."""
    return max(2, rows // batch) * batch


def to_run(a: Tensor, dead: bool) -> int:
    """How many of the channels [K, h, w] have to be run."""
    return len(select_channels(a, dead=dead))


def poly_agreement(subject: Subject, n: int) -> float:
    """The largest difference between our map and the loop's, of the n strongest channels of the last layer."""
    layer = subject.model.layers[-1]
    watched = ours.run(
        subject.model, subject.x, subject.call("poly-cam", (layer.name,), variant="official"), budget=2 + 2 * n
    )
    x = subject.image.tensor[None]
    (a,) = subject.activations([layer])
    chosen = a[select_channels(a, dead=False).indices[:n]]
    theirs = peers.poly_cam(subject.made, x, [chosen], watched.result.targets.index[0])
    return float((watched.result.maps[0] - theirs.cpu()).abs().max())


def _poly_findings(found: Findings, subject: Subject, levels: Sequence[Level], agree: float) -> None:
    owed, run = sum(level.layer.channels for level in levels), sum(level.run for level in levels)
    share = ratio(levels, "plain", "ours")
    dense, photo = (ratio(levels, LOOP, "official variant", live=live) for live in (False, True))
    kept_dense, kept_photo = (ratio(levels, KEPT, "official variant", live=live) for live in (False, True))
    name, maps = f"PCAM±, {subject.name}", f"maps to {agree:.0e}"
    whole = f"{name}, one image, photograph ({run} of {owed} channels)"
    claims = [Claim(f"{name}, rows a second", "plain forward pass", share, SHARE_AIM, "share")]
    if subject.name in TRAINED_AIM:
        claims.append(Claim(whole, LOOP, photo, TRAINED_AIM[subject.name], "×", maps))
        claims.append(Claim(whole, KEPT, kept_photo, None, "×", maps))
    else:
        claims.append(Claim(f"{name}, one image, dense", LOOP, dense, DENSE_AIM, "×", maps))
        claims.append(Claim(f"{name}, one image, dense", KEPT, kept_dense, None, "×", maps))
        if run < owed:
            claims.append(Claim(whole, LOOP, photo, DENSE_AIM * owed / run, "×", maps))
    budget = 2 + _whole(round(subject.limit.rate * subject.seconds), lane(subject))
    found.claims += explained_by(
        claims, lambda: ours.where(subject.model, subject.x, subject.call("poly-cam"), budget=budget)
    )
    found.bars[subject.name] = {
        "plain forward passes, dense": seconds(levels, "plain", -1),
        LOOP: seconds(levels, LOOP, -1),
        KEPT: seconds(levels, KEPT, -1),
        "ours, dense": seconds(levels, "official variant", -1),
        "ours, photograph": seconds(levels, "official variant", -1, live=True),
    }
    for level in levels:
        rate = {side: f"{rates.rate:.1f}" for side, rates in level.rates.items()}
        share = level.rates["ours"].over(level.rates["plain"])
        cells = [level.layer.name, str(level.layer.channels), str(level.run), rate["plain"], rate["ours"]]
        found.rows.append([subject.name, *cells, f"{share:.2f}", rate["official variant"], rate[LOOP], rate[KEPT]])


# ---- Score-CAM -------------------------------------------------------------------------------------------------------


def score(bench: Bench) -> Result:
    """Score-CAM: plain forward pass, ours, torchcam, pytorch-grad-cam, in turn."""
    found = Findings()
    for subject in bench.subjects():
        libraries = subject.name != "efficientnet-lite0"
        _score_findings(bench, found, subject, [Torchcam, GradCam] if libraries else [])
    return Result(
        "Score-CAM against the plain forward pass and two libraries",
        "One image, the last layer. Each library runs at the batch size that suits it best, once as it is and once "
        "with our allocator's settings, on a bounded number of channels, in turn with ours through the engine and with "
        "the plain forward pass; the time of a whole image is extrapolated in proportion to its channels, the passes "
        "before the first of them included. Channels that are the same everywhere cost us one row for all of them. The "
        "equations differ, so maps made of the same channels are compared by their correlation; ours agree with a "
        "plain re-implementation in the tests.",
        claims=found.claims,
        tables=[
            Table(
                "Rows a second, median of the rounds, and seconds an image:",
                ["model", "layer", "side", "batch", "channels run", "rows/s", "share of plain", "one image (s)"],
                found.rows,
            )
        ],
        charts=[Chart("Score-CAM, one image", "seconds", found.bars)],
    )


def _score_findings(bench: Bench, found: Findings, subject: Subject, libraries: Sequence[type[Library]]) -> None:
    (layer,) = subject.model.default_layers(many=False)
    rows = _whole(round(subject.limit.rate * bench.seconds), lane(subject))
    runs: list[Watched] = []

    def ours_side() -> Timed:
        runs.append(ours.run(subject.model, subject.x, subject.call("score-cam"), budget=2 + rows))
        return runs[-1].timed

    (a,) = alone(subject.activations, [layer])
    run = alone(to_run, a, True)
    sides = {"plain": subject.limit.side(bench.seconds), "ours": ours_side}
    sizes: dict[str, int] = {}
    agree: dict[str, str] = {}
    cams: list[Library] = []
    for library in libraries:
        cam = alone(partial(_library, library, subject, layer.name))
        cams.append(cam)

        def there(n: int, batch: int, name: str = library.name) -> Timed:
            return bench.apart(apart.score_cam, subject.config, name, layer.name, n, batch)

        def here(n: int, batch: int, cam: Library = cam) -> Timed:
            return alone(peers.timed_weights, cam, a[:n], 0, batch)

        r = alone(score_agreement, subject, cam, a, bench.channels)
        ways: dict[str, Callable[[int, int], Timed]] = {library.name: there, f"{library.name}, our allocator": here}
        for name, way in ways.items():
            bench.step(f"{subject.name}: the best batch of {name}")
            sizes[name] = best = best_size(way, len(a), PEER_SIZES[bench.device.type])
            sides[name] = partial(way, min(len(a), max(1, rows // best) * best), best)
            agree[name] = f"maps correlate, r = {r:.3f}: {cam.differs}"
    rates = bench.alternate(f"{subject.name}: Score-CAM", sides)
    for cam in cams:
        cam.close()

    before_s = min(watched.before_s for watched in runs)
    seconds = {"ours": before_s + run / rates["ours"].rate}
    seconds |= {name: (len(a) + 2) / rates[name].rate for name in sizes}
    share = rates["ours"].over(rates["plain"])
    claims = [Claim(f"Score-CAM, {subject.name}, rows a second", "plain forward pass", share, None, "share")]
    for name in sizes:
        what = f"Score-CAM, {subject.name}, one image ({run} of {len(a)} channels)"
        aim = SCORE_AIM if name in peers.LIBRARIES else None
        claims.append(Claim(what, name, seconds[name] / seconds["ours"], aim, "×", agree[name]))
    found.claims += explained_by(
        claims, lambda: ours.where(subject.model, subject.x, subject.call("score-cam"), budget=2 + rows)
    )
    found.bars[subject.name] = {"plain forward passes": len(a) / rates["plain"].rate, **seconds}
    form, size = subject.limit.best
    batches = {"plain": f"{size}, {form}", "ours": str(lane(subject)), **{k: str(v) for k, v in sizes.items()}}
    for side, of in rates.items():
        cells = [subject.name, layer.name, side, batches[side], str(run if side == "ours" else len(a))]
        image = f"{seconds[side]:.1f}" if side in seconds else f"{len(a) / of.rate:.1f}"
        found.rows.append([*cells, f"{of.rate:.1f}", f"{of.over(rates['plain']):.2f}", image])


def _library(library: type[Library], subject: Subject, layer: str) -> Library:
    return library(subject.made, layer, subject.image.tensor)


def explained_by(claims: Sequence[Claim], why: Callable[[], str]) -> list[Claim]:
    """Those that are missed get a reason, made once."""
    because = "" if all(claim.reached for claim in claims) else why()
    return [claim if claim.reached else replace(claim, because=because) for claim in claims]


def best_size(side: Callable[[int, int], Timed], channels: int, sizes: Sequence[int]) -> int:
    """The batch size of the highest rate, on one batch of the largest; `side` runs so many channels in such batches."""
    n = min(channels, max(sizes))
    side(min(n, *sizes), min(sizes))
    rates = {size: n / side(n, size).seconds for size in sizes if size <= n}
    return max(rates, key=lambda size: rates[size]) if rates else n


def score_agreement(subject: Subject, cam: Library, a: Tensor, n: int) -> float:
    """The correlation of our map with theirs, both made of the n strongest channels."""
    watched = ours.run(subject.model, subject.x, subject.call("score-cam"), budget=2 + n)
    chosen = a[select_channels(a, dead=True).indices[:n]]
    explained: RequestResult = watched.result
    w = cam.weights(chosen, explained.targets.index[0], n)
    S = torch.einsum("k,khw->hw", w, chosen).relu()
    theirs = F.interpolate(S[None, None], explained.maps.shape[-2:], mode="bilinear", align_corners=False).cpu()
    both = torch.stack([explained.maps.flatten(), theirs.flatten()]).double()
    return float(torch.corrcoef(both)[0, 1])
