"""The review server over real sockets: what it answers, what it refuses, and what then lies on the disk."""

from __future__ import annotations

import json
import random
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from review_fakes import OFFSET, SETTINGS, Answer, Folder, ask, send_bytes, serving

from trackbench.cli import main
from trackbench.files import sha256
from trackbench.robotics import guard
from trackbench.robotics.keypoints import read_annotation
from trackbench.robotics.review import tracks_sha256
from trackbench.robotics.server import listen, server_for
from trackbench.robotics.store import Decisions
from trackbench.robotics.track_file import read_tracks

K = 5
EPISODE = "episode_0"


@pytest.fixture(scope="module")
def place(made_folder: Folder) -> Iterator[str]:
    """A server whose folder no test changes."""
    with serving(made_folder) as address:
        yield address


def api(name: str, **values: Any) -> str:
    return f"/api/{name}?{urlencode(values)}"


def wait_for_job(place: str) -> dict[str, Any]:
    for _ in range(600):
        job = ask(place, "GET", "/api/job").json
        if job["state"] != "running":
            return job
        time.sleep(0.05)
    raise AssertionError("the job does not end")


def decision(folder: Folder, verdict: str = "accept", **changes: Any) -> dict[str, Any]:
    hashes = {str(camera): digest for camera, digest in tracks_sha256(folder.workspace, EPISODE).items()}
    return {"episode": EPISODE, "verdict": verdict, "tracks_sha256": hashes, **changes}


def test_the_list_starts_with_the_most_doubtful_and_knows_every_state(place: str, made_folder: Folder) -> None:
    rows = ask(place, "GET", "/api/episodes").json["episodes"]
    doubts = {
        episode: json.loads(made_folder.workspace.quality(episode).read_text())["doubt"]
        for episode in ("episode_0", "episode_1")
    }
    assert [row["episode"] for row in rows[:2]] == sorted(doubts, key=lambda name: -doubts[name])
    assert {row["episode"]: row["state"] for row in rows} == {
        "episode_0": "review",
        "episode_1": "review",
        "episode_2": "proposal",
        "episode_3": "unannotated",
    }
    assert {row["doubt"] for row in rows[2:]} == {None}


def test_tracks_and_their_curves_are_those_of_the_file(place: str, made_folder: Folder) -> None:
    answer = ask(place, "GET", api("tracks", episode=EPISODE, camera=1)).json
    path = made_folder.workspace.file(EPISODE, 1, "tracks")
    tracks = read_tracks(path)
    assert answer["tracks_sha256"] == sha256(path)
    assert [point["name"] for point in answer["points"]] == list(tracks.names)
    for k, point in enumerate(answer["points"]):
        np.testing.assert_allclose(np.stack([point["x"], point["y"]], axis=1), tracks.xy[k], atol=0.006)
        assert point["visible"] == tracks.visible[k].tolist()
        error = [np.nan if value is None else value for value in point["error"]]
        np.testing.assert_allclose(error, tracks.error[k], atol=0.006)
    assert not answer["outdated"]


def test_videos_are_served_in_ranges(place: str, made_folder: Folder) -> None:
    content = made_folder.workspace.file(EPISODE, 0, "video").read_bytes()
    path = api("file", episode=EPISODE, camera=0, kind="video")
    whole = ask(place, "GET", path)
    assert (whole.status, whole.body, whole.headers["content-type"]) == (200, content, "video/mp4")
    part = ask(place, "GET", path, headers={"range": "bytes=100-299"})
    assert (part.status, part.body) == (206, content[100:300])
    assert part.headers["content-range"] == f"bytes 100-299/{len(content)}"
    assert ask(place, "GET", path, headers={"range": f"bytes={len(content)}-"}).status == 416


@pytest.mark.parametrize("kind", ["tracks", "annotation", "../review.sqlite", "video/../..", ""])
def test_no_other_kind_of_file_is_served(place: str, kind: str) -> None:
    answer = ask(place, "GET", api("file", episode=EPISODE, camera=0, kind=kind))
    assert answer.status in (404, 422)
    assert "error" in answer.json


