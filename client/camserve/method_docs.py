"""Names, signatures and docstrings of the client methods that are created from request functions.

`camserve.Client` and `camserve.aio.Client` wrap the functions of `camserve.request_messages` and `camserve.batches`. A
function returns a prepared call, and the method returns its result, so the documentation needs a few changes.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any, get_args

from camserve.answers import Level, Progress, Randomised

__all__ = ["document_method"]

_EVENTS = {
    Progress: "Number of rows done. The server sends it at least every 15 s.",
    Level: "Intermediate maps of one level of a coarse-to-fine method such as Poly-CAM, the coarsest first.",
    Randomised: "Map of one step of a randomisation metric.",
}


def document_method(
    method: Any, build_call: Callable[..., Any], container: Any = None, *, streams: bool = False
) -> None:
    """Set the name, signature and docstring of a client method.

    Args:
        method: The method to change.
        build_call: The request function that the method wraps.
        container: Generic type that contains the result or the event, such as `Awaitable`. None for a plain result.
        streams: True for the method that yields the events of the streaming RPC.
    """
    signature = inspect.signature(build_call)
    result, event = (*get_args(signature.return_annotation), None)[:2]
    inner = event if streams else result
    name = build_call.__name__.removeprefix("list_")
    doc = inspect.cleandoc(build_call.__doc__ or "")
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = signature.replace(
        parameters=[self_parameter, *signature.parameters.values()],
        return_annotation=container[inner] if container else inner,
    )
    method.__name__ = f"{name}_stream" if streams else name
    method.__qualname__ = f"Client.{method.__name__}"
    method.__doc__ = _stream_doc(name, doc, event) if streams else doc


def _stream_doc(name: str, doc: str, event: Any) -> str:
    """Return the docstring of a streaming method: its first line and its "Yields" section replace those of `doc`."""
    *intermediate, result = get_args(event)
    events = [f"    {kind.__name__}: {_EVENTS[kind]}" for kind in intermediate]
    yields = "\n".join(["Yields:", *events, f"    {result.__name__}: The last event; the result of `{name}`."])
    doc = re.sub(r"^Returns:\n(?:    .*\n)+", yields + "\n", doc, flags=re.MULTILINE)
    first_line = f"Call `{name}` and yield events while the server works."
    return f"{first_line}\n\n{doc.replace('Args:', _CLOSING + 'Args:', 1)}"


_CLOSING = "Closing the iterator before its last event cancels the call.\n\n"
