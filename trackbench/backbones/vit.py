"""DINOv2 vision transformer (Oquab et al., 2023, arXiv 2304.07193), with the official parameter names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackbench.backbones.staged import StagedBackbone
from trackbench.layers.chunking import by_chunks
from trackbench.layers.precision import at_least_float32, normalize_length

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PosEmbedMode = Literal["size", "scale"]

TOKENS_PER_CHUNK = 1024  # that go through the feed-forward layers at a time on the CPU without gradients


@dataclass(frozen=True)
class ViTSize:
    """What tells the DINOv2 models apart (arXiv 2304.07193, table 17)."""

    embed_dim: int
    depth: int
    num_heads: int
    ffn: Literal["mlp", "swiglu"] = "mlp"


VIT_SIZES: dict[str, ViTSize] = {
    "small": ViTSize(384, 12, 6),
    "base": ViTSize(768, 12, 12),
    "large": ViTSize(1024, 24, 16),
    "giant": ViTSize(1536, 40, 24, "swiglu"),
}


class PatchEmbed(nn.Module):
    """Images -> one token per patch."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, h*w, C), rows first."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(n, L, C) -> (n, L, C)."""
        n, L, C = x.shape
        qkv = self.qkv(x).view(n, L, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(n, L, C))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, 2020, arXiv 2002.05202) with the width that DINOv2-g uses."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        # two thirds of an MLP's width (its third matrix makes up for it), rounded up to a multiple of 8
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """Learned factor per channel (Touvron et al., 2021, arXiv 2103.17239)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """``x`` and its scaled residual branch (..., C) -> their sum (..., C)."""
        return torch.addcmul(x, branch, self.gamma)


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale."""

    def __init__(
        self, dim: int, num_heads: int, ffn: Literal["mlp", "swiglu"] = "mlp", layer_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp: nn.Module = Mlp(dim, 4 * dim) if ffn == "mlp" else SwiGLU(dim, 4 * dim)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(n, L, C) -> (n, L, C)."""
        x = self.ls1(x, self.attn(self.norm1(x)))
        rows = by_chunks(self._feed_forward, x.flatten(0, 1), dim=0, size=TOKENS_PER_CHUNK)
        return rows.view_as(x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.ls2(x, self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """The DINOv2 trunk. Takes normalised images of any size that its patch divides.

    Tokens are ordered class, registers, patches (rows first).

    Args:
        embed_dim: channels C.
        depth: number of blocks.
        num_heads: attention heads.
        ffn: feed-forward layer; "swiglu" for DINOv2-g.
        patch_size: pixels per patch.
        image_size: side in pixels of the square images behind ``pos_embed`` (518: 37 x 37 patches).
        num_register_tokens: 4 for the models "with registers" (Darcet et al., 2023, arXiv 2309.16588).
        pos_embed_mode: how the position embedding fits another grid, bicubically and without antialiasing:
            "size" by the ratio of the sizes (Track-On), "scale" by the factor (g + 0.1) / 37 (Chrono, DINOv2
            without registers), which also moves the sampling positions.
        mask_token: hold the mask token of DINOv2's pre-training, which no tracker uses.
        layer_scale: initial value of LayerScale.
    """

    def __init__(
        self,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        ffn: Literal["mlp", "swiglu"] = "mlp",
        patch_size: int = 14,
        image_size: int = 518,
        num_register_tokens: int = 0,
        pos_embed_mode: PosEmbedMode = "scale",
        mask_token: bool = False,
        layer_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if pos_embed_mode not in ("size", "scale"):
            raise ValueError(f"pos_embed_mode must be 'size' or 'scale', got {pos_embed_mode!r}")
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.pos_embed_mode = pos_embed_mode
        self.pos_grid = image_size // patch_size
        self.num_prefix_tokens = 1 + num_register_tokens

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.pos_grid**2, embed_dim))
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim))
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, ffn, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.num_prefix_tokens > 1:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(h, w) of the patches of images (..., H, W). Raises ValueError where the patch does not divide."""
        H, W = images.shape[-2:]
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"image size {H} x {W} is not a multiple of the patch size {self.patch_size}")
        return H // self.patch_size, W // self.patch_size

    def pos_embedding(self, h: int, w: int) -> Tensor:
        """Position embedding of the patch tokens for a grid of h x w patches: (1, h*w, C)."""
        patch_pos = self.pos_embed[:, 1:]
        if (h, w) == (self.pos_grid, self.pos_grid):
            return patch_pos
        grid = at_least_float32(patch_pos).unflatten(1, (self.pos_grid, self.pos_grid)).permute(0, 3, 1, 2)
        if self.pos_embed_mode == "size":
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
        else:
            factor = ((h + 0.1) / self.pos_grid, (w + 0.1) / self.pos_grid)
            grid = F.interpolate(grid, scale_factor=factor, mode="bicubic", align_corners=False)
        return grid.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)

    def cls_pos_embedding(self) -> Tensor:
        """Position embedding of the class token: (1, 1, C)."""
        return self.pos_embed[:, :1]

    def patch_tokens(self, images: Tensor) -> Tensor:
        """Patch tokens with their position embedding, no class token: (n, 3, H, W) -> (n, h*w, C)."""
        h, w = self.grid(images)
        return self.patch_embed(images) + self.pos_embedding(h, w)

    def embed(self, images: Tensor) -> Tensor:
        """The input of the first block: normalised images (n, 3, H, W) -> (n, 1 + registers + h*w, C)."""
        patches = self.patch_tokens(images)
        prefix = [self.cls_token + self.cls_pos_embedding()]
        if self.num_prefix_tokens > 1:
            prefix.append(self.register_tokens)
        return torch.cat([*(token.expand(len(patches), -1, -1) for token in prefix), patches], dim=1)

    def tokens_to_map(self, tokens: Tensor, h: int, w: int) -> Tensor:
        """Patch tokens as a map: (n, prefix + h*w, C) -> (n, C, h, w)."""
        return tokens[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, (h, w))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (n, 3, H, W) -> all tokens after the final norm (n, 1 + registers + h*w, C)."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def normalize_images(images: Tensor) -> Tensor:
    """ImageNet normalisation of images (..., 3, H, W) in [0, 1]."""
    # by numbers and not by tensors, which would be copied to the device, and waited for, at every call
    channels = zip(images.unbind(-3), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=-3)


def load_dinov2_weights(vit: VisionTransformer, path: str | Path) -> None:
    """Load an official DINOv2 file (``dinov2_vits14_pretrain.pth`` and its siblings) into ``vit``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, or keys are missing, unexpected or of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"DINOv2 weights {path} do not exist")
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} is not a DINOv2 state dict: expected a mapping of names to tensors")
    own = vit.state_dict()
    # every official file has the mask token of the pre-training
    found = {key: value for key, value in content.items() if key != "mask_token" or key in own}
    wrong = [
        f"{key}: {tuple(found[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own.keys() & found.keys()
        if found[key].shape != own[key].shape
    ]
    problems = {
        "missing": sorted(own.keys() - found.keys()),
        "unexpected": sorted(found.keys() - own.keys()),
        "of another shape": sorted(wrong),
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_shorten(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(f"{path} does not fit this DINOv2 model; keys {listed}")
    vit.load_state_dict(found)


def _shorten(keys: Iterable[str], limit: int = 8) -> str:
    keys = list(keys)
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


@dataclass(frozen=True)
class ViTState:
    """Frames on their way through the blocks: tokens (n, prefix + h*w, C) and their grid (h, w)."""

    tokens: Tensor
    grid: tuple[int, int]


class DinoV2(StagedBackbone):
    """DINOv2 frame by frame: the patch tokens after the final norm.

    Its stages are the blocks.

    Args:
        size: "small", "base", "large" or "giant".
        registers: the model with 4 register tokens.
        weights: official DINOv2 file to start from; None: random weights.
        token_grid: resize every frame (after normalisation, bilinearly, without antialiasing) so that the map
            has this many cells: a side for square maps or (h, w). None: as given; then the patch must divide
            the frames.
        pos_embed_mode: see :class:`VisionTransformer`.
        normalize_features: divide each feature by its length (Chrono's features).
        frozen: the weights take no gradient (gradients still flow through to the input).
        frames_per_chunk: frames that go through the network at once: activations do not grow with T in
            inference. None: all at once.
        embed_dim: replaces the one of ``size``, for models made small; likewise the next two.
        depth: number of blocks.
        num_heads: attention heads.
    """

    def __init__(
        self,
        size: str = "small",
        registers: bool = False,
        weights: str | Path | None = None,
        token_grid: int | tuple[int, int] | None = None,
        pos_embed_mode: PosEmbedMode = "scale",
        normalize_features: bool = False,
        frozen: bool = False,
        frames_per_chunk: int | None = 8,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
    ) -> None:
        if size not in VIT_SIZES:
            raise ValueError(f"size must be one of {', '.join(VIT_SIZES)}, got {size!r}")
        config = VIT_SIZES[size]
        vit = VisionTransformer(
            embed_dim=embed_dim or config.embed_dim,
            depth=depth or config.depth,
            num_heads=num_heads or config.num_heads,
            ffn=config.ffn,
            num_register_tokens=4 if registers else 0,
            pos_embed_mode=pos_embed_mode,
        )
        stage_dims = [vit.embed_dim] * len(vit.blocks)
        super().__init__(vit.embed_dim, float(vit.patch_size), stage_dims, frames_per_chunk)
        self.vit = vit
        if weights is not None:
            load_dinov2_weights(self.vit, weights)
        self.frozen = frozen
        if frozen:
            self.vit.requires_grad_(False)
        self.token_grid = (
            (token_grid, token_grid) if isinstance(token_grid, int) else token_grid and tuple(token_grid)
        )
        self.normalize_features = normalize_features

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Let ``torch.compile`` take the blocks, each of the same few shapes: one compilation serves them all."""
        for block in self.vit.blocks:
            block.compile(*args, **kwargs)

    def begin(self, images: Tensor) -> ViTState:
        """Frames (n, 3, H, W) in [0, 1] -> the state before the first block."""
        images = normalize_images(images)
        if self.token_grid is not None:
            size = [cells * self.vit.patch_size for cells in self.token_grid]
            if list(images.shape[-2:]) != size:
                images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        return ViTState(self.vit.embed(images), self.vit.grid(images))

    def run_stage(self, index: int, state: ViTState) -> ViTState:
        """Run block ``index``."""
        return replace(state, tokens=self.vit.blocks[index](state.tokens))

    def get_map(self, state: ViTState) -> Tensor:
        """The patch tokens as a map (n, C, h, w)."""
        return self.vit.tokens_to_map(state.tokens, *state.grid)

    def add_map(self, state: ViTState, delta: Tensor) -> ViTState:
        """Add ``delta`` (n, C, h, w) to the patch tokens; class and register tokens stay."""
        prefix, patches = state.tokens.split(
            [self.vit.num_prefix_tokens, state.tokens.shape[1] - self.vit.num_prefix_tokens], dim=1
        )
        return replace(state, tokens=torch.cat([prefix, patches + delta.flatten(2).transpose(1, 2)], dim=1))

    def finish(self, state: ViTState) -> Tensor:
        """Features (n, C, h, w): the final norm and, if asked for, unit length."""
        features = self.vit.tokens_to_map(self.vit.norm(state.tokens), *state.grid)
        return normalize_length(features) if self.normalize_features else features
