"""``trackbench prepare NAME``: each data set's module says what its command takes."""

from __future__ import annotations

import argparse

from trackbench.data.prepare import benchmarks, kinetics, movi


def add_prepare_commands(parser: argparse.ArgumentParser) -> None:
    """Add one command per data set; each module's ``add_command(names)`` adds its own."""
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    movi.add_command(names)
    kinetics.add_command(names)
    benchmarks.add_command(names)
