"""``trackbench h5 ...``: each stage's module says what its command takes."""

from __future__ import annotations

import argparse


def add_h5_commands(parser: argparse.ArgumentParser) -> None:
    """Add one command per stage; each module's ``add_command(stages)`` adds its own."""
    parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
