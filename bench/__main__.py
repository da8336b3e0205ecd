"""`python -m bench [options]` compares ours with every peer; `python -m bench COMMAND --help` tells of a command."""

from __future__ import annotations

import argparse

from . import against, compiled, host, record, report, run, tune, warm


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    run.add_arguments(parser)
    commands = parser.add_subparsers(dest="command")
    for module in (record, report, against, host, compiled, tune, warm):
        name = module.__name__.rpartition(".")[2]
        assert module.__doc__ is not None
        module.add_arguments(commands.add_parser(name, help=module.__doc__.partition("\n\n")[0]))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
