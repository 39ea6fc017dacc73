"""The benchmark command: parts against known operations and known times, the reference files, the refusals."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trackbench.composition import load_tracker
from trackbench.evaluation import bench
from trackbench.evaluation.bench import (
    BenchSettings,
    bench_table,
    comparison_table,
    header_lines,
    matmul_ceiling,
    measure_row,
    parts_table,
    read_reference,
    read_settings,
    run_bench,
)
from trackbench.evaluation.bench_common import settings_help
from trackbench.evaluation.parts import REST, Breakdown, OperationClock, Part, WallClock, parts_of
from trackbench.evaluation.speed import counted_operations, flops_per_frame, moving_texture
from trackbench.heads.memory.head import MemoryHead
from trackbench.tracker import PointTracker

QUICK = BenchSettings(points=[3], frames=6, size=[64, 64], warmup=2, repeats=1, ceiling_size=64, isolate=False)
VIT = {"backbone": "chrono_vit_tiny"}  # linear layers, attention and adapters; with window 5 it lags by 4 frames


class Ticks:
    """A clock that is one second later at each reading."""

    def __init__(self) -> None:
        self.now = 0

    def read(self) -> int:
        self.now += 1
        return self.now

    def differences(self, readings: Sequence[int]) -> list[float]:
        return WallClock().differences(readings)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Inner()
        self.second = Inner()
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        if self.fails:
            raise RuntimeError("on purpose")
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = Outer()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        # readings: start, outer in, first in, first out, second in, second out, outer out, end
        (None, {"outer": 3, "first": 1, "second": 1, REST: 2}),
        ("later", {"outer": 1, "first": 1, "later": 2, "second": 1, REST: 2}),
    ],
)
def test_nested_calls_count_once(after: str | None, expected: dict[str, int]) -> None:
    table = [
        Part("outer", "outer"),
        Part("first", "outer.*st", kind=Inner, after=after),
        Part("second", "outer.second"),
        Part("absent", "elsewhere"),
    ]
    model = Model()
    breakdown = Breakdown(model, table, Ticks())
    with breakdown.attached():
        for _ in range(2):
            breakdown.record(lambda: model(torch.zeros(1)))
            assert breakdown.spent() == expected
        model(torch.zeros(1))  # not recorded
        assert breakdown.spent() == expected
        model.outer.fails = True
        with pytest.raises(RuntimeError, match="on purpose"):
            breakdown.record(lambda: model(torch.zeros(1)))
        assert sum(breakdown.spent().values()) == 7
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_method_that_stood_there_before_comes_back() -> None:
    model = Model()
    forward = model.outer.first.forward
    model.outer.first.forward = forward  # type: ignore[method-assign]
    with Breakdown(model, [Part("first", "outer.first")], Ticks()).attached():
        assert model.outer.first.forward is not forward
    assert model.outer.first.forward is forward


CASES = [
    ("trackon_tiny", {}, "stream", {"backbone", "head: correlation", "head: query decoder", "head: re-ranking"}),
    ("trackon_chrono_tiny", VIT, "stream", {"backbone: linear layers", "head: memory write"}),
    ("chrono_tiny", VIT, "stream", {"backbone: attention", "backbone: adapters", "matching"}),
    ("chrono_tiny", {**VIT, "norm": "clip"}, "clip", {"backbone: attention", "backbone: adapters", "matching"}),
    ("lucas_kanade", {}, "stream", set()),
]


@pytest.mark.filterwarnings("ignore:the pretrained CNN weights")
@pytest.mark.parametrize(("model", "overrides", "mode", "some"), CASES)
def test_parts_add_up(model: str, overrides: dict[str, Any], mode: str, some: set[str]) -> None:
    row = measure_row(replace(QUICK, model=model, overrides=overrides), 3)
    parts, operations = row["parts_ms"], row["parts_gflops"]
    assert row["mode"] == mode
    assert sum(parts.values()) == pytest.approx(row["mean_ms"], rel=1e-9)
    assert sum(operations.values()) == pytest.approx(row["gflops_per_frame"], rel=1e-9)
    assert list(parts) == list(operations)
    assert list(parts)[-1] == REST
    assert some <= parts.keys()
    # query features are made at the first frame only, which a stream does not count
    idle = {"head: query features"}
    assert all(value > 0 for name, value in parts.items() if name not in idle)
    assert operations[REST] == 0
    assert 0 < row["latency_ms"] <= row["latency_p95_ms"]
    assert row["fps"] == pytest.approx(1000 / row["mean_ms"])
    assert row["peak_total_mib"] is None or row["peak_total_mib"] > 50
    assert row["cpu_ms"] > 0


@pytest.mark.filterwarnings("ignore:.*no checkpoint given")
def test_operations_of_the_parts_match_the_modules_formulas() -> None:
    settings = replace(QUICK, model="chrono_tiny", overrides={**VIT, "norm": "clip"})
    row = measure_row(settings, 3)
    tokens, dim, depth = 8 * 8 + 1, 48, 3
    linear = depth * tokens * 2 * (dim * 3 * dim + dim * dim + 2 * 4 * dim * dim)
    attention = depth * 2 * 2 * tokens**2 * dim
    assert row["parts_gflops"]["backbone: linear layers"] == pytest.approx(linear / 1e9)
    assert row["parts_gflops"]["backbone: attention"] == pytest.approx(attention / 1e9)
    # the whole, as counted without any part
    tracker = load_tracker("chrono_tiny", **settings.overrides)
    video = moving_texture(6, 64, 64, torch.Generator().manual_seed(0))
    assert row["gflops_per_frame"] == pytest.approx(flops_per_frame(tracker, video, torch.full((3, 2), 9.0)) / 1e9)


@pytest.mark.filterwarnings("ignore:.*no checkpoint given", "ignore:the pretrained CNN weights")
def test_the_part_that_runs_gets_the_operations() -> None:
    """Each line of the memory head's table, by a product of known size inside the module that it names."""
    tracker = load_tracker("trackon_tiny")
    head = tracker.head
    assert isinstance(head, MemoryHead)
    modules = {
        "head: query decoder": head.query_decoder.query_to_query[0],
        "head: re-ranking": head.rerank_module.sample_query_fusion,
        "head: offset and visibility": head.visibility_head,
        "head: memory write": head.sm_query_updater.augment_layer,
        "head: query updater": head.sm_query_updater.query_residual,
        "head: tokens and pyramid": head.feature_decoder.linear4,
        "backbone": tracker.backbone,
    }
    plain = _operations(tracker)
    projections = 2 * (2 * 2 * head.dim**2)  # of two points, once for each correlation
    assert plain["head: correlation"] > projections
    a = torch.zeros(100, 100)
    for label, module in modules.items():
        hook = module.register_forward_pre_hook(lambda *_: (a @ a, None)[1])
        more = _operations(tracker)
        hook.remove()
        assert {name: more[name] - plain[name] for name in plain if more[name] != plain[name]}.keys() == {label}


