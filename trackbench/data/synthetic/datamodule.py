"""Synthetic clips for Lightning: endless training data and a fixed validation split."""

from __future__ import annotations

from functools import partial

from trackbench.data.datamodule import ClipDataModule
from trackbench.data.synthetic.dataset import QueryTime, SyntheticDataset


class SyntheticDataModule(ClipDataModule):
    """Endless synthetic training clips; validation and test on a fixed, finite split.

    Validation clips depend on ``val_seed`` and not on ``seed``: runs that differ in their seed are compared
    on the same clips. Their queries are at the first frame in which a point is visible (query mode
    ``first``).

    Args:
        num_frames: T of training clips.
        height: H, pixels.
        width: W, pixels.
        num_points: N per training clip.
        batch_size: training clips per batch and rank.
        num_workers: loading processes, for training and for validation.
        seed: of the training clips.
        query_time: ``"first"``, ``"random"`` or ``"start"``; see :class:`SyntheticDataset`, as for the next
            ones.
        objects: least and most number of objects per clip.
        photos: use scikit-image's photographs besides procedural textures.
        motion: speed relative to the default.
        object_share: share of the points that lie on objects.
        blur: share of clips with a slight lens blur.
        noise: share of clips with sensor noise.
        val_videos: number of validation clips.
        val_num_frames: T of validation clips; None: ``num_frames``.
        val_num_points: N per validation clip.
        val_batch_size: validation clips per batch.
        val_seed: of the validation clips.
    """

    def __init__(
        self,
        num_frames: int = 24,
        height: int = 256,
        width: int = 256,
        num_points: int = 256,
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        query_time: QueryTime = "random",
        objects: tuple[int, int] = (3, 8),
        photos: bool = True,
        motion: float = 1.0,
        object_share: float = 0.5,
        blur: float = 0.3,
        noise: float = 0.5,
        val_videos: int = 16,
        val_num_frames: int | None = None,
        val_num_points: int = 64,
        val_batch_size: int = 1,
        val_seed: int = 0,
    ) -> None:
        super().__init__()
        make_clips = partial(
            SyntheticDataset,
            height=height,
            width=width,
            objects=objects,
            photos=photos,
            motion=motion,
            object_share=object_share,
            blur=blur,
            noise=noise,
        )
        self.train_clips = make_clips(
            num_frames=num_frames, num_points=num_points, seed=seed, split="train", query_time=query_time
        )
        self.val_clips = make_clips(
            num_frames=num_frames if val_num_frames is None else val_num_frames,
            num_points=val_num_points,
            seed=val_seed,
            length=val_videos,
            split="val",
            query_time="first",
        )
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.seed = seed
