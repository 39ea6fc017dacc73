"""``eval.py`` from config to files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from omegaconf import DictConfig

from trackbench.composition import compose_config
from trackbench.data.prepare.kinetics import prepare_kinetics
from trackbench.evaluation.main import evaluate_models


def settings(folder: Path, *overrides: str) -> DictConfig:
    config = compose_config("eval", ["models=[lucas_kanade,static]", *overrides])
    config.output_dir = str(folder)
    return config


SMALL = ["benchmark.dataset.length=2", "benchmark.dataset.num_frames=5", "benchmark.dataset.num_points=8"]


def test_models_on_synthetic_clips(tmp_path: Path) -> None:
    score = evaluate_models(settings(tmp_path, *SMALL, "task=both", "speed.points=[4]", "speed.num_frames=5"))
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    by_model = {row["model"]: row for row in summary["results"]}
    assert set(by_model) == {"lucas_kanade", "static"}
    assert score == pytest.approx(by_model["lucas_kanade"]["average_jaccard"])
    assert {row["num_videos"] for row in by_model.values()} == {2}
    assert {row["model"] for row in summary["speed"]} == {"lucas_kanade", "static"}
    table = (tmp_path / "results" / "table.md").read_text()
    assert "| lucas_kanade |" in table
    page = (tmp_path / "report.html").read_text()
    assert "data:video/mp4;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        assert any("lucas_kanade" in key for key in next(csv.DictReader(file)))


def test_rows_that_are_there_are_not_run_again(tmp_path: Path) -> None:
    quick = [*SMALL, "report=false"]
    evaluate_models(settings(tmp_path, *quick, "limit=1"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").glob("*/*.csv")}
    evaluate_models(settings(tmp_path, *quick, "limit=1"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "results").glob("*/*.csv")} == before
    evaluate_models(settings(tmp_path, *quick))
    rows = [row for path in before for row in csv.DictReader(path.open())]
    assert len(rows) == 4


def test_annotated_real_clips(realdata: Path, tmp_path: Path) -> None:
    overrides = ["benchmark=tapvid_files", f"benchmark.path={realdata / 'annotated'}", "report=false"]
    evaluate_models(settings(tmp_path, *overrides, "models=[static]"))
    (path,) = (tmp_path / "results").glob("tapvid_files/*.csv")
    rows = {row["video"]: float(row["average_pts_within_thresh"]) for row in csv.DictReader(path.open())}
    expected = {"camel": 0.138, "horsejump-high": 0.038, "cmu_house": 0.239, "kitchen": 0.310}
    assert rows == pytest.approx(expected, abs=2e-3)


def test_published_files_in_both_query_modes(data_fixtures: Path, tmp_path: Path) -> None:
    for name, where in (("davis", "tapvid_davis/tapvid_davis.pkl"), ("kinetics", "tapvid_kinetics")):
        overrides = [f"benchmark=tapvid_{name}", f"benchmark.path={data_fixtures / 'tapvid' / where}"]
        for mode in ("first", "strided"):
            config = settings(tmp_path, *overrides, f"query_mode={mode}", "report=false", "limit=1")
            assert evaluate_models(config) is not None
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert {(row["benchmark"], row["query_mode"]) for row in summary["results"]} == {
        (f"tapvid_{name}", mode) for name in ("davis", "kinetics") for mode in ("first", "strided")
    }


def test_results_on_a_part_of_kinetics_say_how_many_videos_were_there(
    data_fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = data_fixtures / "tapvid" / "kinetics_raw"
    data, output = tmp_path / "data", tmp_path / "results"
    overrides = ["benchmark=tapvid_kinetics", f"benchmark.path={data}", "models=[static]", "overlays=0"]
    for shifted in (False, True):
        prepare_kinetics(raw / "tapvid_kinetics.csv", raw / "videos", data, half_pixel_shift=shifted)
        capsys.readouterr()
        evaluate_models(settings(output, *overrides))
        assert "mean over 2 of 3 videos" in capsys.readouterr().out
        (summary,) = json.loads((output / "results" / "summary.json").read_text())["results"]
        assert summary["num_videos"] == 2
        assert summary["benchmark_videos"] == 3
        assert summary["half_pixel_shift"] == ("yes" if shifted else "no")
        for file in ("results/table.md", "report.html"):
            text = (output / file).read_text()
            assert "2 of 3" in text
            assert ("half-pixel shift" in text) == shifted


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task must be one of"):
        evaluate_models(settings(tmp_path, "task=fast"))
    with pytest.raises(ValueError, match="unknown model 'nonesuch'"):
        evaluate_models(settings(tmp_path, "models=[nonesuch]"))
    with pytest.raises(ValueError, match="no models"):
        evaluate_models(settings(tmp_path, "models=[]"))
