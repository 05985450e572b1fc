"""Requests that the page's filter passes and rejects, sent by a client."""

import asyncio

import fastapi
import pytest
from fastapi import testclient

from mvit_jax.predict.request_filter import AROUND, filter_requests, is_loopback

LARGEST = 10**6
UPLOAD, JOIN = "/gradio_api/upload", "/gradio_api/queue/join"


def send(method, path, bound="127.0.0.1", **headers):
    """Returns a response's status; only status 200 comes from the app behind the filter."""
    app, reached = fastapi.FastAPI(), []

    @app.api_route("/{rest:path}", methods=["GET", "HEAD", "POST", "DELETE", "OPTIONS"])
    def behind(rest):
        reached.append(rest)

    client = testclient.TestClient(filter_requests(app, host=bound, largest=LARGEST))
    values = {"host": "127.0.0.1:7860", "content_length": "0"} | headers
    request = client.build_request(method, path)
    request.headers.clear()
    request.headers.update({k.replace("_", "-"): v for k, v in values.items() if v is not None})
    status = client.send(request).status_code
    assert bool(reached) == (status == 200)
    return status


def test_requests_for_the_page_and_its_assets_pass():
    for path in ("/", "/theme.css", "/assets/index.js", "/gradio_api/queue/data"):
        assert send("GET", path) == send("HEAD", path) == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=http://example.org"),
        ("GET", "/gradio_api/%66ile=http://example.org"),
        ("HEAD", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/call/answer"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/gradio_api/upload/"),
        ("POST", "/"),
        ("DELETE", "/"),
        ("OPTIONS", "/gradio_api/upload"),
    ],
)
def test_routes_with_side_effects_or_fetches_are_blocked(method, path):
    assert send(method, path) == 404


def test_large_requests_are_rejected_before_they_are_read():
    for path, largest in ((UPLOAD, LARGEST + AROUND), (JOIN, AROUND)):
        assert send("POST", path, content_length=str(largest)) == 200
        assert send("POST", path, content_length=str(largest + 1)) == 413
        for length in (None, "-1", "1e3", ""):
            assert send("POST", path, content_length=length) == 411
        assert send("POST", path, transfer_encoding="chunked") == 411


def test_requests_from_other_origins_are_rejected():
    assert send("GET", "/", origin="http://127.0.0.1:7860") == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:80"):
        assert send("POST", UPLOAD, origin=origin) == 403


@pytest.mark.parametrize(
    ("bound", "name", "status"),
    [
        ("127.0.0.1", "localhost:7860", 200),
        ("127.0.0.1", "[::1]:7860", 200),
        ("127.0.0.1", "evil.example:7860", 403),
        ("127.0.0.1", "", 403),
        ("0.0.0.0", "workstation.example:7860", 200),
    ],
)
def test_a_server_on_loopback_rejects_other_host_names(bound, name, status):
    assert send("GET", "/", bound, host=name) == status


def test_an_exception_in_the_app_is_logged_as_one_line(capsys):
    async def fails(scope, receive, send):
        raise RuntimeError("no such session\nand more")

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    asyncio.run(filter_requests(fails, host="127.0.0.1", largest=1)(scope, fails, fails))
    assert capsys.readouterr().err == "a request failed: RuntimeError: no such session\n"


def test_loopback_addresses_are_recognised():
    for host in ("127.0.0.1", "127.8.0.1", "localhost", "::1", "[::1]"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "192.168.1.2", "example.org", "127.0.0.1.example.org", "", "::"):
        assert not is_loopback(host)
