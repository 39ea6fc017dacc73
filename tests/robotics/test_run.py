"""The whole chain by one config: what configs may say, where it stops, and how it goes on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import pytest
import yaml

from trackbench.cli import main
from trackbench.composition import configs_dir
from trackbench.robotics.keypoints import Keypoints, write_annotation
from trackbench.robotics.miniature import MiniatureSettings, make_episodes, read_truth
from trackbench.robotics.review import decide
from trackbench.robotics.run import STAGES, RunConfig, StageResult, read_config, run
from trackbench.robotics.workspace import Workspace

SETTINGS = MiniatureSettings(steps=12, height=120, width=160)


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("episodes")
    make_episodes(folder, 3, SETTINGS)
    return folder


def config(episodes: Path, work: Path, **stages: dict[str, Any]) -> RunConfig:
    made = RunConfig(source=str(episodes), work=str(work), workers=1)
    for stage, options in stages.items():
        for key, value in options.items():
            setattr(getattr(made, stage), key, value)
    return made


def annotate(episodes: Path, work: Path, number: int = 0) -> None:
    """The truth as the annotation of an episode."""
    workspace, episode = Workspace(work), f"episode_{number}"
    truth = read_truth(episodes / "truth" / f"{episode}.npz")
    for camera in range(SETTINGS.cameras):
        path = workspace.file(episode, camera, "annotation")
        keypoints = Keypoints(truth.names, truth.xy[camera, :, 0])
        write_annotation(path, keypoints, image="cam0.png", height=SETTINGS.height, width=SETTINGS.width)


def counts(results: list[StageResult]) -> dict[str, tuple[int, int, int, int]]:
    return {r.stage: (r.done, r.there, r.waiting, len(r.failed)) for r in results}


def test_the_chain_goes_as_far_as_it_can_and_then_on(episodes: Path, tmp_path: Path) -> None:
    work = tmp_path / "out"
    nothing = (0, 0, 0, 0)
    results = run(config(episodes, work))
    assert counts(results) == dict.fromkeys(STAGES, nothing) | {
        "extract": (3, 0, 0, 0),
        "annotate": (0, 0, 3, 0),
        "track": (0, 0, 3, 0),
    }
    assert (
        f"keypoints missing in 3 episodes, to be confirmed in 0: `trackbench h5 serve {work}`" in results[1].advice
    )

    annotate(episodes, work)
    template = {"template": "episode_0"}
    results = run(config(episodes, work, annotate=template))
    assert counts(results)["annotate"] == (0, 1, 2, 0)
    assert "to be confirmed in 2" in results[1].advice
    assert counts(results)["track"] == (1, 0, 2, 0)
    assert counts(results)["review"] == (0, 0, 1, 0)
    assert f"1 episodes to look at: `trackbench h5 serve {work} --in {episodes}`" in results[3].advice

    settings: dict[str, Any] = {"annotate": {**template, "confirm_above": 0.0}, "export": {"formats": ["lerobot"]}}
    results = run(config(episodes, work, **settings))
    assert counts(results)["annotate"] == (2, 1, 0, 0)
    assert counts(results)["track"] == (2, 1, 0, 0)
    assert counts(results)["attach"] == nothing

    decide(Workspace(work), ["episode_0"], "reject", "blurred")
    results = run(config(episodes, work, **settings, review={"accept_above": 0.0}))
    assert counts(results)["review"] == (2, 1, 0, 0)
    assert counts(results)["attach"] == (2, 0, 0, 0)
    assert counts(results)["export"] == (2, 0, 0, 0)
    assert counts(results)["verify"] == (2, 0, 0, 0)
    with h5py.File(work / "attached/episode_1.h5") as file:
        reason = file["trackbench_keypoints"].attrs["decision_reason"]
    assert reason == "score of at least 0 (review.accept_above)"

    results = run(config(episodes, work, **settings, review={"accept_above": 0.0}))
    assert counts(results) == dict.fromkeys(STAGES, (0, 3, 0, 0)) | {
        "attach": (0, 2, 0, 0),
        "export": (0, 2, 0, 0),
        "verify": (2, 0, 0, 0),
    }


def test_labelme_files_are_imported(episodes: Path, tmp_path: Path) -> None:
    run(config(episodes, tmp_path / "a"))
    annotate(episodes, tmp_path / "a")
    for camera in range(SETTINGS.cameras):
        path = Workspace(tmp_path / "a").file("episode_0", camera, "annotation")
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / f"labels/episode_0_cam{camera}.json").write_bytes(path.read_bytes())
    (tmp_path / "labels/other_cam0.json").write_text("{}")
    results = run(config(episodes, tmp_path / "b", annotate={"labelme": str(tmp_path / "labels")}))
    assert counts(results)["annotate"] == (1, 0, 2, 1)
    assert "belongs to no extracted episode" in results[1].failed["other_cam0.json"]
    assert counts(results)["track"] == (1, 0, 2, 0)


def test_a_stage_that_cannot_begin_ends_the_chain(episodes: Path, tmp_path: Path) -> None:
    run(config(episodes, tmp_path / "out"))
    annotate(episodes, tmp_path / "out")
    results = run(config(episodes, tmp_path / "out", track={"model": "luca_kanade"}))
    assert [result.stage for result in results] == ["extract", "annotate", "track"]
    assert "unknown model 'luca_kanade'" in results[-1].failed[""]


def test_only_the_stages_that_are_asked_for_are_done(episodes: Path, tmp_path: Path) -> None:
    settings = config(episodes, tmp_path / "out")
    settings.stages = ["annotate", "extract"]
    assert [result.stage for result in run(settings)] == ["extract", "annotate"]


def test_the_command_prints_a_table_and_its_status_tells_failures(
    episodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["h5", "run", "--example"]) == 0
    path = tmp_path / "chain.v1.yaml"
    path.write_text(capsys.readouterr().out)
    arguments = ["h5", "run", str(path), f"source={episodes}", f"work={tmp_path / 'out'}", "workers=1"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "done", "there", "waiting", "failed"]
    assert [line.split()[0] for line in lines[1:]] == list(STAGES)
    assert lines[1].split() == ["extract", "3", "0", "0", "0"]

    broken = tmp_path / "in"
    broken.mkdir()
    (broken / "good.h5").write_bytes((episodes / "episode_0.h5").read_bytes())
    (broken / "bad.h5").write_bytes(b"no HDF5")
    arguments[3:5] = [f"source={broken}", f"work={tmp_path / 'other'}"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    problem = f"bad: {broken / 'bad.h5'}: not an HDF5 file"
    assert f"extract: {problem}" in captured.err.splitlines()
    assert captured.out.splitlines()[1].split(maxsplit=5) == ["extract", "1", "0", "0", "1", problem]


def test_the_example_holds_all_keys_with_their_defaults(tmp_path: Path) -> None:
    path = configs_dir() / "robotics/example.yaml"
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    defaults = asdict(RunConfig(source=given["source"], work=given["work"]))
    assert given == defaults
    assert asdict(read_config(path)) == defaults


def test_configs_use_hydras_syntax(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("work: ${source}_work\nreview: {accept_above: 0.5}\n")
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [base, _self_]\nsource: data\ntrack: {model: static}\n")
    read = read_config(path, ["export.formats=[lerobot,tapvid]", "export.keys={obs/qpos: observation.state}"])
    assert (read.work, read.review.accept_above, read.track.model) == ("data_work", 0.5, "static")
    assert read.export.formats == ["lerobot", "tapvid"]
    assert read.export.keys == {"obs/qpos": "observation.state"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extrct: {fps: 3}", "unknown key 'extrct': did you mean extract?"),
        ("extract: {fsp: 3}", "unknown key 'extract.fsp': did you mean fps?"),
        ("extract: {fps: fast}", "extract.fps: Value 'fast' of type 'str' could not be converted to Float"),
        ("extract: 3", "extract: "),
        ("workers: 1.5", "workers: Value '1.5' of type 'float' could not be converted to Integer"),
        ("stages: [extract, trakc]", "stages: 'trakc' is none of extract, annotate, track"),
        ("export: {formats: [rlds]}", "export.formats: 'rlds' is none of lerobot, tapvid"),
        ("export: {to: {tapvid: [1]}}", "export.to.tapvid: expected a text, got [1]"),
        ("review: {accept_above: 80}", "review.accept_above: expected a number in [0, 1], got 80"),
        ("annotate: {confirm_above: .nan}", "annotate.confirm_above: expected a number in [0, 1], got nan"),
        ('track: {model: "${nowhere}"}', "track.model: Interpolation key 'nowhere' not found"),
        ("track: {model: [", "while parsing a flow"),
        ("defaults: [nowhere, _self_]", "nowhere"),
    ],
)
def test_what_a_config_cannot_say_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"source: a\nwork: b\n{text}\n")
    with pytest.raises(ValueError, match=r"c\.yaml: ") as caught:
        read_config(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_keys_files_and_damaged_overrides_are_told(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(FileNotFoundError, match="no such config"):
        read_config(path)
    path.write_text("source: a\n")
    with pytest.raises(ValueError, match="work is missing"):
        read_config(path)
    assert read_config(path, ["work=b", "track.model=static"]).track.model == "static"
    for override in ("track", "track.model={", "work=a,b", "+nothing=3"):
        with pytest.raises(ValueError, match=r"c\.yaml: "):
            read_config(path, ["work=b", override])
