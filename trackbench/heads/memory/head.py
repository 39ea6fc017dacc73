"""Track-On's head: causal tracking frame by frame with a context and a spatial memory per point.

Track-On, https://arxiv.org/abs/2501.18487 (ICLR 2025). Lengths that the paper gives in pixels of its stride-4
map are given in cells here, so that the head works on the map of any backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trackbench.heads.base import FrameOutput, Head, HeadOutput, Target
from trackbench.heads.memory.correlation import CorrelationMap, correlate
from trackbench.heads.memory.decoder import FeatureDecoder, QueryDecoder
from trackbench.heads.memory.initialisation import start_as_matcher
from trackbench.heads.memory.offset_visibility import OffsetHead, VisibilityHead
from trackbench.heads.memory.pyramid import build_pyramid, scramble_last_level
from trackbench.heads.memory.rerank import Reranking
from trackbench.heads.memory.sampling import sample_clip
from trackbench.heads.memory.spatial_memory import SpatialMemory
from trackbench.heads.memory.state import MemoryState
from trackbench.layers.chunking import by_chunks
from trackbench.losses import TrackOnLoss

MAPS_PER_CHUNK = 64  # correlations that exist at a time on the CPU without gradients


class FrameDetails(NamedTuple):
    """Everything that one frame yields for N points, in cells.

    Attributes:
        xy: (B, N, 2), the points.
        visible_logit: (B, N).
        uncertain_logit: (B, N), that the point is wrong or not visible.
        centre: (B, N, 2), centre of the best cell.
        offsets: (B, N, layers, 2), from that centre, after each layer of the offset head.
        candidates: (B, N, K, 2), centres of the cells that were re-ranked.
        candidate_logits: (B, N, K), that a candidate is wrong.
        coarse: (B, N, h * w), first correlation; only where gradients are recorded, likewise the next.
        fine: (B, N, h * w), correlation after re-ranking.
    """

    xy: Tensor
    visible_logit: Tensor
    uncertain_logit: Tensor
    centre: Tensor
    offsets: Tensor
    candidates: Tensor
    candidate_logits: Tensor
    coarse: Tensor | None
    fine: Tensor | None


class MemoryHead(Head):
    """Track-On's head.

    Args:
        in_dim: channels of the backbone.
        dim: channels of the head.
        num_heads: attention heads everywhere.
        decoder_layers: layers of the query decoder.
        rerank_layers: deformable layers at each candidate, and of the memory writer.
        offset_layers: layers of the offset head.
        num_candidates: cells that are re-ranked (at most all of them).
        levels: scales of the feature pyramid.
        grid_size: (h, w) of the position embedding; maps of another size get it interpolated bilinearly.
        trained_memory_size: memory slots while training, and rows of the trained time embeddings.
        memory_size: slots in evaluation, of both memories or (context, spatial); None: as trained.
        visibility_threshold: a point is visible above this probability; it also decides what memory ignores.
        support_grid: in evaluation, track this many points per side along, spread over the first frame.
        scrambled_rerank_level: re-rank with the coarsest level that published weights were trained with (see
            :func:`trackbench.heads.memory.pyramid.scramble_last_level`); False: with the one that was meant.
        input_scale: factor of the features before the projection; features of unit length in C channels want about
            sqrt(C), or the projection's bias drowns them at first.
        matcher_start: initialise as a plain matcher of the features, for short trainings from pretrained features
            (see :func:`trackbench.heads.memory.initialisation.start_as_matcher`); False: as published.
        dropout: of all blocks.
        checkpointing: recompute each frame's activations in the backward pass instead of keeping them.
        memory_mask_ratio: share of memory slots and query neighbours that training hides at random.
        loss: None: :class:`TrackOnLoss` as published.

    Points are tracked from the frame in which they start; a clip's earlier frames get positions too, without
    meaning. Query times are cut to whole frames.
    """

    causal = True

    def __init__(
        self,
        *,
        in_dim: int,
        dim: int = 256,
        num_heads: int = 8,
        decoder_layers: int = 3,
        rerank_layers: int = 3,
        offset_layers: int = 3,
        num_candidates: int = 16,
        levels: int = 4,
        grid_size: tuple[int, int] = (96, 128),
        trained_memory_size: int = 12,
        memory_size: int | Sequence[int] | None = None,
        visibility_threshold: float = 0.8,
        support_grid: int = 0,
        scrambled_rerank_level: bool = True,
        input_scale: float = 1.0,
        matcher_start: bool = False,
        dropout: float = 0.1,
        memory_mask_ratio: float = 0.1,
        checkpointing: bool = False,
        loss: TrackOnLoss | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.levels, self.num_candidates = dim, levels, num_candidates
        self.trained_memory_size = trained_memory_size
        self.memory_size = memory_size
        self._memory_sizes()
        self.visibility_threshold = visibility_threshold
        self.input_scale = input_scale
        self.support_grid = support_grid
        self.scrambled_rerank_level = scrambled_rerank_level
        self.checkpointing = checkpointing
        self.static_shapes = False
        self._loss = TrackOnLoss() if loss is None else loss

        self.token_projection = nn.Conv2d(in_dim, dim, kernel_size=1)
        self.frame_pos_embedding = nn.Parameter(torch.empty(1, dim, *grid_size))
        nn.init.trunc_normal_(self.frame_pos_embedding, std=0.02)
        self.feature_decoder = FeatureDecoder(dim)
        self.sm_query_updater = SpatialMemory(
            dim, num_heads, rerank_layers, levels, trained_memory_size, dropout, memory_mask_ratio
        )
        self.query_decoder = QueryDecoder(
            dim, num_heads, decoder_layers, trained_memory_size, dropout, memory_mask_ratio
        )
        self.projection1 = nn.Linear(dim, dim)
        self.projection2 = nn.Linear(dim, dim)
        self.corr_layer = nn.Conv2d(levels, 1, kernel_size=1, bias=False)
        self.rerank_module = Reranking(dim, num_heads, rerank_layers, levels, dropout)
        self.offset_head = OffsetHead(dim, num_heads, offset_layers, levels, dropout)
        self.visibility_head = VisibilityHead(dim, num_heads, levels, dropout)
        if matcher_start:
            start_as_matcher(self)

    def forward(self, features: Tensor, queries: Tensor) -> HeadOutput:
        """Track through a clip; see :meth:`trackbench.heads.base.Head.forward`.

        ``extra`` holds the stacked :class:`FrameDetails` that :class:`TrackOnLoss` needs, time on axis 2;
        the two correlations, (B, N, T, h * w) each, only where gradients are recorded.

        Raises:
            ValueError: a query's frame is not in the clip.
        """
        T = features.shape[1]
        time = queries[..., 0].long()
        if queries.numel() and not bool(((time >= 0) & (time < T)).all()):
            raise ValueError(f"query frames must lie in [0, {T - 1}], got {time.min()} to {time.max()}")
        state = self.start(features.shape[0])
        self.add(state, self._sample(features, time, queries[..., 1:]), queries)
        frames = [self._shed(self._advance(state, features[:, t]), state) for t in range(T)]
        return self._stack(frames, features.shape[-2:])

    def loss(self, output: HeadOutput, target: Target) -> dict[str, Tensor]:
        """The six terms of :class:`TrackOnLoss`."""
        return self._loss(output, target)

    def sample(self, features: Tensor, xy: Tensor) -> Tensor:
        """Query features (B, N, D) at xy (B, N, 2), in cells, of one frame's features (B, C, h, w)."""
        time = torch.zeros(xy.shape[:2], dtype=torch.int64, device=xy.device)
        return self._sample(features[:, None], time, xy)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Let ``torch.compile`` take the step of a frame, and ``forward`` with it.

        From then on all slots of the memories are read in every frame, written or not, so that shapes depend on
        the number of points only: one compilation serves a whole video. Arguments are those of ``torch.compile``.
        """
        self.static_shapes = True
        frame = torch.compile(self._frame, *args, **{"dynamic": False, "fullgraph": True, **kwargs})
        object.__setattr__(self, "_frame", frame)

    def start(self, batch_size: int) -> MemoryState:
        """A state without points, with the memory sizes of training or evaluation."""
        trained = self.trained_memory_size
        context, spatial = (trained, trained) if self.training else self._memory_sizes()
        like = self.frame_pos_embedding.detach()
        return MemoryState.empty(batch_size, self.dim, context, spatial, like)

    def add(self, state: MemoryState, query_features: Tensor, queries: Tensor) -> None:
        """Let points enter: query_features (B, N, D) of :meth:`sample`, queries (B, N, 3) as (t, x, y)."""
        state.add(query_features, queries[..., 0].long())

    def drop(self, state: MemoryState, keep: Tensor) -> None:
        """Keep only the points where ``keep`` (N,) is True."""
        state.drop(keep)

    def step(self, state: MemoryState, features: Tensor) -> FrameOutput:
        """Advance by one frame, features (B, C, h, w)."""
        details = self._advance(state, features)
        xy, logit = details.xy[:, state.num_support :], details.visible_logit[:, state.num_support :]
        xy = xy.clone() if self.static_shapes else xy  # the next replay of a CUDA graph overwrites its outputs
        visibility = logit.sigmoid()
        return FrameOutput(xy, visibility, visibility > self.visibility_threshold)

    def _memory_sizes(self) -> tuple[int, int]:
        """Slots of the context and the spatial memory in evaluation."""
        size = self.trained_memory_size if self.memory_size is None else self.memory_size
        sizes = [size, size] if isinstance(size, int) else list(size)
        if len(sizes) != 2 or min(*sizes, self.trained_memory_size) < 1:
            raise ValueError(f"memory_size must be positive, or (context, spatial), got {self.memory_size}")
        return sizes[0], sizes[1]

    def _position(self, size: tuple[int, int]) -> Tensor:
        """Position embedding (1, D, h, w)."""
        embedding = self.frame_pos_embedding
        if tuple(embedding.shape[-2:]) == size:
            return embedding
        return F.interpolate(embedding, size=size, mode="bilinear", align_corners=False)

    def _project(self, content: Tensor) -> Tensor:
        """(..., C) -> (..., D): the 1x1 convolution that published weights hold, for channels in the last axis."""
        return F.linear(content, self.token_projection.weight.flatten(1), self.token_projection.bias)

    def _sample(self, features: Tensor, time: Tensor, xy: Tensor) -> Tensor:
        """Projected features with position, (B, N, D), at points of a clip (B, T, C, h, w).

        Projection is linear and the bilinear weights sum to one: sampling first spares projecting whole maps.
        """
        B = features.shape[0]
        content = self._project(self.input_scale * sample_clip(features, time, xy))
        h, w = features.shape[-2:]
        position = self._position((h, w)).expand(B, -1, -1, -1)[:, None]
        return content + sample_clip(position, torch.zeros_like(time), xy)

    def _advance(self, state: MemoryState, features: Tensor) -> FrameDetails:
        """One frame, for all points of the state, support points included."""
        if state.frame == 0 and self.support_grid and not self.training:
            self._add_support(state, features)
        if state.position is None:
            h, w = features.shape[-2:]
            state.position = self._position((h, w)).flatten(2).transpose(1, 2).contiguous()
        inputs = (
            features,
            state.position,
            state.query,
            state.waiting,
            *state.recent_context(whole=self.static_shapes),
            *state.recent_spatial(whole=self.static_shapes),
            (state.context.shape[2], state.spatial.shape[2]),
        )
        if self.checkpointing and torch.is_grad_enabled():
            details, query, written = checkpoint(self._frame, *inputs, use_reentrant=False)
        else:
            details, query, written = self._frame(*inputs)
        state.remember(query, written, details.visible_logit.sigmoid() < self.visibility_threshold)
        return details

    def _frame(
        self,
        features: Tensor,
        position: Tensor,
        initial: Tensor,
        waiting: Tensor,
        context: Tensor,
        hidden: Tensor,
        spatial: Tensor,
        ignored: Tensor,
        slots: tuple[int, int],
    ) -> tuple[FrameDetails, Tensor, Tensor]:
        """One frame as a function of tensors: its details, and the new slots (B, N, D) of both memories."""
        h, w = features.shape[-2:]
        content = self.input_scale * features if self.input_scale != 1.0 else features
        tokens = self._project(content.flatten(2).transpose(1, 2)) + position
        decoded = build_pyramid(self.feature_decoder(tokens), (h, w), self.levels)
        compared = CorrelationMap.of(decoded, self.corr_layer.weight)
        query = self.sm_query_updater.update(initial, spatial, ignored, slots[1])
        query = self.query_decoder(query, tokens, waiting, context, hidden, slots[0])
        query = self.projection1(query)

        coarse, best = self._best_cells(query, compared, min(self.num_candidates, h * w))
        candidates = _centres(best, w)
        local = scramble_last_level(decoded) if self.scrambled_rerank_level else decoded
        query, candidate_logits = self.rerank_module(query, local, _reference(candidates, h, w))

        projected = self.projection2(query)
        fine, best = self._best_cells(projected, compared, 1)
        centre = _centres(best[..., 0], w)
        offsets = self.offset_head(projected, decoded, _reference(centre, h, w)[:, :, None])
        xy = centre + offsets[:, :, -1]
        found = _reference(xy, h, w)[:, :, None]
        visible_logit, uncertain_logit = self.visibility_head(query, decoded, found)

        raw = build_pyramid(tokens, (h, w), self.levels)
        written = self.sm_query_updater.write(query, initial, raw, found)
        details = FrameDetails(
            xy=xy,
            visible_logit=visible_logit,
            uncertain_logit=uncertain_logit,
            centre=centre,
            offsets=offsets,
            candidates=candidates,
            candidate_logits=candidate_logits,
            coarse=coarse,
            fine=fine,
        )
        return details, query, written

    @staticmethod
    def _best_cells(query: Tensor, compared: CorrelationMap, count: int) -> tuple[Tensor | None, Tensor]:
        """Correlation (B, N, h * w), which only the loss needs, and its best cells (B, N, count), best first."""

        def best(correlation: Tensor) -> Tensor:
            if count == 1:
                return correlation.argmax(dim=-1, keepdim=True)
            return correlation.topk(count, dim=-1).indices

        if torch.is_grad_enabled():
            correlation = correlate(query, compared)
            return correlation, best(correlation)
        size = MAPS_PER_CHUNK
        return None, by_chunks(lambda part: best(correlate(part, compared)), query, dim=1, size=size)

    def _add_support(self, state: MemoryState, features: Tensor) -> None:
        """Put a regular grid of points on the first frame, a 64th of the width away from its borders."""
        B, _, h, w = features.shape
        margin = w / 64
        x = torch.linspace(margin, w - margin, self.support_grid, device=features.device)
        y = torch.linspace(margin, h - margin, self.support_grid, device=features.device)
        lines, columns = torch.meshgrid(y, x, indexing="ij")
        xy = torch.stack([columns.flatten(), lines.flatten()], dim=-1).expand(B, -1, -1)
        start = torch.zeros(xy.shape[:2], dtype=torch.int64, device=features.device)
        state.add(self.sample(features, xy), start, support=True)

    @staticmethod
    def _shed(details: FrameDetails, state: MemoryState) -> dict[str, Tensor]:
        """What a clip keeps of a frame: no support points."""
        found = details._asdict().items()
        return {name: value[:, state.num_support :] for name, value in found if value is not None}

    def _stack(self, frames: list[dict[str, Tensor]], size: torch.Size) -> HeadOutput:
        extra: dict[str, Any] = {name: torch.stack([frame[name] for frame in frames], dim=2) for name in frames[0]}
        extra["size"] = (size[0], size[1])
        visibility = extra["visible_logit"].sigmoid()
        return HeadOutput(
            xy=extra["xy"], visibility=visibility, visible=visibility > self.visibility_threshold, extra=extra
        )


def _centres(cells: Tensor, width: int) -> Tensor:
    """Centres (..., 2), (x, y), of cells (...) numbered row by row."""
    return torch.stack([cells % width, cells // width], dim=-1) + 0.5


def _reference(points: Tensor, h: int, w: int) -> Tensor:
    """Normalised (x, y), within the map, of points (..., 2) in cells of an h x w map."""
    x, y = points.unbind(dim=-1)
    return torch.stack([x / w, y / h], dim=-1).clamp(0, 1)
