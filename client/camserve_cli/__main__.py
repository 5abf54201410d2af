"""Entry point of the `camserve` script and of `python -m camserve_cli`."""

from camserve_cli.extras import needs_extra


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: Always. The exit status is 0 on success, 1 if an operation failed, 2 for wrong usage, a wrong
            configuration or a missing extra, and 130 after Ctrl-C.
    """
    with needs_extra("cli", "camserve"):
        from camserve_cli.app import app
    app(prog_name="camserve")


if __name__ == "__main__":
    main()
