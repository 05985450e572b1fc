"""The demo page: its limits and errors, and its use in a real browser."""

import asyncio
import base64
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.data.media.images import Frames
from mvit_jax.data.media.video import Video
from mvit_jax.predict import server
from mvit_jax.predict.boxes import BoxPredictor, KeyFrame, Shown
from mvit_jax.predict.server import Limits, check_kind, check_size
from tests.predict import detection_run, small
from tests.support import tiny

LIMITS = Limits(megabytes=1, minutes=0.25)


def test_file_kinds_are_checked_by_ending_and_first_bytes(tmp_path):
    video = small.write_video(tmp_path / "a.mp4", small.textured(10))
    check_kind(video, list(server.VIDEOS))
    for ending in ("mov", "mkv", "avi"):
        path = small.write_video(tmp_path / f"a.{ending}", small.textured(10))
        check_kind(path.rename(path.with_suffix(f".{ending.upper()}")), list(server.VIDEOS))
    refused = {
        "list.mp4": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "not a video"),
        "concat.mkv": (b"ffconcat version 1.0\nfile a.mp4\n", "not a video"),
        "empty.mp4": (b"", "the file is empty"),
        "a.txt": (b"text", r"accepts \.mp4 .*, not \.txt"),
        "none": (b"text", "not files without a suffix"),
        "a.png": (b"\x89PNG\r\n\x1a\n", r"not \.png"),
    }
    for name, (content, reason) in refused.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=reason):
            check_kind(tmp_path / name, list(server.VIDEOS))
    # Formats that Pillow passes to another program are rejected by their content.
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(UserError, match="it is not an image"):
        check_kind(tmp_path / "a.png", [".png"])


def test_long_videos_and_large_frames_are_refused(tmp_path, monkeypatch):
    path = small.write_video(tmp_path / "a.mp4", small.textured(60), rate=10)
    with Video(path) as video:
        check_size(video, Limits(1, 0.1))
        with pytest.raises(
            UserError, match=r"it is too long .0:06, 60 frames.: .* up to 0.05 minutes"
        ):
            check_size(video, Limits(1, 0.05))
        with monkeypatch.context() as patch:
            patch.setattr(Video, "fps", 1e6)  # false times
            with pytest.raises(UserError, match=r"up to 0\.001 minutes"):
                check_size(video, Limits(1, 0.001))
        monkeypatch.setattr(server, "MAX_PIXELS", 48 * 64 - 1)
        with pytest.raises(UserError, match="frames of 64 x 48 pixels are too large"):
            check_size(video, Limits(1, 0.1))
    check_size(Frames(np.zeros((1, 10, 10, 3), np.uint8)), Limits(1, 0.01))


def test_a_port_in_use_or_a_foreign_address_is_a_one_sentence_error():
    def load():
        raise AssertionError("the model is loaded for nothing")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is in use: choose another --port"):
            server.serve(load, host="127.0.0.1", port=port, limits=LIMITS, top=5)
    with pytest.raises(UserError, match=r"cannot listen on 192\.0\.2\.1, port 0"):
        server.serve(load, host="192.0.2.1", port=0, limits=LIMITS, top=5)


def test_missing_gradio_is_an_error_with_the_install_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=re.escape("gradio is not installed: pip install -e '.[demo]'")
    ):
        server.serve(lambda: None, host="127.0.0.1", port=0, limits=LIMITS, top=5)


