"""Where the points under given pixels of a Kubric scene are in every frame, and where they are hidden.

What Kubric's ``add_tracks`` computes (Greff et al., CVPR 2022; the point tracking challenge of its repository),
for all points at once. A camera looks along its own -z with +y up; quaternions are (w, x, y, z); matrices take
column vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scene = Mapping[str, Any]
Window = tuple[int, int, int, int]

FULL_SCALE = 65535  # of what is stored in 16 bits
NEARER = 0.99  # of the distance: what is stored below it hides the point
MAX_NORMAL_GAP = 0.05  # between the normals of diagonal neighbours on a smooth surface
MAX_ROUGH = 2  # neighbours, of four, beyond that gap
UNIT_TOLERANCE = 1e-2  # of a quaternion's length

_SHAPES: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "segmentations": ("iu", ("T", "H", "W")),
    "depth": ("uint16", ("T", "H", "W")),
    "depth_range": ("fiu", (2,)),
    "normal": ("uint16", ("T", "H", "W", 3)),
    "object_coordinates": ("uint16", ("T", "H", "W", 3)),
    "bboxes_3d": ("fiu", ("instances", "T", 8, 3)),
    "obj_quaternions": ("fiu", ("instances", "T", 4)),
    "cam_positions": ("fiu", ("T", 3)),
    "cam_quaternions": ("fiu", ("T", 4)),
    "focal_length": ("fiu", ()),
    "sensor_width": ("fiu", ()),
    "video": ("uint8", ("T", "H", "W", 3)),
}
_KINDS = {"iu": "integer", "fiu": "float"}
# Corners of the unit cube in the order of bboxes_3d: x slowest, z fastest, low before high.
_CORNERS = np.stack(np.meshgrid(*[(-0.5, 0.5)] * 3, indexing="ij"), axis=-1).reshape(8, 3)


def project_tracks(
    scene: Scene, queries_tyx: Any, window: Any = None, *, official_quirks: bool = False
) -> dict[str, NDArray[Any]]:
    """Follow the points under query pixels through all frames of a scene.

    A point of the background stands still in the world; a point of an object moves with the object's box. It is
    occluded in a frame where it is behind the camera or outside the window, where none of the four pixels around
    it is of its segment, where the farthest of them is nearer than 0.99 of its distance, or where its surface
    faces away. That last test leaves out normals that face away in the query's own frame, and rough ones: those
    that differ from more than two of the four diagonal neighbours'.

    Args:
        scene: one example as MOVi stores it, without singleton channels: ``segmentations`` (T, H, W) integer,
            0 the background, i the instance i - 1; ``depth`` (T, H, W) uint16, distance to the camera's centre
            within ``depth_range`` (2,); ``normal`` (T, H, W, 3) uint16, in the world; ``object_coordinates``
            (T, H, W, 3) uint16, in the instance's box; ``bboxes_3d`` (instances, T, 8, 3);
            ``obj_quaternions`` (instances, T, 4); ``cam_positions`` (T, 3); ``cam_quaternions`` (T, 4);
            ``focal_length`` and ``sensor_width``. A negative segment belongs to nothing.
        queries_tyx: (n, 3) integers, frame, row and column.
        window: (y0, x0, y1, x1), pixels: points beyond its edges are occluded. None: the frame.
        official_quirks: the published vertical focal length, which is wrong by (H / W)^2 on frames that are not
            square.

    Returns:
        ``xy`` (n, T, 2) float64, raster pixels of the full frame (the centre of the first pixel is 0.5);
        ``occluded`` (n, T) bool; ``distance`` (n, T) float64, from the camera's centre, metres.

    Raises:
        ValueError: an array is missing, has another type or shape or is not finite, a quaternion is not of unit
            length, the window is not in the frame, or a query is outside the video or on a segment that has no
            instance.
    """
    arrays = check_scene(scene, [key for key in _SHAPES if key != "video"])
    segmentations, depth = arrays["segmentations"], arrays["depth"]
    T, H, W = segmentations.shape
    queries = _check_queries(queries_tyx, (T, H, W))
    y0, x0, y1, x1 = check_window(window, H, W)
    at_query = tuple(queries.T)
    segments = _check_segments(segmentations[at_query].astype(np.int64), len(arrays["bboxes_3d"]))

    for key in ("focal_length", "sensor_width"):
        if arrays[key] <= 0:
            raise ValueError(f"scene[{key!r}]: expected a positive number, got {arrays[key]}")
    camera = _rotations(arrays["cam_quaternions"], "cam_quaternions")
    centre = arrays["cam_positions"].astype(np.float64)
    focal = float(arrays["focal_length"]) / float(arrays["sensor_width"])
    focal_xy = focal * np.array([1.0, H / W if official_quirks else W / H])
    # takes a point in the camera's axes to (x w, y w, w) with x, y in pixels and w the depth along the axis
    to_pixels = np.array([[W * focal_xy[0], 0, -W / 2], [0, -H * focal_xy[1], -H / 2], [0, 0, -1.0]])
    to_pixels = to_pixels @ camera.swapaxes(1, 2)

    is_object = segments > 0
    in_box = arrays["object_coordinates"][at_query] / FULL_SCALE - 0.5
    on_ray = _unproject(
        queries, decode_depth(depth[at_query], arrays["depth_range"]), camera, centre, focal_xy, (H, W)
    )
    points = np.ones((len(queries), 4))
    points[:, :3] = np.where(is_object[:, None], in_box, on_ray)
    normals = _decode_normals(arrays["normal"][at_query])

    projected = np.empty((len(queries), 3, T))
    distance = np.empty((len(queries), T))
    faces_away = np.zeros((len(queries), T), bool)
    for segment in np.unique(segments):
        members = np.flatnonzero(segments == segment)
        if segment:
            to_world = _box_to_world(arrays["bboxes_3d"][segment - 1])
            axes = _rotations(arrays["obj_quaternions"][segment - 1], "obj_quaternions")
        else:
            to_world, axes = np.tile(np.eye(3, 4), (T, 1, 1)), np.tile(np.eye(3), (T, 1, 1))
        to_world[..., 3] -= centre  # from here on relative to the camera
        both = np.concatenate([to_pixels @ to_world, axes.swapaxes(1, 2) @ to_world], axis=1)  # (T, 6, 4)
        seen = (points[members] @ both.transpose(2, 1, 0).reshape(4, -1)).reshape(-1, 6, T)
        sight = seen[:, 3:]  # from the camera to the point, in the object's axes: those of its normals
        projected[members] = seen[:, :3]
        distance[members] = np.sqrt(np.einsum("nit,nit->nt", sight, sight))
        if segment:
            frames = queries[members, 0]
            own_normals = np.einsum("nij,ni->nj", axes[frames], normals[members])
            faces_away[members] = _faces_away(own_normals, sight, frames)
    faces_away &= _smooth(arrays["normal"], queries, normals)[:, None]

    w = projected[:, 2]
    behind = w < 0
    w[w == 0] = np.finfo(np.float64).eps  # in the plane of the camera: far outside, but finite
    x, y = projected[:, 0] / w, projected[:, 1] / w
    occluded = faces_away | behind | (x < x0) | (y < y0) | (x > x1) | (y > y1)
    farthest, same_segment = _around(x, y, depth, segmentations, segments)
    occluded |= ~same_segment
    occluded |= decode_depth(farthest, arrays["depth_range"]) < NEARER * distance
    return {"xy": np.stack([x, y], axis=-1), "occluded": occluded, "distance": distance}


def check_scene(scene: Scene, keys: list[str]) -> dict[str, NDArray[Any]]:
    """The named arrays of a scene.

    Raises:
        ValueError: one is missing, has another type or shape than is expected beside the others, or holds NaN or
            infinity.
    """
    sizes: dict[str, int] = {}
    arrays = {}
    for key in keys:
        kind, axes = _SHAPES[key]
        expected = f"{_KINDS.get(kind, kind)} ({', '.join(str(sizes.get(str(axis), axis)) for axis in axes)})"
        if key not in scene:
            raise ValueError(f"scene lacks {key!r}: expected {expected}")
        array = np.asarray(scene[key])
        fits = array.dtype == kind if kind not in _KINDS else array.dtype.kind in kind
        fits = fits and array.ndim == len(axes)
        fits = fits and all(
            size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
            for axis, size in zip(axes, array.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"scene[{key!r}]: expected {expected}, got {array.dtype} {array.shape}")
        if kind == "fiu" and not np.isfinite(array).all():
            raise ValueError(f"scene[{key!r}]: expected finite numbers, got NaN or infinity")
        arrays[key] = array
    return arrays


def check_window(window: Any, height: int, width: int) -> Window:
    """The window (y0, x0, y1, x1), or the whole frame for None.

    Raises:
        ValueError: it is empty or not within the frame.
    """
    if window is None:
        return 0, 0, height, width
    values = np.asarray(window)
    if values.shape == (4,) and values.dtype.kind in "iu":
        y0, x0, y1, x1 = (int(value) for value in values)
        if 0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width:
            return y0, x0, y1, x1
    raise ValueError(f"window: expected integers y0 < y1 <= {height} and x0 < x1 <= {width}, got {window}")


def decode_depth(stored: NDArray[Any], depth_range: NDArray[Any]) -> NDArray[np.float32]:
    """Metres."""
    nearest, farthest = np.asarray(depth_range, np.float32)
    metres = stored.astype(np.float32)
    metres *= (farthest - nearest) / np.float32(FULL_SCALE)
    metres += nearest
    return metres


def _check_queries(queries_tyx: Any, shape: tuple[int, int, int]) -> NDArray[np.intp]:
    queries = np.asarray(queries_tyx)
    if queries.ndim != 2 or queries.shape[1] != 3 or (queries.size and queries.dtype.kind not in "iu"):
        raise ValueError(f"queries_tyx: expected integer (n, 3), got {queries.dtype} {queries.shape}")
    queries = queries.astype(np.intp)
    outside = ((queries < 0) | (queries >= shape)).any(axis=1)
    if outside.any():
        raise ValueError(
            f"queries_tyx: expected frame, row and column below {shape}, got {queries[outside.argmax()].tolist()}"
        )
    return queries


def _check_segments(segments: NDArray[np.int64], instances: int) -> NDArray[np.int64]:
    unknown = (segments < 0) | (segments > instances)
    if unknown.any():
        raise ValueError(
            f"scene['segmentations'] is {segments[unknown.argmax()]} at a query: "
            f"expected 0 to {instances}, the instances in scene['bboxes_3d']"
        )
    return segments


def _rotations(quaternions: NDArray[Any], key: str) -> NDArray[np.float64]:
    """Rotation matrices (T, 3, 3) of quaternions (T, 4), (w, x, y, z)."""
    quaternions = quaternions.astype(np.float64)
    length = np.linalg.norm(quaternions, axis=1, keepdims=True)
    if not (np.abs(length - 1) < UNIT_TOLERANCE).all():
        raise ValueError(
            f"scene[{key!r}]: expected unit quaternions, got lengths {length.min()} to {length.max()}"
        )
    w, x, y, z = (quaternions / length).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), 2, 0)


def _box_to_world(corners: NDArray[Any]) -> NDArray[np.float64]:
    """Affine maps (T, 3, 4) from box coordinates in [-0.5, 0.5] to the least-squares fit of corners (T, 8, 3)."""
    corners = corners.astype(np.float64)
    linear = corners.swapaxes(1, 2) @ (_CORNERS / 2)  # the cube's corners are orthogonal, of squared length 2
    return np.concatenate([linear, corners.mean(axis=1)[..., None]], axis=2)


def _unproject(
    queries: NDArray[np.intp],
    depth: NDArray[np.float32],
    camera: NDArray[np.float64],
    centre: NDArray[np.float64],
    focal_xy: NDArray[np.float64],
    size: tuple[int, int],
) -> NDArray[np.float64]:
    """World points (n, 3) at a distance on the rays through the centres of pixels."""
    frames = queries[:, 0]
    uv = (queries[:, :0:-1] + 0.5) / size[::-1] - 0.5
    ray = np.concatenate([uv / focal_xy * (1, -1), np.full((len(queries), 1), -1.0)], axis=1)
    ray *= (depth / np.linalg.norm(ray, axis=1))[:, None]
    return np.einsum("nij,nj->ni", camera[frames], ray) + centre[frames]


def _decode_normals(stored: NDArray[np.uint16]) -> NDArray[np.float64]:
    return stored / (FULL_SCALE / 2) - 1


def _faces_away(
    normals: NDArray[np.float64], sight: NDArray[np.float64], frames: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Whether surfaces (m, 3) are seen from behind (m, T), with lines of sight (m, 3, T) in the same axes."""
    away = np.einsum("ni,nit->nt", normals, sight) > 0
    # a surface that the query itself sees from behind has a wrong normal
    return away & ~away[np.arange(len(frames)), frames][:, None]


