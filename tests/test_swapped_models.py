"""Either backbone under either head, as named models: both sizes, their recipes, and a small one of each."""

from __future__ import annotations

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from trackbench.composition import build_tracker, compose_config, model_names, tracker_config
from trackbench.structures import VideoBatch
from trackbench.tracker import PointTracker

EXPERIMENTS = {"trackon": "trackon_movi_f", "correlation": "chrono_panning_movi_e"}
NAMES = ["correlation_dinov2", "correlation_vit_adapter", "trackon_chrono", "trackon_dinov2"]
CHANNELS = {name + suffix: dim for name in NAMES for suffix, dim in (("", 384), ("_b", 768))}


def shrink(config: DictConfig) -> None:
    """The same parts with few channels, on small frames."""
    OmegaConf.set_struct(config, False)
    config.tracker.input_size = [64, 96]
    vit = config.backbone.get("trunk", config.backbone)
    vit.update(embed_dim=48, depth=4, num_heads=3)
    if "token_grid" in vit:
        vit.token_grid = 8
    if "deformable_heads" in vit:
        vit.update(deformable_heads=3, prior_width=8, dropout=0.0)
    if "hidden" in config.backbone:
        config.backbone.hidden = 16
    if "num_candidates" in config.head:
        config.head.update(dim=32, num_heads=4, num_candidates=4, levels=2, grid_size=[8, 8], dropout=0.0)


def moving_video(num_frames: int) -> Tensor:
    """(T, 3, 64, 96) uint8, noise that slides by a pixel a frame."""
    wide = torch.randint(0, 256, (3, 64, 96 + num_frames), dtype=torch.uint8)
    return torch.stack([wide[..., t : t + 96] for t in range(num_frames)])


@pytest.mark.parametrize("name", CHANNELS)
def test_named_at_both_sizes_with_a_recipe(name: str) -> None:
    assert name in model_names()
    config = tracker_config(name)
    with torch.device("meta"):  # at full size, without its memory
        backbone = instantiate(config.backbone)
    assert backbone.dim == CHANNELS[name]
    head = instantiate(config.head, in_dim=backbone.dim)
    frozen = [key for key, value in backbone.named_parameters() if not value.requires_grad]
    assert sum(key.startswith(("vit.", "trunk.vit.")) for key in frozen) > 150  # all of DINOv2
    assert head.causal == name.startswith("trackon")
    if head.causal:
        assert not head.scrambled_rerank_level

    experiment = EXPERIMENTS[name.split("_")[0]]
    overrides = [f"experiment={experiment}", f"model={name}", "output_dir=unused", "data.path=unused"]
    recipe = compose_config("train", overrides)
    assert recipe.name == name
    assert OmegaConf.to_container(recipe.backbone) == OmegaConf.to_container(config.backbone)
    weights = [torch.nn.Parameter(torch.zeros(1))]
    assert isinstance(instantiate(recipe.optimizer)(weights), torch.optim.AdamW)
    assert callable(instantiate(recipe.scheduler))
    assert recipe.get("lr_scales", {}).keys() == ({"backbone.adapters"} if "trackon_chrono" in name else set())


@pytest.mark.parametrize("name", CHANNELS)
def test_a_small_one_trains_and_streams(name: str) -> None:
    config = tracker_config(name)
    shrink(config)
    tracker: PointTracker = build_tracker(config)
    video = moving_video(4)
    queries = torch.tensor([[0.0, 20.0, 30.0], [0.0, 80.5, 12.5], [1.0, 50.0, 60.0]])
    xy = (queries[:, None, 1:] - torch.tensor([1.0, 0.0]) * torch.arange(4)[:, None]).clamp(min=0)
    batch = VideoBatch(video[None], queries[None], xy[None], torch.ones(1, 3, 4, dtype=torch.bool))
    tracker.train()
    losses = tracker.loss(tracker(batch.video, batch.queries), batch)
    sum(losses.values()).backward()
    reached = set()
    for key, parameter in tracker.named_parameters():
        if parameter.grad is not None and bool((parameter.grad != 0).any()):
            assert torch.isfinite(parameter.grad).all()
            assert ".vit." not in key
            reached.add(key.split(".")[0])
    assert reached == ({"head"} if "dinov2" in name else {"head", "backbone"})

    tracker.eval()
    tracks = tracker.track_tensor(video, queries[:2])
    stream = tracker.stream()
    stream.add(queries[:2, 1:])
    results = [stream.step(frame.permute(1, 2, 0)) for frame in video]
    ready = [result for result in [*results, *stream.finish()] if result is not None]
    assert [result.frame for result in ready] == [0, 1, 2, 3]
    torch.testing.assert_close(torch.stack([result.xy for result in ready], dim=1), tracks.xy, atol=1e-3, rtol=0)