@pytest.mark.parametrize(
    "episode",
    [
        "nobody",
        "..",
        "../episodes/episode_0",
        "/etc",
        "episode_0/",
        "./episode_0",
        "episode_0/../episode_1",
        "x" * 900,
        "a\0b",
        "C:\\x",
        "episode_0/history",
        "\ud800",
        "e" * 5000,
    ],
)
def test_what_is_no_episode_is_not_found(place: str, episode: str) -> None:
    for name, more in (("episode", {}), ("tracks", {"camera": 0}), ("file", {"camera": 0, "kind": "video"})):
        query = "&".join(f"{key}={value}" for key, value in more.items())
        path = f"/api/{name}?episode={quote(episode, errors='surrogatepass')}&{query}"
        answer = ask(place, "GET", path)
        assert answer.status in (404, 422)
        assert len(answer.json["error"].splitlines()) == 1


def test_a_link_out_of_the_folder_is_not_followed(folder: Folder, tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"secret")
    video = folder.workspace.file(EPISODE, 0, "video")
    video.unlink()
    video.symlink_to(secret)
    (folder.workspace.root / "episodes" / "link").symlink_to(tmp_path)
    with serving(folder) as place:
        answer = ask(place, "GET", api("file", episode=EPISODE, camera=0, kind="video"))
        assert answer.status == 404
        assert ask(place, "GET", api("episode", episode="link")).status == 404


def test_the_page_and_its_files_come_with_strict_headers(place: str) -> None:
    page = ask(place, "GET", "/")
    assert page.status == 200
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    text = page.body.decode()
    names = {part.partition('"')[0] for part in text.split('"/assets/')[1:]}
    assert {"review.js", "review.css", "icon.svg"} <= names
    for name in [*names, "api.js", "stage.js", "curves.js", "list.js", "annotate.js", "strings.js"]:
        asset = ask(place, "GET", f"/assets/{name}")
        assert asset.status == 200
        assert b"://" not in asset.body.replace(b"http://www.w3.org/2000/svg", b""), f"{name} names another server"
    for name in ("..%2fserver.py", "server.py", "%2e%2e/desk.py", ""):
        assert ask(place, "GET", f"/assets/{name}").status == 404


def test_a_decision_is_stored_with_the_tracks_it_was_made_on_and_undone(folder: Folder) -> None:
    with serving(folder) as place:
        answer = ask(place, "POST", "/api/decide", decision(folder, "reject", reason=" 点漂移 "))
        assert answer.status == 200
        assert (answer.json["state"], answer.json["reason"]) == ("rejected", "点漂移")
        decisions = Decisions(folder.workspace.review)
        current = decisions.current(EPISODE)
        assert current is not None
        assert current.tracks_sha256 == tracks_sha256(folder.workspace, EPISODE)
        assert ask(place, "POST", "/api/decide", decision(folder)).json["state"] == "accepted"
        event = ask(place, "GET", api("episode", episode=EPISODE)).json["undoable"]
        assert ask(place, "POST", "/api/undo", {"event": event}).status == 200
        assert decisions.current(EPISODE) == current
        again = ask(place, "POST", "/api/undo", {"event": event})
        assert (again.status, again.json["code"]) == (409, "stale_event")
        assert [one.kind for one in decisions.history(EPISODE)] == ["decision", "decision", "undo"]


def test_a_decision_on_tracks_that_changed_is_refused_and_older_ones_are_stale(folder: Folder) -> None:
    with serving(folder) as place:
        seen = decision(folder)
        assert ask(place, "POST", "/api/decide", seen).status == 200
        path = folder.workspace.file(EPISODE, 0, "tracks")
        path.write_bytes(folder.workspace.file("episode_1", 0, "tracks").read_bytes())
        answer = ask(place, "POST", "/api/decide", seen)
        assert (answer.status, answer.json["code"]) == (409, "stale_tracks")
        view = ask(place, "GET", api("episode", episode=EPISODE)).json
        assert (view["state"], view["stale"]) == ("review", True)
        row = next(r for r in ask(place, "GET", "/api/episodes").json["episodes"] if r["episode"] == EPISODE)
        assert (row["state"], row["stale"]) == ("review", True)


