"""`python -m bench CASE [options]`; `python -m bench CASE --help` tells a case's options."""

from __future__ import annotations

import argparse

from . import live_rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    cases = parser.add_subparsers(dest="case", required=True)
    live_rows.add_arguments(cases.add_parser("live-rows", help=live_rows.__doc__))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
