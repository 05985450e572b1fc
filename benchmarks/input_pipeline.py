"""Throughput of the input pipeline, compared with PySlowFast's steps and with tf.data.

    python -m benchmarks.input_pipeline [--videos=24] [--rounds=5] [--keep=DIR]

Videos: clips per second of one core, for decoding alone, with the random resized crop, and with
RandAugment too (the full Kinetics recipe). Each decoding gives two clips. Inputs are raw files
(10 s, 340x256, H.264 with x264's defaults) and the shards that `prepare videos` writes. The
reference follows the steps of PySlowFast: PyAV decodes the whole span to RGB, Pillow applies
RandAugment frame by frame, and values are normalised before the crop is resized in float32.

Images: images per second of all cores, from JPEGs of 500x400 to random crops of 224 (bicubic with
antialiasing), compared with the same steps in tf.data.

The implementations alternate within one run, as machines are shared: compare the ratios.
"""

import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
from absl import app, flags
from PIL import Image, ImageEnhance, ImageOps

from mvit_jax.data import pipeline, randaugment
from mvit_jax.data.augmentation import Augmentation, random_box
from mvit_jax.data.loader import LoaderOptions
from mvit_jax.data.making import packing
from mvit_jax.data.pipeline import ClipSettings
from mvit_jax.data.source import Source, open_source

VIDEOS = flags.DEFINE_integer("videos", 24, "Videos to make.")
IMAGES = flags.DEFINE_integer("images", 256, "Images to make.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds.")
KEEP = flags.DEFINE_string("keep", None, "Folder for the files, for reuse.")

FRAMES, STRIDE, SIZE, REPEATS = 16, 4, 224, 2
WIDTH, HEIGHT, SECONDS = 340, 256, 10
POLICY = "rand-m7-n4-mstd0.5-inc1"


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(KEEP.value or made)
        raw, shards = make_videos(folder)
        videos(raw, shards)
        images(make_images(folder))


def make_videos(folder: Path) -> tuple[Source, Source]:
    """Makes videos of a moving, zooming texture with camera noise, as raw files and as shards."""
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(VIDEOS.value):
        path = raw / f"{number}.mp4"
        if not path.exists():
            write_video(path, rng)
    lines = [f"{number}.mp4 {number % 2}\n" for number in range(VIDEOS.value)]
    (raw / "train.csv").write_text("".join(lines))
    (raw / "labels.txt").write_text("even\nodd\n")
    packing.prepare(raw / "train.csv", folder / "shards")
    return (
        open_source(raw, "train.csv"),
        open_source(folder / "shards", "train", source="shards"),
    )