def _smooth(normal: NDArray[np.uint16], queries: NDArray[np.intp], own: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether normals (n,) agree with those of most diagonal neighbours; the rest come from a texture."""
    H, W = normal.shape[1:3]
    t, y, x = queries.T
    rough = np.zeros(len(queries), np.int64)
    for dy in (-1, 1):
        for dx in (-1, 1):
            inside = (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
            neighbour = _decode_normals(normal[t, (y + dy).clip(0, H - 1), (x + dx).clip(0, W - 1)])
            neighbour[~inside] = 0
            rough += ((neighbour - own) ** 2).sum(axis=1) > MAX_NORMAL_GAP**2
    return rough <= MAX_ROUGH


def _around(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    depth: NDArray[np.uint16],
    segmentations: NDArray[Any],
    segments: NDArray[np.int64],
) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Of the four pixels around points (n, T): the farthest stored depth, and whether one is of the segment."""
    T, H, W = depth.shape
    left, top = np.floor(x - 0.5), np.floor(y - 0.5)
    columns = [(left + step).clip(0, W - 1).astype(np.intp) for step in (0, 1)]
    rows = [(top + step).clip(0, H - 1).astype(np.intp) * W + np.arange(T) * (H * W) for step in (0, 1)]
    flat_depth, flat_segmentations = depth.reshape(-1), segmentations.reshape(-1)
    farthest = np.zeros(x.shape, np.uint16)
    same_segment = np.zeros(x.shape, bool)
    wanted = segments.astype(segmentations.dtype)[:, None]
    for row in rows:
        for column in columns:
            pixel = row + column
            np.maximum(farthest, flat_depth[pixel], out=farthest)
            same_segment |= flat_segmentations[pixel] == wanted
    return farthest, same_segment
