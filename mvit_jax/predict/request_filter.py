"""What the page lets in of what gradio's own switches leave open.

Of 6.31 these hold that no request reads or names a file that was not uploaded. They do not hold:
FFmpeg runs on what is posted to `process_recording`, so a list in it shows videos of this machine;
of an upload each file is bounded, but neither their number nor its other fields, nor a question;
other sites' pages, and names elsewhere that lead here, are answered.
"""

import ipaddress
import sys
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

AROUND = 2**16  # bytes of a request beside the file that it uploads


def guarded(app: Any, *, host: str, largest: int) -> Callable[..., Awaitable[None]]:
    """Gives an ASGI application that refuses requests in front of another one.

    Args:
      host: the address that the page is bound to. On loopback, requests must be for loopback.
      largest: bytes of the largest upload.
    """
    from starlette.requests import Request  # starlette comes with gradio
    from starlette.responses import PlainTextResponse

    private = is_loopback(host)
    posts = {"/gradio_api/upload": largest + AROUND, "/gradio_api/queue/join": AROUND}

    def refusal(request: Any) -> int | None:
        headers, path = request.headers, request.scope["path"]
        asked, origin = headers.get("host", ""), headers.get("origin")
        if private and not is_loopback(urlsplit(f"//{asked}").hostname or ""):
            return 403
        if origin is not None and urlsplit(origin).netloc != asked:
            return 403
        if request.method in ("GET", "HEAD"):  # gradio would fetch file=http://... for anyone
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
        except Exception as error:  # gradio's, when the server ends while a page is open, say
            first = str(error).partition("\n")[0]
            print(f"a request failed: {type(error).__name__}: {first}", file=sys.stderr, flush=True)

    return gate


def is_loopback(host: str) -> bool:
    """Whether only this machine itself reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
