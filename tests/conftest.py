"""Shared fixtures: where reference data lies, and what happens when it is absent."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def offline_records() -> Callable[[Path], Iterator[Any]]:
    """Reader of the records in a ``.wandb`` file of an offline run."""
    return _offline_records


def _offline_records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    block = 32768
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = block - at % block
        if left < 7:  # a block ends with zeros where no header fits
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record
