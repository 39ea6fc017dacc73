"""The report: self-contained, escaped, with the right numbers and clips that are videos."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trackbench.data.video_io import read_video
from trackbench.evaluation.report import Clip, write_report
from trackbench.evaluation.runner import Row
from trackbench.metrics import METRICS

EVIL = "</script><script>alert(1)</script><img src=http://evil.example/x>$a_1$"


def results(model: str, values: list[float], **changes: Any) -> list[Row]:
    return [
        {
            "model": model,
            "benchmark": "davis",
            "video": f"clip {index}",
            "query_mode": "first",
            "checkpoint": "abc",
            **dict.fromkeys(METRICS, value),
            "num_points": 5,
            "num_frames": 10,
            "height": 64,
            "width": 96,
            "seconds": 0.5,
            **changes,
        }
        for index, value in enumerate(values)
    ]


def cost(model: str, points: int = 64, **changes: Any) -> Row:
    return {
        "model": model,
        "device": "cpu",
        "num_points": points,
        "num_frames": 8,
        "height": 256,
        "width": 256,
        "mode": "stream",
        "lag_frames": 0,
        "latency_ms": 12.0,
        "latency_p95_ms": 15.0,
        "fps": 80.0,
        "peak_memory_mib": 10.0,
        "peak_total_mib": 400.0,
        "memory_kind": "resident set",
        "parameters": 2_500_000,
        "trainable_parameters": 0,
        "gflops_per_frame": 1.25,
        **changes,
    }


class Page(HTMLParser):
    """Tags, what they load, and the text of table cells."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data

    def videos(self) -> list[bytes]:
        prefix = "data:video/mp4;base64,"
        return [base64.b64decode(s.removeprefix(prefix)) for s in self.sources if s.startswith(prefix)]


def test_nothing_is_loaded_from_outside_and_all_text_is_escaped(tmp_path: Path) -> None:
    rows = results("good", [0.5, 0.7]) + results(EVIL, [0.6, 0.8], video=EVIL, benchmark=EVIL)
    clip = Clip(EVIL, {EVIL: np.zeros((3, 20, 30, 3), np.uint8)})
    path = write_report(
        tmp_path / "report.html",
        rows,
        speed=[cost(EVIL), cost("good")],
        environment={"command": EVIL, "cpu": EVIL, EVIL: EVIL, "date": "today"},
        config={EVIL: EVIL},
        clips=[clip],
        title=EVIL,
    )
    page = Page(path)
    assert page.open == []
    assert page.tags.count("script") == 1
    assert all(source.startswith("data:") for source in page.sources)
    assert not re.search(r"url\(|@import", page.source)
    assert "alert(1)</script>" not in page.source
    assert "default-src 'none'" in page.source
    assert any(EVIL in cell for cell in page.cells)
    for source in page.sources:
        if source.startswith("data:image/svg+xml;base64,"):
            assert b"<script" not in base64.b64decode(source.split(",")[1])


def test_headline_numbers_and_differences(tmp_path: Path) -> None:
    base = list(np.linspace(0.2, 0.8, 12))
    rows = results("base", base) + results("better", [value + 0.05 for value in base])
    page = Page(write_report(tmp_path / "report.html", rows, speed=[cost("base", 1), cost("base", 256)]))
    text = " | ".join(page.cells)
    assert "50.0[" in text
    assert "55.0[" in text
    assert "+5.0[+5.0, +5.0] better" in text
    assert "12 ms256 points" in text
    assert "2.50 M" in text
    assert "1.25" in text
    assert "in common the intervals" not in page.source
    worse = Page(write_report(tmp_path / "other.html", rows[-3:] + rows[:12], reference="better"))
    assert "worse" in " | ".join(worse.cells)
    assert "With only 3 videos in common" in worse.source


def test_two_checkpoints_of_a_model_are_two_models(tmp_path: Path) -> None:
    rows = results("m", [0.5, 0.6], checkpoint="one") + results("m", [0.7, 0.8], checkpoint="two")
    cells = Page(write_report(tmp_path / "report.html", rows)).cells
    assert "m (one)" in cells
    assert "m (two)" in cells


def test_values_that_are_missing_become_dashes(tmp_path: Path) -> None:
    rows = results("m", [0.5, math.nan]) + results("n", [math.nan, math.nan])
    speed = [cost("m", peak_memory_mib=None, peak_total_mib=None, gflops_per_frame=None)]
    page = Page(write_report(tmp_path / "report.html", rows, speed=speed))
    assert "nan" not in page.source.split("<script>")[0].split("base64")[0]
    assert "\N{EN DASH}" in page.cells


def test_clips_are_small_videos(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 200 * 500 * 3).reshape(200, 500, 3).astype(np.uint8)
    clip = Clip("jump", {"truth": np.stack([ramp] * 120), "model": np.stack([255 - ramp] * 4)})
    page = Page(write_report(tmp_path / "report.html", results("m", [0.5]), clips=[clip]))
    shapes = []
    for index, content in enumerate(page.videos()):
        file = tmp_path / f"{index}.mp4"
        file.write_bytes(content)
        shapes.append(read_video(file).shape)
    assert shapes == [(96, 128, 320, 3), (4, 128, 320, 3)]


def test_the_same_results_give_the_same_report(tmp_path: Path) -> None:
    rows = results("m", [0.5, 0.6]) + results("n", [0.4, 0.7])
    one, two = (write_report(tmp_path / name, rows, speed=[cost("m")]) for name in ("one.html", "two.html"))
    assert one.read_bytes() == two.read_bytes()


def test_a_report_needs_results_and_a_known_reference(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        write_report(tmp_path / "report.html", [])
    with pytest.raises(ValueError, match=r"one of \['m'\], got 'x'"):
        write_report(tmp_path / "report.html", results("m", [0.5]), reference="x")