def test_a_url_in_a_request_is_not_downloaded(digits, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    gradio = pytest.importorskip("gradio")
    blocks = server.build(small.shared_run(digits)[1], LIMITS, 5)
    (file,) = (block for block in blocks.blocks.values() if isinstance(block, gradio.File))
    named = {"path": "http://example.org/a.mp4", "meta": {"_type": "gradio.FileData"}}
    to_cache = gradio.processing_utils.async_move_files_to_cache
    with pytest.raises(ValueError, match="a URL instead of an upload"):
        asyncio.run(to_cache(named, file, check_in_upload_folder=True))


def persons(video, progress):
    """Returns the same two persons at two key frames."""
    boxes = np.array([(0.1, 0.1, 0.4, 0.9), (0.5, 0.1, 0.9, 0.9)])
    return [KeyFrame(seconds, boxes, np.ones(2)) for seconds in (1.0, 2.0)]


def test_the_page_of_persons_has_the_video_a_table_and_key_frames(tmp_path, monkeypatch):
    detection_run.make_run(tmp_path)
    (tmp_path / "labels.txt").write_text("<b>stand\nwalk\ntalk\n")
    path = detection_run.wide_video(tmp_path / "<i>.mp4")
    page = server.BoxPage(BoxPredictor(tmp_path), persons, Shown(3, 0.0))
    heading, video, table, sheet = server._answer_boxes(page, path, LIMITS, mock.Mock())
    assert heading == "<p><b>&lt;i&gt;.mp4</b>: 0:04; 2 persons in 2 key frames</p>"
    coded = re.fullmatch(r"<video controls muted src='data:video/mp4;base64,(.*)'></video>", video)
    with Video(base64.b64decode(coded[1])) as drawn:
        assert drawn.num_frames == 49
    assert table.count("<tr>") == 3 and "&lt;b&gt;stand 0." in table and "<b>" not in table
    assert "<td>0</td><td>0:01.0 - 0:02.0</td>" in table
    assert "data:image/png" in sheet
    monkeypatch.setattr(server, "SECONDS", 1.5)
    _, video, *_ = server._answer_boxes(page, path, LIMITS, mock.Mock())
    assert video.endswith("of the video; all key frames are predicted.</p>")
    nobody = dataclasses.replace(
        page, persons=lambda video, progress: [KeyFrame(1.0, np.zeros((0, 4)), np.zeros(0))]
    )
    heading, *rest = server._answer_boxes(nobody, path, LIMITS, mock.Mock())
    assert "0 persons in 1 key frame" in heading and rest == [None] * 3


def serve(run, folder, *flags):
    """Starts the page of a run, which writes temporary files to `folder`."""
    program = [sys.executable, "-m", "mvit_jax.predict", "--serve", f"--workdir={run}", "--port=0"]
    return subprocess.Popen(
        [*program, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=run.parent, env=os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(tiny.ROOT)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def served(digits, tmp_path_factory):
    """A server of a small model, and the folder that it may write temporary files to."""
    folder = tmp_path_factory.mktemp("page")
    small.make_run(digits, folder / "run")
    temporary = folder / "temporary"
    temporary.mkdir()
    process = serve(folder / "run", temporary, "--max_mb=1", "--max_minutes=0.25")
    try:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert address, line + process.stderr.read()
        yield address[0], temporary
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read().strip().splitlines()[-1] == "stopped"
        assert not list(temporary.glob("mvit_jax_*"))
        assert not (folder / ".gradio").exists()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def browser(served):
    """A page in Chromium, with the URLs that it requested and its console errors."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    assert chromium, "this test needs chromium"
    with playwright.sync_playwright() as started:
        open_ = started.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        tab = open_.new_page()
        tab.requested, tab.errors = [], []
        tab.on("request", lambda request: tab.requested.append(request.url))
        tab.on("console", lambda m: tab.errors.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda error: tab.errors.append(str(error)))
        tab.goto(served[0])
        tab.wait_for_selector("input[type=file]", state="attached")
        yield tab
        open_.close()


@pytest.fixture
def files(tmp_path):
    """A valid video, and a file for each reason to reject it."""
    good = small.write_video(tmp_path / "good.mp4", small.textured(150, height=40)).read_bytes()
    (tmp_path / "huge.mp4").write_bytes(good + bytes(2 * 10**6))
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(good[: len(good) // 2])
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    (tmp_path / "words.txt").write_text("no video")
    small.write_video(tmp_path / "long.mp4", small.textured(500, height=40))
    small.write_audio(tmp_path / "tone.mp4")
    return tmp_path


def drop(tab, path, wait):
    """Chooses a file and waits for something to appear."""
    for close in tab.query_selector_all(".toast-close"):
        close.click()
    tab.wait_for_selector(".toast-body", state="detached")
    tab.set_input_files("input[type=file]", path)
    tab.wait_for_selector(wait, timeout=120_000)
    return tab.inner_text(wait)


@pytest.mark.browser
def test_a_video_shows_classes_over_time_and_grad_cam(browser, files, served):
    assert "deleted" in browser.inner_text("body")
    drop(browser, files / "good.mp4", "h3:has-text('Evidence')")
    # The heading may be there before the progress, with its own "100%", is gone.
    browser.wait_for_selector("text=drawing Grad-CAM", state="detached")
    body = browser.inner_text("body")
    assert "good.mp4: 0:05; means over 18 windows" in body
    assert len(re.findall(r"\d+%", body)) == 5
    assert re.search(r"0:00\.0 - 0:\d\d\.\d\s+\w+\s+0\.\d\d", body)
    for label in ("classes over time", "Grad-CAM"):
        image = browser.wait_for_selector(f"img[alt='{label}']")
        assert browser.evaluate("i => i.complete && i.naturalWidth > 400", image), label
    assert not browser.errors
    outside = [
        url for url in browser.requested if not url.startswith((served[0], "data:", "blob:"))
    ]
    assert not outside and len(browser.requested) > 10
    # The upload is deleted, and the page is ready for the next file.
    browser.wait_for_selector("text=Drop File Here")
    assert not [path for path in served[1].rglob("*") if path.is_file() and path.stat().st_size]
    for width in (375, 1280):
        browser.set_viewport_size({"width": width, "height": 800})
        assert browser.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_a_page_of_action_detection_plays_the_video_with_boxes(browser, tmp_path):
    (tmp_path / "run").mkdir()
    detection_run.make_run(tmp_path / "run")
    detection_run.wide_video(tmp_path / "yard.mp4")
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("yard,0001,0.1,0.2,0.5,0.9,,0.9\nyard,0002,0.1,0.2,0.5,0.9,,0.9\n")
    process = serve(tmp_path / "run", tmp_path, f"--boxes={boxes}")
    try:
        address = re.search(r"http://\S+", process.stdout.readline())
        assert address, process.stderr.read()
        tab = browser.context.browser.new_page()
        tab.goto(address[0])
        tab.wait_for_selector("input[type=file]", state="attached")
        drop(tab, tmp_path / "yard.mp4", "img[alt='key frames']")
        assert "yard.mp4: 0:04; 1 person in 2 key frames" in tab.inner_text("body")
        tab.wait_for_function("document.querySelector('video').readyState > 0")
        shape = tab.evaluate("(v => [v.videoWidth, v.duration])(document.querySelector('video'))")
        assert shape == [512, pytest.approx(49 / 24, abs=0.1)]
        for width in (375, 1280):
            tab.set_viewport_size({"width": width, "height": 800})
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
        (tmp_path / "porch.mp4").write_bytes((tmp_path / "yard.mp4").read_bytes())
        message = drop(tab, tmp_path / "porch.mp4", ".toast-body")
        assert "no boxes of porch, only of 1 video (yard)" in message
        tab.close()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.browser
def test_bad_files_are_rejected_in_one_sentence_and_the_page_still_works(browser, files, served):
    for name, reason in {
        "cut.mp4": "it is not a video, or it is damaged or cut off",
        "empty.mp4": "empty",
        "list.mp4": "it is not a video, or its beginning is damaged",
        "long.mp4": "it is too long (0:17, 500 frames): this page accepts videos of up to 0.25",
        "tone.mp4": "it holds no video, only other streams",
        "huge.mp4": "exceed the maximum allowed size of 1.0 Mb",
        "words.txt": "Invalid file type",
    }.items():
        message = drop(browser, files / name, ".toast-body")
        assert reason.lower() in message.lower(), (name, message)
        assert "Traceback" not in message and "/" not in message.replace("0:", "")
    files.joinpath("good.mp4").rename(files / "again.mp4")
    drop(browser, files / "again.mp4", "p:has-text('again.mp4: 0:05')")
    assert not [path for path in served[1].rglob("*") if path.is_file() and path.stat().st_size]


@pytest.mark.browser
def test_the_server_rejects_paths_and_files_outside_its_uploads(served, tmp_path):
    url, temporary = served

    def send(path, body=None, **headers):
        request = urllib.request.Request(url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    video = small.write_video(tmp_path / "of_this_machine.mp4", small.textured(10))
    for path in (f"file={video}", f"file/{video}", "file=http://example.org"):
        assert send(f"/gradio_api/{path}")[0] == 404
    assert send("/gradio_api/proxy=http://example.org")[0] == 400
    assert send("/monitoring")[0] == send("/monitoring/summary")[0] == 403
    assert send("/static/..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd")[0] in (403, 404)
    assert json.loads(send("/gradio_api/info")[1])["named_endpoints"] == {}

    def join(session, named):
        """Returns the page's response to a request that names a file."""
        data = [{"path": named, "meta": {"_type": "gradio.FileData"}}]
        body = json.dumps({"data": data, "fn_index": 0, "session_hash": session}).encode()
        assert (
            send("/gradio_api/queue/join", body, **{"Content-Type": "application/json"})[0] == 200
        )
        _, events = send(f"/gradio_api/queue/data?session_hash={session}")
        return next(line for line in events.splitlines() if "process_completed" in line)

    form = {"Content-Type": "multipart/form-data; boundary=b"}
    upload = (
        b'--b\r\nContent-Disposition: form-data; name="files"; filename="../../x.mp4"\r\n\r\n'
        b"x\r\n--b--\r\n"
    )
    status, answer = send("/gradio_api/upload", upload, **form)
    assert status == 200 and str(temporary) in answer and ".." not in answer
    link = Path(json.loads(answer)[0]).with_name("link.mp4")
    link.symlink_to(video)
    outside = f"{link.parent}/../../../{video.name}"
    (temporary / video.name).symlink_to(video)
    for i, named in enumerate((str(video), outside, str(link), "\0", 3)):
        response = join(f"other{i}", named)
        assert (
            '"success":false' in response
            and video.name not in response
            and "link.mp4" not in response
        )
    assert video.exists()  # the page deletes uploads alone
    link.unlink()
    (temporary / video.name).unlink()
    # FFmpeg would cut the videos that such a list names.
    listed = f"#EXTM3U\n#EXTINF:1,\nfile://{video}\n".encode()
    recording = upload.replace(b'"files"', b'"video"').replace(b"x\r\n--b--", listed + b"\r\n--b--")
    assert send("/gradio_api/process_recording", recording, **form)[0] == 404
    status, _ = send("/", Host="evil.example")
    assert status == 403
    # Without the browser's file chooser: the server checks the size too.
    large = upload.replace(b"x\r\n--b--", bytes(2**20 + 1) + b"\r\n--b--")
    assert send("/gradio_api/upload", large, **form)[0] == 413
    # Other fields of a form would be held in memory: too large a request is not read.
    whole = {"Content-Length": str(2**20 + 2**16 + 1)}
    assert send("/gradio_api/upload", upload, **form, **whole)[0] == 413


@pytest.mark.browser
def test_the_server_exits_at_once_with_an_open_connection(digits, tmp_path):
    run = small.make_run(digits, tmp_path / "run")
    process = serve(run, tmp_path, "--host=0.0.0.0")
    try:
        port = int(process.stdout.readline().split()[0].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(
                b"GET /gradio_api/queue/data?session_hash=a HTTP/1.1\r\nHost: a\r\n\r\n"
            )
            assert connection.recv(12) == b"HTTP/1.1 200"
            process.terminate()
            began = time.monotonic()
            assert process.wait(timeout=20) == 128 + signal.SIGTERM
            assert time.monotonic() - began < 10
        errors = process.stderr.read()
        assert "warning: anyone who can reach 0.0.0.0 can use this page" in errors
        assert "Traceback" not in errors
        assert not list(tmp_path.glob("mvit_jax_*"))
    finally:
        process.kill()
        process.communicate()
