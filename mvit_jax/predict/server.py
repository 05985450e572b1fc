"""Local web page for uploads: classes, classes over time, Grad-CAM; or the actions of persons."""

import base64
import errno
import html
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mvit_jax.analysis import render
from mvit_jax.common import extras
from mvit_jax.common.errors import UserError
from mvit_jax.common.text import plural
from mvit_jax.data.media import images
from mvit_jax.data.media.images import DecodeError, Frames
from mvit_jax.data.media.video import Video
from mvit_jax.predict import box_figures, figures, tables
from mvit_jax.predict.boxes import BoxPredictor, KeyFrames, Shown, described
from mvit_jax.predict.predictor import Prediction, Predictor
from mvit_jax.predict.request_filter import filter_requests, is_loopback
from mvit_jax.predict.windows import clock, interval

# The page takes fewer kinds of files than `predict`: those that `check_kind` recognises.
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

MAX_PIXELS = 4096 * 2304  # of a frame at most: 28 MB in memory
MAX_FPS = 120  # limits the number of frames, as a file may state any frame rate
SECONDS = 60  # of a video with boxes that the page shows
SIDE = 480  # short side of that video at most
WAITING = 8  # requests in the queue at most; one is processed at a time

STYLE = """
.gradio-container { max-width: 960px !important; margin: 0 auto !important; }
.result img { width: 100%; height: auto; display: block; }
.result video { width: 100%; height: auto; display: block; }
.result img.pixels { image-rendering: pixelated; }
.result .wide { overflow-x: auto; contain: inline-size; }
.result .wide img { min-width: 600px; }
.result .wide img.sheet { min-width: 900px; }
.result td, .result th { padding: .2rem .75rem !important; }
.result td:last-child { text-align: right; }
.result .persons td { text-align: left; vertical-align: top; }
.result .persons td, .result .persons th { word-break: normal; overflow-wrap: normal; }
"""


@dataclass(frozen=True)
class Limits:
    """Limits of an upload."""

    megabytes: int  # of a file
    minutes: float  # of a video


@dataclass(frozen=True)
class BoxPage:
    """A page of action detection.

    Attributes:
      predictor: the model.
      persons: returns the key frames of an opened video, with the boxes of persons.
      shown: choice of classes.
    """

    predictor: BoxPredictor
    persons: KeyFrames
    shown: Shown


def serve(
    load: Callable[[], Predictor | BoxPage], *, host: str, port: int, limits: Limits, top: int
) -> None:
    """Serves the page until interrupted; uploads go to a temporary folder.

    Args:
      load: loads the model; called after the port is bound.
      host: an address of this machine; prints a warning if it is not loopback.
      port: 0 for any free port.
      limits: of an upload.
      top: number of most probable classes to show.

    Raises:
      UserError: gradio is not installed, or the address cannot be bound.
    """
    extras.require("gradio")
    with (
        _open_socket(host, port) as listener,
        tempfile.TemporaryDirectory(prefix="mvit_jax_") as folder,
    ):
        # By default SIGTERM ends the process at once, without removing the folder.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        # gradio reads these variables on import.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        tempfile.tempdir = folder  # for uploads in progress
        try:
            _run(build(load(), limits, top), listener, limits)
        finally:
            tempfile.tempdir = None


def _run(blocks: Any, listener: socket.socket, limits: Limits) -> None:
    import uvicorn

    host, port = listener.getsockname()[:2]
    app = filter_requests(_mount(blocks, limits), host=host, largest=limits.megabytes * 2**20)
    if not is_loopback(host):
        print(
            f"warning: anyone who can reach {host} can use this page, without a password",
            file=sys.stderr,
        )
    address = f"[{host}]" if ":" in host else host
    print(f"http://{address}:{port}  (Ctrl-C ends it)", flush=True)
    # The connection of an open page must not delay shutdown.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


def _open_socket(host: str, port: int) -> socket.socket:
    try:
        version = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=version)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use: choose another --port, or 0 for any") from None
        raise UserError(
            f"the page cannot listen on {host}, port {port} ({error.strerror}): check --host and "
            "--port"
        ) from None


def _mount(blocks: Any, limits: Limits) -> Any:
    import gradio
    from fastapi import FastAPI
    from gradio.themes.default import Default

    # gradio checks paths in requests only if this is set.
    blocks.has_launched = True
    return gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=limits.megabytes * 2**20,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=STYLE,
    )


