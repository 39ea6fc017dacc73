from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from trackbench.robotics.command import MODULES, add_h5_commands


def stages(wanted: str = "") -> set[str]:
    parser = argparse.ArgumentParser()
    add_h5_commands(parser, wanted)
    return {name for action in parser._subparsers._group_actions for name in action.choices}  # type: ignore[union-attr]


def test_every_stage_is_found_by_its_name() -> None:
    assert stages() == set(MODULES)
    for stage in MODULES:
        assert stage in stages(stage)


@pytest.mark.parametrize("stage", ["extract"])
def test_stages_of_many_processes_do_not_load_pytorch(stage: str) -> None:
    """Each process would take 300 MB and seconds more."""
    code = (
        "import sys; from trackbench import cli, jobs\n"
        f"try: cli.main(['h5', {stage!r}, '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'trackbench.robotics' in sys.modules; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
