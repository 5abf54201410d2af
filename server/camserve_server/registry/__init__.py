"""Registry of methods and metrics. A decorator registers a function:

    @method("score-cam", title="Score-CAM", paper="arXiv:1910.01279", rows=lambda s: s.channels[0])
    def score_cam(x: Image, c: Targets, layer: str, *, batch: Annotated[int, Range(1, 9)] = 3) -> Plan[SaliencyMaps]:

The signature is the schema. A third positional argument `layer` or `layers` makes it a method of one layer or of
several layers. Keyword-only arguments are its parameters, with type, range, choices and default. `seed` is not a
parameter: the request has it.

The docstring is published. `ListMethods` and `ListMetrics` return its first line as the summary. The description of a
parameter is a string in its annotation or, without one, its entry in the section `Args:`. The sections `Equations:` and
`Advice:` appear in `camserve list methods NAME` and in docs/methods.md.
"""

from camserve_server.registry.entries import (
    NEEDS,
    REQUEST_KEYWORDS,
    Entry,
    Layers,
    Method,
    Metric,
    Needs,
    Parameter,
    Passes,
    Range,
    Sizes,
    Value,
)
from camserve_server.registry.table import (
    METHODS,
    METRICS,
    discover,
    get_method,
    get_metric,
    method,
    method_label,
    metric,
)

__all__ = [
    "METHODS",
    "METRICS",
    "NEEDS",
    "REQUEST_KEYWORDS",
    "Entry",
    "Layers",
    "Method",
    "Metric",
    "Needs",
    "Parameter",
    "Passes",
    "Range",
    "Sizes",
    "Value",
    "discover",
    "get_method",
    "get_metric",
    "method",
    "method_label",
    "metric",
]
