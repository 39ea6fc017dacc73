"""Shared fixtures: where reference data lies, and what happens when it is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_folder(name: str) -> Path:
    """The folder ``../shared/NAME``; skips where it is absent, fails where CI=true and it is absent."""
    folder = SHARED / name
    if not folder.is_dir():
        message = f"reference data {folder} is not on this machine"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def trackon_fixtures() -> Path:
    return shared_folder("parity/trackon")


@pytest.fixture(scope="session")
def chrono_fixtures() -> Path:
    return shared_folder("parity/chrono")


@pytest.fixture(scope="session")
def data_fixtures() -> Path:
    return shared_folder("parity/data")


@pytest.fixture(scope="session")
def realdata() -> Path:
    return shared_folder("realdata")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
