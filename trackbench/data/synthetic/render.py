"""Painting a scene: back to front, each layer sampled by its inverse map at the centres of the pixels."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from trackbench.data.synthetic.scene import Layer, Scene
from trackbench.data.synthetic.textures import ByteImage

FloatImage = npt.NDArray[np.float32]
Box = tuple[int, int, int, int]


def render(scene: Scene, rng: np.random.Generator) -> ByteImage:
    """Paint all frames of a scene.

    Args:
        scene: what to paint.
        rng: source of the sensor noise; not used if the scene has none.

    Returns:
        (T, H, W, 3) uint8 RGB.
    """
    video = np.empty((scene.num_frames, scene.height, scene.width, 3), np.uint8)
    for index, frame in enumerate(video):
        frame[:] = paint(scene, index)
    if scene.noise:
        _add_noise(video, scene.noise, rng)
    return video


def paint(scene: Scene, index: int) -> ByteImage:
    """Paint one frame, (H, W, 3) uint8 RGB, without sensor noise."""
    wall, *objects = scene.layers
    frame = _sample_wall(wall, index, scene.height, scene.width)
    for layer in objects:
        _paint_object(frame, layer, index)
    return np.asarray(cv2.GaussianBlur(frame, (0, 0), scene.blur), np.uint8) if scene.blur else frame


def _sample_wall(wall: Layer, index: int, height: int, width: int) -> ByteImage:
    x, y = _sampling_maps(wall, index, (0, 0, width, height))
    colour = cv2.remap(wall.texture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(cv2.convertScaleAbs(colour, alpha=float(wall.gain[index])), dtype=np.uint8)


def _paint_object(frame: ByteImage, layer: Layer, index: int) -> None:
    box = _bounding_box(layer, index, frame.shape[0], frame.shape[1])
    if box is None:
        return
    left, top, right, bottom = box
    x, y = _sampling_maps(layer, index, box)
    rgba = cv2.remap(layer.rgba, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    target = frame[top:bottom, left:right]
    colour = np.minimum(rgba[..., :3] * np.float32(layer.gain[index]), np.float32(255))
    alpha = rgba[..., 3:] * np.float32(1 / 255)
    target[:] = target + (colour - target) * alpha + np.float32(0.5)


def _bounding_box(layer: Layer, index: int, height: int, width: int) -> Box | None:
    """The pixels (left, top, right, bottom) that the layer can reach; None: out of sight."""
    rows, cols = layer.texture.shape[:2]
    slack_x = slack_y = 0.0
    if layer.ripple is not None:
        slack_x, slack_y = abs(layer.ripple.x_amplitude[index]), abs(layer.ripple.y_amplitude[index])
    left, right, top, bottom = -slack_x, cols + slack_x, -slack_y, rows + slack_y
    corners = np.array([[left, right, left, right], [top, top, bottom, bottom], [1.0, 1.0, 1.0, 1.0]])
    u, v, depth = layer.homography[index] @ corners
    u, v = u / depth, v / depth
    first_x, last_x = max(0, int(np.floor(u.min()))), min(width, int(np.ceil(u.max())))
    first_y, last_y = max(0, int(np.floor(v.min()))), min(height, int(np.ceil(v.max())))
    return (first_x, first_y, last_x, last_y) if first_x < last_x and first_y < last_y else None


def _sampling_maps(layer: Layer, index: int, box: Box) -> tuple[FloatImage, FloatImage]:
    """For each pixel of the box, the texture position at its centre, as cv2.remap wants it: x and y, (h, w).

    It is ``Layer.to_texture`` on a grid, in float32. OpenCV puts the centre of the first texel at 0, we at
    0.5.
    """
    left, top, right, bottom = box
    h = layer.inverse_homography[index]
    x, y = np.arange(left, right) + 0.5, (np.arange(top, bottom) + 0.5)[:, None]

    def plane(row: npt.NDArray[np.float64]) -> FloatImage:
        return (row[0] * x + row[2]).astype(np.float32) + (row[1] * y).astype(np.float32)

    scale = np.float32(1) / plane(h[2])
    u, v = plane(h[0]) * scale, plane(h[1]) * scale
    if layer.ripple is not None:
        wave = layer.ripple
        v -= _sine(u, wave.y_rate, wave.y_phase[index], wave.y_amplitude[index])
        u -= _sine(v, wave.x_rate, wave.x_phase[index], wave.x_amplitude[index])
    return u - np.float32(0.5), v - np.float32(0.5)


def _sine(argument: FloatImage, rate: float, phase: float, amplitude: float) -> FloatImage:
    return np.float32(amplitude) * np.sin(np.float32(rate) * argument + np.float32(phase))


def _add_noise(video: ByteImage, sigma: float, rng: np.random.Generator) -> None:
    """Gaussian noise, in place: one field per clip (drawing is slow), shifted at random for each frame."""
    height, width = video.shape[1:3]
    margin = 64
    field = rng.standard_normal((height + margin, width + margin, 3), dtype=np.float32)
    levels = np.clip(np.round(sigma * field), -127, 127).astype(np.int8)
    for frame in video:
        top, left = rng.integers(margin + 1, size=2)
        noise = levels[top : top + height, left : left + width]
        frame[:] = cv2.add(frame, np.ascontiguousarray(noise), dtype=cv2.CV_8U)
