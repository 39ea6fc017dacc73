"""A small work folder with known keypoints, for the review server and its page."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trackbench.robotics.desk import Desk
from trackbench.robotics.extract import extract
from trackbench.robotics.keypoints import Keypoints, write_annotation
from trackbench.robotics.miniature import MiniatureSettings, Truth, make_episodes, read_truth
from trackbench.robotics.server import listen, server_for
from trackbench.robotics.track import track
from trackbench.robotics.workspace import Workspace

EPISODES = 4
SETTINGS = MiniatureSettings(steps=24, height=240, width=320)
OFFSET = 2.0  # pixels between the proposal and the truth, in x


@dataclass(frozen=True)
class Folder:
    """Episodes 0 and 1 are tracked, 2 has proposals, 3 has nothing."""

    source: Path
    workspace: Workspace

    def truth(self, episode: str) -> Truth:
        return read_truth(self.source / "truth" / f"{episode}.npz")

    def copy(self, to: Path) -> Folder:
        shutil.copytree(self.workspace.root, to)
        return Folder(self.source, Workspace(to))


def make_folder(root: Path) -> Folder:
    folder = Folder(root / "in", Workspace(root / "out"))
    make_episodes(folder.source, EPISODES, SETTINGS, workers=1)
    assert all(outcome.error is None for outcome in extract(folder.source, folder.workspace, workers=1))
    for index in range(3):
        episode = f"episode_{index}"
        truth = folder.truth(episode)
        for camera in range(SETTINGS.cameras):
            confidence = np.linspace(0.3, 1, len(truth.names)) if index == 2 else None
            shift = [OFFSET, 0] if index == 2 else [0, 0]
            keypoints = Keypoints(truth.names, truth.xy[camera, :, 0] + shift, confidence=confidence)
            path = folder.workspace.file(episode, camera, "proposal" if index == 2 else "annotation")
            write_annotation(
                path, keypoints, image=f"cam{camera}.png", height=SETTINGS.height, width=SETTINGS.width
            )
    outcomes = track(folder.source, folder.workspace, episodes=["episode_0", "episode_1"], workers=1)
    assert [outcome.error for outcome in outcomes] == [None, None]
    return folder


@contextmanager
def serving(
    folder: Folder, *, host: str = "127.0.0.1", token: str | None = None, corrections: bool = True
) -> Iterator[str]:
    """A running server; its host and port."""
    desk = Desk(folder.workspace, source=folder.source if corrections else None)
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server, _ = server_for(desk, host, port, token)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(place: str, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """One request over a connection of its own; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection(place, timeout=30)
    sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        known = {"content-type": "application/json"} if sent is not None else {}
        connection.request(method, path, sent, {**known, **(headers or {})})
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def send_bytes(place: str, content: bytes) -> bytes:
    """What a server answers to any bytes, until it closes or falls silent."""
    host, _, port = place.rpartition(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.settimeout(0.3)
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                answer += part
        except OSError:
            pass
    return answer
