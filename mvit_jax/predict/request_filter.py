"""What the page lets in: of gradio's server the few routes that it needs, and small requests."""

import ipaddress
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mvit_jax.common.text import first_line

# Everything else of gradio's (an API, files, a proxy, monitoring, code written by a model) is shut.
ROUTES = {
    "GET": (
        "/", "/theme.css", "/favicon.ico", "/gradio_api/queue/data", "/gradio_api/upload_progress",
    ),
    "POST": ("/gradio_api/upload", "/gradio_api/queue/join"),
}  # fmt: skip
FOLDERS = ("/assets/", "/static/")  # with GET

# A browser asks no other host for anything, whatever gradio's pages name.
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
QUESTION = 2**16  # bytes of a request that is no upload
AROUND = 2**16  # bytes around the file in an upload

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """An ASGI application in front of another one."""

    def __init__(
        self, app: Callable[..., Awaitable[None]], *, folder: Path, host: str, largest: int
    ):
        """Shuts the gate.

        Args:
          app: what is behind.
          folder: where uploads lie; a request may name no other file.
          host: the address that the page is bound to. On loopback, requests must be for loopback:
            a name elsewhere that leads here is another site's attempt.
          largest: bytes of the largest upload.
        """
        self._app, self._folder, self._largest = app, folder.resolve(), largest
        self._private = is_loopback(host)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        status = self._refusal(scope["method"], scope["path"], headers)
        if status is None and scope["path"] == "/gradio_api/queue/join":
            body = await _body(receive)
            status = None if body is not None and self._only_uploads(body) else 403
            receive = _again(body or b"", receive)
        if status is not None:
            await _answer(send, status)
            return
        try:
            await self._app(scope, receive, _with_headers(send))
        except Exception as error:
            # One line, as gradio fails at requests that make no sense. The connection is closed.
            told = f"{type(error).__name__}: {first_line(error)}"
            print(f"a request failed: {told}", file=sys.stderr, flush=True)

    def _refusal(self, method: str, path: str, headers: dict[str, str]) -> int | None:
        """A status that says no, or None."""
        method = "GET" if method == "HEAD" else method
        folder = method == "GET" and path.startswith(FOLDERS) and ".." not in path.split("/")
        if not folder and path not in ROUTES.get(method, ()):
            return 404
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if self._private and not is_loopback(host):
            return 403
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return 403  # another site's page asks
        if method != "POST":
            return None
        length = headers.get("content-length", "")
        if not length.isdecimal():
            return 411
        limit = self._largest + AROUND if path == "/gradio_api/upload" else QUESTION
        return 413 if int(length) > limit else None

    def _only_uploads(self, body: bytes) -> bool:
        """Whether all files that a request names were uploaded: gradio itself would take any."""
        try:
            named = list(_values_of("path", json.loads(body)))
        except (ValueError, RecursionError):
            return False
        return all(isinstance(path, str) and self._uploaded(path) for path in named)

    def _uploaded(self, path: str) -> bool:
        try:
            return Path(path).is_absolute() and Path(path).resolve().is_relative_to(self._folder)
        except (OSError, ValueError):
            return False


def is_loopback(host: str) -> bool:
    """Whether only this machine itself reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _values_of(key: str, value: Any):
    """All values of a key in nested JSON."""
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        for inner in value.values():
            yield from _values_of(key, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _values_of(key, inner)


async def _body(receive: Receive) -> bytes | None:
    """A small request's body; None where it is larger than it said."""
    body = b""
    while len(body) <= QUESTION:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body
    return None


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, and then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _with_headers(send: Send) -> Send:
    added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message.get("headers", ()), *added]}
        await send(message)

    return sending


async def _answer(send: Send, status: int) -> None:
    text = {404: "not found", 411: "length required", 413: "too large"}.get(status, "forbidden")
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