def correction(folder: Folder, **changes: Any) -> dict[str, Any]:
    truth = folder.truth(EPISODE)
    x, y = truth.xy[0, 2, 10].tolist()
    digest = sha256(folder.workspace.file(EPISODE, 0, "tracks"))
    return {
        "episode": EPISODE,
        "camera": 0,
        "point": 2,
        "t": 10,
        "x": x,
        "y": y,
        "tracks_sha256": digest,
        **changes,
    }


def test_a_correction_moves_the_track_from_its_frame_on_and_can_be_undone(folder: Folder) -> None:
    path = folder.workspace.file(EPISODE, 0, "tracks")
    before, content = read_tracks(path), path.read_bytes()
    wish = correction(folder, x=100.5, y=60.25)
    with serving(folder) as place:
        assert ask(place, "POST", "/api/decide", decision(folder)).status == 200
        answer = ask(place, "POST", "/api/correct", wish)
        assert answer.status == 202
        assert wait_for_job(place)["state"] == "done"
        after = read_tracks(path)
        np.testing.assert_array_equal(after.xy[2, 10], [100.5, 60.25])
        np.testing.assert_array_equal(after.xy[2, :10], before.xy[2, :10])
        others = [0, 1, 3, 4]
        np.testing.assert_array_equal(after.xy[others], before.xy[others])
        view = ask(place, "GET", api("episode", episode=EPISODE)).json
        assert (view["state"], view["stale"]) == ("review", True)
        assert view["history"][-1]["content"]["name"] == after.names[2]
        tracks = ask(place, "GET", api("tracks", episode=EPISODE, camera=0)).json
        assert tracks["points"][2]["corrected"] == [10]
        late = ask(place, "POST", "/api/correct", wish)
        assert (late.status, late.json["code"]) == (409, "stale_tracks")

        job = ask(place, "POST", "/api/undo", {"event": view["undoable"]})
        assert job.json["what"] == "undo"
        assert wait_for_job(place)["state"] == "done"
        assert path.read_bytes() == content
        view = ask(place, "GET", api("episode", episode=EPISODE)).json
        assert (view["state"], view["stale"]) == ("accepted", False)


def test_corrections_that_make_no_sense_are_refused(folder: Folder) -> None:
    with serving(folder) as place:
        for changes in ({"point": K}, {"t": SETTINGS.steps}, {"x": -1.0}, {"y": 1e4}, {"camera": 2}):
            answer = ask(place, "POST", "/api/correct", correction(folder, **changes))
            assert 400 <= answer.status < 500, changes
        assert ask(place, "GET", "/api/job").json["state"] == "none"
    with serving(folder, corrections=False) as place:
        answer = ask(place, "POST", "/api/correct", correction(folder))
        assert (answer.status, answer.json["code"]) == (409, "no_source")
        assert "--in" in answer.json["error"]
    assert not folder.workspace.review.exists()


def test_a_correction_without_its_source_fails_in_one_line_and_changes_nothing(folder: Folder) -> None:
    content = folder.workspace.file(EPISODE, 0, "tracks").read_bytes()
    elsewhere = Folder(folder.workspace.root, folder.workspace)
    with serving(elsewhere) as place:
        wish = {**correction(folder)}
        assert ask(place, "POST", "/api/correct", wish).status == 202
        job = wait_for_job(place)
        assert job["state"] == "failed"
        assert "no such file" in job["message"]
    assert folder.workspace.file(EPISODE, 0, "tracks").read_bytes() == content
    assert Decisions(folder.workspace.review).history() == []


def annotation_wish(place: str, episode: str, camera: int, points: list[dict[str, Any]]) -> dict[str, Any]:
    seen = ask(place, "GET", api("annotation", episode=episode, camera=camera)).json["seen"]
    return {"episode": episode, "camera": camera, "points": points, "seen": seen}


