"""Checkpoint files -> a tracker's weights: our own and the official ones, without running what a file brings."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trackbench.weights import map_trackon_keys
from trackbench.weights_chrono import convert_chrono_state_dict

_SHOWN = 8


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint: tensors, plain containers and ``argparse.Namespace``, nothing else.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, needs a foreign class, or holds no mapping.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it needs {found.group(1)}, which could run code" if found else "it is not plain data"
        raise ValueError(f"{path}: refused to load this checkpoint: {what}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a readable PyTorch checkpoint ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def tracker_state(content: Mapping[str, Any], origin: str) -> dict[str, Tensor]:
    """The tracker's weights inside a checkpoint of any known kind, under our names (``backbone.*``, ``head.*``).

    Known are trackbench's own files, Track-On's (``model`` with ``module.`` names), Chrono's (``state_dict`` with
    ``model.`` names), and the bare state dict of each.

    Raises:
        ValueError: none of these.
    """
    state = content.get("state_dict", content.get("model", content))
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{origin}: holds no weights; expected an entry 'state_dict' or 'model'")
    weights = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if len(weights) < len(state):
        strange = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
        raise ValueError(f"{origin}: these entries are not tensors: {', '.join(strange[:_SHOWN])}")
    names = {key.removeprefix("module.").removeprefix("model.") for key in weights}
    try:
        if any(name.startswith("tracker.") for name in names):
            own = ((key.removeprefix("tracker."), value) for key, value in weights.items())
            return {key: value for key, value in own if key.startswith(("backbone.", "head."))}
        if any(name.startswith("sm_query_updater.") for name in names):
            return map_trackon_keys(weights)
        if any(name.startswith(("dino.", "adapter.")) for name in names):
            return convert_chrono_state_dict(weights)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    if names and all(name.startswith(("backbone.", "head.")) for name in names):
        return weights
    raise ValueError(
        f"{origin}: not a checkpoint of trackbench, Track-On or Chrono; its first names are {sorted(names)[:3]}"
    )


def load_weights(tracker: nn.Module, path: str | PathLike[str]) -> None:
    """Load a checkpoint into a tracker: every weight of both, or none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or holds another architecture; missing, unexpected and misshapen
            names are listed.
    """
    state = tracker_state(read_checkpoint(path), str(path))
    expected = tracker.state_dict()
    problems = [
        (f"{len(names)} {kind}", names)
        for kind, names in (
            ("missing", sorted(expected.keys() - state.keys())),
            ("unexpected", sorted(state.keys() - expected.keys())),
            (
                "of another shape",
                [
                    f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
                    for key, value in expected.items()
                    if key in state and state[key].shape != value.shape
                ],
            ),
        )
        if names
    ]
    if problems:
        details = "; ".join(f"{title}: {_listing(names)}" for title, names in problems)
        raise ValueError(f"{path} holds another architecture: {details}")
    tracker.load_state_dict(state)


def _listing(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
