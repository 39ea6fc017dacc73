"""Object storage on the local disk: one that counts its requests and fails on demand, and a web server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import fsspec
from fsspec import AbstractFileSystem


class Bucket(AbstractFileSystem):
    """``bucket:///tmp/x`` is the local folder /tmp/x, with the four kinds of requests of object storage.

    Attributes:
        requests: those made in this process: kind and name of the file.
        failures: raised instead of answers, one for each request.
    """

    protocol = "bucket"
    requests: ClassVar[list[tuple[str, str]]] = []
    failures: ClassVar[list[Exception]] = []

    def _count(self, kind: str, path: str) -> Path:
        self.requests.append((kind, Path(path).name))
        if self.failures:
            raise self.failures.pop(0)
        return Path(path)

    def _describe(self, file: Path) -> dict[str, Any]:
        kind = "directory" if file.is_dir() else "file"
        return {"name": str(file), "type": kind, "size": file.stat().st_size, "mtime": file.stat().st_mtime_ns}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        return [self._describe(file) for file in self._count("list", path).iterdir()]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return self._describe(self._count("head", path))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        with self._count("get", path).open("rb") as file:
            file.seek(start or 0)
            return file.read() if end is None else file.read(end - (start or 0))

    def get_file(self, rpath: str, lpath: str, *args: Any, **kwargs: Any) -> None:
        Path(lpath).write_bytes(self._count("copy", rpath).read_bytes())


fsspec.register_implementation("bucket", Bucket, clobber=True)


@contextmanager
def web_server(folder: Path) -> Iterator[tuple[str, list[HTTPStatus]]]:
    """URL of a folder, and answers to give in place of the next ones. Its client in fsspec is asynchronous."""
    answers: list[HTTPStatus] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, with_body: bool) -> None:
            file = folder / self.path.strip("/")
            if answers:
                return self.send_error(answers.pop(0))
            if not file.exists():
                return self.send_error(HTTPStatus.NOT_FOUND)
            if file.is_dir():
                links = (f'<a href="{f.name}{"/" * f.is_dir()}">{f.name}</a>' for f in file.iterdir())
                body, status = "".join(links).encode(), HTTPStatus.OK
            else:
                body, status = file.read_bytes(), HTTPStatus.OK
                if wanted := self.headers.get("Range"):
                    first, last = wanted.removeprefix("bytes=").split("-")
                    body, status = body[int(first) : int(last) + 1], HTTPStatus.PARTIAL_CONTENT
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if file.is_dir() else "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if with_body:
                self.wfile.write(body)
            return None

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", answers
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def fill(url: str, folder: Path) -> str:
    """Copy a folder's files to a URL."""
    for file in folder.iterdir():
        with fsspec.open(f"{url}/{file.name}", "wb") as target:
            target.write(file.read_bytes())
    return url