def test_a_clicked_annotation_becomes_a_labelme_file_and_undo_takes_it_back(folder: Folder) -> None:
    points = [{"name": "夹爪", "x": 12.25, "y": 30.5}, {"name": "cup", "x": 100.0, "y": 200.0, "frame": 3}]
    with serving(folder) as place:
        wish = annotation_wish(place, "episode_3", 1, points)
        view = ask(place, "POST", "/api/annotate", wish).json
        assert view["kind"] == "annotation"
        path = folder.workspace.file("episode_3", 1, "annotation")
        keypoints = read_annotation(path, SETTINGS.height, SETTINGS.width, SETTINGS.steps)
        assert keypoints.names == ("夹爪", "cup")
        assert keypoints.xy.tolist() == [[12.25, 30.5], [100.0, 200.0]]
        assert keypoints.frame.tolist() == [0, 3]
        assert keypoints.confidence is None
        content = path.read_bytes()
        assert ask(place, "POST", "/api/annotate", wish).json["code"] == "stale_annotation"
        second = annotation_wish(place, "episode_3", 1, points[:1])
        assert ask(place, "POST", "/api/annotate", second).status == 200
        for expected in (content, None):
            event = ask(place, "GET", api("episode", episode="episode_3")).json["undoable"]
            assert ask(place, "POST", "/api/undo", {"event": event}).status == 200
            assert (path.read_bytes() if path.exists() else None) == expected
        assert len(list(folder.workspace.history("episode_3").iterdir())) == 2, "nothing is ever deleted"


def test_a_proposal_is_confirmed_as_edited_and_undo_makes_it_a_proposal_again(folder: Folder) -> None:
    proposal = folder.workspace.file("episode_2", 0, "proposal")
    content = proposal.read_bytes()
    with serving(folder) as place:
        view = ask(place, "GET", api("annotation", episode="episode_2", camera=0)).json
        assert view["kind"] == "proposal"
        assert view["usual_episode"] == "episode_0"
        assert view["points"][0]["confidence"] == pytest.approx(0.3)
        points = [{key: point[key] for key in ("name", "x", "y", "frame")} for point in view["points"]]
        points[1]["x"] -= OFFSET
        wish = {"episode": "episode_2", "camera": 0, "points": points, "seen": view["seen"]}
        assert ask(place, "POST", "/api/annotate", wish).json["kind"] == "annotation"
        assert not proposal.exists()
        annotation = folder.workspace.file("episode_2", 0, "annotation")
        keypoints = read_annotation(annotation, SETTINGS.height, SETTINGS.width)
        truth = folder.truth("episode_2").xy[0, :, 0]
        np.testing.assert_allclose(keypoints.xy[1], truth[1], atol=1e-4)
        np.testing.assert_allclose(keypoints.xy[2], truth[2] + [OFFSET, 0], atol=1e-4)
        shown = ask(place, "GET", api("episode", episode="episode_2")).json
        assert shown["history"][-1]["kind"] == "confirmation"
        assert ask(place, "POST", "/api/undo", {"event": shown["undoable"]}).status == 200
        assert proposal.read_bytes() == content
        assert not annotation.exists()


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "at least 1"),
        ([{"name": " ", "x": 1, "y": 1}], "printable name"),
        ([{"name": "a\nb", "x": 1, "y": 1}], "printable name"),
        ([{"name": "a", "x": 1, "y": 1}, {"name": "a ", "x": 2, "y": 2}], "two keypoints"),
        ([{"name": "a", "x": 321, "y": 1}], "outside the frame"),
        ([{"name": "a", "x": 1, "y": 1, "frame": 24}], "no frame 24"),
        ([{"name": "a", "x": "1", "y": 1}], "points.0.x"),
        ([{"name": "a", "x": 1, "y": 1, "more": 1}], "Extra inputs"),
    ],
)
def test_annotations_that_make_no_sense_are_refused(
    place: str, made_folder: Folder, points: list[dict[str, Any]], message: str
) -> None:
    answer = ask(place, "POST", "/api/annotate", annotation_wish(place, "episode_3", 0, points))
    assert answer.status == 422
    assert message in answer.json["error"]
    assert not made_folder.workspace.file("episode_3", 0, "annotation").exists()


