"""Page of the demo: one HTML file that needs no other file, no script and no network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import PIL.Image

import camserve
from camserve.heatmaps import ALPHA, COLOURS, overlay


@dataclass(frozen=True)
class Photograph:
    """Photograph with its description.

    Attributes:
        path: The image file.
        title: Title of the photograph.
        credit: Author and licence.
        comment: Comment on the maps, or "".
    """

    path: Path
    title: str
    credit: str
    comment: str


@dataclass(frozen=True, eq=False)
class Result:
    """Result of one method for a photograph.

    Attributes:
        method: Description of the method.
        explanation: The map with its scores.
        levels: Intermediate maps, from coarse to fine.
        map_seconds: Time until the map was finished and its scoring began.
    """

    method: camserve.Method
    explanation: camserve.Explanation
    levels: tuple[camserve.Level, ...]
    map_seconds: float

    @property
    def difference(self) -> float:
        """Insertion minus deletion. Higher is better."""
        return self.explanation.scores["insertion"] - self.explanation.scores["deletion"]

    @property
    def score_rows(self) -> int:
        """Number of rows of the scores: one for each point of a curve."""
        return sum(len(score.curve) for score in self.explanation.scores.values())

    @property
    def map_rows(self) -> int:
        """Number of rows of the prediction and the map."""
        return self.explanation.cost.rows - self.score_rows


Results = Sequence[tuple[Photograph, Sequence[Result]]]


def html(model: camserve.Model, rows: Results, *, seconds: float, note: str = "") -> str:
    """Return the page.

    Args:
        model: Description of the model.
        rows: Each photograph with its results.
        seconds: Duration of the run.
        note: A note at the top of the page, or "".
    """
    total = sum(result.explanation.cost.rows for _, results in rows for result in results)
    facts = f"{total:,} rows in {_duration(seconds)} on the {model.device.upper()}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>camserve: which parts of an image decide the class</title>
<style>{CSS}</style>
</head>
<body>
<header>
<p class="name">camserve</p>
<h1>Which parts of an image decide the class?</h1>
<p class="lead">{_lead(rows)} The network is <b>{escape(model.name)}</b>, trained on ImageNet. The run took
{facts}, including the start of the server.</p>
{f'<p class="note"><b>Note.</b> {escape(note)}</p>' if note else ""}
</header>
<main>
{"".join(_section(model, photograph, results) for photograph, results in rows)}
{_reading(rows)}
{_receipts(rows)}
</main>
<footer>Made by <code>make demo</code>. Photographs from scikit-image.</footer>
</body>
</html>
"""


def _lead(rows: Results) -> str:
    titles = [escape(result.method.title) for result in rows[0][1]]
    photographs = "One photograph" if len(rows) == 1 else f"{('Two', 'Three')[len(rows) - 2]} photographs"
    return (
        f"{photographs}, explained by {', '.join(titles[:-1])} and {titles[-1]} for the predicted class. "
        "A brighter colour means stronger evidence for the class."
    )


# ---- a photograph ---------------------------------------------------------------------------------------------------


def _section(model: camserve.Model, photograph: Photograph, results: Sequence[Result]) -> str:
    answer = results[0].explanation
    name = photograph.path.stem
    best = max(results, key=lambda result: result.difference)
    return f"""<section aria-labelledby="{name}">
<h2 id="{name}">{escape(photograph.title)}: <q>{escape(answer.target.label)}</q>,
{answer.target.probability:.1%}</h2>
{f"<p>{escape(photograph.comment)}</p>" if photograph.comment else ""}
<div class="cards">
{_original(photograph, answer)}
{"".join(_card(photograph, result, result is best) for result in results)}
</div>
{"".join(_levels(model, photograph, result) for result in results if len(result.levels) > 1)}
</section>
"""


def _original(photograph: Photograph, answer: camserve.Explanation) -> str:
    predictions = "".join(
        f'<li><span class="bar" style="width:{p.probability:.2%}"></span>'
        f"<span>{escape(p.label)}</span> <span>{p.probability:.1%}</span></li>"
        for p in answer.predictions[:4]
    )
    return f"""<figure class="card">
{_img(answer.image(), f"Photograph: {photograph.title}.")}
<figcaption>
<h3>Photograph</h3>
<p class="sub">{escape(photograph.credit)}</p>
<p class="term">Predictions of the network</p>
<ol class="predictions">{predictions}</ol>
</figcaption>
</figure>
"""


