"""A work folder that is made once, and a copy of it for every test."""

from __future__ import annotations

from pathlib import Path

import pytest
from review_fakes import Folder, make_folder


@pytest.fixture(scope="session")
def made_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return make_folder(tmp_path_factory.mktemp("review"))


@pytest.fixture
def folder(made_folder: Folder, tmp_path: Path) -> Folder:
    return made_folder.copy(tmp_path / "out")
