"""Our Chrono against numbers of the official code (synthetic weights, float32 and float64)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackbench.backbones.chrono import ChronoBackbone
from trackbench.backbones.vit import DinoV2
from trackbench.heads.base import HeadOutput, Target
from trackbench.heads.correlation import CorrelationHead, sample_trilinear
from trackbench.layers.temporal import LocalAttention, Moments, TemporalAdapter
from trackbench.weights import map_chrono_keys

RASTER = 256


class Chrono(nn.Module):
    """Backbone and head without the tracker around them: pixels of a 256 x 256 raster in and out."""

    def __init__(self, size: str, token_grid: int) -> None:
        super().__init__()
        trunk = DinoV2(size, token_grid=token_grid, normalize_features=True, frozen=True)
        self.backbone = ChronoBackbone(trunk)
        self.head = CorrelationHead(trunk.dim)
        self.cell = RASTER / token_grid

    def forward(self, video: Tensor, queries: Tensor) -> tuple[Tensor, HeadOutput]:
        features = self.backbone(video)
        return features, self.head(features, queries / queries.new_tensor([1, self.cell, self.cell]))


@pytest.fixture(scope="module")
def manifest(chrono_fixtures: Path) -> dict[str, Any]:
    return json.loads((chrono_fixtures / "manifest.json").read_text())


@pytest.fixture(scope="module")
def make_model(chrono_fixtures: Path, manifest: dict[str, Any]) -> Any:
    spec = importlib.util.spec_from_file_location("chrono_weights", chrono_fixtures / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)

    def make(size: str, token_grid: int) -> Chrono:
        official = weights.make_state_dict(
            weights.load_spec(chrono_fixtures / f"spec_{size}.json"), manifest["seed"]
        )
        sums = weights.checksums(official)
        for key, expected in manifest["weight_checksums"][size].items():
            if key in sums:
                assert sums[key] == pytest.approx(expected, rel=1e-9), key
        model = Chrono(size, token_grid)
        model.load_state_dict(map_chrono_keys(official))
        return model.eval()

    return make


def as_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)


def raster_video(video: np.ndarray, resize: bool = True) -> Tensor:
    """(1, T, H, W, 3) uint8 -> (1, T, 3, 256, 256) in [0, 1]."""
    frames = as_tensor(video).permute(0, 1, 4, 2, 3).float() / 255
    if resize and frames.shape[-2:] != (RASTER, RASTER):
        size = (RASTER, RASTER)
        frames = F.interpolate(frames[0], size=size, mode="bilinear", align_corners=False)[None]
    return frames


def raster_queries(query_points: np.ndarray, height: int, width: int) -> Tensor:
    """(t, y, x) of the video -> (t, x, y) of the raster."""
    return as_tensor(query_points)[..., [0, 2, 1]] * torch.tensor([1, RASTER / width, RASTER / height])


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the outputs of modules, call by call."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name].append(output)

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def close(actual: Tensor, expected: np.ndarray, atol: float) -> None:
    torch.testing.assert_close(actual.detach(), as_tensor(expected).to(actual.dtype), atol=atol, rtol=0)


def test_adapter_alone(chrono_fixtures: Path) -> None:
    arrays = np.load(chrono_fixtures / "adapter.npz")
    adapter = TemporalAdapter(16, hidden=32, heads=4, window=13)
    adapter.load_state_dict({key[2:]: as_tensor(arrays[key]) for key in arrays.files if key.startswith("w.")})
    maps = as_tensor(arrays["x"]).float().transpose(1, 2)
    close(adapter(maps).transpose(1, 2), arrays["y"], atol=1e-4)

    pieces = maps.split(7, dim=1)
    moments = Moments()
    for piece in pieces:
        moments.update(piece)
    deltas = [adapter.decode(pooled, *maps.shape[-2:]) for pooled in adapter.attend_chunks(pieces, moments)]
    close(torch.cat(deltas, dim=1).transpose(1, 2), arrays["y"], atol=1e-4)


@pytest.mark.parametrize("case", range(3))
def test_local_attention_alone(chrono_fixtures: Path, case: int) -> None:
    arrays = np.load(chrono_fixtures / "local_attention.npz")
    prefix = f"{case}.w."
    x = as_tensor(arrays[f"{case}.x"]).float()
    heads, window = (int(value) for value in arrays[f"{case}.heads_window"])
    attention = LocalAttention(x.shape[-1], heads, window)
    attention.load_state_dict(
        {key.removeprefix(prefix): as_tensor(arrays[key]) for key in arrays.files if key.startswith(prefix)}
    )
    close(attention(x), arrays[f"{case}.y"], atol=3e-5)


@pytest.mark.parametrize(
    ("name", "size", "token_grid", "grid_slice", "adapter_slice"),
    [
        ("reduced_small", "small", 16, (4, 4, 8), (16, 4, 4)),
        ("reduced_base", "base", 16, (4, 4, 8), (16, 4, 4)),
        ("native_small", "small", 64, (8, 8, 4), (8, 8, 8)),  # about a minute of one core
    ],
)
def test_model(
    chrono_fixtures: Path,
    make_model: Any,
    name: str,
    size: str,
    token_grid: int,
    grid_slice: tuple[int, int, int],
    adapter_slice: tuple[int, int, int],
) -> None:
    arrays = np.load(chrono_fixtures / f"{name}.npz")
    model = make_model(size, token_grid)
    height, width = arrays["video"].shape[2:4]
    video = raster_video(arrays["video"])
    queries = raster_queries(arrays["query_points"], height, width)
    last_layers = {str(index): model.backbone.adapters[index].conv2 for index in (0, 10)}
    with torch.no_grad(), recorded(last_layers) as outputs:
        features, output = model(video, queries)
        cells = queries / torch.tensor([1, model.cell, model.cell])
        query_features = sample_trilinear(features, *cells.unbind(-1))
        cost = torch.einsum("bnc,btchw->bnthw", query_features, features)

    for index in ("0", "10"):
        c, y, x = adapter_slice
        delta = torch.cat(outputs[index]).transpose(0, 1)
        close(delta[::c, :, ::y, ::x], arrays[f"adapter{index}_slice"], atol=1e-3)
    y, x, c = grid_slice
    close(features[0].permute(0, 2, 3, 1)[:, ::y, ::x, ::c], arrays["grid_slice"], atol=3e-5)
    close(query_features[0], arrays["query_features"], atol=3e-5)
    close(cost[0, 0], arrays["cost"], atol=2e-5)

    tolerance = 1e-3 if token_grid == 64 else 3e-3
    tracks = output["xy"] * model.cell
    at_raster = "tracks256" if "tracks256" in arrays.files else "tracks"
    close(tracks, arrays[at_raster], atol=tolerance)
    at_input = "inference_tracks" if "inference_tracks" in arrays.files else "tracks"
    scale = torch.tensor([width / RASTER, height / RASTER])
    close(tracks * scale, arrays[at_input], atol=tolerance * float(scale.max()))
    close(output["extra"]["occlusion"], arrays["occlusion"], atol=1e-4)
    close(output["extra"]["expected_dist"], arrays["expected_dist"], atol=1e-4)
    assert torch.equal(~output["visible"], as_tensor(arrays["occluded"]))


def test_video_resized_once(chrono_fixtures: Path, make_model: Any) -> None:
    """A video that goes to the backbone as it is: no stop at 256 x 256."""
    arrays = np.load(chrono_fixtures / "reduced_small.npz")
    height, width = arrays["video"].shape[2:4]
    with torch.no_grad():
        _, output = make_model("small", 16)(
            raster_video(arrays["video"], resize=False), raster_queries(arrays["query_points"], height, width)
        )
    tracks = output["xy"] * torch.tensor([width / 16, height / 16])
    close(tracks, arrays["direct_tracks"], atol=3e-3 * width / RASTER)
    close(output["extra"]["occlusion"], arrays["direct_occlusion"], atol=1e-4)


class LossCase(NamedTuple):
    model: Chrono
    video: Tensor
    queries: Tensor
    target: Target

    def loss(self) -> tuple[HeadOutput, dict[str, Tensor]]:
        _, output = self.model(self.video, self.queries)
        return output, self.model.head.loss(output, self.target)


@pytest.fixture
def loss_case(chrono_fixtures: Path, make_model: Any) -> LossCase:
    arrays = np.load(chrono_fixtures / "loss.npz")
    model = make_model("small", 16)
    video = raster_video(np.load(chrono_fixtures / "reduced_base.npz")["video"])
    queries = raster_queries(arrays["query_points"], RASTER, RASTER)
    visible = ~as_tensor(arrays["target_occluded"])
    target = Target(
        queries=queries / torch.tensor([1, model.cell, model.cell]),
        xy=as_tensor(arrays["target_points"]) / model.cell,
        visible=visible,
        labelled=torch.ones_like(visible),
    )
    return LossCase(model, video, queries, target)


def test_loss_terms(loss_case: LossCase, chrono_fixtures: Path, manifest: dict[str, Any]) -> None:
    arrays = np.load(chrono_fixtures / "loss.npz")
    output, terms = loss_case.loss()
    close(output["xy"] * loss_case.model.cell, arrays["tracks"], atol=3e-3)
    expected = manifest["loss"]["loss_terms_f64"]
    for ours, theirs in (("position", "position"), ("occlusion", "occlusion"), ("expected_dist", "prob")):
        assert terms[ours].item() == pytest.approx(2 * expected[f"{theirs}_loss"], rel=1e-5)
    total = torch.stack(list(terms.values())).sum()
    assert total.item() == pytest.approx(expected["loss"], rel=1e-5)


@pytest.fixture
def float64_loss_case(loss_case: LossCase, chrono_fixtures: Path) -> LossCase:
    frames = as_tensor(np.load(chrono_fixtures / "reduced_base.npz")["video"]).permute(0, 1, 4, 2, 3)
    target = loss_case.target
    return LossCase(
        loss_case.model.double(),
        frames.double() / 255,
        loss_case.queries.double(),
        target._replace(queries=target.queries.double(), xy=target.xy.double()),
    )


def test_gradients_in_float64(
    float64_loss_case: LossCase, chrono_fixtures: Path, manifest: dict[str, Any]
) -> None:
    arrays = np.load(chrono_fixtures / "loss.npz")
    model = float64_loss_case.model
    output, terms = float64_loss_case.loss()
    close(output["xy"] * model.cell, arrays["tracks_f64"], atol=1e-9)
    total = torch.stack(list(terms.values())).sum()
    total.backward()

    ours = {
        name.replace("backbone.adapters.", "adapter.").removeprefix("head."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    norms = manifest["loss"]["grad_norm_per_parameter"]
    assert ours.keys() == norms.keys()
    for name, gradient in ours.items():
        assert gradient is not None, name
        assert gradient.norm().item() == pytest.approx(norms[name], rel=1e-6), name
    for key in arrays.files:
        if key.startswith("grad."):
            name, _, step = key.removeprefix("grad.").partition("[")
            gradient = ours[name]
            assert gradient is not None
            if step:  # "::16,::16]"
                rows, columns = (int(part.strip(":]")) for part in step.split(","))
                gradient = gradient[::rows, ::columns]
            expected = as_tensor(arrays[key])
            assert (gradient - expected).norm() <= 1e-6 * expected.norm(), name


def test_four_optimiser_steps(
    float64_loss_case: LossCase, chrono_fixtures: Path, manifest: dict[str, Any]
) -> None:
    """The published recipe on one batch: AdamW, one-cycle schedule, clipping of the total norm at 1."""
    arrays = np.load(chrono_fixtures / "loss.npz")
    model = float64_loss_case.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-4, total_steps=100_000, pct_start=0.003)
    for step in manifest["loss"]["optimiser_steps_f64"]:
        _, terms = float64_loss_case.loss()
        loss = torch.stack(list(terms.values())).sum()
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        assert loss.item() == pytest.approx(step["loss"], rel=1e-6)
        assert norm.item() == pytest.approx(step["grad_norm"], rel=1e-6)
        assert optimiser.param_groups[0]["lr"] == pytest.approx(step["lr"], rel=1e-9)
        optimiser.step()
        schedule.step()
    for name in ("weight", "bias"):
        close(getattr(model.head.occ_linear, name), arrays[f"after4steps.occ_linear.{name}"], atol=1e-9)
