"""Official Chrono checkpoints -> a :class:`PointTracker`'s names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PREFIXES = {
    "dino.": "backbone.trunk.vit.",
    "adapter.": "backbone.adapters.",
    "occ_linear.": "head.occ_linear.",
}
UNUSED = ("dino.mask_token",)  # only DINOv2's pre-training used it


def load_chrono_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read an official Chrono checkpoint.

    Args:
        path: Lightning checkpoint (keys under ``state_dict``, prefix ``model.``), or a file of bare weights.

    Returns:
        The weights under the names of a tracker with ``ChronoBackbone(DinoV2(...))`` and ``CorrelationHead``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no Chrono checkpoint, or holds keys that belong to none of its parts.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Chrono checkpoint {path} does not exist")
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} is not a Chrono checkpoint: expected a mapping of names to tensors")
    return convert_chrono_state_dict(content, source=str(path))


def convert_chrono_state_dict(
    official: Mapping[str, Tensor], source: str = "the state dict"
) -> dict[str, Tensor]:
    """Rename official Chrono weights; see :func:`load_chrono_state_dict`."""
    official = {key.removeprefix("model."): value for key, value in official.items()}
    unknown = [key for key in official if not key.startswith(tuple(PREFIXES))]
    if unknown:
        raise ValueError(f"{source} has keys that are not Chrono's: {', '.join(sorted(unknown)[:8])}")
    absent = [prefix + "*" for prefix in PREFIXES if not any(key.startswith(prefix) for key in official)]
    if absent:
        raise ValueError(f"{source} lacks keys of Chrono: {', '.join(absent)}")
    converted = {}
    for key, value in official.items():
        if key not in UNUSED:
            prefix = next(prefix for prefix in PREFIXES if key.startswith(prefix))
            converted[PREFIXES[prefix] + key.removeprefix(prefix)] = value
    return converted
