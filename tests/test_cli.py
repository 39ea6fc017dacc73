"""The command line on real files, and its refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from trackbench.cli import main, read_queries
from trackbench.data.video_io import VideoReader, read_video, write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of a textured square on grey that moves by 2 pixels a frame to the right."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    frames = np.full((10, 96, 128, 3), 128, np.uint8)
    for t in range(10):
        frames[t, 30:70, 20 + 2 * t : 60 + 2 * t] = texture
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, frames, fps=12)
    return path


def test_points_are_tracked_and_written(clip: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out.mp4"
    assert main(["track", str(clip), "--points", "40,50", "30.5,40.25", "-o", str(output)]) == 0
    with np.load(output.with_suffix(".npz"), allow_pickle=False) as data:
        xy, visible = data["xy"], data["visible"]
        assert data["queries"].tolist() == [[0, 40, 50], [0, 30.5, 40.25]]
    assert xy.shape == (2, 10, 2)
    assert visible.all()
    truth = np.array([[40.0, 50.0], [30.5, 40.25]])[:, None] + np.arange(10)[:, None] * [2, 0]
    assert np.abs(xy - truth).max() < 0.5
    with output.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert float(rows[13]["x"]) == pytest.approx(xy[1, 3, 0], abs=1e-3)
    overlay = read_video(output)
    assert overlay.shape == (10, 96, 128, 3)
    assert VideoReader(output).fps == pytest.approx(12)


def test_output_is_never_replaced_unasked(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["track", str(clip), "--grid", "2", "-o", str(tmp_path / "out.mp4"), "--max-frames", "3"]
    assert main(command) == 0
    assert main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--points", "1;2"], "expected X,Y"),
        (["--points", "500,2"], "outside the video"),
        (["--points", "nan,2"], "not finite"),
        (["--grid", "0"], "at least 1 point"),
        (["--grid", "2", "--start", "10"], "outside the video"),
        (["--grid", "2", "--model", "nonesuch"], "unknown model 'nonesuch'"),
        (["--grid", "2", "--checkpoint", "absent.ckpt"], "absent.ckpt"),
        (["--queries", "absent.csv"], "absent.csv"),
    ],
)
def test_bad_arguments_get_one_line(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["track", str(clip), *arguments, "-o", str(tmp_path / "out.mp4")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_video_without_frames_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    assert main(["track", str(empty), "--grid", "2", "-o", str(tmp_path / "out.mp4")]) == 1
    assert "empty.mp4" in capsys.readouterr().err


def test_queries_files(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("t,x,y\n0,1.5,2\n3,4,5\n")
    assert read_queries(path).tolist() == [[0, 1.5, 2], [3, 4, 5]]
    np.save(tmp_path / "q.npy", np.array([[0, 1.5, 2]]))
    assert read_queries(tmp_path / "q.npy").tolist() == [[0, 1.5, 2]]
    path.write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match=r"q\.csv.*missing \['t'\]"):
        read_queries(path)
    path.write_text("t,x,y\n0,1,2\n0,a,2\n")
    with pytest.raises(ValueError, match=r"q\.csv:3: expected three numbers"):
        read_queries(path)
    np.save(tmp_path / "q.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        read_queries(tmp_path / "q.npy")


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert "ViTAdapter x MemoryHead" in listed
    assert "LucasKanade" in listed


BENCH = ["bench", "points=[1,2]", "frames=4", "warmup=1", "size=[64,64]", "ceiling_size=64", "isolate=false"]


def test_bench_prints_tables_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, reference = tmp_path / "bench.json", tmp_path / "original.json"
    reference.write_text('{"machine": "a machine", "N2": {"median_s_per_frame": 1.5}}')
    files = [f"output={output}", f"reference={reference}"]
    assert main([*BENCH, "model=lucas_kanade", *files]) == 0
    printed = capsys.readouterr()
    assert "measuring lucas_kanade with 2 points" in printed.err
    assert "ceiling: " in printed.out
    assert "| lucas_kanade | 2 | stream |" in printed.out
    assert "| rest | " in printed.out
    assert "original: a machine" in printed.out
    assert [row["num_points"] for row in json.loads(output.read_text())["rows"]] == [1, 2]
    assert main([*BENCH, "model=lucas_kanade", *files]) == 1
    assert "overwrite=true" in capsys.readouterr().err


def test_bench_explains_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "KEY=VALUE" in printed
    assert "  points=[1,64,256] " in printed


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("point=[1]", "unknown key 'point': did you mean points?"),
        ("precision=fp8", "precision=fp8: expected one of fp32, bf16, fp16"),
        ("device=cuda:99", "device=cuda:99"),
        ("model=nonesuch", "unknown model 'nonesuch'"),
        ("reference=absent.json", "absent.json"),
        ("compile=true", "compiled"),
    ],
)
def test_bad_bench_settings_get_one_line(capsys: pytest.CaptureFixture[str], setting: str, message: str) -> None:
    assert main([*BENCH, "model=static", setting]) == 1
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("trackbench bench: ")
    assert message in last
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_real_video_is_tracked(realdata: Path, tmp_path: Path) -> None:
    video = realdata / "clips" / "motocross.mp4"
    output = tmp_path / "out.mp4"
    assert main(["track", str(video), "--grid", "4", "--max-frames", "5", "-o", str(output)]) == 0
    assert read_video(output).shape == (5, 384, 512, 3)
