"""The benchmark of training data: stages against known readings, real loaders on small data, the refusals."""

from __future__ import annotations

import csv
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import pytest
import torch
from folder_fakes import write_sequences
from torch.utils.data import DataLoader

from tests.evaluation.test_bench import Ticks
from trackbench.cli import main
from trackbench.composition import configs_dir
from trackbench.evaluation.bench_common import in_own_process
from trackbench.evaluation.bench_data import (
    STAGES,
    DataBenchSettings,
    endless,
    header_lines,
    is_meant,
    measure_loading,
    measure_stages,
    processor_seconds,
    read_settings,
    run_bench,
    tables,
    train_loader,
)
from trackbench.evaluation.memory import MIB, peak_memory_of_all, proportional_bytes
from trackbench.evaluation.parts import REST, Breakdown, Function

MAKE = Path(__file__).resolve().parents[2] / "experiments" / "data_speed" / "make_miniature.py"
QUICK = {"samples": 6, "repeats": 2, "warmup": 1, "isolate": False}
SYNTHETIC = [f"data.{setting}" for setting in ("num_frames=4", "height=32", "width=40", "num_points=5")]
KUBRIC_STAGES = {"read", "decode", "tracks", "augmentation: crop", "augmentation: colours"}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training scenes of 24 frames of 32 x 32, from the script that makes them for measurements."""
    folder = tmp_path_factory.mktemp("miniature")
    made = subprocess.run(
        [sys.executable, str(MAKE), str(folder), "--scenes", "2", "--side", "32"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr
    assert "2 scenes" in made.stdout
    return folder


def panning(folder: Path, **settings: Any) -> DataBenchSettings:
    overrides = [f"data.path={folder}", "data.height=32", "data.width=32", "data.num_points=7"]
    return DataBenchSettings(data="panning_movi_e", overrides=overrides, **{**QUICK, **settings})


def synthetic(**settings: Any) -> DataBenchSettings:
    return DataBenchSettings(data="synthetic", overrides=SYNTHETIC, **{**QUICK, **settings})


# --- stages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.path)
def test_what_the_stages_name_is_there(stage: Function) -> None:
    ((owner, name),) = stage.calls(None)
    assert callable(getattr(owner, name))


def test_a_name_that_is_gone_is_said() -> None:
    with pytest.raises(AttributeError, match="nonesuch"):
        Function("read", "trackbench.data.clip:nonesuch").calls(None)
    with pytest.raises(ImportError, match="nonesuch"):
        Function("read", "trackbench.data.nonesuch:Clip").calls(None)


class Reader:
    def read(self) -> str:
        return fake.decode("content")  # type: ignore[no-any-return]

    @staticmethod
    def collate(values: list[str]) -> str:
        return "+".join(values)

    @contextmanager
    def opened(self) -> Iterator[str]:
        self.collate([])
        yield "open"


fake = SimpleNamespace(decode=str.upper, Reader=Reader)


def test_functions_methods_and_contexts_count_once_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fake_data", fake)  # type: ignore[arg-type]
    before = dict(vars(Reader)), dict(vars(fake))
    table = [
        Function("read", "fake_data:Reader.read"),
        Function("decode", "fake_data:decode"),
        Function("collate", "fake_data:Reader.collate"),
        Function("open", "fake_data:Reader.opened"),
    ]

    def work() -> str:
        reader = fake.Reader()
        with reader.opened() as state:
            assert state == "open"
            return reader.collate([reader.read(), Reader.collate(["a", "b"])])  # type: ignore[no-any-return]

    breakdown, inner = Breakdown(None, table, Ticks()), Breakdown(None, table, Ticks())
    with breakdown.attached():
        assert work() == "CONTENT+a+b"  # not recorded
        assert breakdown.record(work) == "CONTENT+a+b"
        assert breakdown.spent() == {"read": 2, "decode": 1, "collate": 3, "open": 3, REST: 6}
        with inner.attached():  # two clocks at once
            assert breakdown.record(lambda: inner.record(work)) == "CONTENT+a+b"
        assert breakdown.spent() == inner.spent()
    assert (dict(vars(Reader)), dict(vars(fake))) == before


@pytest.mark.parametrize("batch_size", [1, 2])
def test_stages_add_up_and_the_data_stays_the_same(miniature: Path, batch_size: int) -> None:
    settings = panning(miniature)
    settings.overrides.append(f"data.batch_size={batch_size}")
    expected = next(iter(train_loader(settings, 0)))
    before = torch.get_num_threads(), cv2.getNumThreads()
    stages = measure_stages(settings)
    assert (torch.get_num_threads(), cv2.getNumThreads()) == before
    again = next(iter(train_loader(settings, 0)))
    assert torch.equal(expected.video, again.video)
    assert torch.equal(expected.xy, again.xy)

    assert (stages["samples"], stages["batch_size"]) == (6, batch_size)
    assert (stages["num_frames"], stages["height"], stages["width"], stages["num_points"]) == (24, 32, 32, 7)
    assert stages["ms"].keys() == stages["cpu_ms"].keys() == KUBRIC_STAGES | {"batching", "transfer", REST}
    assert list(stages["ms"])[-1] == REST
    assert min(stages["ms"].values()) > 0
    assert sum(stages["ms"].values()) == pytest.approx(stages["total_ms"])
    assert sum(stages["cpu_ms"].values()) == pytest.approx(stages["total_cpu_ms"])


def test_stages_of_other_data(tmp_path: Path, miniature: Path) -> None:
    made = {"scene", "render", "tracks", "batching", "transfer", REST}
    assert measure_stages(synthetic())["ms"].keys() == made
    write_sequences(tmp_path / "movi_f", 3)
    sizes = ["data.num_frames=4", "data.height=24", "data.width=24", "data.num_points=5"]
    for path, own in ((tmp_path / "movi_f", {"read", "decode"}), (miniature, {"read", "decode", "tracks"})):
        settings = DataBenchSettings(data="movi_f", overrides=[f"data.path={path}", *sizes], **QUICK)
        augmented = {f"augmentation: {name}" for name in ("boxes", "colours", "crop", "rest")}
        expected = own | augmented | {"batching", "transfer", REST}
        assert measure_stages(settings)["ms"].keys() - {"augmentation: blur"} == expected


# --- loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_from_a_miniature(miniature: Path, workers: int) -> None:
    row = measure_loading(panning(miniature), workers)
    assert (row["data"], row["workers"], row["batch_size"], row["samples"]) == ("panning_movi_e", workers, 1, 6)
    assert 0 < row["samples_per_second_min"] <= row["samples_per_second"] <= row["samples_per_second_max"]
    assert row["cpu_s_per_sample"] is None or row["cpu_s_per_sample"] > 0
    assert row["peak_memory_mib"] is None or row["peak_memory_mib"] > 50
    assert not multiprocessing.active_children()


def test_samples_are_whole_batches() -> None:
    settings = synthetic(samples=5)
    settings.overrides = [*SYNTHETIC, "data.batch_size=2"]
    assert measure_loading(settings, 0)["samples"] == 6
    assert measure_stages(settings)["samples"] == 6


def test_a_loader_that_ends_starts_again() -> None:
    batches = endless(DataLoader([1, 2], batch_size=None))  # type: ignore[arg-type]
    assert [next(batches) for _ in range(5)] == [1, 2, 1, 2, 1]
    with pytest.raises(ValueError, match="no batch"):
        next(endless(DataLoader([], batch_size=None)))


def _hold(connection: Connection, size: int) -> None:
    held = bytearray(b"\1" * size)
    connection.send(len(held))
    connection.recv()


@pytest.mark.skipif(proportional_bytes() is None, reason="the system does not tell")
def test_memory_and_processor_time_of_children_count() -> None:
    ours, theirs = multiprocessing.Pipe()
    size = 64 * MIB
    with peak_memory_of_all() as alone:
        pass
    child = multiprocessing.get_context("fork").Process(target=_hold, args=(theirs, size))
    child.start()
    with peak_memory_of_all() as both:
        assert ours.recv() == size
    time = processor_seconds()
    ours.send("done")
    child.join()
    assert both.kind == "proportional set"
    assert both.total is not None
    assert alone.total is not None
    assert both.total - alone.total > size
    assert time is not None
    assert time > 0


# --- the command ---------------------------------------------------------------------------------------------


def test_result_is_written_and_shown(miniature: Path, tmp_path: Path) -> None:
    settings = panning(miniature, workers=[0, 1], samples=2, output=str(tmp_path / "deep" / "r.json"))
    said: list[str] = []
    result = run_bench(settings, said.append)
    assert len(said) == 3
    stored = json.loads(Path(str(settings.output)).read_text())
    assert stored == result
    assert stored["data"]["num_points"] == 7
    assert stored["settings"]["overrides"] == settings.overrides
    assert stored["environment"]["torch"] == torch.__version__
    assert "24 frames of 32 x 32, 7 points, batches of 1" in header_lines(stored)[1]
    (_, loading), (_, stages) = tables(stored)
    assert [line["workers"] for line in loading] == ["0", "1"]
    assert stages[-1]["stage"] == "total"
    assert stages[-1]["of time"] == "100.0%"
    with pytest.raises(ValueError, match=r"r\.json exists; overwrite=true"):
        run_bench(settings)
    run_bench(replace(settings, workers=[0], output=str(tmp_path / "r.csv")))
    with (tmp_path / "r.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["data"] == "panning_movi_e"
    assert float(row["samples_per_second"]) > 0


def _measured(settings: DataBenchSettings) -> tuple[str, dict[str, Any]]:
    return multiprocessing.get_start_method(), measure_loading(settings, 1)


def test_a_row_from_a_process_of_its_own() -> None:
    method, row = in_own_process("synthetic", _measured, synthetic())
    assert method == multiprocessing.get_start_method()  # its loader starts processes as in training
    assert row["samples_per_second"] > 0


def test_command_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["data=synthetic", "workers=[1]", "samples=2", "repeats=1", "warmup=1", "isolate=false"]
    assert main(["bench", *settings, *SYNTHETIC]) == 0
    printed = capsys.readouterr()
    assert "measuring synthetic with 1 workers" in printed.err
    assert "synthetic: 4 frames of 32 x 40, 5 points" in printed.out
    assert "| workers | samples/s |" in printed.out
    assert "| rest | " in printed.out


def test_help_explains_both_benches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "  points=[1,64,256] " in printed
    assert "  workers=[0,1,2,4] " in printed
    assert "overrides=[]" not in printed


def test_missing_data_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "data=panning_movi_e", f"data.path={tmp_path / 'nowhere'}"]) == 1
    printed = capsys.readouterr()
    assert "nowhere" in printed.err.strip().splitlines()[-1]
    assert printed.out == ""


def test_benches_are_told_apart_by_their_keys() -> None:
    for arguments in (["data=movi_f"], ["workers=[1]"], ["repeats=1", "+data.motion=0"], ["samples=4"]):
        assert is_meant(arguments)
    for arguments in ([], ["model=static"], ["repeats=1", "output=data.json"]):
        assert not is_meant(arguments)


def test_settings_have_the_syntax_of_training() -> None:
    settings = read_settings(["workers=[2]", "samples=8", "data.num_points=3", "+data.motion=0"])
    assert (settings.data, settings.workers, settings.samples) == ("synthetic", [2], 8)
    assert settings.overrides == ["data.num_points=3", "+data.motion=0"]
    config = settings.config()
    assert (config.num_points, config.motion, config.seed) == (3, 0, 1234)
    assert read_settings([]) == DataBenchSettings()


@pytest.mark.parametrize("name", sorted(path.stem for path in (configs_dir() / "data").glob("*.yaml")))
def test_every_config_can_be_measured(name: str, tmp_path: Path) -> None:
    settings = DataBenchSettings(data=name, overrides=[f"data.path={tmp_path}"] if name != "synthetic" else [])
    assert settings.config()._target_.startswith("trackbench.data.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=nonesuch"], "unknown data 'nonesuch'; expected one of .*panning_movi_e"),
        (["data=panning_movi_e"], r"data=panning_movi_e needs data\.path=\.\.\."),
        (["data.nonesuch=1"], r"data=synthetic: Could not override 'data\.nonesuch'"),
        (["data.num_workers=3"], r"data\.num_workers: workers="),
        (["data=synthetic", "model=static"], "unknown key 'model': the keys are data, workers"),
        (["worker=[1]", "samples=3"], "unknown key 'worker': did you mean workers?"),
        (["data=synthetic", "overrides=[data.seed=3]"], "expected KEY=VALUE|unknown key 'overrides'"),
        (["workers=[]"], "expected numbers of at least 0"),
        (["workers=[-1]"], "expected numbers of at least 0"),
        (["workers=2"], "workers=2"),
        (["samples=0"], "samples=0: expected at least 1"),
        (["samples=many"], "samples=many"),
        (["workers=[1]", "repeats=0"], "repeats=0: expected at least 1"),
        (["workers=[1]", "warmup=-1"], "warmup=-1: expected at least 0"),
        (["+samples=3"], "expected one KEY=VALUE"),
        (["~data.seed"], "expected one KEY=VALUE"),
        (["data.seed=1,2"], "expected one KEY=VALUE"),
        (["data=synthetic", "output=rows.txt"], "ends in .json or .csv"),
    ],
)
def test_bad_settings(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(arguments)


def test_what_the_data_module_refuses_is_said() -> None:
    settings = synthetic()
    settings.overrides = ["data.num_points=0"]
    with pytest.raises(ValueError, match=r"data=synthetic: num_points must be at least 1"):
        run_bench(settings)
