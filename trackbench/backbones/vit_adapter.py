"""ViT-Adapter: a convolutional branch that turns DINOv2's tokens into a dense map of stride 4.

Vision Transformer Adapter for Dense Predictions, https://arxiv.org/abs/2205.08534, section 3, as Track-On
uses it (https://arxiv.org/abs/2501.18487, section 3.1).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trackbench.backbones.base import Backbone
from trackbench.backbones.vit import Block, VisionTransformer, load_dinov2_weights, normalize_images
from trackbench.layers.chunking import by_chunks
from trackbench.layers.deformable import QUERIES_PER_CHUNK, DeformableAttention, Shapes, level_sizes

NUM_INTERACTIONS = 4
NUM_EXTRA_EXTRACTORS = 2


class SpatialPrior(nn.Module):
    """Convolutions from the image to maps of stride 4, 8, 16 and 32.

    Args:
        width: channels of the stem; deeper stages have up to four times as many.
        dim: channels of the maps.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_norm_relu(3, width, stride=2),
            *_conv_norm_relu(width, width, stride=1),
            *_conv_norm_relu(width, width, stride=1),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_conv_norm_relu(width, 2 * width, stride=2))
        self.conv3 = nn.Sequential(*_conv_norm_relu(2 * width, 4 * width, stride=2))
        self.conv4 = nn.Sequential(*_conv_norm_relu(4 * width, 4 * width, stride=2))
        self.fc1 = nn.Conv2d(width, dim, kernel_size=1)
        self.fc2 = nn.Conv2d(2 * width, dim, kernel_size=1)
        self.fc3 = nn.Conv2d(4 * width, dim, kernel_size=1)
        self.fc4 = nn.Conv2d(4 * width, dim, kernel_size=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(n, 3, H, W) -> maps (n, dim, h, w) of stride 4, 8, 16, 32."""
        c1 = self.stem(images)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)


def _conv_norm_relu(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class _DepthwiseConv(nn.Module):
    """One 3x3 depthwise convolution, shared by all levels of a pyramid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, shapes: Shapes) -> Tensor:
        levels = tokens.split(level_sizes(shapes), dim=1)
        maps = (level.transpose(1, 2).unflatten(2, shape) for level, shape in zip(levels, shapes, strict=True))
        return torch.cat([self.dwconv(x).flatten(2).transpose(1, 2) for x in maps], dim=1)


class ConvFFN(nn.Module):
    """Feed-forward layer with a depthwise convolution in the middle."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = _DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor, shapes: Shapes) -> Tensor:
        """(n, S, dim) -> (n, S, dim), tokens of all levels one after the other."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(tokens), shapes)))


class Grid(NamedTuple):
    """Where the tokens of a pyramid lie: (h, w) of each level, and their normalised centres (1, S, 1, 2)."""

    shapes: list[tuple[int, int]]
    centres: Tensor

    @staticmethod
    def of(shapes: list[tuple[int, int]], device: torch.device) -> Grid:
        """The grid of levels with these (h, w)."""
        parts = []
        for h, w in shapes:
            y = (torch.arange(h, dtype=torch.float32, device=device) + 0.5) / h
            x = (torch.arange(w, dtype=torch.float32, device=device) + 0.5) / w
            lines, columns = torch.meshgrid(y, x, indexing="ij")
            parts.append(torch.stack([columns.flatten(), lines.flatten()], dim=-1))
        return Grid(shapes, torch.cat(parts)[None, :, None])


class Injector(nn.Module):
    """Patch tokens attend to the convolutional pyramid; ``gamma`` lets the result in, from zero on."""

    def __init__(self, dim: int, num_heads: int, num_points: int, value_ratio: float, dropout: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, num_heads, 3, num_points, dropout, value_ratio)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, patches: Tensor, patch_grid: Grid, pyramid: Tensor, pyramid_grid: Grid) -> Tensor:
        """(n, h * w, dim) patches and (n, S, dim) pyramid -> patches."""
        centres = patch_grid.centres.expand(len(patches), -1, -1, -1)
        query, value = self.query_norm(patches), self.feat_norm(pyramid)
        return patches + self.gamma * self.attn(query, value, centres, pyramid_grid.shapes)