def _card(photograph: Photograph, result: Result, best: bool) -> str:
    e = result.explanation
    insertion, deletion = e.scores["insertion"], e.scores["deletion"]
    alt = f"Map of {result.method.title} for {e.target.label}, drawn over the photograph."
    warnings = "".join(f'<p class="note">{escape(warning)}</p>' for warning in e.warnings)
    return f"""<figure class="card">
{_img(e.overlay(), alt)}
{'<p class="best">best difference</p>' if best else ""}
<figcaption>
<h3>{escape(result.method.title)}</h3>
<p class="sub">for {escape(e.target.label)}, {e.target.probability:.1%}</p>
{_curves(insertion, deletion)}
<dl>
<div><dt class="insertion">insertion</dt><dd>{insertion:.3f}</dd></div>
<div><dt class="deletion">deletion</dt><dd>{deletion:.3f}</dd></div>
<div class="main"><dt>difference</dt><dd>{_signed(result.difference)}</dd></div>
<div><dt>rows</dt><dd>{result.map_rows:,}</dd></div>
<div><dt>time</dt><dd>{result.map_seconds:.1f} s</dd></div>
</dl>
{warnings}
</figcaption>
</figure>
"""


def _curves(insertion: camserve.Score, deletion: camserve.Score) -> str:
    """Draw the two curves, the probability of the class over the share of pixels. Their areas are the scores."""
    label = f"Insertion curve, area {insertion:.3f}, and deletion curve, area {deletion:.3f}."
    lines = "".join(
        f'<polyline class="{name}" points="{_points(score.curve)}"/>'
        for name, score in (("insertion", insertion), ("deletion", deletion))
    )
    return f"""<svg class="curves" viewBox="0 0 200 72" role="img" aria-label="{label}">
<path class="axis" d="M0.5 1V60.5H200"/>{lines}
<text x="0" y="71">no pixels</text><text x="200" y="71" text-anchor="end">all pixels</text></svg>
"""


def _points(curve: Sequence[float]) -> str:
    return " ".join(f"{200 * (i + 1) / len(curve):.1f},{60 - 58 * p:.1f}" for i, p in enumerate(curve))


def _levels(model: camserve.Model, photograph: Photograph, result: Result) -> str:
    image = result.explanation.image()
    sizes = {layer.name: f"{layer.height} × {layer.width}" for layer in model.layers}
    figures = "".join(
        f"<li><figure>{_img(overlay(image, level.saliency, ALPHA), _level_alt(result, level), side_px=360)}"
        f"<figcaption><b>{sizes.get(level.layer, '')}</b> {escape(level.layer)}</figcaption></figure></li>"
        for level in result.levels
    )
    return f"""<div class="levels">
<h3>{escape(result.method.title)}, from coarse to fine</h3>
<p class="sub">Each level adds a finer layer of the network to the coarser ones. The server sends each level as soon as
it is finished.</p>
<ol>{figures}</ol>
</div>
"""


def _level_alt(result: Result, level: camserve.Level) -> str:
    return f"{result.method.title}, level {level.index + 1} of {level.count}, layer {level.layer}."


# ---- explanations of the page ---------------------------------------------------------------------------------------


def _reading(rows: Results) -> str:
    scale = ", ".join(f"rgb({r} {g} {b})" for r, g, b in COLOURS[::15].tolist())
    methods = "".join(
        f"<dt>{escape(result.method.title)}</dt>"
        f'<dd>{escape(result.method.summary)} <span class="sub">{escape(result.method.paper)}</span></dd>'
        for result in rows[0][1]
    )
    return f"""<section aria-labelledby="reading">
<h2 id="reading">How to read this</h2>
<div class="columns">
<div>
<h3>Colours</h3>
<p>A map assigns each pixel a value from 0 (not used) to 1 (the strongest evidence for the class). At 0, the photograph
is shown unchanged.</p>
<p class="scale"><span>0</span><span class="gradient" role="img" aria-label="From dark blue at 0 over violet, pink and
orange to pale yellow at 1." style="background:linear-gradient(to right, {scale})"></span><span>1</span></p>
</div>
<div>
<h3>Scores</h3>
<p><b class="insertion">Insertion</b> starts from a blurred image and restores the pixels, the most salient first. With
a good map, the probability of the class rises early. <b class="deletion">Deletion</b> removes the pixels in the same
order. With a good map, the probability falls early. Each score is the mean height of its curve. The <b>difference</b>
of the two scores summarises a map: higher is better.</p>
</div>
<div>
<h3>Rows and time</h3>
<p>A row is one input of the network. The table shows the rows of the map. Its scores took
{rows[0][1][0].score_rows} more. The three methods of a photograph run at the same time and share the batches of the
server, so they also share the time.</p>
</div>
<div>
<h3>Methods</h3>
<dl class="methods">{methods}</dl>
</div>
</div>
</section>
"""


def _receipts(rows: Results) -> str:
    """Return the receipts of all maps."""
    receipts = "".join(
        f"<details><summary>{escape(photograph.title)}, {escape(result.method.title)}</summary>"
        f"<pre>{escape(json.dumps(asdict(result.explanation.receipt), indent=2))}</pre></details>"
        for photograph, results in rows
        for result in results
    )
    return f"""<section class="receipts" aria-labelledby="receipts">
<h2 id="receipts">Receipts</h2>
<p><code>camserve replay</code> makes a map again from its receipt.</p>
{receipts}
</section>
"""


# ---- images and numbers ---------------------------------------------------------------------------------------------


