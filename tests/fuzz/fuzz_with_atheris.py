"""Coverage-guided fuzzing of the code that parses requests. README.md in this folder describes how to run it.

The first byte of an input selects the kind of the others: an image, an ExplainRequest or an EvaluateRequest.
"""

from __future__ import annotations

import logging
import sys
import warnings

import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]

with atheris.instrument_imports(include=["PIL", "camserve_server.service", "camserve_server.models.pixels"]):
    import PIL.Image

    PIL.Image.init()  # which imports the readers of all formats

    from camserve.v1 import explain_pb2 as pb
    from camserve_server.config import Config
    from camserve_server.errors import CamserveError
    from camserve_server.models.pixels import decode
    from camserve_server.request_plan import limits
    from camserve_server.service import bounds, requests

from tests import nets
from tests.support import as_model

MAX_PIXELS = 250_000
MODEL = as_model(nets.tiny_cnn(), (32, 32))
CONFIG = Config(max_image_pixels=MAX_PIXELS)


def one_input(data: bytes) -> None:
    """Parse one input. Exceptions other than those of camserve, and errors without a field, are crashes."""
    kind, data = data[:1], data[1:]
    try:
        match kind:
            case b"i":
                decode(data, max_pixels=MAX_PIXELS, field="image.encoded")
                return
            case b"x":
                explain = bounds.parse(pb.ExplainRequest, data)
                assert isinstance(explain, pb.ExplainRequest)
                parsed = requests.parse_explain(explain, MODEL, CONFIG)
            case b"v":
                evaluate = bounds.parse(pb.EvaluateRequest, data)
                assert isinstance(evaluate, pb.EvaluateRequest)
                parsed = requests.parse_evaluate(evaluate, MODEL, CONFIG)
            case _:
                return
        limits(parsed.model, parsed.method, parsed.rows, budget=parsed.budget)
        requests.decode_pixels(parsed, CONFIG)
    except CamserveError as error:
        if not (error.field or "cannot be read" in error.message):
            raise RuntimeError(f"no field: {error.message}") from error


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