def write_video(path: Path, rng: np.random.Generator) -> None:
    scale = rng.normal(size=(3, 40, 54)).astype(np.float32)
    texture = sum(
        cv2.resize(np.moveaxis(scale[:, : 10 * n, : 13 * n], 0, 2), (2 * WIDTH, 2 * HEIGHT)) / n
        for n in (1, 2, 4)
    )
    texture = np.clip(128 + 50 * np.asarray(texture), 0, 255)
    speed, zoom = rng.uniform(-1.5, 1.5, 2), rng.uniform(0.999, 1.001)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(30 * SECONDS):
            away = zoom**number
            matrix = np.array([[away, 0, -170 + speed[0] * number / 2],
                               [0, away, -128 + speed[1] * number / 4]])  # fmt: skip
            frame = cv2.warpAffine(
                texture, matrix, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT_101
            )
            frame = np.clip(frame + rng.normal(size=frame.shape) * 3, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def videos(raw: Source, shards: Source) -> None:
    policy = randaugment.parse(POLICY)
    steps = {
        "decode": Augmentation(crop_area=None),
        "decode, crop": Augmentation(),
        "decode, RandAugment, crop": Augmentation(randaugment=policy),
    }
    paths = [raw.item(i) for i in range(len(raw))]
    print("| clips a second of one core | reference | raw files | shards | ratios |")
    print("| --- | --- | --- | --- | --- |")
    for name, augmentation in steps.items():
        settings = ClipSettings(
            frames=FRAMES, stride=STRIDE, size=SIZE, short_side=256, augmentation=augmentation
        )
        policy = augmentation.randaugment
        crop = augmentation.crop_area is not None

        def ours(source: Source, i: int, rng: np.random.Generator, settings=settings) -> None:
            pipeline.load_train_clips(source, i, settings, rng, REPEATS)

        rates = turns(
            {
                "reference": lambda i, rng, policy=policy, crop=crop: reference(
                    paths[i], rng, policy is not None, crop
                ),
                "raw": lambda i, rng, ours=ours: ours(raw, i, rng),
                "shards": lambda i, rng, ours=ours: ours(shards, i, rng),
            },
            len(raw),
            REPEATS,
        )
        base = rates["reference"]
        cells = [f"{rate:.1f}" for rate in rates.values()]
        ratios = ", ".join(f"{rates[k] / base:.1f}" for k in ("raw", "shards"))
        print(f"| {name} | {' | '.join(cells)} | {ratios} |", flush=True)


def turns(
    readers: dict[str, Callable[[int, np.random.Generator], object]], count: int, each: int
) -> dict[str, float]:
    """Returns each reader's median items per second of CPU time; readers alternate in a round."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(ROUNDS.value + 1):
        for name, do in readers.items():
            rng = np.random.default_rng(turn)
            began = time.process_time()
            for i in range(count):
                do(i, rng)
            rates[name].append(count * each / (time.process_time() - began))
    return {name: float(np.median(values[1:])) for name, values in rates.items()}


def reference(path: str, rng: np.random.Generator, augmented: bool, crop: bool) -> list[np.ndarray]:
    """Loads clips by the steps of PySlowFast, on the CPU."""
    span = FRAMES * STRIDE
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        assert stream.time_base and stream.average_rate
        ticks = float(1 / stream.time_base / stream.average_rate)
        start = rng.uniform(0, max(stream.frames - span, 0))
        first, last = int(start * ticks), int((start + span - 1) * ticks)
        container.seek(max(first - 1024, 0), stream=stream, any_frame=False, backward=True)
        decoded = {}
        for frame in container.decode(stream):
            if frame.pts is None or frame.pts < first:
                continue
            decoded[frame.pts] = frame.to_ndarray(format="rgb24")
            if frame.pts > last:
                break
    frames = np.stack([decoded[pts] for pts in sorted(decoded)])
    chosen = frames[np.linspace(0, len(frames) - 1, FRAMES).astype(int)]
    return [finish(chosen, rng, augmented, crop) for _ in range(REPEATS)]


def finish(frames: np.ndarray, rng: np.random.Generator, augmented: bool, crop: bool) -> np.ndarray:
    if augmented:
        pictures = [Image.fromarray(frame) for frame in frames]
        for op in pillow_ops(rng):
            pictures = [op(picture) for picture in pictures]
        frames = np.stack([np.asarray(picture) for picture in pictures])
    values = (frames.astype(np.float32) / 255 - 0.45) / 0.225
    if crop:
        top, left, height, width = random_box(HEIGHT, WIDTH, rng, (0.08, 1.0), (0.75, 1.3333))
    else:
        top, left, height, width = 0, (WIDTH - HEIGHT) // 2, HEIGHT, HEIGHT
    cut = values[:, top : top + height, left : left + width]
    return np.stack([cv2.resize(frame, (SIZE, SIZE)) for frame in cut])


def pillow_ops(rng: np.random.Generator) -> list[Callable[[Image.Image], Image.Image]]:
    """Draws four of the 15 operations, each applied with probability 0.5, at magnitude 7 of 10."""
    level = float(np.clip(rng.normal(7, 0.5), 0, 10)) / 10
    sign = int(rng.choice((-1, 1)))
    factor = 1 + 0.9 * sign * level

    def affine(*matrix: float) -> Callable[[Image.Image], Image.Image]:
        return lambda x: x.transform(
            x.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC,
            fillcolor=(128, 128, 128),
        )  # fmt: skip

    ops: list[Callable[[Image.Image], Image.Image]] = [
        ImageOps.autocontrast,
        ImageOps.equalize,
        ImageOps.invert,
        lambda x: x.rotate(30 * sign * level, Image.Resampling.BICUBIC, fillcolor=(128, 128, 128)),
        lambda x: ImageOps.posterize(x, max(4 - int(4 * level), 1)),
        lambda x: ImageOps.solarize(x, 256 - int(256 * level)),
        lambda x: x.point(
            [min(255, v + int(110 * level)) if v < 128 else v for v in range(256)] * 3
        ),
        lambda x: ImageEnhance.Color(x).enhance(factor),
        lambda x: ImageEnhance.Contrast(x).enhance(factor),
        lambda x: ImageEnhance.Brightness(x).enhance(factor),
        lambda x: ImageEnhance.Sharpness(x).enhance(factor),
        affine(1, 0.3 * sign * level, 0, 0, 1, 0),
        affine(1, 0, 0, 0.3 * sign * level, 1, 0),
        affine(1, 0, 0.45 * sign * level * WIDTH, 0, 1, 0),
        affine(1, 0, 0, 0, 1, 0.45 * sign * level * HEIGHT),
    ]
    drawn = [ops[int(i)] for i in rng.integers(len(ops), size=4)]
    return [op for op in drawn if rng.random() < 0.5]


def make_images(folder: Path) -> Source:
    root = folder / "images"
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(IMAGES.value):
        path = root / f"{number}.jpg"
        if not path.exists():
            coarse = rng.integers(0, 256, (50, 40, 3), np.uint8)
            pixels = cv2.resize(coarse, (400, 500), interpolation=cv2.INTER_CUBIC).astype(int)
            pixels = np.clip(pixels + rng.normal(size=pixels.shape) * 12, 0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
            path.write_bytes(buffer.getvalue())
    lines = [f"{number}.jpg 0\n" for number in range(IMAGES.value)]
    (root / "train.csv").write_text("".join(lines))
    (root / "labels.txt").write_text("one\n")
    return open_source(root, "train.csv")


def images(source: Source) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    batch = 32
    settings = ClipSettings(
        frames=1, stride=1, size=SIZE, short_side=256, interpolation="bicubic",
        augmentation=Augmentation(interpolation="bicubic"),
    )  # fmt: skip
    steps = len(source) // batch

    def ours() -> None:
        for _ in pipeline.train_batches(
            source,
            settings,
            seed=0,
            batch=batch,
            steps=steps,
            loader=LoaderOptions(os.cpu_count() or 1),
        ):
            pass

    def load(path):
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image), tf.zeros((1, 0, 4)), min_object_covered=0.0,
            aspect_ratio_range=(0.75, 1.3333), area_range=(0.08, 1.0), max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        cut = tf.slice(image, begin, size)
        resized = tf.image.resize(cut, (SIZE, SIZE), "bicubic", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)

    paths = [source.item(i) for i in range(len(source))]
    dataset = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths))
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(batch).prefetch(2)

    def theirs() -> None:
        for _ in dataset:
            pass

    rates: dict[str, list[float]] = {"mvit_jax": [], "tf.data": []}
    for _ in range(ROUNDS.value + 1):
        for name, do in (("mvit_jax", ours), ("tf.data", theirs)):
            began = time.perf_counter()
            do()
            rates[name].append(steps * batch / (time.perf_counter() - began))
    mine, tf_data = (float(np.median(values[1:])) for values in rates.values())
    print("| images a second, all cores | mvit_jax | tf.data | ratio |\n| --- | --- | --- | --- |")
    print(f"| JPEG 500x400 to 224 | {mine:.0f} | {tf_data:.0f} | {mine / tf_data:.2f} |")


if __name__ == "__main__":
    app.run(main)