def build(model: Predictor | BoxPage, limits: Limits, top: int) -> Any:
    """Returns the page as gradio Blocks; `limits` are enforced on the server."""
    import gradio

    predictor = model.predictor if isinstance(model, BoxPage) else model
    takes_images = isinstance(predictor, Predictor) and predictor.model.frames == 1
    endings = [*VIDEOS, *(IMAGES if takes_images else ())]
    kinds = "a video or an image" if takes_images else "a video"
    with gradio.Blocks(
        title="mvit_jax", analytics_enabled=False, delete_cache=(300, 900), fill_width=False
    ) as blocks:
        gradio.Markdown(
            f"# What does the model see?\n{predictor.config.model.variant}, "
            f"{len(predictor.names)} classes. Drop {kinds} of up to {limits.megabytes} MB and "
            f"{limits.minutes:g} minutes. Files stay on this machine and are deleted after "
            "prediction."
        )
        file: Any = gradio.File(
            label=f"{kinds[2].upper()}{kinds[3:]} ({' '.join(endings)})",
            file_types=endings,
            height=140,
        )
        file.async_move_resource_to_block_cache = partial(
            _cached_upload, file.async_move_resource_to_block_cache
        )
        # Not gradio.HTML, whose templates the browser runs as code.
        result = partial(gradio.Markdown, elem_classes="result", latex_delimiters=[])
        outputs: list[Any] = [result() for _ in range(4)]
        if isinstance(model, Predictor):
            outputs[1] = gradio.Label(label="Classes", num_top_classes=top, show_heading=False)

        def answer(path: str | None, progress=gradio.Progress()) -> Iterator[tuple[Any, ...]]:  # noqa: B008
            if path is None:
                return
            yield (None,) * len(outputs)
            try:
                check_kind(Path(path), endings)
                if isinstance(model, BoxPage):
                    yield _answer_boxes(model, Path(path), limits, progress)
                else:
                    yield _answer(model, Path(path), limits, top, progress)
            except UserError as error:
                reason = error.reason if isinstance(error, DecodeError) else str(error)
                raise gradio.Error(
                    f"{Path(path).name}: {reason}", duration=None, print_exception=False
                ) from None
            finally:
                Path(path).unlink(missing_ok=True)

        done = file.upload(
            answer, file, outputs, api_visibility="private", show_progress_on=outputs[1],
        )  # fmt: skip
        # Clears the upload for the next file, also after a failure.
        for after in (done.success, done.failure):
            after(lambda: None, None, file, api_visibility="private", show_progress="hidden")
    blocks.queue(api_open=False, max_size=WAITING, default_concurrency_limit=1)
    return blocks


async def _cached_upload(to_cache: Callable[..., Any], path: str) -> str:
    """Returns a request's file in the cache; gradio has already refused paths not uploaded."""
    if "://" in path:  # `to_cache` would download the address, without a size limit
        raise ValueError("a request contained a URL instead of an upload")
    return await to_cache(path)


def _answer(
    predictor: Predictor, path: Path, limits: Limits, top: int, progress: Any
) -> tuple[Any, ...]:
    """Returns heading, probabilities by class, classes over time, and Grad-CAM."""
    prediction = predictor.predict(
        path,
        check=lambda video: check_size(video, limits),
        progress=lambda done, of: progress((done, of), desc="predicting", unit="windows"),
    )
    names = predictor.names
    # Two classes may have the same name.
    confidences: dict[str, float] = {}
    for i in (-prediction.probabilities).argsort(kind="stable")[:top]:
        name = names[i] if names[i] not in confidences else f"{names[i]} ({i})"
        confidences[name] = float(prediction.probabilities[i])
    progress(1.0, desc="drawing Grad-CAM")
    return (
        _heading(path.name, prediction),
        confidences,
        _timeline_plot(prediction, names),
        _grad_cam(predictor, prediction),
    )


def _answer_boxes(page: BoxPage, path: Path, limits: Limits, progress: Any) -> tuple[Any, ...]:
    """Returns heading, the video with boxes, persons with their classes, and key frames."""
    predictor, names = page.predictor, page.predictor.names
    prediction = predictor.predict(
        path,
        page.persons,
        check=lambda video: check_size(video, limits),
        progress=lambda done, of: progress((done, of), desc="predicting", unit="key frames"),
    )
    result = described(prediction, names, page.shown)
    count = len(result["persons"])
    heading = (
        f"<p><b>{html.escape(path.name)}</b>: {clock(prediction.seconds)}; "
        f"{plural(count, 'person')} in {plural(len(prediction.frames), 'key frame')}</p>"
    )
    if not count:
        return heading, None, None, None
    first = [frame for frame in prediction.frames if frame.seconds < SECONDS]
    start = replace(prediction, frames=tuple(first or prediction.frames[:1]))
    frames, fps = box_figures.moving(
        path, start, names, page.shown, largest=SIDE,
        progress=lambda done, of: progress((done, of), desc="drawing", unit="frames"),
    )  # fmt: skip
    coded = base64.b64encode(render.mp4(frames, fps)).decode()
    shown = f"<video controls muted src='data:video/mp4;base64,{coded}'></video>"
    if len(first) < len(prediction.frames):
        shown += f"<p>The first {clock(SECONDS)} of the video; all key frames are predicted.</p>"
    sheet = render.png(box_figures.picture(path, prediction, names, page.shown, columns=2))
    return (
        heading,
        shown,
        _person_table(result["persons"]),
        f"<h3>Key frames</h3><div class='wide'>{_image(sheet, 'png', 'key frames', 'sheet')}</div>",
    )


