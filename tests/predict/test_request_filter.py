"""What the page's gate lets through, asked as a server asks it."""

import asyncio
import json

import pytest

from mvit_jax.predict.request_filter import QUESTION, Gate, is_loopback

LARGEST = 10**6


class Behind:
    """An application that answers everything and notes what it was asked."""

    def __init__(self):
        self.bodies = []

    async def __call__(self, scope, receive, send):
        message = await receive()
        self.bodies.append(message.get("body"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def ask(tmp_path):
    def ask(method, path, body=b"", host="127.0.0.1", **headers):
        behind, sent = Behind(), []
        gate = Gate(behind, folder=tmp_path, host=host, largest=LARGEST)
        given = {"host": "127.0.0.1:7860", "content-length": str(len(body))} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        scope = {
            "type": "http", "method": method, "path": path,
            "headers": [(k.encode(), v.encode()) for k, v in given.items() if v is not None],
        }  # fmt: skip
        parts = [body[:10], body[10:]] if len(body) > 10 else [body]

        async def receive():
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message):
            sent.append(message)

        asyncio.run(gate(scope, receive, send))
        return sent[0]["status"], dict(sent[0]["headers"]), behind.bodies

    return ask


def joins(path):
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
    return json.dumps({"data": data, "fn_index": 0, "session_hash": "x"}).encode()


def test_the_page_and_its_parts_come_through_and_ask_no_other_host(ask):
    for path in ("/", "/theme.css", "/assets/index.js", "/static/a.woff2"):
        status, headers, _ = ask("GET", path)
        assert status == 200
        policy = headers[b"content-security-policy"].decode()
        assert "default-src 'self'" in policy and "http" not in policy


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://example.org"),
        ("GET", "/gradio_api/info"),
        ("GET", "/config"),
        ("GET", "/monitoring"),
        ("GET", "/assets/../config"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/call/answer"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/"),
        ("DELETE", "/"),
        ("OPTIONS", "/gradio_api/upload"),
    ],
)
def test_every_other_route_is_shut(ask, method, path):
    status, _, bodies = ask(method, path)
    assert status == 404 and not bodies


def test_a_request_may_name_uploads_and_no_other_file(ask, tmp_path):
    upload = tmp_path / "ab" / "a.mp4"
    upload.parent.mkdir()
    upload.write_bytes(b"x")
    body = joins(str(upload))
    status, _, bodies = ask("POST", "/gradio_api/queue/join", body)
    assert status == 200 and bodies == [body]  # put together again
    (tmp_path / "link.mp4").symlink_to("/etc/passwd")
    others = (
        "/etc/passwd", f"{tmp_path}/../secret.mp4", "a.mp4", "http://example.org/a.mp4",
        str(tmp_path / "link.mp4"), str(tmp_path) + "2/a.mp4", "\0", None, 3, ["/etc/passwd"],
    )  # fmt: skip
    for other in others:
        status, _, bodies = ask("POST", "/gradio_api/queue/join", joins(other))
        assert status == 403 and not bodies, other
    deep = b'{"a":' * 2000 + b'{"path": "/etc/passwd"}' + b"}" * 2000
    for body in (b"no json", b"", deep):
        assert ask("POST", "/gradio_api/queue/join", body)[0] == 403


def test_large_requests_are_refused_before_they_are_read(ask):
    upload = "/gradio_api/upload"
    assert ask("POST", upload, content_length=str(LARGEST))[0] == 200
    for length, status in ((str(2 * LARGEST), 413), (None, 411), ("-1", 411), ("1e3", 411)):
        found, _, bodies = ask("POST", upload, content_length=length)
        assert found == status and not bodies
    assert ask("POST", "/gradio_api/queue/join", content_length=str(QUESTION + 1))[0] == 413
    # More than it said.
    assert ask("POST", "/gradio_api/queue/join", b" " * 2 * QUESTION, content_length="9")[0] == 403


def test_other_sites_cannot_ask_in_a_visitors_name(ask):
    assert ask("GET", "/", origin="http://127.0.0.1:7860")[0] == 200
    assert ask("POST", "/gradio_api/upload", origin="http://evil.example")[0] == 403
    assert ask("POST", "/gradio_api/upload", origin="null")[0] == 403


@pytest.mark.parametrize(
    ("bound", "asked", "status"),
    [
        ("127.0.0.1", "localhost:7860", 200),
        ("127.0.0.1", "[::1]:7860", 200),
        ("127.0.0.1", "evil.example:7860", 403),
        ("127.0.0.1", "", 403),
        ("0.0.0.0", "workstation.example:7860", 200),
    ],
)
def test_on_loopback_requests_must_be_for_loopback(tmp_path, bound, asked, status):
    gate = Gate(Behind(), folder=tmp_path, host=bound, largest=1)
    assert (gate._refusal("GET", "/", {"host": asked}) or 200) == status


def test_what_fails_behind_it_is_one_line(tmp_path, capsys):
    async def fails(scope, receive, send):
        raise RuntimeError("no such session\nand more")

    gate = Gate(fails, folder=tmp_path, host="127.0.0.1", largest=1)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    asyncio.run(gate(scope, fails, fails))
    assert capsys.readouterr().err == "a request failed: RuntimeError: no such session\n"


def test_what_loopback_is():
    for host in ("127.0.0.1", "127.8.0.1", "localhost", "::1", "[::1]"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "192.168.1.2", "example.org", "127.0.0.1.example.org", "", "::"):
        assert not is_loopback(host)