def _operations(tracker: PointTracker) -> dict[str, float]:
    stream = tracker.stream()
    stream.add(torch.full((2, 2), 9.0))
    video = moving_texture(2, 64, 64, torch.Generator().manual_seed(0))
    stream.step(video[0])
    with counted_operations() as counter:
        breakdown = Breakdown(tracker, parts_of(tracker), OperationClock(counter))
        with breakdown.attached():
            breakdown.record(lambda: stream.step(video[1]))
        return breakdown.spent()


@pytest.mark.filterwarnings("ignore:.*no checkpoint given", "ignore:the pretrained CNN weights")
def test_tracks_do_not_change_while_measured() -> None:
    tracker = load_tracker("trackon_tiny")
    video = moving_texture(3, 64, 64, torch.Generator().manual_seed(0))
    queries = torch.tensor([[0.0, 20.0, 30.0]])
    expected = tracker.track(video, queries)
    breakdown = Breakdown(tracker, parts_of(tracker), WallClock())
    with breakdown.attached():
        measured = breakdown.record(lambda: tracker.track(video, queries))
    assert torch.equal(measured.xy, expected.xy)


@pytest.mark.filterwarnings("ignore:the pretrained CNN weights")
def test_half_precision(tmp_path: Path) -> None:
    result = run_bench(replace(QUICK, model="trackon_tiny", precision="bf16", operations=False))
    assert result["ceiling"]["dtype"] == "bfloat16"
    row = result["rows"][0]
    assert row["gflops_per_frame"] is row["ceiling_share"] is row["parts_gflops"] is None
    assert parts_table(row, result["ceiling"])[0]["GFLOP/frame"] == "-"


