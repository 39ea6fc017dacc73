"""Benchmarks fetched from a server that misbehaves in every way, and unpacked from files of every kind."""

from __future__ import annotations

import base64
import hashlib
import pickle
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from trackbench.cli import main
from trackbench.data.prepare import benchmarks
from trackbench.data.prepare.benchmarks import PUBLISHED, Published, download, prepare_benchmark
from trackbench.data.tapvid import TapVidDataset

QUIET = Console(quiet=True)


@dataclass
class Server:
    """A web server with one file.

    Attributes:
        url: of the file.
        content: it.
        etag: its ETag; None: it sends none.
        ranges: whether it answers Range with a part.
        cut: bytes after which the connection ends, for the first so many answers.
        on_answer: called before each answer.
        headers: further ones of every answer.
        status: instead of an answer.
        asked: the Range and If-Range of every request.
        sent: bytes of content that were sent.
    """

    url: str = ""
    content: bytes = b""
    etag: str | None = '"one"'
    ranges: bool = True
    cut: list[int] = field(default_factory=list)
    changes: list[tuple[bytes, str]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    status: list[int] = field(default_factory=list)
    ignores_if_range: bool = False
    asked: list[tuple[str | None, str | None]] = field(default_factory=list)
    sent: int = 0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted, condition = self.headers["Range"], self.headers["If-Range"]
            state.asked.append((wanted, condition))
            if len(state.asked) > 1 and state.changes:
                state.content, state.etag = state.changes.pop(0)
            if state.status:
                self.send_error(state.status.pop(0))
                return
            start, total = 0, len(state.content)
            same = state.ignores_if_range or condition is None or condition == state.etag
            if wanted and state.ranges and same:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= total:
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            else:
                self.send_response(200)
            body = state.content[start:]
            self.send_header("Content-Length", str(len(body)))
            if state.etag:
                self.send_header("ETag", state.etag)
            for name, value in state.headers.items():
                self.send_header(name, value)
            self.end_headers()
            body = body[: state.cut.pop(0)] if state.cut else body
            state.sent += len(body)
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(benchmarks, "PAUSE", 0.0)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{httpd.server_port}/tapvid_davis.zip"
    yield state
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(0).bytes(100_000)


def packed(files: dict[str, bytes]) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def davis(data_fixtures: Path) -> bytes:
    return (data_fixtures / "tapvid" / "tapvid_davis" / "tapvid_davis.pkl").read_bytes()


@pytest.fixture
def davis_zip(davis: bytes) -> bytes:
    """As published: a folder with a read-me."""
    return packed({"tapvid_davis/README.md": b"CC BY", "tapvid_davis/tapvid_davis.pkl": davis})


# the download


def test_a_file_is_fetched_whole(server: Server, content: bytes, tmp_path: Path) -> None:
    server.content = content
    download(server.url, tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == content
    assert server.asked == [(None, None)]
    download(server.url, tmp_path / "file", QUIET)  # it is there
    assert len(server.asked) == 1


def test_a_cut_connection_goes_on_where_it_was(server: Server, content: bytes, tmp_path: Path) -> None:
    server.content, server.cut = content, [30_000, 0, 20_000]
    download(server.url, tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == content
    assert server.asked == [
        (None, None),
        ("bytes=30000-", '"one"'),
        ("bytes=30000-", '"one"'),
        ("bytes=50000-", '"one"'),
    ]
    assert server.sent == len(content)


def test_the_next_run_goes_on_where_a_stopped_one_was(server: Server, content: bytes, tmp_path: Path) -> None:
    server.content, server.cut = content, [40_000, *[0] * (benchmarks.RETRIES + 1)]
    with pytest.raises(OSError, match=r"ended after 40,000 of 100,000 bytes; what came is kept, run it again"):
        download(server.url, tmp_path / "file", QUIET)
    assert not (tmp_path / "file").exists()
    download(server.url, tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == content
    assert server.sent == len(content)


@pytest.mark.parametrize("ignores_if_range", [False, True])
def test_a_file_that_changes_meanwhile_starts_again(
    server: Server, content: bytes, tmp_path: Path, ignores_if_range: bool
) -> None:
    server.content, server.cut, server.ignores_if_range = content, [30_000], ignores_if_range
    changed = content[::-1]
    server.changes = [(changed, '"two"')]
    download(server.url, tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == changed
    assert server.asked[1] == ("bytes=30000-", '"one"')


def test_a_file_that_became_shorter_starts_again(server: Server, content: bytes, tmp_path: Path) -> None:
    server.content, server.cut, server.ignores_if_range = content, [30_000], True
    server.changes = [(content[:500], '"two"')]
    download(server.url, tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == content[:500]


def test_a_server_without_ranges_starts_again(server: Server, content: bytes, tmp_path: Path) -> None:
    server.content, server.cut, server.ranges = content, [30_000], False
    download(server.url, tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == content
    assert server.sent == 30_000 + len(content)


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_sign_of_sameness_it_starts_again(
    server: Server, content: bytes, tmp_path: Path, etag: str | None
) -> None:
    server.content, server.cut, server.etag = content, [30_000], etag
    download(server.url, tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == content
    assert server.asked == [(None, None), (None, None)]


def test_a_part_of_another_address_is_not_used(server: Server, content: bytes, tmp_path: Path) -> None:
    server.content, server.cut = content, [30_000, *[0] * (benchmarks.RETRIES + 1)]
    with pytest.raises(OSError, match="kept"):
        download(server.url, tmp_path / "file", QUIET)
    server.asked.clear()
    download(server.url.replace("davis", "robotap"), tmp_path / "file", QUIET)
    assert server.asked == [(None, None)]
    assert (tmp_path / "file").read_bytes() == content


def test_the_server_s_md5_is_checked(server: Server, content: bytes, tmp_path: Path) -> None:
    right = base64.b64encode(hashlib.md5(content).digest()).decode()
    server.content, server.headers = content, {"x-goog-hash": f"crc32c=n03x6A==,md5={right}"}
    download(server.url, tmp_path / "file", QUIET)
    server.content = content[:-1] + b"?"
    with pytest.raises(ValueError, match="it came damaged"):
        download(server.url, tmp_path / "other", QUIET)
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "other.part").exists()


def test_passing_errors_are_tried_again_and_others_not(server: Server, content: bytes, tmp_path: Path) -> None:
    server.content, server.status = content, [503, 429]
    download(server.url, tmp_path / "file", QUIET)
    assert (tmp_path / "file").read_bytes() == content
    server.status = [404]
    with pytest.raises(OSError, match=r"404.*give it with --file"):
        download(server.url, tmp_path / "other", QUIET)
    assert len(server.asked) == 4


def test_no_network_and_other_addresses(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=r"127.0.0.1:9/x.zip: .*give the file with --file"):
        download("http://127.0.0.1:9/x.zip", tmp_path / "file", QUIET)
    for url in ("file:///etc/passwd", "ftp://127.0.0.1/x.zip", "x.zip"):
        with pytest.raises(ValueError, match="expected an address that starts with https"):
            download(url, tmp_path / "file", QUIET)


def test_no_room_is_said_before_anything_is_written(
    server: Server, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = content
    monkeypatch.setattr(benchmarks.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match="100,000 bytes to come, 10 free"):
        download(server.url, tmp_path / "file", QUIET)
    assert len(server.asked) == 1


# the whole command


def test_a_benchmark_is_downloaded_and_checked(
    server: Server, davis: bytes, davis_zip: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content, server.cut = davis_zip, [50_000]
    out = tmp_path / "davis"
    digest = hashlib.sha256(davis_zip).hexdigest()
    assert main(["prepare", "davis", "--out", str(out), "--url", server.url, "--sha256", digest.upper()]) == 0
    said = capsys.readouterr().err
    assert f"{digest} (as asked)" in said
    assert "warning: 3 videos, TAP-Vid DAVIS has 30" in said
    assert [file.name for file in out.iterdir()] == ["tapvid_davis.pkl"]
    assert (out / "tapvid_davis.pkl").read_bytes() == davis
    assert main(["prepare", "davis", "--out", str(out), "--url", server.url]) == 0
    assert "3 videos are in" in capsys.readouterr().err
    assert len(server.asked) == 2


def test_an_unknown_checksum_is_shown(
    davis_zip: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.zip").write_bytes(davis_zip)
    assert main(["prepare", "davis", "--out", f"{tmp_path}/out", "--file", f"{tmp_path}/a.zip"]) == 0
    digest = hashlib.sha256(davis_zip).hexdigest()
    assert f"SHA-256 of a.zip: {digest} (nothing to compare it with: none is published)" in capsys.readouterr().err
    assert (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("what", ["checksum", "html", "truncated"])
def test_a_bad_download_leaves_nothing(server: Server, davis_zip: bytes, tmp_path: Path, what: str) -> None:
    server.content = {"checksum": davis_zip, "html": b"<html>quota</html>", "truncated": davis_zip[:-500]}[what]
    checksum = "0" * 64 if what == "checksum" else None
    message = {"checksum": "expected SHA-256 0000", "html": "not a zip file", "truncated": "not a zip file"}[what]
    with pytest.raises(ValueError, match=message):
        prepare_benchmark("davis", tmp_path / "out", url=server.url, checksum=checksum, console=QUIET)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_was_downloaded_outlives_a_full_disk(
    server: Server, davis_zip: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = davis_zip
    with monkeypatch.context() as patched:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr(benchmarks, "_unpack", full)
        with pytest.raises(OSError, match="No space left"):
            prepare_benchmark("davis", tmp_path, url=server.url, console=QUIET)
    assert prepare_benchmark("davis", tmp_path, url=server.url, console=QUIET) == 3
    assert len(server.asked) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["tapvid_davis.pkl"]


def test_pickles_are_copied_under_their_published_names(data_fixtures: Path, tmp_path: Path) -> None:
    splits = sorted((data_fixtures / "tapvid" / "robotap").glob("*.pkl"))
    assert prepare_benchmark("robotap", tmp_path / "robotap", files=splits, console=QUIET) == 3
    assert len(TapVidDataset("robotap", tmp_path / "robotap")) == 3
    stacking = data_fixtures / "tapvid" / "tapvid_rgb_stacking" / "tapvid_rgb_stacking.pkl"
    (tmp_path / "renamed.pkl").write_bytes(stacking.read_bytes())
    assert prepare_benchmark("rgb_stacking", tmp_path, files=[tmp_path / "renamed.pkl"], console=QUIET) == 2
    assert (tmp_path / "tapvid_rgb_stacking.pkl").read_bytes() == stacking.read_bytes()
    with pytest.raises(
        ValueError, match=r"expected one zip file, or robotap_split\*\.pkl, each once; got renamed"
    ):
        prepare_benchmark("robotap", tmp_path / "other", files=[tmp_path / "renamed.pkl"], console=QUIET)
    with pytest.raises(ValueError, match="each once; got robotap_split0"):
        prepare_benchmark("robotap", tmp_path / "other", files=[splits[0], splits[0]], console=QUIET)


class _Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("run",))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b"nothing else"}, "no tapvid_davis.pkl in it"),
        ({"../../tapvid_davis.pkl": b"x"}, "expected a relative name that stays in"),
        ({"/tmp/tapvid_davis.pkl": b"x"}, "expected a relative name that stays in"),
        ({"a/tapvid_davis.pkl": b"x", "b/tapvid_davis.pkl": b"y"}, "tapvid_davis.pkl is in it twice"),
        ({"tapvid_davis.pkl": b"x"}, "not a readable pickle"),
        ({"tapvid_davis.pkl": pickle.dumps({"a": _Attack()})}, "refused: it asks for 'builtins.print'"),
        ({"tapvid_davis.pkl": pickle.dumps({})}, "no videos in it"),
        ({"tapvid_davis.pkl": pickle.dumps({"a": {"video": 3}})}, "lacks occluded, points"),
        ({"tapvid_davis.pkl": bytes(3_000_000)}, "would unpack to 3,000,000 bytes, more than 2,000,000"),
    ],
)
def test_bad_archives_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], message: str
) -> None:
    monkeypatch.setitem(PUBLISHED, "davis", Published("TAP-Vid DAVIS", "", 30, 2_000_000))
    (tmp_path / "in.zip").write_bytes(packed(files))
    with pytest.raises(ValueError, match=rf"in\.zip: .*{message}"):
        prepare_benchmark("davis", tmp_path / "out", files=[tmp_path / "in.zip"], console=QUIET)
    assert list((tmp_path / "out").iterdir()) == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.zip", "out"]


def test_a_zip_file_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    data = bytearray(packed({"tapvid_davis.pkl": bytes(1_000_000)}))
    for sign, place in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        at = data.index(sign) + place
        data[at : at + 4] = (1000).to_bytes(4, "little")
    (tmp_path / "in.zip").write_bytes(data)
    with pytest.raises(ValueError, match="damaged zip file"):
        prepare_benchmark("davis", tmp_path / "out", files=[tmp_path / "in.zip"], console=QUIET)


def test_a_damaged_zip_file_is_refused(davis_zip: bytes, tmp_path: Path) -> None:
    data = bytearray(davis_zip)
    data[len(data) // 2] ^= 255
    (tmp_path / "in.zip").write_bytes(data)
    with pytest.raises(ValueError, match=r"in\.zip: damaged zip file"):
        prepare_benchmark("davis", tmp_path / "out", files=[tmp_path / "in.zip"], console=QUIET)


def test_files_that_are_there_are_replaced_only_when_asked(davis: bytes, davis_zip: bytes, tmp_path: Path) -> None:
    (tmp_path / "in.zip").write_bytes(davis_zip)
    out = tmp_path / "out"
    out.mkdir()
    (out / "tapvid_davis.pkl").write_bytes(davis[:-1000])
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"tapvid_davis.pkl: not a readable pickle.*--overwrite replaces it"):
        prepare_benchmark("davis", out, files=[tmp_path / "in.zip"], console=QUIET)
    assert prepare_benchmark("davis", out, files=[tmp_path / "in.zip"], overwrite=True, console=QUIET) == 3
    (tmp_path / "in.zip").write_bytes(packed({"tapvid_davis.pkl": b"bad"}))
    with pytest.raises(ValueError, match="not a readable pickle"):
        prepare_benchmark("davis", out, files=[tmp_path / "in.zip"], overwrite=True, console=QUIET)
    assert (out / "tapvid_davis.pkl").read_bytes() == davis
    assert (out / "notes.txt").read_text() == "mine"


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "davis", "--out", str(tmp_path), "--sha256", "abc", "--file", "x.zip"]) == 1
    assert "--sha256 abc: expected 64 hex digits" in capsys.readouterr().err
    assert main(["prepare", "davis", "--out", str(tmp_path), "--file", f"{tmp_path}/x.zip"]) == 1
    assert "x.zip: no such file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="that of one file, got 2"):
        prepare_benchmark("robotap", tmp_path, files=[tmp_path] * 2, checksum="0" * 64, console=QUIET)
