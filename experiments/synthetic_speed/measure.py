"""How fast synthetic clips are made, and how hard they are: one line of numbers per setting."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from trackbench.data.loading import single_thread
from trackbench.data.synthetic import SyntheticDataset
from trackbench.structures import VideoBatch

THRESHOLDS = (1, 2, 4, 8, 16)  # pixels at 256 x 256


def difficulty(clip: VideoBatch) -> tuple[float, float, float, float]:
    """Shares of entries hidden and out of frame, px/frame at 256 x 256, delta_avg of standing still."""
    height, width = clip.video.shape[-2:]
    to_256 = torch.tensor([256 / width, 256 / height])
    xy, visible = clip.xy[0] * to_256, clip.visible[0]
    outside = ((xy < 0) | (xy >= 256)).any(-1)
    motion = xy.diff(dim=1).norm(dim=-1)
    after = visible & (torch.arange(xy.shape[1]) > clip.queries[0, :, :1])
    error = (xy - (clip.queries[0, :, 1:] * to_256)[:, None]).norm(dim=-1)[after]
    within = torch.stack([(error < threshold).float().mean() for threshold in THRESHOLDS])
    return (
        float((~visible).float().mean()),
        float(outside.float().mean()),
        float(motion.mean()),
        float(within.mean()),
    )


def main() -> None:
    """Measure with the settings of the command line, on one thread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), metavar=("H", "W"))
    parser.add_argument("--points", type=int, default=256)
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--split", default="train")
    parser.add_argument("--query-time", default="random")
    options = parser.parse_args()
    single_thread()
    dataset = SyntheticDataset(
        num_frames=options.frames,
        height=options.size[0],
        width=options.size[1],
        num_points=options.points,
        split=options.split,
        query_time=options.query_time,
    )
    for index in range(10):  # decode the photographs first: a worker does so once
        dataset[10**6 + index]
    start = time.process_time()  # one thread: other programs on the machine do not count
    clips = [dataset[index] for index in range(options.clips)]
    rate = options.clips / (time.process_time() - start)
    hidden, outside, motion, static = torch.tensor([difficulty(clip) for clip in clips]).nanmean(0).tolist()
    sys.stdout.write(
        f"{rate:.1f} clips/s per core, {hidden:.1%} of entries hidden ({outside:.1%} out of frame), "
        f"{motion:.2f} px/frame, delta_avg of standing still {static:.3f}\n"
    )


if __name__ == "__main__":
    main()
