"""``trackbench prepare davis|rgb_stacking|robotap``: the published files, downloaded or from a given path."""

from __future__ import annotations

import argparse
import base64
import binascii
import fnmatch
import hashlib
import http.client
import json
import lzma
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from trackbench.data.tapvid import FILES, TapVidDataset, TapVidName
from trackbench.files import inside, remove_unfinished, sha256, written_whole

CHUNK = 1 << 20
TIMEOUT = 60.0  # seconds without a byte
RETRIES = 5  # in a row without anything new
PAUSE = 1.0  # seconds before the second try, twice as long before each further one
GB = 10**9


@dataclass(frozen=True)
class Published:
    """A benchmark as it is published.

    Attributes:
        title: its name in papers.
        url: of a zip file. https://github.com/google-deepmind/tapnet, tapnet/tapvid/README.md; no checksums are
            published there.
        videos: how many it has.
        max_bytes: more than its files have, unpacked: a few GB of raw frames, RoboTAP 14 GB.
    """

    title: str
    url: str
    videos: int
    max_bytes: int


_HOST = "https://storage.googleapis.com/dm-tapnet"
PUBLISHED: dict[TapVidName, Published] = {
    "davis": Published("TAP-Vid DAVIS", f"{_HOST}/tapvid_davis.zip", 30, 20 * GB),
    "rgb_stacking": Published("TAP-Vid RGB-Stacking", f"{_HOST}/tapvid_rgb_stacking.zip", 50, 20 * GB),
    "robotap": Published("RoboTAP", f"{_HOST}/robotap/robotap.zip", 265, 60 * GB),
}


def add_command(names: Any) -> None:
    """Add one command per benchmark."""
    for name, published in PUBLISHED.items():
        command = names.add_parser(
            name,
            help=f"{published.title}: downloaded, or from a file",
            description=f"{published.title} ({published.videos} videos): download and unpack {published.url}, "
            "or take files that are there; check them by reading. A stopped download goes on where it was.",
        )
        command.add_argument(
            "--out", type=Path, default=Path("data") / name, metavar="DIR", help="folder (default: %(default)s)"
        )
        source = command.add_mutually_exclusive_group()
        source.add_argument(
            "--file",
            type=Path,
            nargs="+",
            metavar="FILE",
            help=f"the zip file, or {FILES[name]}; nothing is downloaded, and it stays where it is",
        )
        source.add_argument("--url", default=published.url, help="another address of the zip file")
        command.add_argument("--sha256", metavar="HEX", help="what the zip file (or the one pickle) must have")
        command.add_argument("--overwrite", action="store_true", help="replace the files that are in DIR")
        command.set_defaults(run=_run, benchmark=name)


def _run(options: argparse.Namespace) -> int:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    prepare_benchmark(
        options.benchmark,
        options.out,
        files=options.file or (),
        url=options.url,
        checksum=options.sha256,
        overwrite=options.overwrite,
        console=console,
    )
    return 0


