"""Docstrings of the client methods that are created from request functions."""

from __future__ import annotations

import inspect
import re
from typing import get_args

import pytest

import camserve
from camserve import batches, request_messages

UNARY = ["explain", "evaluate", "replay", "models", "methods", "metrics"]
STREAMS = ["explain_stream", "evaluate_stream", "replay_stream"]
MANY = ["explain_many", "evaluate_many"]


def sections(name: str) -> dict[str, list[str]]:
    """Return the names of the entries in each section of a method's docstring."""
    doc = inspect.getdoc(getattr(camserve.Client, name)) or ""
    parts = re.split(r"^(Args|Returns|Yields|Raises):\n", doc, flags=re.MULTILINE)[1:]
    return {
        title: re.findall(r"^    (\w+):", body, flags=re.MULTILINE)
        for title, body in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.mark.parametrize("name", [*UNARY, *STREAMS, *MANY])
def test_docstring_describes_all_arguments(name: str) -> None:
    parameters = [*inspect.signature(getattr(camserve.Client, name)).parameters]
    documented = sections(name)
    assert parameters == ["self", *documented["Args"]]
    assert set(documented["Raises"]) <= {"OSError", "TypeError", "ValueError", *camserve.errors.__all__}
    assert ("Returns" in documented) == (name in UNARY)
    assert ("Yields" in documented) == (name not in UNARY)


@pytest.mark.parametrize("name", STREAMS)
def test_stream_docstring_lists_the_events_of_the_annotation(name: str) -> None:
    (events,) = get_args(inspect.signature(getattr(camserve.Client, name)).return_annotation)
    assert sections(name)["Yields"] == [kind.__name__ for kind in get_args(events)]


def test_documented_retry_limit_is_the_real_one() -> None:
    for function in (batches.explain_many, batches.evaluate_many):
        assert f"up to {batches.MAX_ATTEMPTS} times in total" in (function.__doc__ or "").replace("\n    ", " ")
    assert request_messages.DEFAULT_METRICS == ("insertion", "deletion", "average-gain")
