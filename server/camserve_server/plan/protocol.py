"""`Query`, `Plan` and `Answer`. This file contains the only bare `yield` of the project.

Every other generator delegates with `yield from`, so all queries of nested plans reach the engine through
`Query.__iter__`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

Answer = Callable[[], T]
"""Callable that returns the answer to a query, or raises the error that the query caused."""

Plan = Generator["Query[Any]", Answer[Any], T]
"""Generator that yields queries, receives answers and returns a result of type `T`."""


class Query(Generic[T]):
    """Base class of all queries. `answer = yield from query` has the type `T`."""

    def __iter__(self) -> Generator[Query[Any], Answer[T], T]:
        """Send the query to the engine and return its answer.

        Returns:
            The answer.

        Raises:
            Exception: The error of the query, for example `FailedPrecondition` or a device error. It is raised inside
                the plan, at the line of the query.
        """
        answer = yield self
        return answer()