def test_damaged_files_cost_their_episode_alone(folder: Folder) -> None:
    folder.workspace.quality("episode_1").write_text('{"doubt": NaN}')
    folder.workspace.file(EPISODE, 0, "tracks").write_bytes(b"PK no tracks")
    (folder.workspace.folder("episode_3") / "episode.json").write_text("{")
    with serving(folder) as place:
        rows = {row["episode"]: row for row in ask(place, "GET", "/api/episodes").json["episodes"]}
        assert rows["episode_1"]["state"] == rows["episode_3"]["state"] == "broken"
        assert "quality.json" in rows["episode_1"]["note"]
        assert rows["episode_2"]["state"] == "proposal"
        answer = ask(place, "GET", api("tracks", episode=EPISODE, camera=0))
        assert answer.status == 422
        assert "not a file of tracks" in answer.json["error"]
        assert ask(place, "GET", api("episode", episode="episode_3")).status == 422


# --- who may ask ---


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:9", 200),
        ("[::1]:8008", 200),
        ("LOCALHOST", 200),
        ("evil.example", 403),
        ("evil.example:8008", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost@evil.example", 403),
        ("10.0.0.7", 403),
        ("", 403),
        ("[::1", 403),
        ("127.0.0.1:notaport", 403),
    ],
)
def test_foreign_hosts_are_refused(place: str, host: str, status: int) -> None:
    assert ask(place, "GET", "/api/job", headers={"host": host}).status == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://{place}"}, 200),
        ({"origin": "http://{place}", "sec-fetch-site": "same-origin"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_writes_of_other_sites_are_refused(place: str, headers: dict[str, str], status: int) -> None:
    headers = {key: value.replace("{place}", place) for key, value in headers.items()}
    assert ask(place, "POST", "/api/job/cancel", {"number": 0}, headers).status == status


def test_bodies_have_a_limit_whatever_their_headers_say(place: str) -> None:
    huge = b" " * (guard.LARGEST_BODY + 1)
    assert ask(place, "POST", "/api/decide", huge).status == 413
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    head = f"POST /api/decide HTTP/1.1\r\nhost: {place}\r\ncontent-type: application/json\r\n".encode()
    answer = send_bytes(place, head + b"transfer-encoding: chunked\r\n\r\n" + 8 * chunk + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_token_is_needed_once_it_is_set(made_folder: Folder) -> None:
    with serving(made_folder, token="correct-horse") as place:
        refused = ask(place, "GET", "/api/episodes")
        assert refused.status == 401
        assert "?token=" in refused.json["error"]
        assert ask(place, "GET", "/assets/review.js").status == 401
        assert ask(place, "GET", "/?token=wrong-horse").status == 401
        assert ask(place, "GET", "/api/episodes?token=correct-horse").status == 401
        assert ask(place, "POST", "/api/undo", {"event": 1}).status == 401
        entry = ask(place, "GET", "/?token=correct-horse")
        assert entry.status == 200
        cookie = entry.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        value = cookie.partition(";")[0]
        assert ask(place, "GET", "/api/episodes", headers={"cookie": value}).status == 200
        assert ask(place, "GET", "/api/episodes", headers={"cookie": f"{value}x"}).status == 401
        for bearer, status in (("correct-horse", 200), ("correct-hors\xe9", 401), ("", 401)):
            answer = ask(place, "GET", "/api/episodes", headers={"authorization": f"Bearer {bearer}"})
            assert answer.status == status


def test_bound_elsewhere_it_always_has_a_token_and_answers_to_addresses(made_folder: Folder) -> None:
    from trackbench.robotics.desk import Desk

    desk = Desk(made_folder.workspace)
    assert server_for(desk, "127.0.0.1", 8008)[1] == ""
    assert server_for(desk, "localhost", 8008)[1] == ""
    assert server_for(desk, "::1", 8008)[1] == ""
    first, second = (server_for(desk, "0.0.0.0", 8008)[1] for _ in range(2))
    assert len(first) >= 32
    assert first != second
    with pytest.raises(ValueError, match="a token needs"):
        server_for(desk, "0.0.0.0", 8008, "short")
    with serving(made_folder, host="0.0.0.0", token="correct-horse") as place:
        known = {"authorization": "Bearer correct-horse"}
        assert ask(place, "GET", "/api/job", headers={**known, "host": "10.0.0.7:8008"}).status == 200
        assert ask(place, "GET", "/api/job", headers={**known, "host": "evil.example"}).status == 403


def test_a_taken_port_is_one_clear_line(place: str) -> None:
    port = int(place.rpartition(":")[2])
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
        listen("127.0.0.1", port)


# --- malformed input ---


def random_json(rng: random.Random, depth: int = 0) -> Any:
    leaves: list[Any] = [None, True, -1, 0, 3, 2**63, -(2**70), 10**400, 0.5, 1e308, float("nan"), float("inf")]
    leaves += ["", EPISODE, "..", "a\0b", "\ud800", "x" * 3000, "accept", "0" * 64, "../../etc/passwd", "夹爪"]
    if depth > 2 or rng.random() < 0.6:
        return rng.choice(leaves)
    if rng.random() < 0.5:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = ["episode", "camera", "point", "t", "x", "y", "points", "verdict", "name", "seen", "reason", "event"]
    return {
        rng.choice([*keys, "", "\0", "__proto__"]): random_json(rng, depth + 1) for _ in range(rng.randrange(5))
    }


def valid_wishes() -> dict[str, dict[str, Any]]:
    return {
        "decide": {"episode": EPISODE, "verdict": "accept", "reason": "", "tracks_sha256": {"0": "0" * 64}},
        "undo": {"event": 2**40},
        "correct": {
            "episode": EPISODE,
            "camera": 0,
            "point": 0,
            "t": 1,
            "x": 1.0,
            "y": 1.0,
            "tracks_sha256": "0" * 64,
        },
        "annotate": {
            "episode": EPISODE,
            "camera": 0,
            "points": [{"name": "a", "x": 1.0, "y": 1.0}],
            "seen": "other",
        },
    }


def malformed(rng: random.Random, place: str) -> tuple[str, Answer | bytes]:
    """Send one malformed request; what it was, and the answer."""
    name = rng.choice(["decide", "undo", "correct", "annotate"])
    kind = rng.randrange(8)
    if kind == 0:  # any JSON
        body = json.dumps(random_json(rng)).encode("utf-8", "surrogatepass")
    elif kind == 1:  # a good wish with one field changed, missing or added
        wish = valid_wishes()[name]
        key = rng.choice([*wish, "extra"])
        wish[key] = random_json(rng)
        if rng.random() < 0.2:
            wish.pop(key)
        body = json.dumps(wish).encode("utf-8", "surrogatepass")
    elif kind == 2:  # no JSON
        body = rng.choice(
            [b"", b"{", b"[" * 5000, b"\xff\xfe{}", rng.randbytes(200), b'{"event": 1' + b"0" * 5000 + b"}"]
        )
    elif kind == 3:  # any query
        key = rng.choice(["episode", "tracks", "annotation", "file", "nothing", "%00", "../../etc/passwd"])
        values = {k: random_json(rng) for k in ("episode", "camera", "kind") if rng.random() < 0.8}
        query = urlencode({k: str(v) for k, v in values.items()}, errors="replace")
        path = f"/api/{key}?{query}&{rng.choice(['', '%', '%zz', 'camera=1&camera=2', '=', '&&&', '%ff=%fe'])}"
        return f"GET {path}", ask(place, "GET", path)
    elif kind == 4:  # another method
        method = rng.choice(["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD", "BREW"])
        path = rng.choice([f"/api/{name}", "/api/episodes", "/", "/assets/review.js"])
        headers = {"origin": f"http://{place}"} if rng.random() < 0.5 else {}
        return f"{method} {path}", ask(place, method, path, {} if rng.random() < 0.5 else None, headers)
    elif kind == 5:  # ranges and headers
        path = api("file", episode=EPISODE, camera=0, kind=rng.choice(["video", "image", "nothing"]))
        value = rng.choice(
            ["bytes=9-1", "bytes=a-b", "lines=1-2", "bytes=" + "0-1," * 300, "bytes=-", "bytes=99999999-"]
        )
        key = rng.choice(["range", "if-range", "if-none-match", "cookie", "authorization", "content-length"])
        return f"GET {key}: {value[:30]}", ask(place, "GET", path, headers={"range": "x=", key: value})
    elif kind == 6:  # no HTTP, or not quite
        line = rng.choice(
            ["GET", "POST /api/decide", f"GET /{'a' * 70000}", "GET / HTTP/9.9", "\0\0", "GET /\x01 HTTP/1.1"]
        )
        head = rng.choice(
            ["", f"host: {place}\r\n", f"host: {place}\r\nhost: evil\r\n", "x" * 70000, "content-length: -1\r\n"]
        )
        content = f"{line} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + rng.randbytes(rng.randrange(50))
        return repr(content[:60]), send_bytes(place, content)
    else:  # a body shorter than it says, or said twice
        length = rng.choice(["9999", "1e3", "-5", "99999999999999999999999", "5, 5"])
        content = f"POST /api/{name} HTTP/1.1\r\nhost: {place}\r\ncontent-type: application/json\r\n"
        return f"content-length: {length}", send_bytes(
            place, f"{content}content-length: {length}\r\n\r\n{{}}".encode()
        )
    return f"{name} {body[:80]!r}", ask(place, "POST", f"/api/{name}", body)


def files_under(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): sha256(path) for path in root.rglob("*") if path.is_file()}


def test_a_thousand_malformed_requests_change_nothing_and_are_all_refused(folder: Folder) -> None:
    before = files_under(folder.workspace.root)
    rng = random.Random(6)
    seen: dict[int, int] = {}
    with serving(folder) as place:
        for number in range(1000):
            what, answer = malformed(rng, place)
            if isinstance(answer, Answer):
                seen[answer.status] = seen.get(answer.status, 0) + 1
                harmless = what.startswith("GET ") and answer.status in (200, 206)  # a header that may be ignored
                assert 400 <= answer.status < 500 or harmless, f"request {number}, {what}: {answer.status}"
                if answer.status >= 400 and answer.body and answer.headers["content-type"] == "application/json":
                    assert answer.json["error"]
                    assert "\n" not in answer.json["error"]
            else:
                status = answer[9:12]
                assert status in (b"", b"307") or status.startswith(b"4"), (
                    f"request {number}, {what}: {answer[:200]!r}"
                )
        assert ask(place, "GET", "/api/episodes").status == 200
        assert ask(place, "GET", "/api/job").json["state"] == "none"
    assert files_under(folder.workspace.root) == before
    assert sum(count for status, count in seen.items() if status >= 400) > 700


# --- the command line ---


def test_episodes_are_decided_without_the_page(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(folder.workspace.root)
    assert main(["h5", "decide", root, "episode_0", "episode_1", "--reject", "--reason", "too dark"]) == 0
    assert main(["h5", "decide", root, "nobody", "../x", "episode_3", "episode_1", "--accept"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["rejected", "nobody", "../x", "episode_3", "accepted"]
    decisions = Decisions(folder.workspace.review)
    current = {name: (one.verdict, one.reason) for name, one in decisions.all_current().items()}
    assert current == {"episode_0": ("reject", "too dark"), "episode_1": ("accept", "")}
    for wrong in (
        ["--accept"],
        ["episode_0", "--accept", "--all-above", "0.5"],
        ["--accept", "--all-above", "nan"],
    ):
        assert main(["h5", "decide", root, *wrong]) == 1


def test_all_above_a_score_leaves_decided_and_untracked_episodes_alone(folder: Folder) -> None:
    root = str(folder.workspace.root)
    scores = {
        episode: json.loads(folder.workspace.quality(episode).read_text())["score"]
        for episode in ("episode_0", "episode_1")
    }
    worse, better = sorted(scores, key=lambda name: scores[name])
    assert main(["h5", "decide", root, "--all-above", str((scores[worse] + scores[better]) / 2), "--accept"]) == 0
    decisions = Decisions(folder.workspace.review)
    assert set(decisions.all_current()) == {better}
    assert main(["h5", "decide", root, "--all-above", "0", "--reject"]) == 0
    assert {name: one.verdict for name, one in decisions.all_current().items()} == {
        better: "accept",
        worse: "reject",
    }


def test_the_database_can_be_read_with_any_tool(folder: Folder) -> None:
    main(["h5", "decide", str(folder.workspace.root), "episode_0", "--accept"])
    with sqlite3.connect(folder.workspace.review) as connection:
        rows = connection.execute("SELECT episode, kind, content ->> 'verdict' FROM events").fetchall()
    assert rows == [("episode_0", "decision", "accept")]
