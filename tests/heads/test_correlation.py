from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from live_tensors import LiveTensors
from torch import Tensor

from trackbench.heads import correlation
from trackbench.heads.base import FrameOutput, Target
from trackbench.heads.correlation import CorrelationHead
from trackbench.losses import ChronoLoss


def unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=2, keepdim=True)


def make_queries(num_frames: int, h: int, w: int, whole_frames: bool = False) -> Tensor:
    """Two samples with different query times: between frames, on half frames, beyond the border."""
    queries = torch.rand(2, 7, 3) * torch.tensor([num_frames - 1, w, h])
    queries[0, 0] = torch.tensor([0.5, 0.1, h - 0.1])
    queries[0, 1] = torch.tensor([1.5, w, 0.0])
    queries[1, 0] = torch.tensor([num_frames - 1.0, 2.5, 2.5])
    if whole_frames:
        queries[..., 0] = queries[..., 0].floor()
    return queries


def brute_force(
    features: np.ndarray, query: np.ndarray, weight: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One query in float64, loop by loop: positions (T, 2) and logits (T, 2)."""
    T, D, h, w = features.shape
    t, x, y = query
    sample = np.zeros(D)
    for frame in range(T):
        for row in range(h):
            for column in range(w):
                near = [
                    max(0.0, 1 - abs(min(max(position, 0), length - 1) - index))
                    for position, length, index in ((t, T, frame), (y - 0.5, h, row), (x - 0.5, w, column))
                ]
                sample += math.prod(near) * features[frame, :, row, column]
    positions, logits = np.zeros((T, 2)), np.zeros((T, 2))
    for frame in range(T):
        cost = np.einsum("c,chw->hw", sample, features[frame])
        probability = np.exp(20 * (cost - cost.max()))
        probability /= probability.sum()
        best_row, best_column = divmod(int(probability.argmax()), w)
        mass, mean = 0.0, np.zeros(2)
        for row in range(h):
            for column in range(w):
                if (row - best_row) ** 2 + (column - best_column) ** 2 < 25:
                    mass += probability[row, column]
                    mean += probability[row, column] * np.array([column + 0.5, row + 0.5])
        positions[frame] = mean / max(mass, 1e-12)
        if frame == round(t):  # Python rounds halves to even too
            positions[frame] = x, y
        logits[frame] = weight @ np.array([cost.mean(), cost.max(), cost.min()]) + bias
    return positions, logits


@pytest.mark.parametrize("costs", [1, 2 * 3 * 112, 2 * 16 * 112, 2**20])
@pytest.mark.parametrize("size", [(9, 12), (1, 3), (16, 7)])
def test_head_is_brute_force(size: tuple[int, int], costs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correlation, "COSTS_PER_CHUNK_CPU", costs)
    head = CorrelationHead(6).double()
    features = unit(torch.randn(2, 4, 6, *size, dtype=torch.float64))
    queries = make_queries(4, *size).double()
    output = head(features, queries)
    weight, bias = (p.detach().numpy() for p in (head.occ_linear.weight, head.occ_linear.bias))
    for b in range(2):
        for n in range(7):
            positions, logits = brute_force(features[b].numpy(), queries[b, n].numpy(), weight, bias)
            np.testing.assert_allclose(output["xy"][b, n].detach().numpy(), positions, atol=1e-9)
            ours = [output["extra"][key][b, n].detach().numpy() for key in ("occlusion", "expected_dist")]
            np.testing.assert_allclose(np.stack(ours, -1), logits, atol=1e-9)
            chance = 1 / (1 + np.exp(-logits))
            occluded = 1 - (1 - chance[:, 0]) * (1 - chance[:, 1])
            np.testing.assert_allclose(output["visibility"][b, n].detach().numpy(), 1 - occluded, atol=1e-9)
            assert (output["visible"][b, n].numpy() == ~(occluded > 0.5)).all()
    assert output["extra"]["grid"] == size


@pytest.mark.parametrize("options", [{}, {"query_chunk_size": 2}])
def test_costs_never_exist_as_a_whole(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 4096
    monkeypatch.setattr(correlation, "COSTS_PER_CHUNK_CPU", limit)
    head = CorrelationHead(4, **options)
    peaks = {}
    for num_points, num_frames in ((2, 2), (40, 2), (2, 40), (40, 40)):
        features = unit(torch.randn(1, num_frames, 4, 32, 32))
        queries = torch.rand(1, num_points, 3) * torch.tensor([1.0, 32, 32])
        with torch.no_grad(), LiveTensors() as memory:
            output = head(features, queries)
        results = sum(x.nbytes for x in output.values() if isinstance(x, torch.Tensor))
        peaks[num_points, num_frames] = memory.peak - features.nbytes - 6 * results
        assert memory.peak > 4 * min(limit, num_points * num_frames * 1024)  # otherwise it saw nothing
    # a window of 69 cells in a map of 1024, its indices of 8 bytes, takes a few times as much as a piece's costs
    assert max(peaks.values()) < 6 * 4 * limit < 4 * 40 * 40 * 1024 / 50


def test_gradients_are_those_of_the_full_softmax() -> None:
    """Against the published formulation: softmax over all cells, then mask, then division by the mass."""
    h, w = 9, 12
    head = CorrelationHead(6).double()
    features = unit(torch.randn(1, 2, 6, h, w, dtype=torch.float64)).requires_grad_()
    queries = torch.tensor([[[0.0, 3.5, 4.5], [1.0, 10.5, 0.5]]], dtype=torch.float64)
    target = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    ours = torch.autograd.grad((head(features, queries)["xy"] * target).sum(), features)[0]

    sample = torch.stack([features[0, 0, :, 4, 3], features[0, 1, :, 0, 10]])
    cost = torch.einsum("nc,tchw->nthw", sample, features[0])
    probability = (20 * cost).flatten(2).softmax(-1).view_as(cost)
    best = probability.flatten(2).argmax(-1)
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    distance = (row - (best // w)[..., None, None]) ** 2 + (column - (best % w)[..., None, None]) ** 2
    kept = probability * (distance < 25)
    centres = torch.stack([column, row], -1) + 0.5
    xy = (kept[..., None] * centres).sum((2, 3)) / kept.sum((2, 3)).clamp(min=1e-12)[..., None]
    on_query = torch.eye(2, dtype=torch.bool)[..., None]
    xy = torch.where(on_query, queries[0, :, None, 1:], xy)
    theirs = torch.autograd.grad((xy * target[0]).sum(), features)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("projection_dim", [None, 5])
def test_stream_equals_clip(projection_dim: int | None) -> None:
    head = CorrelationHead(6, projection_dim=projection_dim, normalize=True, query_chunk_size=4)
    features = torch.randn(2, 5, 6, 8, 10)
    queries = make_queries(5, 8, 10, whole_frames=True)
    with torch.no_grad():
        clip = head(features, queries)
        state = head.start(2)
        for n in range(7):  # one after the other, their queries lying ahead or behind
            frames = torch.stack([features[b, int(queries[b, n, 0])] for b in range(2)])
            sampled = head.sample(frames, queries[:, n : n + 1, 1:])
            head.add(state, sampled, queries[:, n : n + 1])
        outputs = [head.step(state, frame) for frame in features.unbind(1)]
    xy, visibility, visible = (torch.stack(part, dim=2) for part in zip(*outputs, strict=True))
    torch.testing.assert_close(xy, clip["xy"], atol=1e-5, rtol=0)
    torch.testing.assert_close(visibility, clip["visibility"], atol=1e-6, rtol=0)
    assert torch.equal(visible, clip["visible"])


def test_points_leave_a_stream() -> None:
    head = CorrelationHead(6, normalize=True)
    features = torch.randn(1, 3, 6, 8, 10)
    queries = make_queries(3, 8, 10, whole_frames=True)[:1]
    queries[..., 0] = 0
    state = head.start(1)
    first = head.step(state, features[:, 0])
    assert isinstance(first, FrameOutput)
    assert first.xy.shape == (1, 0, 2)
    assert first.visible.shape == (1, 0)
    head.add(state, head.sample(features[:, 0], queries[..., 1:]), queries)
    every = head.step(state, features[:, 1])
    keep = torch.tensor([True, False, True, True, False, False, True])
    state.frame = 1
    head.drop(state, keep)
    torch.testing.assert_close(head.step(state, features[:, 1]).xy, every.xy[:, keep])
    head.drop(state, torch.zeros(4, dtype=torch.bool))
    assert head.step(state, features[:, 2]).xy.shape == (1, 0, 2)


def test_geometry_stays_float32_under_autocast() -> None:
    head = CorrelationHead(6, projection_dim=5, normalize=True)
    features = torch.randn(2, 3, 6, 8, 10)
    queries = make_queries(3, 8, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(features, queries)
    outside = head(features, queries)
    assert inside["xy"].dtype == torch.float32
    assert torch.equal(inside["xy"], outside["xy"])
    assert head(features.bfloat16(), queries)["xy"].dtype == torch.float32


@pytest.mark.parametrize("fill", [0.0, 1e6])
def test_never_nan(fill: float) -> None:
    head = CorrelationHead(6, projection_dim=5, normalize=True)
    features = torch.full((1, 3, 6, 4, 4), fill, requires_grad=True)
    queries = torch.tensor([[[0.0, -50.0, 90.0], [99.0, 1.0, 1.0]]])
    output = head(features, queries)
    assert output["xy"].isfinite().all()
    output["xy"].sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_no_points() -> None:
    assert CorrelationHead(6)(torch.randn(1, 3, 6, 4, 4), torch.zeros(1, 0, 3))["xy"].shape == (1, 0, 3, 2)


def test_wrong_channels() -> None:
    with pytest.raises(ValueError, match="expected in_dim = 6"):
        CorrelationHead(6)(torch.randn(1, 2, 5, 4, 4), torch.zeros(1, 1, 3))


def make_target(labelled: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Target]:
    xy, wanted = torch.rand(2, 5, 6, 2) * 8, torch.rand(2, 5, 6, 2) * 8
    occlusion, off = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    visible = torch.rand(2, 5, 6) < 0.6
    labelled = torch.ones_like(visible) if labelled is None else labelled
    return xy, occlusion, off, Target(torch.zeros(2, 5, 3), wanted, visible, labelled)


def test_loss_entry_by_entry() -> None:
    xy, occlusion, off, target = make_target()
    terms = ChronoLoss()(xy, occlusion, off, target, grid=(16, 8))
    expected = {"position": 0.0, "occlusion": 0.0, "expected_dist": 0.0}
    for b, n, t in np.ndindex(2, 5, 6):
        dx, dy = ((xy - target.xy)[b, n, t] * torch.tensor([256 / 8, 256 / 16])).tolist()
        square, visible = dx * dx + dy * dy, bool(target.visible[b, n, t])
        distance = math.sqrt(square + 1e-6)
        cross_entropy = [
            math.log1p(math.exp(-value if wanted else value))
            for value, wanted in (
                (occlusion[b, n, t].item(), not visible),
                (off[b, n, t].item(), square > 36),
            )
        ]
        expected["occlusion"] += 2 * cross_entropy[0] / 60
        if visible:
            expected["position"] += 2 * 0.05 * (square / 2 if distance < 4 else 4 * (distance - 2)) / 60
            expected["expected_dist"] += 2 * cross_entropy[1] / 60
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)


def test_unlabelled_entries_count_nowhere() -> None:
    labelled = torch.zeros(2, 5, 6, dtype=torch.bool)
    labelled[:, :, :4] = True
    xy, occlusion, off, target = make_target(labelled)
    target.xy[:, :, 4:] = float("nan")
    xy.requires_grad_()
    terms = ChronoLoss()(xy, occlusion, off, target, grid=(8, 8))
    labelled_only = Target(target.queries, *(value[:, :, :4] for value in target[1:]))
    expected = ChronoLoss()(xy[:, :, :4], occlusion[:, :, :4], off[:, :, :4], labelled_only, grid=(8, 8))
    torch.testing.assert_close(terms, expected)
    gradient = torch.autograd.grad(torch.stack(list(terms.values())).sum(), xy)[0]
    assert gradient.isfinite().all()
    assert gradient[:, :, 4:].abs().max() == 0


def test_loss_without_any_label_is_zero() -> None:
    xy, occlusion, off, target = make_target(torch.zeros(2, 5, 6, dtype=torch.bool))
    assert all(term == 0 for term in ChronoLoss()(xy, occlusion, off, target, grid=(8, 8)).values())
