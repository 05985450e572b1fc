"""Decoding of random clips from original video files, and from shards of the same videos.

    python -m benchmarks.shards                       synthetic videos
    python -m benchmarks.shards --videos=a.mp4,b.mp4  the first 10 seconds of your videos

An original file has 10 seconds at 340x256 in H.264 with x264's defaults (a key frame at least every
250 frames), like copies of Kinetics scaled to a short side of 256. Your videos are first re-encoded
to such files. A clip is 16 frames at stride 4 from a random start, decoded to RGB; opening the file
is included. Times are CPU times of one thread, the minimum over rounds. Ratios and PSNR compare a
shard with the original file. A star marks the defaults of `prepare`.
"""

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import cv2
import numpy as np
from absl import app, flags

from mvit_jax.data.making.transcoding import Encoded, Encoding, encode
from mvit_jax.data.media.video import Video

FRAMES, WIDTH, HEIGHT = 300, 340, 256
CLIPS, ROUNDS = 20, 3
SETTINGS = ((1, 20), (4, 20), (8, 20), (12, 20), (16, 20), (32, 20), (250, 20), (16, 23))

_VIDEOS = flags.DEFINE_list("videos", [], "Files to use instead of synthetic videos.")


def main(argv: list[str]) -> None:
    names = _VIDEOS.value or ["slow", "fast"]
    print("video            gop crf    kB    size   ms a clip   speed   PSNR")
    for name in names:
        made = (
            synthetic_frames(3.0 if name == "fast" else 0.7)
            if not _VIDEOS.value
            else frames_of(name)
        )
        compare(Path(name).stem, encode_with_defaults(made))


def compare(name: str, raw: bytes) -> None:
    """Prints a line for the original file, and one for each setting."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(raw)
        file.flush()
        base = seconds_a_clip(lambda: Video(file.name))
    print(f"{name:16} original{len(raw) / 1e3:6.0f} {1:6.2f}x {1e3 * base:11.1f} {1:6.1f}x")
    with Video(raw) as video:
        reference = video.frames(range(0, FRAMES, 10)).astype(np.float32)
    for gop, crf in SETTINGS:
        encoded = encode(raw, Encoding(gop=gop, crf=crf))
        seconds = seconds_a_clip(lambda encoded=encoded: open_encoded(encoded))
        with open_encoded(encoded) as video:
            frames = video.frames(range(0, FRAMES, 10)).astype(np.float32)
        psnr = 10 * np.log10(255**2 / np.square(frames - reference).mean())
        star = " *" if Encoding(gop=gop, crf=crf) == Encoding() else ""
        print(
            f"{name:16} {gop:3} {crf:3} {len(encoded.file) / 1e3:7.0f} "
            f"{len(encoded.file) / len(raw):6.2f}x {1e3 * seconds:11.1f} {base / seconds:6.1f}x "
            f"{psnr:6.1f}{star}",
            flush=True,
        )


def open_encoded(encoded: Encoded) -> Video:
    """Opens an encoded video as if from a shard."""
    return Video(encoded.file, "a video", encoded.index)


def seconds_a_clip(opened: Callable[[], Video]) -> float:
    """Returns CPU seconds per random clip: the mean over clips, the minimum over rounds."""
    means = []
    for _ in range(ROUNDS):
        starts = np.random.default_rng(0).integers(0, FRAMES - 63, CLIPS)
        began = time.thread_time()
        for start in starts:
            with opened() as video:
                video.frames(start + np.linspace(0, 63, 16).astype(int))
        means.append((time.thread_time() - began) / CLIPS)
    return min(means)


def synthetic_frames(speed: float) -> Iterator[np.ndarray]:
    """Yields noisy frames of a moving, rotating, zooming texture, with a small one in front.

    Args:
      speed: largest speed of the large texture, in pixels per frame.
    """
    rng = np.random.default_rng(0)
    sides = (1024, 128)
    back, front = (texture(rng, side) for side in sides)
    for frame in range(FRAMES):
        turn = 10 * np.sin(speed * frame / 60)
        scale = 1 + 0.2 * np.sin(speed * frame / 80)
        matrix = cv2.getRotationMatrix2D((512, 512), turn, scale)
        matrix[:, 2] += WIDTH / 2 - 512 - 200 * np.sin(speed * frame / 200), HEIGHT / 2 - 512
        image = cv2.warpAffine(back, matrix, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT)
        x = round(100 + 90 * np.sin(speed * frame / 50))
        image[60:188, x : x + 128] = front
        noisy = 128 + image + rng.normal(0, 2, image.shape)
        yield np.clip(noisy, 0, 255).astype(np.uint8)


def texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Returns smooth noise at several scales with mean zero, `[side, side, 3]`."""
    coarse = [rng.normal(0, 24, (side >> k, side >> k, 3)) for k in range(1, 6)]
    return np.sum([cv2.resize(noise, (side, side)) for noise in coarse], axis=0)


def frames_of(path: str) -> Iterator[np.ndarray]:
    """Yields `FRAMES` resized frames of a file; a shorter file is played back and forth."""
    with Video(path) as video:
        last = video.num_frames - 1
        resized = [
            cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
            for _, image in video.in_order(range(min(video.num_frames, FRAMES)))
        ]
    last = max(len(resized) - 1, 1)
    yield from (resized[last - abs(last - frame % (2 * last))] for frame in range(FRAMES))


def encode_with_defaults(frames: Iterator[np.ndarray]) -> bytes:
    """Encodes an mp4 file with x264's defaults."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


if __name__ == "__main__":
    app.run(main)