def _img(image: PIL.Image.Image, alt: str, side_px: int = 640) -> str:
    image = image.copy()
    image.thumbnail((side_px, side_px), PIL.Image.Resampling.LANCZOS)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=88)
    data = base64.b64encode(jpeg.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img alt="{escape(alt)}" {size} src="data:image/jpeg;base64,{data}">'


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


CSS = """
:root {
  --paper: #fbfaf8; --card: #fff; --ink: #1d1b22; --soft: #5d5966; --line: #dfdbe3;
  --insertion: #8a2fb0; --deletion: #b4440c; --bar: #e9def2; --best: #1f6b3a; --best-ink: #fff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131218; --card: #1d1b24; --ink: #eceaf1; --soft: #aaa5b6; --line: #37333f;
    --insertion: #d793f5; --deletion: #ffa266; --bar: #46325a; --best: #7ed49b; --best-ink: #10231a;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 2rem clamp(1rem, 4vw, 3rem); background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: clamp(1.7rem, 4vw, 2.6rem); line-height: 1.15; margin: .2rem 0 .8rem; letter-spacing: -.02em; }
h2 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 .4rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 0; }
p { max-width: 75ch; margin: .4rem 0; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
.name { color: var(--insertion); font-weight: 700; margin: 0; }
.lead { font-size: 1.1rem; }
.sub { color: var(--soft); font-size: .875rem; margin: .1rem 0; }
.note { border-left: 4px solid var(--deletion); padding: .2rem .8rem; }
section { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 1.8rem; }
.cards { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); margin: 1.2rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden;
  position: relative; }
.card figcaption { padding: .8rem 1rem 1rem; }
.best { position: absolute; top: .6rem; right: .6rem; margin: 0; padding: .1rem .6rem; border-radius: 99px;
  background: var(--best); color: var(--best-ink); font-size: .75rem; font-weight: 600; }
.term { color: var(--soft); font-size: .875rem; margin: .9rem 0 .3rem; }
.predictions { list-style: none; margin: 0; padding: 0; font-size: .9rem; }
.predictions li { position: relative; display: flex; justify-content: space-between; gap: 1rem; padding: .15rem .4rem;
  margin-bottom: .25rem; border-radius: 4px; isolation: isolate; }
.bar { position: absolute; inset: 0 auto 0 0; background: var(--bar); border-radius: 4px; z-index: -1; min-width: 3px; }
.curves { display: block; width: 100%; max-width: 300px; margin: .7rem 0 .5rem; overflow: visible; }
.curves text { fill: var(--soft); font-size: 9px; }
.curves .axis { stroke: var(--line); fill: none; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
polyline.insertion { stroke: var(--insertion); }
polyline.deletion { stroke: var(--deletion); stroke-dasharray: 4 2; }
b.insertion { color: var(--insertion); } b.deletion { color: var(--deletion); }
.card dl { margin: 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
.card dl div { display: flex; justify-content: space-between; }
.card dl .main { font-weight: 700; border-bottom: 1px solid var(--line); padding-bottom: .3rem; margin-bottom: .3rem; }
dt { color: var(--soft); }
.card dt.insertion::after, .card dt.deletion::after { content: ""; display: inline-block; vertical-align: middle;
  width: 1.6rem; margin-left: .5rem; border-top: 2px solid var(--insertion); }
.card dt.deletion::after { border-top: 2px dashed var(--deletion); } .main dt { color: inherit; } dd { margin: 0; }
.levels ol { list-style: none; padding: 0; margin: .8rem 0 0; display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(210px, 45%), 1fr)); }
.levels img { border-radius: 8px; }
.levels figcaption { font-size: .85rem; color: var(--soft); padding-top: .3rem; }
.levels figcaption b { color: var(--ink); }
.columns { display: grid; gap: 1.5rem 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.scale { display: flex; align-items: center; gap: .6rem; }
.gradient { flex: 1; max-width: 22rem; height: 1.1rem; border-radius: 4px; border: 1px solid var(--line); }
.methods dt { color: inherit; font-weight: 600; margin-top: .5rem; }
details { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: .5rem 0; }
pre { overflow-x: auto; font-size: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem; }
footer { border-top: 1px solid var(--line); color: var(--soft); font-size: .875rem; margin-top: 3rem;
  padding-top: 1rem; }
@media (max-width: 560px) { .cards { grid-template-columns: 1fr; } .levels ol { grid-template-columns: 1fr 1fr; } }
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --insertion: #8a2fb0;
    --deletion: #b4440c; --bar: #e9def2; --best: #1f6b3a; --best-ink: #fff; }
  html { font-size: 11px; }
  body { padding: 0; max-width: none; font-size: 1rem; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .receipts { display: none; }
  section { break-inside: avoid-page; margin-top: 1.2rem; padding-top: .8rem; }
  .cards { grid-template-columns: repeat(4, 1fr); gap: .5rem; } .levels ol { grid-template-columns: repeat(5, 1fr); }
  .card, .levels { break-inside: avoid; } .card figcaption { padding: .5rem; }
}
"""
