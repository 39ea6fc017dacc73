"""A clip before it is painted: textured layers from back to front, and where every point of them goes.

Each layer maps its texture plane to every frame by a ripple (:class:`~.motion.Ripple`) followed by a
homography. Both invert in closed form. A track is the forward map of a fixed point of a texture, the renderer
samples by the inverse map, and nothing is estimated from pixels.

When is a point visible? In frame t, at xy, a point of layer l is visible if and only if

1. it is inside the frame: ``0 <= x < W`` and ``0 <= y < H``, and
2. no layer in front of l has an alpha above 0.5 at xy; alpha is the closed-form
   :meth:`~.shapes.Outline.alpha` at the inverse map of xy, at the exact position and not at the nearest
   pixel.

The order of the layers is fixed within a clip (painter's order), also where tilted planes would intersect.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from trackbench.data.synthetic.motion import FloatArray, Ripple
from trackbench.data.synthetic.shapes import Outline
from trackbench.data.synthetic.textures import ByteImage

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Layer:
    """A textured, moving, rippling plane; all coordinates are raster coordinates (first centre at 0.5).

    Attributes:
        texture: (h, w, 3) uint8 RGB.
        outline: the opaque region of the texture; None: opaque everywhere, and mirrored beyond its borders.
        homography: (T, 3, 3), rippled texture to frame; the third coordinate stays positive in sight.
        ripple: the deformation that comes before the homography; None: rigid.
        gain: (T,) brightness factors; they have no part in the geometry.
    """

    texture: ByteImage
    outline: Outline | None
    homography: FloatArray
    ripple: Ripple | None
    gain: FloatArray

    @cached_property
    def inverse_homography(self) -> FloatArray:
        """(T, 3, 3), frame to rippled texture, scaled to a last entry of 1."""
        inverse = np.linalg.inv(self.homography)
        return inverse / inverse[:, 2:, 2:]

    @cached_property
    def rgba(self) -> ByteImage:
        """(h, w, 4): the texture and its alpha, sampled at the centres of the texels."""
        height, width = self.texture.shape[:2]
        rgba = np.full((height, width, 4), 255, np.uint8)
        rgba[..., :3] = self.texture
        if self.outline is not None:
            x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
            rgba[..., 3] = np.round(255 * self.outline.alpha(np.stack([x, y], axis=-1)))
        return rgba

    def to_frame(self, points: FloatArray, frame: IntArray) -> FloatArray:
        """Where texture points are: (..., 2) in frame pixels.

        Args:
            points: (..., 2) texture raster coordinates.
            frame: frame indices; its shape broadcasts against ``points.shape[:-1]``.
        """
        x, y = points[..., 0], points[..., 1]
        if self.ripple is not None:
            x, y = self.ripple.apply(x, y, frame)
        return _project(self.homography[frame], x, y)

    def to_texture(self, xy: FloatArray, frame: IntArray) -> FloatArray:
        """Which texture point is seen at a frame position; the inverse of :meth:`to_frame`, same shapes."""
        rippled = _project(self.inverse_homography[frame], xy[..., 0], xy[..., 1])
        if self.ripple is None:
            return rippled
        return np.stack(self.ripple.undo(rippled[..., 0], rippled[..., 1], frame), axis=-1)

    def covers(self, xy: FloatArray, frame: IntArray) -> BoolArray:
        """Whether the layer's alpha exceeds 0.5 at frame positions xy (..., 2)."""
        if self.outline is None:
            return np.ones(np.broadcast_shapes(xy.shape[:-1], frame.shape), np.bool_)
        return self.outline.alpha(self.to_texture(xy, frame)) > 0.5


@dataclass(frozen=True)
class Scene:
    """Layers from back to front, the first of them opaque everywhere.

    Attributes:
        height: H, pixels.
        width: W, pixels.
        layers: back to front.
        blur: standard deviation of the lens blur in pixels; 0: none.
        noise: standard deviation of the sensor noise in grey levels; 0: none.
    """

    height: int
    width: int
    layers: tuple[Layer, ...]
    blur: float = 0.0
    noise: float = 0.0

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.layers[0].homography)

    def top_layer(self, xy: FloatArray, frame: IntArray) -> IntArray:
        """Index of the frontmost layer with alpha above 0.5 at positions xy (M, 2) in frames (M,): (M,)."""
        top = np.zeros(len(xy), np.int64)
        for index, layer in enumerate(self.layers):
            top[layer.covers(xy, frame)] = index
        return top

    def tracks(self, layer_of_point: IntArray, points: FloatArray) -> tuple[FloatArray, BoolArray]:
        """Ground truth of points (N, 2), in the texture raster coordinates of layers ``layer_of_point`` (N,).

        Returns:
            xy (N, T, 2) frame pixels and visible (N, T), by the rule at the top of this file.
        """
        frame = np.arange(self.num_frames)[None]
        xy = np.empty((len(points), self.num_frames, 2))
        for index, layer in enumerate(self.layers):
            mine = layer_of_point == index
            xy[mine] = layer.to_frame(points[mine, None], frame)
        visible: BoolArray = np.all((xy >= 0) & (xy < (self.width, self.height)), axis=-1)
        for index, layer in enumerate(self.layers):
            behind = layer_of_point < index
            visible[behind] &= ~layer.covers(xy[behind], frame)
        return xy, visible


def _project(homography: FloatArray, x: FloatArray, y: FloatArray) -> FloatArray:
    h = np.moveaxis(homography, (-2, -1), (0, 1))
    depth = h[2, 0] * x + h[2, 1] * y + h[2, 2]
    u = h[0, 0] * x + h[0, 1] * y + h[0, 2]
    v = h[1, 0] * x + h[1, 1] * y + h[1, 2]
    return np.stack([u / depth, v / depth], axis=-1)
