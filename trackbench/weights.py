"""Official checkpoint files -> our parameter names, without running anything that a file brings along."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor

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


def load_trackon_state_dict(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Read an official Track-On checkpoint: tensors, plain containers, ``argparse.Namespace``, no code.

    Args:
        path: file with a ``model`` entry, or a bare state dict.

    Returns:
        Tensors under ``backbone.*`` and ``head.*``, for ``load_state_dict`` of the tracker.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file would run code, is damaged, or does not hold exactly Track-On's tensors.
    """
    content = _read(path)
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise ValueError(
            f"{path}: expected a Track-On checkpoint with a 'model' entry, got {type(content).__name__}"
        )
    strange = [
        str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if strange:
        raise ValueError(f"{path}: these entries are not named tensors: {', '.join(strange)}")
    try:
        mapped = map_trackon_keys(state)
        _require_complete(mapped)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return mapped


def _read(path: str | PathLike[str]) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it needs {found.group(1)}, which could run code" if found else "it is not plain data"
        raise ValueError(f"{path}: refused to load this checkpoint: {what}") from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a readable PyTorch checkpoint ({error})") from error


def _require_complete(mapped: Mapping[str, Tensor]) -> None:
    """Compare names and shapes with the published model, built without memory."""
    from trackbench.backbones.vit_adapter import ViTAdapter
    from trackbench.heads.memory import MemoryHead

    with torch.device("meta"):
        backbone, head = ViTAdapter(), MemoryHead(in_dim=384)
    expected = {f"backbone.{key}": value.shape for key, value in backbone.state_dict().items()}
    expected |= {f"head.{key}": value.shape for key, value in head.state_dict().items()}
    problems = [f"missing {key}" for key in sorted(expected.keys() - mapped.keys())]
    problems += [f"unexpected {key}" for key in sorted(mapped.keys() - expected.keys())]
    problems += [
        f"{key} is {tuple(mapped[key].shape)} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if key in mapped and mapped[key].shape != shape
    ]
    if problems:
        raise ValueError("not the published Track-On: " + "; ".join(problems))
