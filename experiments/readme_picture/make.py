"""The picture in the README: ``python experiments/readme_picture/make.py`` after ``make demo``."""

from pathlib import Path

import cv2
import numpy as np

import trackbench
from trackbench.data.synthetic import SyntheticDataset
from trackbench.demo import checkpoint_of
from trackbench.visualization import contact_sheet, ground_truth, overlay

FRAMES = (0, 5, 10, 15)
RUNS = Path("outputs/demo/train")


def main() -> None:
    """Four frames of one validation clip: the truth, two trained trackers and Lucas-Kanade."""
    batch = SyntheticDataset(split="val", num_points=40, query_time="start")[1]
    video = batch.video[0].permute(0, 2, 3, 1).numpy()
    drawn = {"ground truth": ground_truth(batch)}
    for name in ("chrono_tiny", "trackon_tiny"):
        drawn[name] = trackbench.load_tracker(name, checkpoint_of(RUNS / name)).track(video, batch.queries[0])
    drawn["lucas_kanade"] = trackbench.load_tracker("lucas_kanade").track(video, batch.queries[0])
    rows = []
    for name, tracks in drawn.items():
        frames = [overlay(video, tracks)[t] for t in FRAMES]
        cv2.rectangle(frames[0], (0, 230), (14 + 11 * len(name), 256), (0, 0, 0), cv2.FILLED)
        cv2.putText(frames[0], name, (6, 248), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 255), 1, cv2.LINE_AA)
        rows += frames
    sheet = contact_sheet(np.stack(rows), len(FRAMES))
    Path("docs").mkdir(exist_ok=True)
    cv2.imwrite("docs/demo.jpg", sheet[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])


if __name__ == "__main__":
    main()
