"""Error message for commands that need an optional dependency group (an extra) of the camserve distribution."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["needs_extra"]


@contextmanager
def needs_extra(extra: str, command: str) -> Iterator[None]:
    """Exit with status 2 and an installation hint if an import in the block fails.

    Args:
        extra: The extra that contains the packages that the block imports, for example "server".
        command: The command that needs the extra, as the user types it, for example "camserve serve".

    Raises:
        SystemExit: A package of the extra is not installed.
        ModuleNotFoundError: A module of camserve itself is missing. This is a bug, not a missing extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package.startswith("camserve"):
            raise
        print(
            f"error: `{command}` needs the package {package}, which is not installed; "
            f"install it with: pip install 'camserve[{extra}]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