def prepare_benchmark(
    name: TapVidName,
    out: Path,
    *,
    files: Sequence[Path] = (),
    url: str | None = None,
    checksum: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> int:
    """Put the published files of a benchmark into a folder, whole or not at all; files that are there stay.

    Args:
        name: ``davis``, ``rgb_stacking`` or ``robotap``.
        out: the folder.
        files: one zip file or the pickles; without any, ``url`` is downloaded.
        url: of the zip file; None: where it is published.
        checksum: SHA-256 of the one file, as hex digits.
        overwrite: replace what is there.
        console: for messages and the progress bar; None: standard error.

    Returns:
        The number of videos.

    Raises:
        FileNotFoundError: one of ``files`` is not there.
        ValueError: a damaged file, one of other content or another checksum, or a zip file that would grow beyond
            ``max_bytes``.
        OSError: no network, no room, no access.
    """
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    published = PUBLISHED[name]
    if checksum is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", checksum):
        raise ValueError(f"--sha256 {checksum}: expected 64 hex digits")
    if checksum is not None and len(files) > 1:
        raise ValueError(f"--sha256 is that of one file, got {len(files)}")
    staging = out / ".unpacked"  # there: a run was killed while it replaced files
    if list(out.glob(FILES[name])) and not overwrite and not staging.exists():
        try:
            count = _checked(name, out, console)
        except ValueError as error:
            raise ValueError(f"{error}; --overwrite replaces it") from error
        console.print(f"{count} videos are in {out} already; --overwrite replaces them", markup=False)
        return count

    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    kept = out / ".download"  # until its content is unpacked, or is of no use
    archive = None if files else kept / "archive.zip"
    address = url or published.url
    try:
        if archive is not None:
            download(address, archive, console)
        sources = [archive] if archive is not None else list(files)
        origin = ", ".join(map(str, files)) or address
        try:
            _compare(sources, checksum, console)
            if archive is not None and not zipfile.is_zipfile(archive):
                raise ValueError("not a zip file")
            staging.mkdir()
            for source in sources:
                (_unpack if zipfile.is_zipfile(source) else _copy)(name, source, staging, console)
            count = _checked(name, staging, console)
        except ValueError as error:
            if archive is not None:
                shutil.rmtree(kept)
            raise ValueError(f"{origin}: {error}") from error
        for old in out.glob(FILES[name]):
            old.unlink()
        for file in sorted(staging.iterdir()):
            file.replace(out / file.name)
        shutil.rmtree(kept, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    console.print(f"{published.title}: {count} videos -> {out}", markup=False)
    return count


def download(url: str, path: Path, console: Console) -> None:
    """Fetch a file over HTTP; what a stopped run has fetched of it is used where the server still has the same.

    The part lies beside ``path``, with a note of the server's ETag or date: the server decides by that
    (If-Range, RFC 9110 section 13.1.5) whether the rest belongs to it. Google's storage also sends an MD5.

    Raises:
        ValueError: an address of another kind, or content that differs from the MD5 that the server gave.
        OSError: the server refuses, or nothing more came in ``RETRIES`` further tries; or no room on the disk.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url}: expected an address that starts with https:// or http://")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent)
    note, part = path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.part")
    known = _Remote.read(note)
    if known is None or known.url != url:
        for old in (path, part, note):
            old.unlink(missing_ok=True)
    if path.exists():
        return
    furthest, failures = _size(part), 0
    with _bytes_bar(console) as bar:
        task = bar.add_task("download", total=None)
        while True:
            try:
                problem = _fetch(
                    url, part, note, lambda done, total: bar.update(task, completed=done, total=total)
                )
            except urllib.error.HTTPError as error:
                error.close()
                if error.code < 500 and error.code not in (408, 416, 429):
                    raise OSError(f"{url}: {error}; get it elsewhere and give it with --file") from error
                if error.code == 416:  # it is shorter now
                    part.unlink(missing_ok=True)
                problem = str(error)
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                problem = str(error) or type(error).__name__
            if problem is None:
                break
            failures = 0 if _size(part) > furthest else failures + 1
            furthest = max(furthest, _size(part))
            if failures > RETRIES:
                raise OSError(
                    f"{url}: {problem}; what came is kept, run it again to go on, or give the file with --file"
                )
            bar.console.print(f"{problem}; trying again", markup=False)
            time.sleep(PAUSE * 2 ** max(0, failures - 1))
    known = _Remote.read(note)
    if known is not None and known.md5 is not None and known.md5 != _md5(part):
        part.unlink()
        raise ValueError(f"{url}: it came damaged, its MD5 is not the server's {known.md5}; run it again")
    part.replace(path)


@dataclass(frozen=True)
class _Remote:
    """The file that a part belongs to.

    Attributes:
        url: where it is.
        validator: its ETag or date, for If-Range; None: another request may get another file.
        size: bytes, where the server says.
        md5: hex digits, where the server says.
    """

    url: str
    validator: str | None
    size: int | None
    md5: str | None

    @classmethod
    def of(cls, url: str, headers: Message) -> _Remote:
        etag = headers["ETag"]
        validator = etag if etag and not etag.startswith("W/") else headers["Last-Modified"]
        size = headers["Content-Length"]
        return cls(url, validator, int(size) if size and size.isdecimal() else None, _md5_of(headers))

    @classmethod
    def read(cls, note: Path) -> _Remote | None:
        try:
            return cls(**json.loads(note.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write(self, note: Path) -> None:
        with written_whole(note) as unfinished:
            unfinished.write_text(json.dumps(asdict(self)), encoding="utf-8")


def _fetch(url: str, part: Path, note: Path, progress: Callable[[int, int | None], None]) -> str | None:
    """One request for what is missing; None when the file is whole, otherwise why it is not."""
    known, at = _Remote.read(note), _size(part)
    if known is None or known.validator is None or known.size is None:
        at = 0  # another request may get another file
    elif at and at == known.size:
        return None
    request = urllib.request.Request(url, headers={"User-Agent": "trackbench", "Accept-Encoding": "identity"})
    if at and known is not None and known.validator is not None:
        request.add_header("Range", f"bytes={at}-")
        request.add_header("If-Range", known.validator)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        remote = _Remote.of(url, response.headers)
        if response.status == 206 and known is not None:
            expected = f"bytes {at}-{known.size - 1}/{known.size}" if known.size else ""
            if response.headers["Content-Range"] != expected or remote.validator not in (None, known.validator):
                part.unlink()
                return "the file changed meanwhile"
            remote = known
        else:
            at = 0
            part.unlink(missing_ok=True)
            remote.write(note)
        free = shutil.disk_usage(part.parent).free
        if remote.size is not None and remote.size - at > free:
            raise OSError(f"{url}: {remote.size - at:,} bytes to come, {free:,} free in {part.parent}")
        with part.open("ab") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                at += len(chunk)
                progress(at, remote.size)
    if remote.size is None or at == remote.size:
        return None
    if at > remote.size:
        part.unlink()
    return f"the connection ended after {at:,} of {remote.size:,} bytes"


def _md5_of(headers: Message) -> str | None:
    """Of Google's header, such as ``crc32c=n03x6A==,md5=Ojk9c3dhfxgoKVVHYwFbHQ==``."""
    for field in ",".join(headers.get_all("x-goog-hash", [])).split(","):
        kind, _, value = field.strip().partition("=")
        if kind == "md5":
            try:
                return base64.b64decode(value, validate=True).hex()
            except binascii.Error:
                return None
    return None


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _compare(sources: Sequence[Path], checksum: str | None, console: Console) -> None:
    for source in sources:
        if not source.is_file():
            raise FileNotFoundError(f"{source}: no such file")
        found = sha256(source)
        if checksum is not None and found != checksum.lower():
            raise ValueError(f"expected SHA-256 {checksum.lower()}, got {found}")
        told = "as asked" if checksum is not None else "nothing to compare it with: none is published"
        console.print(f"SHA-256 of {source.name}: {found} ({told})", markup=False)


def _unpack(name: TapVidName, source: Path, folder: Path, console: Console) -> None:
    """The files of the benchmark in a zip file, and nothing else of it."""
    try:
        with zipfile.ZipFile(source) as archive:
            members: dict[str, zipfile.ZipInfo] = {}
            for member in archive.infolist():
                file = PurePosixPath(member.filename).name
                if member.is_dir() or not fnmatch.fnmatchcase(file, FILES[name]):
                    continue
                inside(folder, member.filename)
                if file in members:
                    raise ValueError(f"{file} is in it twice")
                members[file] = member
            if not members:
                raise ValueError(f"no {FILES[name]} in it")
            size = sum(member.file_size for member in members.values())
            if size > PUBLISHED[name].max_bytes:
                raise ValueError(f"it would unpack to {size:,} bytes, more than {PUBLISHED[name].max_bytes:,}")
            with _written(folder, size, console, "unpack") as copy:
                for file, member in members.items():
                    with archive.open(member) as packed:
                        copy(packed, folder / file)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"damaged zip file, or not one that can be unpacked: {error}") from error


def _copy(name: TapVidName, source: Path, folder: Path, console: Console) -> None:
    """A pickle, under the name that the benchmark has for it."""
    file = source.name if "*" in FILES[name] else FILES[name]
    if not fnmatch.fnmatchcase(file, FILES[name]) or (folder / file).exists():
        raise ValueError(f"expected one zip file, or {FILES[name]}, each once; got {source.name}")
    with _written(folder, source.stat().st_size, console, "copy") as copy, source.open("rb") as opened:
        copy(opened, folder / file)


@contextmanager
def _written(
    folder: Path, size: int, console: Console, description: str
) -> Iterator[Callable[[IO[bytes], Path], None]]:
    """A function that copies, with a progress bar over ``size`` bytes; an OSError where they do not fit."""
    free = shutil.disk_usage(folder).free
    console.print(f"{description}: {size:,} bytes, {free:,} free", markup=False)
    if size > free:
        raise OSError(f"{folder}: {size:,} bytes needed, {free:,} free")
    with _bytes_bar(console) as bar:
        task = bar.add_task(description, total=size)

        def copy(source: IO[bytes], path: Path) -> None:
            with path.open("wb") as file:
                while chunk := source.read(CHUNK):
                    file.write(chunk)
                    bar.advance(task, len(chunk))

        yield copy


def _checked(name: TapVidName, folder: Path, console: Console) -> int:
    """The number of videos, all of them found in their files, the first and the last one read."""
    videos = TapVidDataset(name, folder, query_mode="strided", resolution=None)
    if len(videos) == 0:
        raise ValueError("no videos in it")
    for index in {0, len(videos) - 1}:
        videos[index]
    expected = PUBLISHED[name].videos
    if len(videos) != expected:
        console.print(f"warning: {len(videos)} videos, {PUBLISHED[name].title} has {expected}", markup=False)
    return len(videos)


def _bytes_bar(console: Console) -> Progress:
    columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), BarColumn(), *columns, console=console)
