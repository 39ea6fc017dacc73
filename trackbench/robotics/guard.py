"""Who may talk to the review server: checks that stand before the application, on every request."""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
import socket
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 256 * 1024  # bytes of a request: hundreds of keypoints
TOKEN = re.compile(r"[A-Za-z0-9._~-]{8,200}")  # signs that need no quoting in addresses and cookies
SAFE_METHODS = frozenset({"GET", "HEAD"})
POLICY = (  # the page and its scripts come from here, and nothing else is loaded or framed
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
ENTER = b'<!doctype html><title>trackbench</title><meta http-equiv="refresh" content="0; url=/">'
WHERE_TO_ENTER = "open the address that `trackbench h5 serve` printed, with its ?token="


class Refused(HTTPException):
    """A request that is not carried out: a status of 4xx, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)


class Guard:
    """ASGI middleware of the review server.

    It refuses names of hosts that are not ours (a page elsewhere can point its own name at this machine: DNS
    rebinding), writes that another site's page sends, requests without the token where one is set, bodies that
    are too large or not JSON, and web sockets; and it sets the headers that keep browsers strict.

    Args:
        app: what is guarded.
        host: name or address that the server is bound to.
        port: of the server; part of the cookie's name, as browsers share cookies between ports.
        token: what requests must know, in a cookie (set by ``/?token=...``) or as ``Authorization: Bearer``;
            None: nothing.

    Raises:
        ValueError: a token that is too short, or holds signs that would need quoting.
    """

    def __init__(self, app: ASGIApp, *, host: str, port: int, token: str | None) -> None:
        if token is not None and not TOKEN.fullmatch(token):
            raise ValueError("a token needs 8 to 200 signs of A-Z a-z 0-9 . _ ~ -")
        self.app = app
        self.token = token
        self.cookie = f"trackbench-review-{port}"
        self.names = {host.lower(), "localhost"}
        self.any_address = not is_loopback(host)
        if self.any_address:
            machine = socket.gethostname().lower()
            self.names |= {machine, f"{machine}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it with a status of 4xx and one line of JSON."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        started = False

        async def send_strictly(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name.lower() for name, _ in message["headers"]}
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in present]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            entering = self._check(scope)
            if entering:  # not by a redirect: browsers would not send a strict cookie along if a link led here
                cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
                headers = [("content-type", "text/html"), ("set-cookie", cookie), ("cache-control", "no-store")]
                return await _reply(send_strictly, 200, ENTER, headers)
            await self.app(scope, _limited(scope, receive), send_strictly)
        except Refused as refusal:
            if started:
                raise
            body = json.dumps({"error": refusal.detail}).encode()
            await _reply(send_strictly, refusal.status_code, body, [("content-type", "application/json")])

    def _check(self, scope: Scope) -> bool:
        """Refuse what may not pass; whether the request brings the token to exchange it for the cookie."""
        hosts = _values(scope, b"host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            raise Refused(403, f"this server does not answer to the host {_short(', '.join(hosts))}")
        if scope["method"] not in SAFE_METHODS:
            _check_write(scope, hosts[0])
        if self.token is None:
            return False
        if scope["method"] in SAFE_METHODS and scope["path"] == "/":
            brought = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=20).get("token", [])
            if len(brought) == 1 and self._is_token(brought[0]):
                return True
        if not any(map(self._is_token, self._shown(scope))):
            raise Refused(401, f"a token is needed: {WHERE_TO_ENTER}")
        return False

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}")
            known = (name.hostname or "").lower()
            _ = name.port
        except ValueError:
            return False
        if name.netloc != host or "@" in host or not known:
            return False
        if known in self.names:
            return True
        try:  # a page's own name can be pointed here, an address cannot
            address = ipaddress.ip_address(known)
        except ValueError:
            return False
        return self.any_address or address.is_loopback

    def _shown(self, scope: Scope) -> Iterable[str]:
        for value in _values(scope, b"authorization"):
            scheme, _, token = value.partition(" ")
            if scheme.lower() == "bearer":
                yield token.strip()
        for value in _values(scope, b"cookie"):
            try:
                jar = SimpleCookie(value)
            except CookieError:
                continue
            if self.cookie in jar:
                yield jar[self.cookie].value

    def _is_token(self, shown: str) -> bool:
        assert self.token is not None
        return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), self.token.encode())


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_write(scope: Scope, host: str) -> None:
    """A write must come from our own page, or from a program that is no browser."""
    origins = _values(scope, b"origin")
    try:
        foreign = any(urlsplit(origin).netloc.lower() != host.lower() for origin in origins)
    except ValueError:
        foreign = True
    sites = _values(scope, b"sec-fetch-site")
    if foreign or any(site not in ("same-origin", "none") for site in sites):
        raise Refused(403, "writes are taken from the review page only, this one comes from another site")
    if [value.partition(";")[0].strip().lower() for value in _values(scope, b"content-type")] != [
        "application/json"
    ]:
        raise Refused(415, "the body must be JSON, with content-type: application/json")
    lengths = _values(scope, b"content-length")
    if any(not length.isdecimal() or len(length) > 20 for length in lengths):
        raise Refused(400, "content-length must be a number")
    if any(int(length) > LARGEST_BODY for length in lengths):
        raise Refused(413, f"the body may have at most {LARGEST_BODY} bytes")


def _limited(scope: Scope, receive: Receive) -> Receive:
    """``receive`` that refuses a body that grows beyond what it may, whatever its headers say."""
    size = 0

    async def receive_limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > LARGEST_BODY:
            raise Refused(413, f"the body may have at most {LARGEST_BODY} bytes")
        return message

    return receive_limited


async def _reply(send: Send, status: int, body: bytes, headers: list[tuple[str, str]]) -> None:
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    encoded.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
