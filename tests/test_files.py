"""Files appear whole or not at all; names stay in their folder."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trackbench.files import inside, remove_unfinished, sha256, written_whole


def write_half(file: Path) -> None:
    with written_whole(file) as unfinished:
        unfinished.write_text("half of the sec")
        raise RuntimeError


def test_a_file_takes_its_place_when_it_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    with written_whole(file) as unfinished:
        assert unfinished.suffix == ".txt"
        unfinished.write_text("first")
        assert not file.exists()
    with pytest.raises(RuntimeError):
        write_half(file)
    assert file.read_text() == "first"
    assert list(file.parent.iterdir()) == [file]
    assert sha256(file) == hashlib.sha256(b"first").hexdigest()


def test_what_a_kill_leaves_is_cleared(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from trackbench.files import written_whole\n"
        "with written_whole(Path(sys.argv[1]) / 'a.txt') as file:\n"
        "    file.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    (tmp_path / "a.txt").write_text("whole")
    (tmp_path / ".keep").write_text("another's")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    remove_unfinished(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".keep", "a.txt"]
    assert (tmp_path / "a.txt").read_text() == "whole"
    remove_unfinished(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["", ".", "/etc/passwd", "../a", "a/../../b", "a\\b", "c:/x", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="relative name"):
        inside(tmp_path, name)


def test_names_inside_are_taken_and_links_out_are_not(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    assert inside(root, "a/b.h5") == root / "a" / "b.h5"
    (root / "out").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads out"):
        inside(root, "out/secret")
