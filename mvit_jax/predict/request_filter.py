"""HTTP request filter in front of gradio, for the attacks that gradio's options do not block.

In gradio 6.31 its options block requests that read or name a file that was not uploaded. They do
not block these:

- FFmpeg runs on files posted to `process_recording`; a playlist there can expose local videos.
- An upload's files have a size limit; their number, other form fields and JSON bodies have none.
- Requests from other sites' pages, and for host names that resolve here (DNS rebinding).
"""

import ipaddress
import sys
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

AROUND = 2**16  # bytes of a request at most, besides the uploaded file


def guarded(app: Any, *, host: str, largest: int) -> Callable[..., Awaitable[None]]:
    """Wraps an ASGI application in the request filter.

    Args:
      app: the application.
      host: the address that the server is bound to. On loopback, requests must be for loopback.
      largest: bytes of an upload at most.
    """
    from starlette.requests import Request  # starlette comes with gradio
    from starlette.responses import PlainTextResponse

    private = is_loopback(host)
    posts = {"/gradio_api/upload": largest + AROUND, "/gradio_api/queue/join": AROUND}

    def refusal(request: Any) -> int | None:
        headers, path = request.headers, request.scope["path"]
        target, origin = headers.get("host", ""), headers.get("origin")
        if private and not is_loopback(urlsplit(f"//{target}").hostname or ""):
            return 403
        if origin is not None and urlsplit(origin).netloc != target:
            return 403
        if request.method in ("GET", "HEAD"):  # gradio would fetch file=http://... for any client
            return 404 if path.startswith("/gradio_api/file") else None
        if request.method != "POST" or path not in posts:
            return 404
        length = headers.get("content-length", "")
        if not length.isdecimal() or "transfer-encoding" in headers:
            return 411
        return 413 if int(length) > posts[path] else None

    async def gate(scope: Any, receive: Any, send: Any) -> None:
        status = refusal(Request(scope)) if scope["type"] == "http" else None
        answer = app if status is None else PlainTextResponse(HTTPStatus(status).phrase, status)
        try:
            await answer(scope, receive, send)
        except Exception as error:  # for example gradio's, if the server stops with a page open
            first = str(error).partition("\n")[0]
            print(f"a request failed: {type(error).__name__}: {first}", file=sys.stderr, flush=True)

    return gate


def is_loopback(host: str) -> bool:
    """Returns True if the address is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
