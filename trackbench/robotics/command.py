"""``trackbench h5 ...``: each stage's module says what its command takes."""

from __future__ import annotations

import argparse
from importlib import import_module

# stage -> the module whose add_command(stages) adds it; only the wanted one is loaded
MODULES = {
    "example": "miniature",
    "extract": "extract",
    "annotate": "annotate",
    "track": "track",
    "serve": "review",
    "decide": "review",
    "attach": "attach",
    "verify": "attach",
    "export": "export",
    "run": "run",
}


def add_h5_commands(parser: argparse.ArgumentParser, stage: str = "") -> None:
    """Add the command of a stage, or of all stages if it is none of them."""
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for module in [MODULES[stage]] if stage in MODULES else dict.fromkeys(MODULES.values()):
        import_module(f"trackbench.robotics.{module}").add_command(stages)
