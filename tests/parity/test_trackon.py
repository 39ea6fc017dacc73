"""The published Track-On against reference values of the official code, at full size with synthetic weights.

About two minutes on one core: backbone features of one clip are computed once and shared.
"""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trackbench.backbones.vit_adapter import ViTAdapter
from trackbench.heads.base import Target
from trackbench.heads.memory import MemoryHead
from trackbench.heads.memory.time_embedding import resize_time_embedding
from trackbench.weights import map_trackon_keys

SEED = 103
HEIGHT, WIDTH, STRIDE = 384, 512, 4

PER_FRAME = ("points", "points_f64", "visibility", "v_logit", "u_logit", "p_patch", "topk_indices")

Arrays = dict[str, Any]


def read(folder: Path, name: str) -> Arrays:
    with np.load(folder / f"{name}.npz") as data:
        return {key: data[key] for key in data.files}


@pytest.fixture(scope="module")
def official(trackon_fixtures: Path) -> dict[str, Tensor]:
    """The synthetic weights under their official names."""
    spec = importlib.util.spec_from_file_location("trackon_weights", trackon_fixtures / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    return generator.make_state_dict(generator.load_spec(trackon_fixtures / "trackon_spec.json"), SEED)


@pytest.fixture(scope="module")
def model(official: dict[str, Tensor]) -> tuple[ViTAdapter, MemoryHead]:
    backbone, head = ViTAdapter(), MemoryHead(in_dim=384)
    state = map_trackon_keys(official)
    for prefix, module in (("backbone.", backbone), ("head.", head)):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return backbone.eval(), head.eval()


def resized(video: np.ndarray) -> Tensor:
    """(1, T, 3, H, W) uint8 -> floats at the size of the model."""
    frames = torch.from_numpy(video)[0].float() / 255
    return F.interpolate(frames, size=(HEIGHT, WIDTH), mode="bilinear", align_corners=False)[None]


def cells_per_pixel(video: np.ndarray) -> Tensor:
    return torch.tensor([WIDTH / video.shape[-1], HEIGHT / video.shape[-2]]) / STRIDE


def in_cells(queries: np.ndarray, scale: Tensor) -> Tensor:
    points = torch.from_numpy(queries)[None]
    return torch.cat([points[..., :1], points[..., 1:] * scale], dim=-1)


def close(actual: Tensor, expected: np.ndarray, atol: float) -> None:
    torch.testing.assert_close(actual, torch.from_numpy(expected), atol=atol, rtol=0)


@pytest.fixture(scope="module")
def case(trackon_fixtures: Path) -> Arrays:
    return read(trackon_fixtures, "inference_case")


@pytest.fixture(scope="module")
def features(model: tuple[ViTAdapter, MemoryHead], case: Arrays) -> Tensor:
    with torch.no_grad():
        return model[0](resized(case["video"]))


@torch.no_grad()
def test_adapter_maps(model: tuple[ViTAdapter, MemoryHead], trackon_fixtures: Path) -> None:
    data = read(trackon_fixtures, "vit_adapter_case")
    generator = np.random.Generator(np.random.PCG64(int(data["input_seed"])))
    low, noise = generator.standard_normal((3, 48, 64)), generator.standard_normal((3, HEIGHT, WIDTH))
    image = (low.repeat(8, axis=1).repeat(8, axis=2) + 0.1 * noise).astype(np.float32)
    if zlib.crc32(image.tobytes()) != int(data["input_crc32"]):
        np.testing.assert_allclose(image[:, ::48, ::64], data["input_slice"], atol=1e-6)
    backbone = model[0]
    images = torch.from_numpy(image)[None]
    prior = backbone.spm(images)
    close(prior[0][0, ::16, 4::12, 4::16], data["spm_c1_slice"], 2e-3)
    for level, name in zip(prior[1:], ("c2", "c3", "c4"), strict=True):
        tokens = level[0].flatten(1).T
        close(tokens[:: len(tokens) // 24, ::16][:24], data[f"spm_{name}_slice"], 2e-3)
    close(backbone.vit.pos_embedding(27, 36)[0, ::36, ::16], data["pos_embed_27x36_slice"], 1e-5)
    outputs: list[tuple[Tensor, Tensor, Tensor]] = []
    hooks = [i.register_forward_hook(lambda *a: outputs.append(a[2])) for i in backbone.interactions]
    maps = backbone.encode(images)[0]
    for hook in hooks:
        hook.remove()
    for i, (prefix, patches, pyramid) in enumerate(outputs):
        close(patches[0, ::36, ::16], data[f"inter{i}_x_slice"], 2e-3)
        rows = pyramid[0, ::126, ::16]  # of the finest level only, after the last interaction
        close(rows, data[f"inter{i}_c_slice"][: len(rows)], 2e-3)
        close(prefix[0, 0], data[f"inter{i}_cls"], 2e-3)
    close(maps[::16, 4::12, 4::16], data["f1_slice"], 2e-3)
    close(maps.flatten(1).mean(1), data["f1_mean"], 2e-3)
    close(maps.flatten(1).std(1, unbiased=False), data["f1_std"], 2e-3)


@pytest.mark.parametrize("run", ["mem48", "mem48_ext", "mem12", "mem4_6", "mem48_thr05"])
@torch.no_grad()
def test_inference(model: tuple[ViTAdapter, MemoryHead], case: Arrays, features: Tensor, run: str) -> None:
    head = model[1]
    context, spatial, support, threshold = case[f"config_{run}"]
    head.memory_size = (int(context), int(spatial))
    head.support_grid = 20 if support else 0
    head.visibility_threshold = float(threshold)
    scale = cells_per_pixel(case["video"])
    frames = 6 if support else 8  # the last query starts at frame 5; 412 points are slow
    output = head(features[:, :frames], in_cells(case["queries"], scale))
    extra = output["extra"]
    expected = {name: case[f"{name}_{run}"][:frames] for name in PER_FRAME}

    def by_frame(tensor: Tensor) -> Tensor:
        return tensor[0].transpose(0, 1)

    close(by_frame(output["xy"]) / scale, expected["points"], 2e-3)
    close((by_frame(output["xy"]) / scale).double(), expected["points_f64"], 2e-3)
    close(by_frame(output["visible"]), expected["visibility"], 0)
    close(by_frame(extra["visible_logit"]), expected["v_logit"], 2e-3)
    close(by_frame(extra["uncertain_logit"]), expected["u_logit"], 2e-3)
    close(by_frame(extra["centre"]) * STRIDE, expected["p_patch"], 0)
    candidates = (by_frame(extra["candidates"]) - 0.5).long()
    cells = (candidates[..., 1] * (WIDTH // STRIDE) + candidates[..., 0]).sort(dim=-1).values
    close(cells, np.sort(expected["topk_indices"].astype(np.int64), axis=-1), 0)


@torch.no_grad()
def test_intermediate_values(model: tuple[ViTAdapter, MemoryHead], case: Arrays, features: Tensor) -> None:
    head = model[1]
    head.memory_size, head.support_grid, head.visibility_threshold = 48, 0, 0.8
    scale = cells_per_pixel(case["video"])
    queries = in_cells(case["queries"], scale)
    time = queries[..., 0].long()
    seen: dict[str, list[Any]] = {}
    hooks = [
        module.register_forward_hook(lambda _, i, out, name=name: seen.setdefault(name, []).append((i, out)))
        for name, module in head.named_children()
    ]
    state = head.start(1)
    sampled = torch.stack([head.sample(features[:, t], queries[..., 1:]) for t in range(8)])
    initial = sampled.gather(0, time[None, ..., None].expand(1, -1, -1, 256))[0]
    close(initial[0], case["q_init"], 4e-3)
    head.add(state, initial, queries)
    for t in range(4):
        started = ~state.waiting[0]
        with torch.enable_grad():  # correlations are kept for the loss only
            details = head._advance(state, features[:, t])
        if t not in (0, 3):
            continue
        expect = {key.removeprefix(f"dbg{t}_"): value for key, value in case.items() if f"dbg{t}_" in key}
        tokens, decoded = seen["query_decoder"][t][0][1][0], seen["feature_decoder"][t][1][0]
        for name, values, atol in (("f_t", tokens, 3e-4), ("h_t", decoded, 2e-3)):
            close(values.view(96, 128, 256)[4::12, 4::16, ::8], expect[f"{name}_slice"], atol)
            close(values.mean(0), expect[f"{name}_mean"], atol)
            close(values.std(0, unbiased=False), expect[f"{name}_std"], atol)
        close(seen["query_decoder"][t][0][0][0], expect["q_init_t"], 4e-3)
        close(seen["query_decoder"][t][1][0], expect["q_dec"], 4e-3)
        close(seen["projection1"][t][1][0], expect["q_t1"], 4e-3)
        close(seen["rerank_module"][t][1][0][0], expect["q_t2"], 4e-3)
        close(seen["projection2"][t][1][0], expect["q_corr"], 4e-3)
        close(details.candidate_logits[0], expect["u_top"], 2e-3)
        close(details.candidates[0] * STRIDE, expect["p_top"], 0)
        close(details.offsets[0].transpose(0, 1) * STRIDE, expect["o_t"], 2e-3)
        coarse, fine = (c[0].view(-1, 96, 128)[:, 4::8, 4::8] for c in (details.coarse, details.fine))
        close(coarse, expect["c1_slice"], 2e-4)
        close(fine, expect["c2_slice"], 2e-4)
        close(details.coarse[0].topk(17).values, expect["c1_topk_values"], 2e-4)
        close(details.fine[0].topk(2).values, expect["c2_top2"], 2e-4)
        level = seen["rerank_module"][t][0][1].tokens[0, -192:]
        close(level[::8, ::8], expect["rerank_level4_slice"], 2e-3)
        # slots of points that have not started are never read
        close(state.spatial[0, :, -1][started], expect["q_aug"][started.numpy()], 4e-3)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_streaming_with_support_points(
    model: tuple[ViTAdapter, MemoryHead], case: Arrays, features: Tensor, trackon_fixtures: Path
) -> None:
    data, head = read(trackon_fixtures, "ff_case"), model[1]
    head.memory_size, head.support_grid, head.visibility_threshold = 48, 20, 0.8
    scale = cells_per_pixel(case["video"])
    xy = torch.from_numpy(data["queries_xy"])[None] * scale
    state = head.start(1)
    head.add(state, head.sample(features[:, 0], xy), F.pad(xy, (1, 0)))
    for t in range(4):
        output = head.step(state, features[:, t])
        close(output.xy[0] / scale, data["points"][t], 2e-3)
        close(output.visible[0], data["visibility"][t], 0)
        close(output.visibility[0].logit(), data["v_logit"][t], 2e-3)


@torch.no_grad()
def test_frame_larger_than_the_model(model: tuple[ViTAdapter, MemoryHead], trackon_fixtures: Path) -> None:
    data, (backbone, head) = read(trackon_fixtures, "large_frame_case"), model
    head.memory_size, head.support_grid, head.visibility_threshold = 48, 0, 0.8
    scale = cells_per_pixel(data["video"])
    maps = backbone(resized(data["video"]))
    queries = in_cells(data["queries"], scale)
    close(head.sample(maps[:, 0], queries[..., 1:])[0], data["q_init"], 4e-3)
    output = head(maps, queries)
    close(output["xy"][0].transpose(0, 1) / scale, data["points"], 2e-3)
    close(output["extra"]["visible_logit"][0].T, data["v_logit"], 2e-3)
    close(output["visible"][0].T, data["visibility"], 0)


@pytest.mark.parametrize("sizes", [(48, 48), (80, 80), (96, 96), (4, 6), (12, 12), (1, 1)])
def test_memory_sizes(trackon_fixtures: Path, sizes: tuple[int, int]) -> None:
    data = read(trackon_fixtures, "memory_size_case")
    for name, slots in zip(("context", "spatial"), sizes, strict=True):
        trained = torch.from_numpy(data[f"{name}_in"])
        close(resize_time_embedding(trained, slots), data[f"{name}_{sizes[0]}_{sizes[1]}"], 1e-6)


def test_losses_and_gradients(model: tuple[ViTAdapter, MemoryHead], case: Arrays, trackon_fixtures: Path) -> None:
    data, (backbone, head) = read(trackon_fixtures, "train_case"), model
    head.memory_size, head.support_grid, head.visibility_threshold = None, 0, 0.8
    scale = cells_per_pixel(case["video"])
    queries = in_cells(data["queries"], scale)
    visible = torch.from_numpy(data["gt_visibility"]).T[None]
    xy = torch.from_numpy(data["gt_tracks"]).transpose(0, 1)[None] * scale
    output = head(backbone(resized(case["video"][:, data["frames"]])), queries)
    close(output["xy"][0].detach().transpose(0, 1) / scale, data["points"], 2e-3)
    terms = head.loss(output, Target(queries, xy, visible, torch.ones_like(visible)))
    for name, expected in zip(data["loss_names"], data["losses"], strict=True):
        assert float(terms[name].detach()) == pytest.approx(expected, rel=1e-4), name
    total = sum(terms.values())
    assert float(total.detach()) == pytest.approx(float(data["total"]), rel=1e-4)
    total.backward()

    names = [str(name) for name in data["param_names"]]
    ours = list(map_trackon_keys({name: torch.empty(0) for name in names}))
    parameters = dict(torch.nn.ModuleDict({"backbone": backbone, "head": head}).named_parameters())
    squares = dict.fromkeys((str(group) for group in data["group_names"]), 0.0)
    for i, (name, own) in enumerate(zip(names, ours, strict=True)):
        gradient = parameters[own].grad
        assert (gradient is not None) == bool(data["param_has_grad"][i]), name
        if gradient is None:
            continue
        norm = float(gradient.double().norm())
        assert norm == pytest.approx(float(data["param_grad_norm"][i]), rel=1e-2), name
        head_of = gradient.flatten()[:4]
        close(head_of, data["param_grad_head"][i][: len(head_of)], 1e-2 * norm)
        group = max((g for g in squares if f"{name}.".startswith(f"{g}.")), key=len)
        squares[group] += norm**2
    backbone.zero_grad(set_to_none=True)
    head.zero_grad(set_to_none=True)
    for group, expected in zip(data["group_names"], data["group_grad_norm"], strict=True):
        assert squares[str(group)] ** 0.5 == pytest.approx(float(expected), rel=2e-3), group


def test_every_official_name_has_exactly_one_place(official: dict[str, Tensor]) -> None:
    assert len(official) == 753
    backbone, head = ViTAdapter(), MemoryHead(in_dim=384)
    own = {f"backbone.{k}" for k in backbone.state_dict()} | {f"head.{k}" for k in head.state_dict()}
    assert set(map_trackon_keys(official)) == own
    assert len(own) == 753
    trainable = sum(p.numel() for m in (backbone, head) for p in m.parameters() if p.requires_grad)
    unused = sum(p.numel() for n in ("norm2", "norm3", "norm4") for p in getattr(backbone, n).parameters())
    assert trainable + unused == 26_983_705
