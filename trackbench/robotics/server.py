"""The review server: :class:`trackbench.robotics.desk.Desk` over HTTP, and the page that talks to it."""

from __future__ import annotations

import secrets
import socket
from importlib import resources
from pathlib import Path
from typing import Annotated, get_args

import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from rich.console import Console
from starlette.exceptions import HTTPException

from trackbench.robotics.desk import SERVED, Desk, RefusedError
from trackbench.robotics.guard import Guard, is_loopback
from trackbench.robotics.messages import (
    AnnotationView,
    AnnotationWish,
    CancelWish,
    CorrectionWish,
    DecisionWish,
    EpisodeList,
    EpisodeView,
    JobView,
    TracksView,
    UndoWish,
)
from trackbench.robotics.workspace import Kind

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LONGEST_MESSAGE = 500  # characters: parts of it may come from the request

EpisodeQuery = Annotated[str, Query(min_length=1, max_length=1024)]
CameraQuery = Annotated[int, Query(ge=0, lt=1000)]


def create_app(desk: Desk) -> FastAPI:
    """The application without its :class:`trackbench.robotics.guard.Guard`; every answer but files is JSON."""
    app = FastAPI(title="trackbench review", docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_page(app)

    @app.get("/api/episodes")
    def episodes() -> EpisodeList:
        return desk.list_episodes()

    @app.get("/api/episode")
    def episode(episode: EpisodeQuery) -> EpisodeView:
        return desk.episode(episode)

    @app.get("/api/tracks")
    def tracks(episode: EpisodeQuery, camera: CameraQuery) -> TracksView:
        return desk.tracks(episode, camera)

    @app.get("/api/annotation")
    def annotation(episode: EpisodeQuery, camera: CameraQuery) -> AnnotationView:
        return desk.annotation(episode, camera)

    @app.get("/api/file", response_class=FileResponse)
    def file(
        episode: EpisodeQuery, camera: CameraQuery, kind: Annotated[str, Query(max_length=20)]
    ) -> FileResponse:
        if kind not in SERVED or kind not in get_args(Kind):
            raise RefusedError(404, f"there is no such kind of file, only {', '.join(SERVED)}")
        return FileResponse(desk.file(episode, camera, kind))

    @app.get("/api/job")
    def job() -> JobView:
        return desk.jobs.view()

    @app.post("/api/job/cancel")
    def cancel(wish: CancelWish) -> JobView:
        return desk.jobs.cancel(wish.number)

    @app.post("/api/decide")
    def decide(wish: DecisionWish) -> EpisodeView:
        return desk.decide(wish)

    @app.post("/api/annotate")
    def annotate(wish: AnnotationWish) -> AnnotationView:
        return desk.annotate(wish)

    @app.post("/api/correct", status_code=202)
    def correct(wish: CorrectionWish) -> JobView:
        return desk.correct(wish)

    @app.post("/api/undo")
    def undo(wish: UndoWish) -> JobView | None:
        return desk.undo(wish)

    return app


def _add_page(app: FastAPI) -> None:
    """The files of the page, by their names: nothing else lies there, and no path comes from a request."""
    folder = resources.files("trackbench.robotics").joinpath("assets")
    assets = {item.name: (item.read_bytes(), TYPES[Path(item.name).suffix]) for item in folder.iterdir()}

    @app.get("/")
    def page() -> Response:
        content, kind = assets["index.html"]
        return Response(content, media_type=kind)

    @app.get("/assets/{name}")
    def asset(name: str) -> Response:
        if name not in assets:
            raise RefusedError(404, "there is no such file of the page")
        content, kind = assets[name]
        return Response(content, media_type=kind)


def _add_errors(app: FastAPI) -> None:
    """Every refusal is ``{"error": one line, "code": for the page}``."""

    @app.exception_handler(RefusedError)
    def refused(request: Request, error: RefusedError) -> JSONResponse:
        return _error(error.status, str(error), error.code)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
        return _error(422, f"{where}: {first['msg']}" if where else f"the request: {first['msg']}")

    @app.exception_handler(HTTPException)
    def failed(request: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(ValueError)
    def damaged(request: Request, error: ValueError) -> JSONResponse:
        return _error(422, str(error))

    @app.exception_handler(OSError)
    def unavailable(request: Request, error: OSError) -> JSONResponse:
        return _error(503, str(error))


def _error(status: int, message: str, code: str = "") -> JSONResponse:
    line = " ".join(message.split())
    line = line if len(line) <= LONGEST_MESSAGE else line[: LONGEST_MESSAGE - 3] + "..."
    line = line.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no text
    return JSONResponse({"error": line, "code": code}, status_code=status)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        OSError: the address is not ours, or the port is taken; one line that says which.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port}: expected 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def server_for(desk: Desk, host: str, port: int, token: str | None = None) -> tuple[uvicorn.Server, str]:
    """A server that is not running yet, and the token that it asks for ("": none).

    Bound to something else than this machine alone, it always asks for one.
    """
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    app = Guard(create_app(desk), host=host, port=port, token=token)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(config), token or ""


def serve(desk: Desk, host: str, port: int, token: str | None = None) -> None:
    """Serve until interrupted; the address is printed on standard error."""
    listener = listen(host, port)
    with listener:
        port = listener.getsockname()[1]
        server, token = server_for(desk, host, port, token)
        name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        address = f"http://{name}:{port}/" + (f"?token={token}" if token else "")
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"review: {address}   (Ctrl-C ends it)", markup=False)
        server.run(sockets=[listener])