def test_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    ceiling = matmul_ceiling(size=32, repeats=4)
    assert 0 < ceiling["gflops_median"] <= ceiling["gflops_best"]
    assert (ceiling["size"], ceiling["dtype"], ceiling["repeats"]) == (32, "float32", 4)
    monkeypatch.setattr(bench, "device_clock", lambda device: Ticks())
    assert matmul_ceiling(size=10)["gflops_best"] == pytest.approx(2 * 10**3 / 1e9)


def test_result_is_written_and_read(tmp_path: Path) -> None:
    settings = replace(QUICK, model="static", points=[1, 4], output=str(tmp_path / "deep" / "r.json"))
    lines: list[str] = []
    result = run_bench(settings, lines.append)
    assert [row["num_points"] for row in result["rows"]] == [1, 4]
    assert len(lines) == 3
    stored = json.loads(Path(str(settings.output)).read_text())
    assert stored == result
    assert stored["environment"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match=r"r\.json exists; overwrite=true"):
        run_bench(settings)
    table = run_bench(replace(settings, output=str(tmp_path / "r.csv")))
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["ms rest"]) for row in rows] == pytest.approx(
        [r["mean_ms"] for r in table["rows"]], rel=1e-5
    )
    assert any("ceiling" in line for line in header_lines(stored))


def test_rows_of_their_own_process() -> None:
    result = run_bench(replace(QUICK, model="static", isolate=True, threads=1, operations=False))
    assert result["rows"][0]["latency_ms"] > 0


def _die(*_: object) -> None:
    import os

    os._exit(9)


def test_a_process_that_dies_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_measure_alone", _die)
    with pytest.raises(ChildProcessError, match="static with 3 points died"):
        run_bench(replace(QUICK, model="static", isolate=True))


def test_threads_come_back() -> None:
    before = torch.get_num_threads()
    result = run_bench(replace(QUICK, model="static", threads=before + 1))
    assert result["environment"]["threads"] == before + 1
    assert torch.get_num_threads() == before