class Extractor(nn.Module):
    """The convolutional pyramid attends to the patch tokens."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_points: int,
        value_ratio: float,
        ffn_ratio: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, num_heads, 1, num_points, dropout, value_ratio)
        self.ffn = ConvFFN(dim, int(dim * ffn_ratio))
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, pyramid: Tensor, pyramid_grid: Grid, patches: Tensor, patch_grid: Grid) -> Tensor:
        """(n, S, dim) pyramid and (n, h * w, dim) patches -> pyramid."""
        centres = pyramid_grid.centres.expand(len(pyramid), -1, -1, -1)
        attend = self.attn.attention(pyramid.shape[1], self.feat_norm(patches), patch_grid.shapes)

        def extract(tokens: Tensor, centres: Tensor) -> Tensor:
            return tokens + attend(self.query_norm(tokens), centres)

        pyramid = by_chunks(extract, pyramid, centres, dim=1, size=QUERIES_PER_CHUNK)
        return pyramid + self.ffn(self.ffn_norm(pyramid), pyramid_grid.shapes)


class Interaction(nn.Module):
    """Inject, run a quarter of the ViT, extract; the last one extracts three times."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_points: int,
        value_ratio: float,
        ffn_ratio: float,
        dropout: float,
        extra: int,
    ) -> None:
        super().__init__()
        self.injector = Injector(dim, num_heads, num_points, value_ratio, dropout)
        self.extractor = Extractor(dim, num_heads, num_points, value_ratio, ffn_ratio, dropout)
        self.extra_extractors: nn.ModuleList | None = None
        if extra:
            self.extra_extractors = nn.ModuleList(
                Extractor(dim, num_heads, num_points, value_ratio, ffn_ratio, dropout) for _ in range(extra)
            )

    def forward(
        self,
        prefix: Tensor,
        patches: Tensor,
        pyramid: Tensor,
        blocks: list[Block],
        patch_grid: Grid,
        pyramid_grid: Grid,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix (class) tokens, patches and pyramid, (n, ..., dim) each -> the same after ``blocks``.

        The last interaction returns the finest level of the pyramid only.
        """
        patches = self.injector(patches, patch_grid, pyramid, pyramid_grid)
        tokens = torch.cat([prefix, patches], dim=1)
        for block in blocks:
            tokens = block(tokens)
        prefix, patches = tokens.split([prefix.shape[1], patches.shape[1]], dim=1)
        if self.extra_extractors is not None:
            # nobody reads the coarser levels after the last interaction, and levels do not see each other in it
            finest = pyramid_grid.shapes[:1]
            pyramid, pyramid_grid = pyramid[:, : level_sizes(finest)[0]], Grid.of(finest, pyramid.device)
        pyramid = self.extractor(pyramid, pyramid_grid, patches, patch_grid)
        for extractor in self.extra_extractors or ():
            pyramid = extractor(pyramid, pyramid_grid, patches, patch_grid)
        return prefix, patches, pyramid


class ViTAdapter(Backbone):
    """DINOv2 with ViT-Adapter: frames -> maps of stride 4.

    The ViT sees each frame resized to the next lower multiple of its patch; the convolutions see it as it is.

    Args:
        embed_dim: channels of the ViT and of the output.
        depth: ViT blocks; a multiple of 4.
        num_heads: ViT attention heads.
        patch_size: pixels per ViT patch.
        image_size: side of the images behind the ViT's position embedding.
        prior_width: channels of the convolutional stem.
        deformable_heads: attention heads of the adapter.
        num_points: samples per head and level of the adapter's attention.
        deformable_ratio: width of its values relative to ``embed_dim``.
        conv_ffn_ratio: width of its feed-forward layers relative to ``embed_dim``.
        dropout: of its attention.
        freeze_vit: the ViT takes no gradient (gradients still flow through it).
        checkpointing: recompute activations in the backward pass instead of keeping them.
        frames_per_chunk: without gradients, frames that go through at once; None: all.
        vit_weights: official DINOv2 file to start from; None: random weights.
    """

    stride = 4.0
    context = 0
    lookahead = 0

    def __init__(
        self,
        *,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        patch_size: int = 14,
        image_size: int = 518,
        prior_width: int = 64,
        deformable_heads: int = 6,
        num_points: int = 4,
        deformable_ratio: float = 1.0,
        conv_ffn_ratio: float = 0.25,
        dropout: float = 0.1,
        freeze_vit: bool = True,
        checkpointing: bool = False,
        frames_per_chunk: int | None = 8,
        vit_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        if depth % NUM_INTERACTIONS:
            raise ValueError(f"depth must be a multiple of {NUM_INTERACTIONS}, got {depth}")
        if frames_per_chunk is not None and frames_per_chunk < 1:
            raise ValueError(f"frames_per_chunk must be positive or None, got {frames_per_chunk}")
        self.dim = embed_dim
        self.checkpointing = checkpointing
        self.frames_per_chunk = frames_per_chunk
        self.spm = SpatialPrior(prior_width, embed_dim)
        self.level_embed = nn.Parameter(torch.randn(3, embed_dim))
        self.interactions = nn.ModuleList(
            Interaction(
                embed_dim,
                deformable_heads,
                num_points,
                deformable_ratio,
                conv_ffn_ratio,
                dropout,
                extra=NUM_EXTRA_EXTRACTORS if i == NUM_INTERACTIONS - 1 else 0,
            )
            for i in range(NUM_INTERACTIONS)
        )
        self.up = nn.ConvTranspose2d(embed_dim, embed_dim, kernel_size=2, stride=2)
        self.norm1 = nn.BatchNorm2d(embed_dim)
        # published checkpoints hold the norms of the coarser maps, which a stride-4 tracker does not compute
        self.norm2, self.norm3, self.norm4 = (nn.BatchNorm2d(embed_dim).requires_grad_(False) for _ in range(3))
        _init_weights(self)
        self.vit = VisionTransformer(
            embed_dim, depth, num_heads, patch_size=patch_size, image_size=image_size, pos_embed_mode="size"
        )
        if vit_weights is not None:
            load_dinov2_weights(self.vit, vit_weights)
        self.vit.requires_grad_(not freeze_vit)

    def forward(self, video: Tensor) -> Tensor:
        """(B, T, 3, H, W) in [0, 1] -> (B, T, embed_dim, H / 4, W / 4).

        Raises:
            ValueError: frames smaller than one ViT patch.
        """
        images = normalize_images(video).flatten(0, 1)
        if torch.is_grad_enabled() or self.frames_per_chunk is None:
            maps = self.encode(images)
        else:
            maps = torch.cat([self.encode(chunk) for chunk in images.split(self.frames_per_chunk)])
        return maps.unflatten(0, video.shape[:2])

    def encode(self, images: Tensor) -> Tensor:
        """Normalised images (n, 3, H, W) -> (n, embed_dim, H / 4, W / 4)."""
        vit = self.vit
        patch = vit.patch_size
        h, w = images.shape[-2] // patch, images.shape[-1] // patch
        if min(h, w) == 0:
            raise ValueError(f"frames must be at least {patch} x {patch} pixels, got {tuple(images.shape[-2:])}")
        finest, *coarser = self.spm(images.contiguous(memory_format=torch.channels_last))
        shapes = [(int(c.shape[2]), int(c.shape[3])) for c in coarser]
        levels = zip(coarser, self.level_embed, strict=True)
        pyramid = torch.cat([c.flatten(2).transpose(1, 2) + row for c, row in levels], dim=1)
        resized = F.interpolate(images, size=(h * patch, w * patch), mode="bilinear", align_corners=False)
        patches = vit.patch_tokens(resized)
        prefix = (vit.cls_token + vit.cls_pos_embedding()).expand(len(images), -1, -1)
        patch_grid, pyramid_grid = Grid.of([(h, w)], images.device), Grid.of(shapes, images.device)
        per_interaction = len(vit.blocks) // NUM_INTERACTIONS
        for i, interaction in enumerate(self.interactions):
            blocks = list(vit.blocks[i * per_interaction : (i + 1) * per_interaction])
            inputs = (prefix, patches, pyramid, blocks, patch_grid, pyramid_grid)
            if self.checkpointing and torch.is_grad_enabled():
                prefix, patches, pyramid = checkpoint(interaction, *inputs, use_reentrant=False)
            else:
                prefix, patches, pyramid = interaction(*inputs)
        # where 8 does not divide the frame, the doubled map is a cell larger than the stride-4 one
        doubled = self._double(pyramid, shapes[0])
        doubled = doubled[:, :, : finest.shape[2], : finest.shape[3]]
        return self.norm1(doubled + finest)

    def _double(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (n, h * w, C) -> a map (n, C, 2 h, 2 w), channels last: the transposed convolution ``up``.

        Its stride is its kernel, so every token makes its own 2 x 2 cells: a linear layer and a change of order.
        """
        weight = self.up.weight.permute(2, 3, 1, 0).flatten(0, 2)
        assert self.up.bias is not None
        cells = F.linear(tokens, weight, self.up.bias.repeat(4)).unflatten(1, size).unflatten(-1, (2, 2, -1))
        return rearrange(cells, "n h w p q c -> n (h p) (w q) c").permute(0, 3, 1, 2)


def _init_weights(adapter: nn.Module) -> None:
    """Initial weights of ViT-Adapter; deformable attention keeps its own."""
    for module in adapter.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in adapter.modules():
        if isinstance(module, DeformableAttention):
            module.reset_parameters()
