"""`python -m bench CASE [options]`; `python -m bench CASE --help` tells a case's options."""

from __future__ import annotations

import argparse

from . import compiled, live_rows, roofline, tune, units


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    cases = parser.add_subparsers(dest="case", required=True)
    live_rows.add_arguments(cases.add_parser("live-rows", help=live_rows.__doc__))
    roofline.add_arguments(cases.add_parser("roofline", help=roofline.__doc__.partition("\n")[0]))
    compiled.add_arguments(cases.add_parser("compiled", help=compiled.__doc__))
    units.add_arguments(cases.add_parser("units", help=units.__doc__))
    tune.add_arguments(cases.add_parser("tune", help=tune.__doc__))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