def _person_table(persons: list[dict[str, Any]]) -> str:
    """Returns the longest tracks with their classes as HTML."""
    rows = "".join(
        f"<tr><td>{person['track']}</td><td>{tables.moments(person)}</td><td>"
        + ", ".join(
            f"{html.escape(entry['class'])} {entry['probability']:.2f}"
            for entry in person["classes"]
        )
        + "</td></tr>"
        for person in persons[: tables.PERSONS]
    )
    more = len(persons) - tables.PERSONS
    return (
        "<h3>Persons</h3><div class='persons'><table><tr><th>person</th><th>time</th>"
        f"<th>classes, by mean probability</th></tr>{rows}</table></div>"
        + f"<p>And {plural(more, 'person')} for a shorter time.</p>"
        * (more > 0)
    )


def _heading(name: str, prediction: Prediction) -> str:
    line, clips = prediction.timeline, prediction.clips
    if line is not None:
        summary = f"{clock(prediction.seconds)}; means over {clips} windows"
    elif prediction.seconds:
        summary = f"{prediction.seconds:.1f} s; means over {clips} clip{'s' * (clips > 1)}"
    else:
        summary = "an image"
    return f"<p><b>{html.escape(name)}</b>: {summary}</p>"


def _timeline_plot(prediction: Prediction, names: tuple[str, ...]) -> str | None:
    if prediction.timeline is None:
        return None
    drawn = figures.timeline_picture(prediction.timeline, names)
    rows = "".join(
        f"<tr><td>{interval(s.start, s.end)}</td><td>{html.escape(names[s.label])}</td>"
        f"<td>{s.probability:.2f}</td></tr>"
        for s in prediction.timeline.segments()
    )
    return (
        f"<h3>Over time</h3><div class='wide'>{_image(drawn, 'png', 'classes over time')}</div>"
        f"<table><tr><th>time</th><th>class</th><th>probability</th></tr>{rows}</table>"
    )


def _grad_cam(predictor: Predictor, prediction: Prediction) -> str:
    shown = prediction.shown
    frames = figures.animate(shown, predictor.grad_cam(shown))
    moving = render.gif(frames, figures.animation_fps(shown, predictor.config.data.stride))
    return (
        f"<h3>Evidence for the class</h3>{_image(moving, 'gif', 'Grad-CAM', 'pixels')}"
        f"<p>Left: input frames. Right: {html.escape(figures.CAPTION)}.</p>"
    )


def _image(data: bytes, kind: str, label: str, style: str = "") -> str:
    """Returns an image as HTML with a data URI, so that no file has to be stored or served."""
    coded = base64.b64encode(data).decode()
    return f"<img class='{style}' alt='{label}' src='data:image/{kind};base64,{coded}'>"


def check_kind(path: Path, endings: list[str]) -> None:
    """Checks a file's kind by its extension and its first bytes.

    FFmpeg also reads playlists, which refer to other files and addresses, and Pillow reads formats
    that are programs. Such a file, renamed to look like a video, must not reach either library.

    Raises:
      UserError: the file is empty, or the page does not take its kind.
    """
    ending = path.suffix.lower()
    if ending not in endings:
        shown = ending or "files without a suffix"
        raise UserError(f"this page accepts {' '.join(endings)}, not {shown}")
    with path.open("rb") as file:
        start = file.read(12)
    if not start:
        raise UserError("the file is empty")
    image = start.startswith((b"\xff\xd8\xff", b"\x89PNG", b"BM")) or (
        start[:4] == b"RIFF" and start[8:] == b"WEBP"
    )
    video = (
        start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
        or start.startswith(b"\x1a\x45\xdf\xa3")
        or (start[:4] == b"RIFF" and start[8:] == b"AVI ")
    )
    if images.is_image(path) and not image:
        raise UserError("it is not an image, or its beginning is damaged")
    if not images.is_image(path) and not video:
        raise UserError("it is not a video, or its beginning is damaged")


def check_size(video: Video | Frames, limits: Limits) -> None:
    """Checks the length and the frame size of a video; an image always passes.

    Raises:
      UserError: the video is too long, or its frames are too large.
    """
    if isinstance(video, Frames):
        return
    seconds, frames = video.num_frames / video.fps, limits.minutes * 60 * MAX_FPS
    if seconds > 60 * limits.minutes or video.num_frames > frames:
        raise UserError(
            f"it is too long ({clock(seconds)}, {video.num_frames:,} frames): this page accepts "
            f"videos of up to {limits.minutes:g} minutes"
        )
    width, height = video.frame_size
    if width * height > MAX_PIXELS:
        raise UserError(f"its frames of {width} x {height} pixels are too large: scale it down")
