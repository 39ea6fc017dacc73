"""The results store: what is written is read back, resuming, crashes, tables."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from evaluation_fakes import Constant
from rich.console import Console

from trackbench.baselines import LucasKanade
from trackbench.evaluation import results
from trackbench.evaluation.results import (
    ResultsStore,
    describe_environment,
    fingerprint,
    headline_rows,
    markdown_table,
    read_rows,
    rich_table,
    write_atomically,
)
from trackbench.evaluation.runner import Row
from trackbench.metrics import METRICS


def row(video: str, value: float, **changes: object) -> Row:
    return {
        "model": "m",
        "benchmark": "b",
        "video": video,
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


def test_rows_survive_to_the_last_digit(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    rows = [row('a, "b"\n<c>', 1 / 3), row("z", math.pi / 4, delta_v="0.8")]
    for one in rows:
        store.add(one)
    again = ResultsStore(tmp_path).rows
    assert again == [{**rows[0], "delta_v": None}, rows[1]]
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["m-abc-first.csv"]


def test_resuming_knows_what_was_run(tmp_path: Path) -> None:
    ResultsStore(tmp_path).add(row("a", 0.5))
    store = ResultsStore(tmp_path, resume=True)
    assert store.has("m", "abc", "b", "a", "first")
    assert not store.has("m", "abc", "b", "other", "first")
    assert not store.has("m", "other", "b", "a", "first")
    assert not store.has("m", "abc", "b", "a", "strided")
    assert not ResultsStore(tmp_path, resume=False).has("m", "abc", "b", "a", "first")


def test_a_part_of_a_benchmark_says_so(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    about = {"benchmark_videos": 1189, "half_pixel_shift": "no"}
    store.add(row("a", 0.5, **about))
    store.add(row("a", 0.5, benchmark="whole"))
    again = ResultsStore(tmp_path)
    part, whole = again.summary()
    assert {**part, **about} == part
    assert not about.keys() & whole.keys()
    assert [line["videos"] for line in headline_rows([part, whole])] == ["1 of 1189", "1"]
    assert [line["benchmark"] for line in headline_rows([part, whole])] == ["b (first)", "whole (first)"]
    (shifted,) = headline_rows([{**part, "half_pixel_shift": "yes"}])
    assert shifted["benchmark"] == "b (first, half-pixel shift)"


def test_rows_on_other_data_are_run_again_and_not_averaged(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    before = {"benchmark_videos": 3, "half_pixel_shift": "no"}
    after = {"benchmark_videos": 3, "half_pixel_shift": "yes"}
    for one in (row("a", 0.5, **before), row("b", 0.5, **before), row("a", 0.5, model="other", **before)):
        store.add(one)
    again = ResultsStore(tmp_path)
    assert again.has("m", "abc", "b", "a", "first", before)
    assert not again.has("m", "abc", "b", "a", "first", after)
    assert not again.has("m", "abc", "b", "a", "first")
    again.add(row("a", 0.25, **after))
    rows = ResultsStore(tmp_path).rows
    assert [(r["model"], r["video"], r["half_pixel_shift"]) for r in rows] == [
        ("m", "a", "yes"),
        ("other", "a", "no"),
    ]


def test_without_resume_old_rows_of_the_model_go(tmp_path: Path) -> None:
    first = ResultsStore(tmp_path)
    for one in (row("a", 0.5), row("b", 0.5), row("a", 0.5, model="other")):
        first.add(one)
    store = ResultsStore(tmp_path, resume=False)
    store.add(row("a", 0.75))
    store.add(row("c", 0.25))
    assert [(r["model"], r["video"]) for r in ResultsStore(tmp_path).rows] == [
        ("m", "a"),
        ("m", "c"),
        ("other", "a"),
    ]


def test_stores_that_write_at_once_do_not_lose_each_others_rows(tmp_path: Path) -> None:
    one, two = ResultsStore(tmp_path), ResultsStore(tmp_path)
    one.add(row("a", 0.1, model="one"))
    two.add(row("a", 0.2, model="two"))
    one.add(row("b", 0.3, model="one"))
    assert [(r["model"], r["video"]) for r in ResultsStore(tmp_path).rows] == [
        ("one", "a"),
        ("one", "b"),
        ("two", "a"),
    ]


def test_names_never_leave_the_folder(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "results")
    store.add(row("a", 0.5, model="../../evil", benchmark="../up", checkpoint="/etc"))
    files = [p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()]
    assert [str(f) for f in files] == ["results/up/evil-etc-first.csv"]
    assert ResultsStore(tmp_path / "results").rows[0]["model"] == "../../evil"


def test_a_crash_while_writing_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def broken(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "not a results file"),
        ("model,checkpoint,benchmark,video,query_mode,num_points\n" * 2, "line 2"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"broken.csv.*{message}"):
        read_rows(path)


def test_a_row_without_its_key_is_refused(tmp_path: Path) -> None:
    incomplete = row("a", 0.5)
    del incomplete["checkpoint"]
    with pytest.raises(ValueError, match=r"lacks \['checkpoint'\]"):
        ResultsStore(tmp_path).add(incomplete)


def test_summary_is_the_plain_mean_over_videos(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    store.add(row("a", 0.2, num_frames=100))
    store.add(row("b", 0.8, average_jaccard=math.nan))
    store.add(row("c", 0.5))
    path = store.write_summary(
        environment=describe_environment("cpu", ["eval.py", "model=a b"]), config={"seed": 1}
    )
    summary = json.loads(path.read_text())
    (only,) = summary["results"]
    assert only["average_pts_within_thresh"] == pytest.approx(0.5)
    assert only["average_jaccard"] == pytest.approx(0.35)
    assert only["num_videos"] == 3
    assert only["fps"] == pytest.approx(120 / 1.5)
    assert summary["config"] == {"seed": 1}
    assert summary["environment"]["command"] == "eval.py 'model=a b'"
    assert summary["environment"]["torch"] == torch.__version__


def test_nan_becomes_null_in_json(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    store.add(row("a", math.nan))
    summary = json.loads(store.write_summary(environment={}).read_text())
    assert summary["results"][0]["average_jaccard"] is None


def test_fingerprint_depends_on_weights_and_settings_only() -> None:
    torch.manual_seed(1)
    one = torch.nn.Linear(3, 2)
    same = torch.nn.Linear(3, 2)
    same.load_state_dict(one.state_dict())
    other = torch.nn.Linear(3, 2)
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one, {"memory": 12}) != fingerprint(one, {"memory": 24})
    assert fingerprint(LucasKanade()) == fingerprint(LucasKanade())
    assert fingerprint(LucasKanade()) != fingerprint(LucasKanade(window=15))
    assert fingerprint(Constant(0)) != fingerprint(Constant(1))


def test_fingerprint_takes_every_kind_of_tensor() -> None:
    module = torch.nn.Module()
    module.register_buffer("half_buffer", torch.ones(3, dtype=torch.bfloat16))
    module.register_buffer("flag_buffer", torch.tensor(True))
    module.register_buffer("empty_buffer", torch.empty(0, 4))
    before = fingerprint(module)
    module.get_buffer("half_buffer")[0] = 2
    assert fingerprint(module) != before


def test_tables_hold_the_numbers() -> None:
    summaries = results.summarise([row("a", 0.5), row("a", 0.25, model="x|[bold]y")])
    speed = [
        {
            "model": "m",
            "num_points": n,
            "latency_ms": ms,
            "fps": 1000 / ms,
            "peak_memory_mib": 12.0,
            "parameters": 1.5e6,
        }
        for n, ms in ((256, 20.0), (64, 10.0))
    ]
    rows = headline_rows(summaries, speed)
    assert rows[0] == {
        "benchmark": "b (first)",
        "model": "m",
        "AJ": "50.0",
        "delta_avg": "50.0",
        "OA": "50.0",
        "videos": "1",
        "frames/s": "50.0",
        "ms @ points": "20.0 @ 256",
        "peak MiB": "12",
        "params M": "1.50",
    }
    assert rows[1]["peak MiB"] == "-"
    text = markdown_table(rows)
    assert "| b (first) | m | 50.0 |" in text
    assert "x\\|[bold]y" in text
    assert "| --- | --- | ---: |" in text
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(rich_table(rows, title="[results]"))
    shown = console.export_text()
    assert "x|[bold]y" in shown
    assert "[results]" in shown
