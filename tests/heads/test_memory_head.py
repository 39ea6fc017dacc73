"""Track-On's head at a small size; the published size is in tests/parity/test_trackon.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trackbench.heads.base import Target
from trackbench.heads.memory import MemoryHead
from trackbench.heads.memory.pyramid import build_pyramid, scramble_last_level
from trackbench.heads.memory.sampling import sample_clip
from trackbench.heads.memory.time_embedding import resize_time_embedding
from trackbench.losses import TrackOnLoss

C = 10


def tiny(seed: int = 0, **options: Any) -> MemoryHead:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "in_dim": C,
        "dim": 16,
        "num_heads": 2,
        "decoder_layers": 2,
        "rerank_layers": 1,
        "offset_layers": 2,
        "num_candidates": 4,
        "levels": 3,
        "grid_size": (12, 12),
        "trained_memory_size": 3,
        "visibility_threshold": 0.5,
        "scrambled_rerank_level": False,
    }
    head = MemoryHead(**(settings | options)).eval()
    for name, parameter in head.named_parameters():
        if "time_embedding" in name or "frame_pos" in name or "sampling_offsets" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return head


def clip(batch: int = 1, frames: int = 5, h: int = 12, w: int = 12) -> Tensor:
    return torch.randn(batch, frames, C, h, w)


def points(*rows: tuple[float, float, float]) -> Tensor:
    return torch.tensor([rows])


QUERIES = points((0, 3.2, 4.1), (1, 7.5, 2.0), (3, 11.9, 0.1), (0, 0.0, 12.0))


def frames_of(head: MemoryHead, state: Any, features: Tensor) -> tuple[Tensor, Tensor]:
    outputs = [head.step(state, frame) for frame in features.unbind(1)]
    return torch.stack([o.xy for o in outputs], 2), torch.stack([o.visibility for o in outputs], 2)


@pytest.mark.parametrize("options", [{}, {"memory_size": 5}, {"memory_size": (2, 6)}, {"support_grid": 3}])
@pytest.mark.parametrize("size", [(12, 12), (16, 20), (5, 7)])
@torch.no_grad()
def test_a_stream_gives_what_the_clip_gives(options: dict[str, Any], size: tuple[int, int]) -> None:
    head, features = tiny(**options), clip(1, 7, *size)
    queries = QUERIES.clone()
    queries[..., 1:] *= torch.tensor([size[1] / 12, size[0] / 12])
    whole = head(features, queries)
    assert whole["xy"].shape == (1, 4, 7, 2)
    assert whole["xy"].isfinite().all()
    state = head.start(1)
    for i in range(4):
        t = int(queries[0, i, 0])
        head.add(state, head.sample(features[:, t], queries[:, i : i + 1, 1:]), queries[:, i : i + 1])
    xy, visibility = frames_of(head, state, features)
    torch.testing.assert_close(xy, whole["xy"], atol=1e-4, rtol=0)
    torch.testing.assert_close(visibility, whole["visibility"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_points_added_when_they_start_do_as_those_known_from_the_beginning() -> None:
    head, features = tiny(), clip(1, 6)
    whole = head(features, QUERIES)
    state = head.start(1)
    order: list[int] = []
    for t in range(6):
        for i in (QUERIES[0, :, 0] == t).nonzero()[:, 0].tolist():
            query = QUERIES[:, i : i + 1]
            head.add(state, head.sample(features[:, t], query[..., 1:]), query)
            order.append(i)
        output = head.step(state, features[:, t])
        torch.testing.assert_close(output.xy, whole["xy"][:, order, t], atol=1e-4, rtol=0)
        torch.testing.assert_close(output.visibility, whole["visibility"][:, order, t], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_batch_gives_what_its_clips_give_with_different_query_times() -> None:
    head, features = tiny(support_grid=2), clip(2, 5)
    queries = torch.cat([QUERIES, points((2, 1, 1), (0, 5, 5), (4, 6, 6), (1, 9, 3))])
    both = head(features, queries)
    for b in range(2):
        alone = head(features[b : b + 1], queries[b : b + 1])
        torch.testing.assert_close(both["xy"][b : b + 1], alone["xy"], atol=1e-4, rtol=0)
        torch.testing.assert_close(both["visibility"][b : b + 1], alone["visibility"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_points_that_have_not_started_do_not_influence_others() -> None:
    head, features = tiny(), clip(1, 4)
    started = points((0, 3, 3), (0, 8, 6))
    alone = head(features, started)
    joined = head(features, torch.cat([started, points((3, 1, 1), (3, 10, 10))], dim=1))
    torch.testing.assert_close(joined["xy"][:, :2, :3], alone["xy"][:, :, :3], atol=1e-5, rtol=0)
    assert not torch.allclose(joined["visibility"][:, :2, 3], alone["visibility"][:, :, 3], atol=1e-6)


@pytest.mark.parametrize("grad", [False, True])
def test_no_nan_when_no_query_starts_at_frame_zero(grad: bool) -> None:
    head, features = tiny(), clip(1, 5)
    with torch.set_grad_enabled(grad):
        output = head(features, points((2, 3, 3), (3, 8, 6)))
    assert output["xy"].isfinite().all()
    assert output["visibility"].isfinite().all()
    if grad:
        (output["xy"].sum() + output["visibility"].sum()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


@torch.no_grad()
def test_dropping_a_point_leaves_a_stream_without_it() -> None:
    head, features = tiny(), clip(1, 5)
    state, other = head.start(1), head.start(1)
    first, second = points((0, 3, 3)), points((0, 8, 6))
    for target, queries in ((state, torch.cat([first, second], 1)), (other, second)):
        head.add(target, head.sample(features[:, 0], queries[..., 1:]), queries)
    head.drop(state, torch.tensor([False, True]))
    torch.testing.assert_close(
        frames_of(head, state, features)[0], frames_of(head, other, features)[0], atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_drop_keeps_the_support_points() -> None:
    head, features = tiny(support_grid=2), clip(1, 3)
    state = head.start(1)
    queries = points((0, 3, 3), (0, 8, 6))
    head.add(state, head.sample(features[:, 0], queries[..., 1:]), queries)
    head.step(state, features[:, 0])
    assert state.query.shape[1] == 6
    head.drop(state, torch.tensor([True, False]))
    assert state.query.shape[1] == 5
    assert head.step(state, features[:, 1]).xy.shape == (1, 1, 2)


@torch.no_grad()
def test_the_state_does_not_grow_with_time() -> None:
    head, features = tiny(memory_size=(2, 4)), clip(1, 9)
    state = head.start(1)
    head.add(state, head.sample(features[:, 0], QUERIES[..., 1:]), QUERIES)
    for frame in features.unbind(1):
        head.step(state, frame)
        assert state.context.shape == (1, 4, 2, 16)
        assert state.spatial.shape == (1, 4, 4, 16)
        assert state.hidden.shape == state.occluded.shape == (1, 4, 4)


@torch.no_grad()
def test_a_stream_without_points_goes_on() -> None:
    head, features = tiny(), clip(1, 3)
    state = head.start(1)
    assert head.step(state, features[:, 0]).xy.shape == (1, 0, 2)
    query = points((1, 3, 3))
    head.add(state, head.sample(features[:, 1], query[..., 1:]), query)
    assert head.step(state, features[:, 1]).xy.isfinite().all()
    assert head(features, torch.zeros(1, 0, 3))["xy"].shape == (1, 0, 3, 2)


@torch.no_grad()
def test_query_times_are_cut_to_whole_frames_and_checked() -> None:
    head, features = tiny(), clip(1, 3)
    torch.testing.assert_close(head(features, points((1.9, 3, 3)))["xy"], head(features, points((1, 3, 3)))["xy"])
    with pytest.raises(ValueError, match=r"query frames must lie in \[0, 2\]"):
        head(features, points((3, 3, 3)))


@torch.no_grad()
def test_sampling_equals_grid_sample_with_border_padding() -> None:
    maps = torch.randn(2, 3, C, 5, 7)
    time = torch.tensor([[0, 2, 1, 1], [1, 0, 2, 2]])
    xy = torch.tensor([[[0.0, 0.0], [7.0, 5.0], [3.3, 2.7], [6.9, 0.2]]]).repeat(2, 1, 1)
    found = sample_clip(maps, time, xy)
    for b in range(2):
        for n in range(4):
            grid = (2 * xy[b, n] / torch.tensor([7.0, 5.0]) - 1).view(1, 1, 1, 2)
            frame = maps[b, time[b, n]][None]
            expected = F.grid_sample(frame, grid, padding_mode="border", align_corners=False).flatten()
            torch.testing.assert_close(found[b, n], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_query_features_equal_those_of_the_projected_map() -> None:
    head, features = tiny(), clip(1, 1, 6, 8)[:, 0]
    xy = torch.tensor([[[2.3, 1.9], [7.9, 5.8]]])
    position = F.interpolate(head.frame_pos_embedding, size=(6, 8), mode="bilinear")
    projected = head.token_projection(features) + position
    grid = (2 * xy / torch.tensor([8.0, 6.0]) - 1)[:, :, None]
    expected = F.grid_sample(projected, grid, padding_mode="border", align_corners=False)[..., 0].transpose(1, 2)
    torch.testing.assert_close(head.sample(features, xy), expected, atol=1e-5, rtol=1e-5)


def test_the_pyramid_is_plain_pooling_where_it_divides_and_keeps_means_elsewhere() -> None:
    tokens = torch.randn(1, 16 * 24, 4)
    pyramid = build_pyramid(tokens, (16, 24), 4)
    assert pyramid.shapes == [(16, 24), (8, 12), (4, 6), (2, 3)]
    block = tokens.view(1, 16, 24, 4)[:, 8:16, 16:24].mean((1, 2))
    torch.testing.assert_close(pyramid.tokens[:, -1], block)
    odd = build_pyramid(torch.ones(1, 12 * 13, 4), (12, 13), 4)
    assert odd.shapes == [(12, 13), (6, 7), (3, 4), (2, 2)]
    torch.testing.assert_close(odd.tokens, torch.ones_like(odd.tokens))


def test_the_scrambled_level_follows_its_description() -> None:
    h, w, d = 8, 16, 8
    tokens = torch.randn(1, h * w, d)
    scrambled = scramble_last_level(build_pyramid(tokens, (h, w), 4))
    matrix = tokens[0].view(h * w // 8, 8, d // 8, 8).mean(dim=(1, 3)).flatten()
    last = scrambled.tokens[0, -2:]
    for token in range(2):
        for channel in range(d):
            torch.testing.assert_close(last[token, channel], matrix[channel * 2 + token])
    with pytest.raises(ValueError, match="scrambled_rerank_level=False"):
        scramble_last_level(build_pyramid(torch.randn(1, 144, 8), (12, 12), 4))


def test_time_embeddings_stretch_end_to_end() -> None:
    rows = torch.tensor([0.0, 1.0, 2.0, 9.0]).view(1, 4, 1)
    torch.testing.assert_close(resize_time_embedding(rows, 5).flatten(), torch.tensor([0, 0.5, 1, 1.5, 2, 9]))
    assert resize_time_embedding(rows, 3) is rows


@pytest.mark.parametrize("size", [0, (3, 0), (1, 2, 3)])
def test_memory_sizes_that_do_not_work_are_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="memory_size"):
        tiny(memory_size=size)


def training_step(head: MemoryHead, queries: Tensor, target: Target, features: Tensor) -> dict[str, Tensor]:
    return head.loss(head(features, queries), target)


def test_a_training_step_reaches_every_parameter_and_the_features() -> None:
    head = tiny(memory_size=7, support_grid=3).train()
    features = clip(2, 4).requires_grad_()
    queries = points((0, 3, 3), (1, 8, 6), (0, 5, 9)).repeat(2, 1, 1)
    xy = (queries[:, :, None, 1:] + torch.randn(2, 3, 4, 2)).clamp(0, 12)
    every = torch.ones(2, 3, 4, dtype=torch.bool)
    terms = training_step(head, queries, Target(queries, xy, every, every), features)
    assert len(terms) == 6
    sum(terms.values()).backward()
    assert features.grad.abs().sum() > 0
    without = [name for name, p in head.named_parameters() if p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_losses_of_empty_masks_are_zero() -> None:
    head, features = tiny(), clip(1, 3)
    queries = points((0, 3, 3), (1, 8, 6))
    nothing = torch.zeros(1, 2, 3, dtype=torch.bool)
    target = Target(queries, torch.zeros(1, 2, 3, 2), nothing, nothing)
    terms = training_step(head, queries, target, features)
    assert all(float(term.detach()) == 0 for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


def hand_made(size: tuple[int, int]) -> tuple[dict[str, Any], Target]:
    """One point, two frames, query in frame 0; target (2.5, 1.5) in the second."""
    h, w = size
    extra = {
        "size": size,
        "coarse": torch.zeros(1, 1, 2, h * w),
        "fine": torch.zeros(1, 1, 2, h * w),
        "xy": torch.tensor([2.5, 4.0]).expand(1, 1, 2, 2),
        "centre": torch.tensor([2.5, 0.5]).expand(1, 1, 2, 2),
        "offsets": torch.tensor([[0.0, 0.5], [0.0, -9.0]]).expand(1, 1, 2, 2, 2),
        "visible_logit": torch.zeros(1, 1, 2),
        "uncertain_logit": torch.full((1, 1, 2), 2.0),
        "candidates": torch.tensor([[2.5, 1.5], [0.5, 4.5]]).expand(1, 1, 2, 2, 2),
        "candidate_logits": torch.full((1, 1, 2, 2), 1.0),
    }
    target_xy = torch.tensor([2.5, 1.5]).expand(1, 1, 2, 2)
    yes = torch.ones(1, 1, 2, dtype=torch.bool)
    output = {"xy": extra["xy"], "visibility": None, "visible": None, "extra": extra}
    return output, Target(torch.zeros(1, 1, 3), target_xy, yes, yes)


def test_loss_terms_equal_closed_forms() -> None:
    output, target = hand_made((5, 6))
    terms = TrackOnLoss()(output, target)
    chance = 3 * torch.log(torch.tensor(30.0))
    torch.testing.assert_close(terms["point_loss"], chance)
    torch.testing.assert_close(terms["point_loss_local"], chance)
    torch.testing.assert_close(terms["visibility_loss"], torch.log(torch.tensor(2.0)))
    # off by half a cell = 2 px, and by 10 cells = 40 px, which saturates at 8
    torch.testing.assert_close(terms["offset_loss"], torch.tensor((2.0 + 8.0) / 2))
    # 2.5 cells = 10 px off: wrong
    torch.testing.assert_close(terms["uncertainty_loss"], F.softplus(torch.tensor(-2.0)))
    right, wrong = F.softplus(torch.tensor(1.0)), F.softplus(torch.tensor(-1.0))
    torch.testing.assert_close(terms["uncertainty_loss_topk"], (right + wrong) / 2)


def test_unlabelled_entries_and_frames_up_to_the_query_do_not_count() -> None:
    output, target = hand_made((5, 6))
    output["extra"]["visible_logit"] = torch.tensor([[[50.0, -1.0]]])
    late = TrackOnLoss()(output, target)["visibility_loss"]
    torch.testing.assert_close(late, F.softplus(torch.tensor(1.0)))
    every = TrackOnLoss(after_query=False)(output, target)["visibility_loss"]
    torch.testing.assert_close(every, F.softplus(torch.tensor(1.0)) / 2)
    unlabelled = target._replace(labelled=torch.tensor([[[True, False]]]))
    assert float(TrackOnLoss()(output, unlabelled)["visibility_loss"]) == 0


def test_targets_without_a_position_do_not_spoil_the_loss() -> None:
    output, target = hand_made((5, 6))
    xy = target.xy.clone()
    xy[:, :, 1] = float("nan")
    hidden = target._replace(xy=xy, visible=torch.zeros_like(target.visible))
    terms = TrackOnLoss()(output, hidden)
    assert all(term.isfinite() for term in terms.values())
    assert float(terms["offset_loss"]) == 0


@torch.no_grad()
def test_evaluation_keeps_no_correlations_and_its_output_cannot_be_trained_on() -> None:
    head, features = tiny(), clip(1, 2)
    queries = points((0, 3, 3))
    output = head(features, queries)
    assert "coarse" not in output["extra"]
    with pytest.raises(ValueError, match="no correlations"):
        head.loss(output, hand_made((12, 12))[1])


@torch.no_grad()
def test_half_precision_autocast_stays_close_and_keeps_geometry_in_float32() -> None:
    head, features = tiny(), clip(1, 3)
    exact = head(features, QUERIES[:, :2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = head(features, QUERIES[:, :2])
    assert rounded["xy"].dtype == rounded["visibility"].dtype == torch.float32
    assert rounded["xy"].isfinite().all()
    torch.testing.assert_close(rounded["visibility"][:, 0, 0], exact["visibility"][:, 0, 0], atol=0.1, rtol=0)


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        head = tiny(dropout=0.1, memory_mask_ratio=0.3, checkpointing=checkpointing).train()
        torch.manual_seed(1)  # the clip, dropout and random masks
        extra = head(clip(batch=2), points((0, 3, 4), (2, 9, 9)).expand(2, -1, -1))["extra"]
        (extra["xy"].square().mean() + extra["visible_logit"].mean() + extra["coarse"].square().mean()).backward()
        gradients.append({name: p.grad for name, p in head.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_one_compilation_serves_a_video() -> None:
    head = tiny(memory_size=3, support_grid=2)
    features, queries = clip(frames=7), points((0, 3, 4), (2, 9, 9), (4, 10.5, 1))
    with torch.no_grad():
        expected = head(features, queries)
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        head.compile(backend="eager")
        output = head(features, queries)
    assert counters["stats"]["unique_graphs"] == 1  # fullgraph=True: there are no breaks either
    torch.testing.assert_close(output["xy"], expected["xy"], atol=1e-5, rtol=0)
    assert torch.equal(output["visible"], expected["visible"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graphs_take_the_frame_step() -> None:
    head = tiny(memory_size=3).cuda()
    features, queries = clip(frames=7).cuda(), points((0, 3, 4), (2, 9, 9)).cuda()
    with torch.no_grad():
        expected = head(features, queries)
        head.compile(mode="reduce-overhead")
        state = head.start(1)
        head.add(state, head._sample(features, queries[..., 0].long(), queries[..., 1:]), queries)
        found = torch.stack([head.step(state, features[:, t]).xy for t in range(7)], dim=2)
    torch.testing.assert_close(found, expected["xy"], atol=1e-3, rtol=0)
