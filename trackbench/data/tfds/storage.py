"""Data sets behind a URL, such as ``gs://bucket/movi_f``: folders and byte ranges through fsspec.

Nothing here keeps a connection or a file system: fsspec has one of each kind for each process, made anew after a
fork. So what refers to a place can be used in loading processes, however they are started.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from trackbench.files import remove_unfinished, written_whole

log = logging.getLogger(__name__)
CACHE = "TRACKBENCH_CACHE"  # environment variable: the folder of local copies
_WAITS = (0.5, 2.0, 8.0)  # seconds before each further attempt
_PATIENCE = 60.0  # seconds, after which there is none: file systems repeat requests themselves
_STAMPS = ("generation", "etag", "ETag", "md5Hash", "LastModified", "last_modified", "updated", "mtime")
_FINAL = (PermissionError, IsADirectoryError, NotADirectoryError)  # no further attempt helps
_MISTAKES = (ImportError, TypeError, AttributeError, NotImplementedError)  # not of the storage
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class RemotePath:
    """A file or folder behind a URL, with what is used here of :class:`pathlib.Path`.

    A request that fails is repeated up to three times, beside what the file system repeats itself.

    Attributes:
        url: of a root.
        inner: names below it, separated by ``/``.
    """

    url: str
    inner: str = ""

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.url, f"{self.inner}/{name}" if self.inner else name)

    def __str__(self) -> str:
        return f"{self.url.rstrip('/')}/{self.inner}" if self.inner else self.url

    @property
    def name(self) -> str:
        """The last part."""
        return str(self).rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The folder of what was found below the root; the root itself has none and gives itself."""
        return RemotePath(self.url, self.inner.rpartition("/")[0])

    def entries(self) -> dict[str, dict[str, Any]]:
        """What is in a folder, by name, as fsspec describes it (``type``, ``size``): nothing if it is not there.

        One request, whatever the number of files (object storage sends them by the thousand).
        """
        try:
            found = self._request(lambda system, path: system.ls(path, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {str(entry["name"]).rstrip("/").rpartition("/")[2]: entry for entry in found}

    def size(self) -> int:
        """Bytes of a file: one request."""
        size = self._request(lambda system, path: system.info(path))["size"]
        if size is None:
            raise OSError(f"{self}: the storage does not tell the size")
        return int(size)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop`` in one request.

        Raises:
            FileNotFoundError: the file is gone.
            OSError: all attempts failed.
            ValueError: the file ends before, or the server knows no ranges.
        """
        content: bytes = self._request(lambda system, path: system.cat_file(path, start=start, end=stop))
        if len(content) < stop - start:
            raise ValueError(f"the file ends before byte {stop}")
        if len(content) > stop - start:
            raise ValueError(f"asked for {stop - start} bytes, got {len(content)}: the server knows no ranges")
        return content

    def read_text(self, encoding: str) -> str:
        """The whole file; errors as of :meth:`read`."""
        content: bytes = self._request(lambda system, path: system.cat_file(path))
        return content.decode(encoding)

    def copy_to(self, file: Path) -> None:
        """Write the whole file to a local one; errors as of :meth:`read`."""
        self._request(lambda system, path: system.get_file(path, str(file)))

    def _request(self, ask: Callable[[Any, str], _Result]) -> _Result:
        begun = time.monotonic()
        for attempt, wait in enumerate((*_WAITS, None), start=1):
            try:
                system, path = fsspec.core.url_to_fs(self.url)
                return ask(system, f"{path.rstrip('/')}/{self.inner}" if self.inner else path)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{self}: no such file") from error
            except _FINAL as error:
                kind = next(kind for kind in _FINAL if isinstance(error, kind))
                raise kind(f"{self}: {error.strerror or error}") from error
            except _MISTAKES:
                raise
            except Exception as error:  # file systems pass on what their HTTP clients raise, of many kinds
                if wait is None or time.monotonic() - begun > _PATIENCE:
                    raise OSError(f"{self}: failed {attempt} times, the last time by {error!r}") from error
                log.debug("%s: %r, once more in %s s", self, error, wait)
                time.sleep(wait)
        raise AssertionError


Place = Path | RemotePath


def place(path: str | Place) -> Place:
    """What a path or URL refers to: ``file://`` is a local path, too.

    Raises:
        ImportError: the protocol's package is not installed; named.
        ValueError: unknown protocol.
    """
    if not isinstance(path, str):
        return path
    if "://" not in path:
        return Path(path)
    protocols = [part.partition("://")[0] for part in path.split("::")]  # several: a chain such as a cache's
    if protocols == ["file"] or protocols == ["local"]:
        return Path(LocalFileSystem._strip_protocol(path))
    if not {"gs", "gcs"}.isdisjoint(protocols):
        # gcsfs would look by gRPC, which survives no fork, before each request what kind of bucket it is
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for protocol in protocols:
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            module = str(known_implementations.get(protocol, {}).get("class", protocol)).partition(".")[0]
            raise ImportError(f"{path}: {protocol}:// needs a package: pip install {module} ({error})") from error
        except ValueError as error:
            raise ValueError(
                f"{path}: unknown protocol {protocol!r}, expected a path or a URL such as gs://, s3:// or hf://"
            ) from error
    return RemotePath(path if path.endswith("://") else path.rstrip("/"))


def local_copy(file: RemotePath, entry: dict[str, Any]) -> Path:
    """A copy of a remote file in the cache folder, made if it is not there.

    The folder is ``$TRACKBENCH_CACHE/files``, else that in ``~/.cache/trackbench``. Processes of one machine
    share it: one copies, the others wait. Nothing is ever removed from it.

    Args:
        file: to copy.
        entry: of it in :meth:`RemotePath.entries`; a file that changes there is copied anew.

    Raises:
        ValueError: not all of the file arrived.
    """
    version = [str(file), *(str(entry.get(key)) for key in ("size", *_STAMPS))]
    folder = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "trackbench") / "files"
    copy = folder / hashlib.sha256("\n".join(version).encode()).hexdigest()[:32] / file.name
    if copy.is_file():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(copy.with_name("lock")):
        if not copy.is_file():
            remove_unfinished(copy.parent)
            log.info("copying %s to %s", file, copy)
            with written_whole(copy) as unfinished:
                file.copy_to(unfinished)
                arrived, size = unfinished.stat().st_size, entry.get("size")
                if size is not None and arrived != size:
                    raise ValueError(f"cut off: {arrived} of {size} bytes arrived")
    return copy
