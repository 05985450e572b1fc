"""HTTP request filter in front of gradio, for the attacks that gradio's options do not block.

The options of gradio 6.31 block requests for files that were not uploaded. Three attacks remain:

- Playlists posted to `process_recording`: FFmpeg runs on them and can expose local videos.
- Large requests: only the size of a file is limited, not the number of files, other form fields
  or JSON bodies.
- Requests from other sites' pages, and for host names that resolve to this machine (DNS rebinding).
"""

import ipaddress
import sys
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

AROUND = 2**16  # bytes of a request at most, in addition to the uploaded file


def filter_requests(app: Any, *, host: str, largest: int) -> Callable[..., Awaitable[None]]:
    """Wraps an ASGI application in the request filter.

    Args:
      app: the application.
      host: the address that the server is bound to. If it is loopback, the Host header of requests
        must be loopback too.
      largest: size limit of an upload in bytes.
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
        except Exception as error:  # such as gradio's, if the server stops with a page open
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
