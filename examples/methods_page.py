"""Write docs/methods.md from the descriptions of the methods: `make docs`.

Titles, papers, equations, advice and parameters are those that the server publishes. The costs are those of the
embedded network. The text above the methods is part of this file.
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
This page lists the equations of all methods. Papers, their official code and other libraries differ in places. The
defaults follow the **equations of the papers**. Where the official code differs significantly, a parameter reproduces
it. `camserve list methods NAME` prints the same from a running server, with the cost on its own model. See also
[how maps are scored](metrics.md) and [how to add a method](add-a-method.md).

![Four photographs, each with the maps of the methods that a convolutional network can serve](pictures/figure.jpg)

*All methods except two controls, with their default parameters, for the class that EfficientNet-Lite0 predicts. The
class and its probability are at the left. The colours of a map end at its 99th percentile, because gradient maps have a
few pixels with much higher values. `make figure` makes this figure, after Figure 5 of the
[Poly-CAM paper](https://arxiv.org/abs/2204.13359), and `make pictures` the images below. The photographs are part of
scikit-image: Chelsea by Stéfan van der Walt, coffee by Rachel Michetti, cameraman by Lav Varshney (all CC0), rocket by
SpaceX (public domain). ImageNet has no class for a rocket; its nearest class is missile.*

## Letters
| letter | meaning |
| --- | --- |
| x | the image `[3, H, W]`, normalised so that the mean colour is zero |
| c | the explained class |
| A, A_k, A_l | the activations `[K, h, w]` of a layer; of its channel k; of layer l, where l = 1 is the finest |
| y, p | the logits, and their softmax (their sigmoid for a network with one logit or several labels) |
| up(·) | bilinear resizing to H × W, or to the size of another map (`align_corners=False`, no antialias) |
| n(·) | a map scaled to [0, 1] by its minimum and maximum |
| ⊙ | the elementwise product |
| S | the map |

## Common properties
- **Maps** have the model's input size and values in [0, 1]: n(up(S)), unless the method says otherwise. With `raw`, the
  response also contains S at its own resolution.
- A map that is constant or not finite is returned as zeros with a `degenerate` warning, never as NaN. A map that is
  nearly constant or concentrated in a few pixels [also has this warning](metrics.md#spread) and is returned unchanged.
- **A mask** multiplies the normalised image, so masked pixels have the mean colour. Opti-CAM differs.
- **Layers**: methods of one layer use the coarsest layer, and methods of several layers use all resolutions, unless the
  request names layers. See [the choice of layers](configuration.md#layers); `camserve list layers` shows them.
- **Rows** are inputs of the network. A row with a gradient counts once, although it also needs a backward pass.
- **Stops early**: with a `budget` of rows or a deadline, the method does as much as fits. `share` in [0, 1] tells how
  much of the whole this is. Other methods are refused if the budget is too small.
- **Seeded**: all random numbers come from the request's `seed`, so the same seed gives the same map.
- A map is the same bit for bit [alone or with concurrent requests](decisions/0002-fixed-batch-sizes.md).

## Overview
Rows are the maximum for one explanation on EfficientNet-Lite0 with default parameters, including the row of the
prediction. Methods with a row for each channel need no rows for channels that are zero everywhere, which saves at least
a third.

| method | layers | needs | rows | a further class | stops early | seeded |
| --- | --- | --- | --- | --- | --- | --- |
"""

LAYERS = {"none": "–", "one": "one", "many": "several"}
LINKS = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}


def main() -> int:
    """Write the page and return the exit status."""
    parser = argparse.ArgumentParser(description="Write the page of methods.")
    parser.add_argument("--out", type=Path, default=DOCS / "methods.md", metavar="FILE", help="file to write")
    options = parser.parse_args()
    registry.discover()
    options.out.write_text(page(load(embedded_model(), torch.device("cpu"))), encoding="utf-8")
    return 0


def page(model: Model) -> str:
    """Return the page with the costs of this model."""
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
    """Yield the anchors of the headings as GitHub makes them: #grad-cam, and #grad-cam-1 for Grad-CAM++."""
    seen = Counter[str]()
    for name in names:
        plain = re.sub(r"[^\w-]", "", name)
        yield f"{plain}-{seen[plain]}" if seen[plain] else plain
        seen[plain] += 1


def overview(method: pb.Method, anchor: str) -> str:
    """Return the row of a method in the overview."""
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
        image(method, published.unavailable),
        f"```\n{code}\n```",
        remarks,
        parameters(method),
        method.advice,
        cost(published),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def paper(method: Method) -> str:
    """Return title, authors, year and link: the first two paragraphs of the docstring of the method's module."""
    title, authors = (inspect.getdoc(inspect.getmodule(method.plan)) or "").split("\n\n")[:2]
    kind, _, number = method.paper.partition(":")
    link = f"[{method.paper}]({LINKS[kind]}{number})"
    return f"*{title.removesuffix('.')}.* {authors.replace(method.paper, link)}"


def image(method: Method, unavailable: str) -> str:
    """Return the link to the map of the cat, or the reason why there is none."""
    if unavailable:
        return f"No image: {MODEL} cannot serve this method ({unavailable})."
    if not (DOCS / "pictures" / f"{method.name}.jpg").exists():
        raise FileNotFoundError(f"the image of {method.name} is missing; make it with: make pictures")
    return f"![The map of {method.title} over a photograph of a cat](pictures/{method.name}.jpg)"


def parameters(method: Method) -> str:
    """Return the table of the parameters."""
    if not method.parameters:
        return "No parameters."
    rows = [f"| `{p.name}` | {literal(p.default)} | {allowed(p)} | {p.description} |" for p in method.parameters]
    return "\n".join(["| parameter | default | allowed | meaning |", "| --- | --- | --- | --- |", *rows])


def allowed(parameter: Parameter) -> str:
    """Return the choices or the range of a parameter."""
    if parameter.range:
        return f"{number(parameter.range.minimum)} to {number(parameter.range.maximum)}"
    return ", ".join(map(literal, parameter.choices or (True, False)))


def literal(value: Value) -> str:
    """Return a value in JSON without quotes."""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def number(value: float) -> str:
    """Format a number with thousands separators and without an exponent."""
    return f"{Decimal(f'{value:g}'):,f}"


def cost(method: pb.Method) -> str:
    """Return the cost on the embedded network."""
    if method.unavailable:
        return ""
    further = (
        f"{method.rows_per_target:,} more for each further class"
        if method.rows_per_target
        else "no more for further classes"
    )
    return f"*Cost:* at most {method.rows:,} row{'s' * (method.rows != 1)} on {MODEL}, {further}."


if __name__ == "__main__":
    sys.exit(main())