class Compiled(nn.Module):
    """Says what it was asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.tracker = load_tracker("static")
        self.stream, self.track = self.tracker.stream, self.tracker.track

    def compile(self, mode: str = "none") -> None:  # type: ignore[override]
        self.calls.append(mode)


def test_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Compiled()
    monkeypatch.setattr(bench, "load_tracker", lambda *_, **__: tracker)
    assert measure_row(replace(QUICK, model="static", compile=True), 1)["compiled"]
    assert measure_row(replace(QUICK, model="static", compile="max-autotune"), 1)["compiled"]
    assert tracker.calls == ["none", "max-autotune"]
    monkeypatch.delattr(Compiled, "compile")  # what every module has is not enough
    with pytest.raises(ValueError, match="Compiled cannot be compiled"):
        measure_row(replace(QUICK, model="static", compile=True), 1)


@pytest.mark.filterwarnings("ignore:.*no checkpoint given", "ignore:the pretrained CNN weights")
@pytest.mark.parametrize("name", ["trackon_tiny", "chrono_tiny"])
def test_compiled_trackers_are_split_from_outside(name: str) -> None:
    tracker = load_tracker(name)
    breakdown = Breakdown(tracker, parts_of(tracker, compiled=True), WallClock())
    with breakdown.attached():
        assert not any("forward" in vars(module) for module in tracker.modules())
        video = moving_texture(2, 64, 64, torch.Generator().manual_seed(0))
        breakdown.record(lambda: tracker.track(video, torch.tensor([[0.0, 9.0, 9.0]])))
    spent = breakdown.spent()
    assert spent.keys() == {"backbone", "head", REST}
    assert min(spent.values()) > 0


def test_settings_have_the_syntax_of_hydra() -> None:
    arguments = [
        "model=trackon_tiny",
        "points=[1,2]",
        "overrides={memory_size:[4,6]}",
        "threads=null",
        "size=[64,96]",
    ]
    settings = read_settings([*arguments, "overrides.head.num_candidates=4", "precision=bf16", "isolate=false"])
    assert settings.points == [1, 2]
    assert settings.size == [64, 96]
    assert settings.overrides == {"memory_size": [4, 6], "head.num_candidates": 4}
    assert (settings.threads, settings.precision, settings.isolate) == (None, "bf16", False)
    assert read_settings([]) == BenchSettings()
    for name in vars(settings):
        assert f"  {name}=" in settings_help(BenchSettings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frame=3"], "unknown key 'frame': did you mean frames?"),
        (["gpu=1"], "unknown key 'gpu': the keys are model"),
        (["points=4"], "points=4"),
        (["points=[]"], "expected numbers of at least 1"),
        (["points=[0]"], "expected numbers of at least 1"),
        (["points"], "expected KEY=VALUE"),
        (["+points=[1]"], "expected one KEY=VALUE"),
        (["frames=8,16"], "expected one KEY=VALUE"),
        (["frames=many"], "frames=many"),
        (["frames=4", "warmup=4"], "times nothing"),
        (["size=[64]"], r"expected \[height,width\]"),
        (["threads=0"], "threads=0: expected at least 1"),
        (["precision=fp8"], "precision=fp8: expected one of fp32, bf16, fp16"),
        (["precision=fp16"], "fp16 needs a CUDA device"),
        (["compile=fast"], "compile=fast: expected true, false or one of default, reduce-overhead"),
        (["device=tpu"], "device=tpu: expected cpu, cuda"),
        (["device=cuda:99"], "device=cuda:99: torch .* finds"),
        (["model=nonesuch"], "unknown model 'nonesuch'"),
        (["overrides={nonesuch:1}"], "no setting 'nonesuch'"),
        (["overrides=a:1"], "quote it"),
        (["checkpoint=absent.pt"], "absent.pt: no such file"),
        (["output=rows.txt"], "ends in .json or .csv"),
    ],
)
def test_bad_settings(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(arguments)


def test_reference_adds_columns(tmp_path: Path) -> None:
    path = tmp_path / "original.json"
    content = {
        "machine": {"cpu": "some processor"},
        "note": "by hand",
        "N3": {"median_s_per_frame": 2.0, "median_cpu_s_per_frame": 4.0, "peak_rss_mib": 900},
    }
    path.write_text(json.dumps(content))
    result = run_bench(replace(QUICK, model="static", points=[3, 5], reference=str(path)))
    known, unknown = result["rows"]
    assert known["ratio"] == pytest.approx(2.0 / (known["latency_ms"] / 1000))
    assert known["cpu_ratio"] == pytest.approx(4.0 / (known["cpu_ms"] / 1000))
    assert known["original_peak_mib"] == 900
    assert unknown["ratio"] is unknown["original_s_per_frame"] is unknown["original_peak_mib"] is None
    assert [line["original"] for line in comparison_table(result)] == ["2.000", "-"]
    assert "some processor; by hand" in header_lines(result)[-1]
    assert bench_table(result)[0]["points"] == "3"


def test_reference_files_of_the_originals(trackon_fixtures: Path, chrono_fixtures: Path) -> None:
    trackon = read_reference(trackon_fixtures / "official_cpu_speed.json")
    assert trackon.rows.keys() == {64, 256}
    assert trackon.rows[64] == {"s_per_frame": 1.65, "cpu_s_per_frame": 3.29, "peak_mib": 906}
    assert "EPYC" in str(trackon.machine)
    chrono = read_reference(chrono_fixtures / "official_cpu_speed.json")
    assert chrono.rows.keys() == {64}
    assert chrono.rows[64]["cpu_s_per_frame"] == 8.61
    assert chrono.rows[64]["peak_mib"] == pytest.approx(1136e6 / 2**20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", 'expected "N<points>" objects'),
        ('{"N3": {"speed": 1}}', 'expected "N<points>" objects'),
        ('{"N3": {"median_s_per_frame": "fast"}}', "N3 median_s_per_frame must be a positive number"),
        ('{"case": "N=3", "peak_rss_mb": -1}', "N3 peak_rss_mb must be a positive number"),
    ],
)
def test_broken_references(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "original.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"original\.json.*" + message):
        read_reference(path)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:the pretrained CNN weights")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_cuda(precision: str) -> None:
    settings = replace(QUICK, model="trackon_tiny", device="cuda", precision=precision, ceiling_size=512)
    result = run_bench(settings)
    row = result["rows"][0]
    assert result["ceiling"]["gflops_median"] > 0
    assert sum(row["parts_ms"].values()) == pytest.approx(row["mean_ms"], rel=1e-9)
    assert min(row["parts_ms"].values()) >= 0
    assert row["memory_kind"] == "cuda allocator"
    assert row["cpu_ms"] is None
