"""Entry point of the `camserve` script and of `python -m camserve_cli`."""

import io
import sys

from camserve_cli.extras import needs_extra


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: Always. The exit status is 0 on success, 1 if an operation failed, 2 for wrong usage, a wrong
            configuration or a missing extra, and 130 after Ctrl-C.
    """
    # Names of files can have bytes that are not UTF-8, and terminals other encodings than UTF-8.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    with needs_extra("cli", "camserve"):
        from camserve_cli.app import app
    app(prog_name="camserve")


if __name__ == "__main__":
    main()
