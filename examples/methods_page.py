"""Writes docs/methods.md out of what the methods say of themselves: `make docs`.

Titles, papers, equations, advice and parameters are those that the server publishes; costs are those of the embedded
network. What stands above the methods is written by hand, and is here.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import torch
from groups import grouped

from camserve.v1 import explain_pb2 as pb
from camserve_server import registry
from camserve_server.config import embedded_model
from camserve_server.models.load import load
from camserve_server.models.model import Model
from camserve_server.registry import Method, Parameter, Value
from camserve_server.service.responses import method_message

DOCS = Path(__file__).parent.parent / "docs"
MODEL = "EfficientNet-Lite0"

HEAD = """\
<!-- Made by `make docs` from the docstrings of server/camserve_server/methods/ and from examples/methods_page.py. -->

# Methods
What camserve computes, equation by equation. Papers, their official code and other libraries differ in places; this
page says which one is followed. The defaults follow the **paper's equations**. Where the official code differs and it
matters, a parameter reproduces it. `camserve list methods NAME` prints the same from a running server, with the cost on
its own model. How maps are scored: [metrics.md](metrics.md). How to add one: [add-a-method.md](add-a-method.md).

![Four photographs, each with the maps of the methods that a convolutional network can serve](pictures/figure.jpg)

*All methods but two controls, with their default parameters, for the class that EfficientNet-Lite0 predicts; at the
left that class, with its probability. Each map is drawn up to its 99th percentile, as gradients have a few pixels that
outshine all others. Made by `make figure`, after Figure 5 of the
[Poly-CAM paper](https://arxiv.org/abs/2204.13359); the pictures below by `make pictures`. Photographs from
scikit-image: Chelsea by Stéfan van der Walt, coffee by Rachel Michetti, cameraman by Lav Varshney, all CC0; rocket by
SpaceX, public domain, for which ImageNet has no nearer class.*

## Letters
| letter | meaning |
| --- | --- |
| x | the image `[3, H, W]`, normalised: the mean colour is zero |
| c | the class that is explained |
| A, A_k, A_l | the activations `[K, h, w]` of a layer; of one channel k; of layer l, where l = 1 is the finest |
| y, p | the logits, and their softmax; for a network of one logit, or of several labels, their sigmoid |
| up(·) | bilinear resizing to H × W, or to the size of another map (`align_corners=False`, no antialias) |
| n(·) | a map scaled to [0, 1] by its minimum and maximum |
| ⊙ | the product pixel by pixel |
| S | the map |

## What all methods share
- **Maps** have the model's input size and lie in [0, 1]: n(up(S)) unless said otherwise. With `raw` comes S itself,
  too, at its own resolution.
- A map that is constant or not finite is returned as zeros with a `degenerate` warning, never as NaN. One that is
  nearly even, or nearly all in a few pixels, [gets the warning, too](metrics.md#spread), and stays as it is.
- **A mask** multiplies the normalised image, so what is masked out has the mean colour. (Opti-CAM differs.)
- **Layers**: methods of one layer look at the coarsest, methods of several look at all resolutions, unless
  the request names layers. [Which ones these are](configuration.md#layers), and `camserve list layers` shows them.
- **Rows** are images that the network looks at. A row with gradient counts once, but goes backward, too.
- **Stops early**: for a `budget` of rows or a deadline the method does as much as fits, and `share` in [0, 1] says how
  much of the whole that is. The others are refused where the budget is too small.
- **Seeded**: all randomness comes from the request's `seed`, so the same seed gives the same map.
- A map is bitwise the same [alone or among many others](decisions/0002-fixed-batch-sizes.md).

## Overview
Rows are the most that one explanation takes on EfficientNet-Lite0 with default parameters, the prediction's row
included. Where every channel has a row, those that are zero everywhere owe none; that saves a third and more.

| method | layers | needs | rows | a further class | stops early | seeded |
| --- | --- | --- | --- | --- | --- | --- |
"""

LAYERS = {"none": "–", "one": "one", "many": "several"}
LINKS = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}


def main() -> int:
    """Writes the page; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the page of methods.")
    parser.add_argument("--out", type=Path, default=DOCS / "methods.md", metavar="FILE", help="where it goes")
    options = parser.parse_args()
    registry.discover()
    options.out.write_text(page(load(embedded_model(), torch.device("cpu"))), encoding="utf-8")
    return 0


def page(model: Model) -> str:
    """The whole page, with the costs of that model."""
    groups = [*grouped(dict(sorted(registry.METHODS.items())))]
    published = {name: method_message(method, model) for name, method in registry.METHODS.items()}
    names = [method.name for _, methods in groups for method in methods]
    anchor_of = dict(zip(names, anchors(names), strict=True))
    rows = [overview(published[name], anchor) for name, anchor in anchor_of.items()]
    text = HEAD + "\n".join(rows) + "\n"
    for group, methods in groups:
        text += f"\n## {group.title}\n{group.text}\n"
        text += "".join(section(method, published[method.name], anchor_of[method.name]) for method in methods)
    return text


def anchors(names: Sequence[str]) -> Iterator[str]:
    """Of the headings that these names are, as GitHub makes them: #grad-cam, and #grad-cam-1 for Grad-CAM++."""
    seen = Counter[str]()
    for name in names:
        plain = re.sub(r"[^\w-]", "", name)
        yield f"{plain}-{seen[plain]}" if seen[plain] else plain
        seen[plain] += 1


def overview(method: pb.Method, anchor: str) -> str:
    """Its row of the table of all."""
    cells = [
        f"[`{method.name}`](#{anchor})",
        LAYERS[method.layers],
        method.needs or "–",
        "–" if method.unavailable else f"{method.rows:,}",
        "the same map" if method.class_agnostic else f"+ {method.rows_per_target:,}",
        "yes" if method.anytime else "–",
        "yes" if method.seeded else "–",
    ]
    return f"| {' | '.join(cells)} |"


def section(method: Method, published: pb.Method, anchor: str) -> str:
    """Return the section of one method."""
    code, _, remarks = method.equations.partition("\n\n")
    # MkDocs numbers headings with equal anchors differently from GitHub, so these anchors are written out.
    written_out = f'\n<a id="{anchor}"></a>\n' if anchor.endswith("-1") else ""
    parts = [
        f"{written_out}\n### `{method.name}`\n**{method.title}.** {method.summary}",
        paper(method),
        picture(method, published.unavailable),
        f"```\n{code}\n```",
        remarks,
        parameters(method),
        method.advice,
        cost(published),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def paper(method: Method) -> str:
    """Title, authors, year and link: the first two paragraphs of the docstring of its module."""
    title, authors = (inspect.getdoc(inspect.getmodule(method.plan)) or "").split("\n\n")[:2]
    kind, _, number = method.paper.partition(":")
    link = f"[{method.paper}]({LINKS[kind]}{number})"
    return f"*{title.removesuffix('.')}.* {authors.replace(method.paper, link)}"


def picture(method: Method, unavailable: str) -> str:
    """Its map of the cat, or why there is none."""
    if unavailable:
        return f"No picture: {MODEL} cannot serve it, for {unavailable}; and random weights would show nothing."
    if not (DOCS / "pictures" / f"{method.name}.jpg").exists():
        raise FileNotFoundError(f"there is no picture of {method.name}; make it: make pictures")
    return f"![The map of {method.title} over a photograph of a cat](pictures/{method.name}.jpg)"


def parameters(method: Method) -> str:
    """The table of them."""
    if not method.parameters:
        return "No parameters."
    rows = [f"| `{p.name}` | {shown(p.default)} | {allowed(p)} | {p.description} |" for p in method.parameters]
    return "\n".join(["| parameter | default | allowed | meaning |", "| --- | --- | --- | --- |", *rows])


def allowed(parameter: Parameter) -> str:
    """Its choices or its range."""
    if parameter.range:
        return f"{number(parameter.range.minimum)} to {number(parameter.range.maximum)}"
    return ", ".join(map(shown, parameter.choices or (True, False)))


def shown(value: Value) -> str:
    """As it is written in JSON, without the quotes."""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def number(value: float) -> str:
    """With commas, and without an exponent."""
    return f"{Decimal(f'{value:g}'):,f}"


def cost(method: pb.Method) -> str:
    """On the embedded network."""
    if method.unavailable:
        return ""
    further = (
        f"{method.rows_per_target:,} more for each further class"
        if method.rows_per_target
        else "none more for further classes"
    )
    return f"*Cost:* at most {method.rows:,} row{'s' * (method.rows != 1)} on {MODEL}, {further}."


if __name__ == "__main__":
    sys.exit(main())
