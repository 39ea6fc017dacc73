"""Checkpoint files -> a tracker's weights: our own and the official ones, without running what a file brings.

Official files: Track-On's ``track_on_checkpoint.pt`` (github.com/gorkaydemir/track_on); Chrono's Lightning
checkpoints (github.com/cvlab-kaist/Chrono); for DINOv2 see :func:`trackbench.backbones.vit.load_dinov2_weights`.
"""

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

_WRAPPER = "module."

# official prefix -> ours, first match wins; the official ViT and its adapter share one namespace
_TRACKON_PREFIXES = (
    ("backbone.frame_pos_embedding", "head.frame_pos_embedding"),
    ("backbone.token_projection.", "head.token_projection."),
    ("backbone.vit_encoder.cls_token", "backbone.vit.cls_token"),
    ("backbone.vit_encoder.pos_embed", "backbone.vit.pos_embed"),
    ("backbone.vit_encoder.patch_embed.", "backbone.vit.patch_embed."),
    ("backbone.vit_encoder.blocks.", "backbone.vit.blocks."),
    ("backbone.vit_encoder.norm.", "backbone.vit.norm."),
    ("backbone.vit_encoder.", "backbone."),
    ("sm_query_updater.", "head.sm_query_updater."),
    ("query_decoder.", "head.query_decoder."),
    ("feature_decoder.", "head.feature_decoder."),
    ("rerank_module.", "head.rerank_module."),
    ("offset_head.", "head.offset_head."),
    ("visibility_head.", "head.visibility_head."),
    ("projection1.", "head.projection1."),
    ("projection2.", "head.projection2."),
    ("corr_layer.", "head.corr_layer."),
)


_SHOWN = 8


def map_trackon_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official Track-On names -> names of a tracker with ``ViTAdapter`` and ``MemoryHead``.

    Args:
        state: official state dict, with or without the ``module.`` prefix of a distributed wrapper.

    Raises:
        ValueError: names that Track-On does not have.
    """
    mapped, unknown = {}, []
    for key, value in state.items():
        name = key.removeprefix(_WRAPPER)
        for official, ours in _TRACKON_PREFIXES:
            if name.startswith(official):
                mapped[ours + name[len(official) :]] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"{len(unknown)} names are not Track-On's: {', '.join(sorted(unknown))}")
    return mapped


# official prefix -> ours
_CHRONO_PREFIXES = {
    "dino.": "backbone.trunk.vit.",
    "adapter.": "backbone.adapters.",
    "occ_linear.": "head.occ_linear.",
}
_CHRONO_UNUSED = ("dino.mask_token",)  # only DINOv2's pre-training used it


def map_chrono_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official Chrono names -> names of a tracker with ``ChronoBackbone(DinoV2(...))`` and ``CorrelationHead``.

    Args:
        state: official state dict, with or without Lightning's prefix ``model.``.

    Raises:
        ValueError: names that Chrono does not have.
    """
    official = {key.removeprefix("model."): value for key, value in state.items()}
    unknown = [key for key in official if not key.startswith(tuple(_CHRONO_PREFIXES))]
    if unknown:
        raise ValueError(f"{len(unknown)} names are not Chrono's: {', '.join(sorted(unknown))}")
    mapped = {}
    for key, value in official.items():
        if key not in _CHRONO_UNUSED:
            prefix = next(prefix for prefix in _CHRONO_PREFIXES if key.startswith(prefix))
            mapped[_CHRONO_PREFIXES[prefix] + key.removeprefix(prefix)] = value
    return mapped


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
            return map_chrono_keys(weights)
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
