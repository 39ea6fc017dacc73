"""Annotations come in with checks, and go over to other episodes with a confidence that means something."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from review_fakes import Folder
from rich.console import Console

from trackbench.baselines import LucasKanade, Static
from trackbench.cli import main
from trackbench.robotics.annotate import confirm, import_annotations, propose, states, transfer
from trackbench.robotics.keypoints import LOW_CONFIDENCE, Keypoints, read_annotation, read_origin, write_annotation

H, W = 240, 320


def labelme_file(path: Path, keypoints: Keypoints, height: int = H) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_annotation(path, keypoints, image="cam0.png", height=height, width=W)
    return path


def picture(folder: Folder, episode: str, camera: int) -> np.ndarray:
    return np.array(Image.open(folder.workspace.file(episode, camera, "image")))


def truth(folder: Folder, episode: str, camera: int) -> Keypoints:
    known = folder.truth(episode)
    return Keypoints(known.names, known.xy[camera, :, 0])


def annotation(folder: Folder, episode: str, camera: int) -> Keypoints:
    return read_annotation(folder.workspace.file(episode, camera, "annotation"), H, W)


def collected(outcomes: Any) -> dict[str, Any]:
    return {outcome.item: outcome for outcome in outcomes}


def proposed(folder: Folder, **settings: Any) -> dict[str, Any]:
    return collected(propose(folder.workspace, "episode_0", console=Console(quiet=True), **settings))


def test_states(folder: Folder) -> None:
    found = {(state.episode, state.camera): state for state in states(folder.workspace)}
    assert [found[f"episode_{n}", 1].state for n in range(4)] == ["annotated", "annotated", "proposed", "missing"]
    assert found["episode_2", 0].confidence == pytest.approx(0.3)
    assert found["episode_0", 0].confidence is None
    folder.workspace.file("episode_3", 0, "annotation").write_text("{")
    (state,) = [state for state in states(folder.workspace, ["episode_3"]) if state.state == "damaged"]
    assert "not JSON" in state.problem


def test_files_of_labelme_come_into_their_places(folder: Folder, tmp_path: Path) -> None:
    points = truth(folder, "episode_3", 0)
    turned = points.in_order_of(points.names[::-1])
    labelme_file(tmp_path / "in" / "episode_3" / "cam0.json", turned)
    labelme_file(tmp_path / "in" / "episode_3_cam1.json", truth(folder, "episode_3", 1))
    outcomes = collected(import_annotations(tmp_path / "in", folder.workspace))
    assert [outcome.result for outcome in outcomes.values()] == [("episode_3", 0), ("episode_3", 1)]
    found = annotation(folder, "episode_3", 0)
    assert found.names == points.names  # in the order of the other episodes
    np.testing.assert_array_equal(found.xy, points.xy)
    content = json.loads(folder.workspace.file("episode_3", 0, "annotation").read_bytes())
    assert content["imagePath"] == "cam0.png"


def test_files_that_do_not_fit_are_told_and_the_others_come_in(folder: Folder, tmp_path: Path) -> None:
    points, top = truth(folder, "episode_3", 0), tmp_path / "in"
    labelme_file(top / "episode_3" / "cam1.json", truth(folder, "episode_3", 1))
    labelme_file(top / "episode_3" / "cam0.json", Keypoints(("a", *points.names[1:]), points.xy))
    labelme_file(top / "episode_2" / "cam0.json", points, height=480)
    labelme_file(top / "episode_9_cam0.json", points)
    labelme_file(top / "episode_0" / "cam0.json", Keypoints(points.names, points.xy + 1))
    (top / "episode_1_cam0.json").write_text("[]")
    before = annotation(folder, "episode_0", 0)
    told = {item: outcome.error for item, outcome in collected(import_annotations(top, folder.workspace)).items()}
    assert told["episode_3/cam1.json"] is None
    assert "misses gripper and adds a, beside the keypoints of episode_0" in told["episode_3/cam0.json"]
    assert "imageHeight is 480" in told["episode_2/cam0.json"]
    assert "belongs to no extracted episode" in told["episode_9_cam0.json"]
    assert "another annotation is there; --overwrite" in told["episode_0/cam0.json"]
    assert "not a labelme file" in told["episode_1_cam0.json"]
    assert annotation(folder, "episode_0", 0).digest == before.digest


def test_replaced_annotations_are_kept(folder: Folder, tmp_path: Path) -> None:
    moved = Keypoints(truth(folder, "episode_0", 0).names, truth(folder, "episode_0", 0).xy + 1)
    labelme_file(tmp_path / "in" / "episode_0_cam0.json", moved)
    old = folder.workspace.file("episode_0", 0, "annotation").read_bytes()
    (outcome,) = import_annotations(tmp_path / "in", folder.workspace, keep=True)
    assert outcome.error is None
    assert folder.workspace.file("episode_0", 0, "annotation").read_bytes() == old
    (outcome,) = import_annotations(tmp_path / "in", folder.workspace, overwrite=True)
    assert outcome.error is None
    assert annotation(folder, "episode_0", 0).digest == moved.digest
    (kept,) = folder.workspace.history("episode_0").glob("cam0.*.json")
    assert kept.read_bytes() == old


def test_files_that_labelme_saved_in_place_are_taken_as_they_are(folder: Folder) -> None:
    outcomes = collected(import_annotations(folder.workspace.root / "episodes", folder.workspace))
    assert sorted(outcomes) == [f"episode_{n}/cam{camera}.json" for n in (0, 1) for camera in (0, 1)]
    assert all(outcome.error is None for outcome in outcomes.values())


def test_transferred_keypoints_are_right_where_they_are_sure(folder: Folder) -> None:
    """All pairs of episodes: arm, cup and box stand elsewhere, up to 40 px away and turned."""
    errors, sure = [], []
    for one, other in itertools.permutations(folder.workspace.episodes(), 2):
        for camera in (0, 1):
            points = truth(folder, one, camera)
            pictures = picture(folder, one, camera), picture(folder, other, camera)
            found = transfer(pictures[0], points, pictures[1], LucasKanade())
            assert found.names == points.names
            errors.append(np.linalg.norm(found.xy - truth(folder, other, camera).xy, axis=1))
            sure.append(found.confidence)
    right, confident = np.array(errors) < 2, np.array(sure) >= LOW_CONFIDENCE
    assert np.median(errors) < 0.1
    assert right.mean() > 0.9
    assert right[confident].mean() > 0.98
    assert confident.mean() > 0.8


def test_a_point_that_is_not_there_is_unsure(folder: Folder) -> None:
    points, blank = truth(folder, "episode_0", 0), np.full((H, W, 3), 90, np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (H, W, 3), np.uint8)
    for other in (blank, noise):
        found = transfer(picture(folder, "episode_0", 0), points, other, Static())
        assert (found.confidence < LOW_CONFIDENCE).all()
        assert ((found.xy >= 0) & (found.xy <= (W, H))).all()


def test_proposals_are_made_once_and_only_where_nothing_is(folder: Folder) -> None:
    folder.workspace.file("episode_2", 0, "proposal").unlink()
    outcomes = proposed(folder)
    assert outcomes["episode_1"].result == {}
    assert list(outcomes["episode_3"].result) == [0, 1]
    assert "a proposal from something else is there" in outcomes["episode_2"].error
    path = folder.workspace.file("episode_3", 1, "proposal")
    found = read_annotation(path, H, W)
    assert float(found.confidence.min()) == outcomes["episode_3"].result[1]
    assert np.median(np.linalg.norm(found.xy - truth(folder, "episode_3", 1).xy, axis=1)) < 1
    assert read_origin(path)["template"] == "episode_0"
    flags = [shape["flags"]["low_confidence"] for shape in json.loads(path.read_bytes())["shapes"]]
    assert flags == (found.confidence < LOW_CONFIDENCE).tolist()

    written = path.read_bytes(), path.stat().st_mtime_ns
    again = proposed(folder, overwrite=False, episodes=["episode_3"])
    assert again["episode_3"].result == {}
    assert (path.read_bytes(), path.stat().st_mtime_ns) == written
    assert proposed(folder, overwrite=True)["episode_2"].error is None


@pytest.mark.parametrize("episode", ["episode_3", "episode_2"])
def test_a_template_must_be_annotated(folder: Folder, episode: str) -> None:
    with pytest.raises(ValueError, match=f"{episode} is not annotated"):
        list(propose(folder.workspace, episode))


def test_confirming_moves_a_proposal(folder: Folder) -> None:
    path = folder.workspace.file("episode_2", 0, "proposal")
    points = read_annotation(path, H, W)
    outcomes = collected(confirm(folder.workspace, min_confidence=0.5))
    assert list(outcomes) == ["episode_2"]
    assert "cam0 has a point of confidence 0.30, below 0.5" in outcomes["episode_2"].error
    assert path.is_file()
    (outcome,) = confirm(folder.workspace, ["episode_2"])
    assert outcome.result == [0, 1]
    assert not path.exists()
    assert annotation(folder, "episode_2", 0).digest == points.digest
    (outcome,) = confirm(folder.workspace, ["episode_3"])
    assert "there is no proposal" in outcome.error


def test_a_proposal_does_not_replace_an_annotation_unasked(folder: Folder) -> None:
    labelme_file(folder.workspace.file("episode_2", 0, "annotation"), truth(folder, "episode_2", 0))
    (outcome,) = confirm(folder.workspace, ["episode_2"])
    assert "another annotation is there" in outcome.error
    (outcome,) = confirm(folder.workspace, ["episode_2"], overwrite=True)
    assert outcome.result[0] == 0


def test_the_command(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(folder.workspace.root)
    assert main(["h5", "annotate", root, "--list"]) == 0
    told = capsys.readouterr().out
    assert "episode_2 cam1: proposed: gripper, elbow, cup, box, table, lowest confidence 0.30" in told
    assert "4 annotated, 2 proposed, 2 missing" in told
    assert main(["h5", "annotate", root, "--template", "episode_1", "--overwrite"]) == 0
    assert "3 episodes have proposals or annotations" in capsys.readouterr().err
    assert main(["h5", "annotate", root, "--confirm-all", "--min-confidence", "1"]) == 1
    assert "0 episodes confirmed, 2 failed" in capsys.readouterr().err
    assert main(["h5", "annotate", root, "--confirm", "episode_3"]) == 0
    labelme_file(tmp_path / "in" / "episode_2_cam0.json", truth(folder, "episode_2", 0))
    assert main(["h5", "annotate", root, "--import", str(tmp_path / "in")]) == 0
    assert main(["h5", "annotate", root, "--import", str(tmp_path / "nowhere")]) == 1
    assert main(["h5", "annotate", str(tmp_path), "--list"]) == 1
    assert "no extracted episodes" in capsys.readouterr().err
