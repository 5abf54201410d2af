"""`camserve`, and `python -m camserve_cli`: starts the command line, or says what it needs."""

import sys


def main() -> None:
    """Run the command line. Exits with 0, 1 (something failed), 2 (wrong usage) or 130 (interrupted)."""
    try:
        from camserve_cli.app import app
    except ModuleNotFoundError as missing:
        needed = (missing.name or "").partition(".")[0]
        if needed not in ("typer", "rich"):
            raise
        sys.exit(f"error: the command line needs {needed}: pip install 'camserve[cli]'")
    app(prog_name="camserve")


if __name__ == "__main__":
    main()
