"""RandAugment and crop of training clips, compared with Pillow frame by frame.

    python -m benchmarks.augmentation

Clips are 16x256x340, and all code runs on one thread. The implementations alternate within one run,
as machines are shared: compare the ratios. "cropped" computes only the pixels within the random
resized crop, as training does. The first lines have one operation each, with a fixed crop. The last
two lines have operations and crops drawn as in the recipes; images are cropped before RandAugment.
"""

import time
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mvit_jax.data import augmentation, randaugment
from mvit_jax.data.image_ops import Box, Colour
from mvit_jax.data.randaugment import Operation

ROUNDS = 5
DRAWS = 150
VIDEO = randaugment.parse("rand-m7-n4-mstd0.5-inc1")
IMAGE = randaugment.parse("rand-m9-n6-mstd0.5-inc1")


def plain(
    clip: np.ndarray, operations: Sequence[Operation], fill: Colour = randaugment.GREY
) -> np.ndarray:
    """Applies operations frame by frame with Pillow; the tests use this as reference."""
    out = []
    for values in clip:
        frame = Image.fromarray(values)
        for operation in operations:
            frame = _plain_operation(frame, operation, fill)
        out.append(np.asarray(frame))
    return np.stack(out)


def _plain_operation(frame: Image.Image, operation: Operation, fill: Colour) -> Image.Image:
    name, argument = operation
    match name:
        case "AutoContrast":
            return ImageOps.autocontrast(frame)
        case "Equalize":
            return ImageOps.equalize(frame)
        case "Invert":
            return ImageOps.invert(frame)
        case "Posterize":
            if int(argument) == 0:  # Pillow 13 rejects it, Pillow 12 made the picture black
                return Image.new(frame.mode, frame.size)
            return ImageOps.posterize(frame, int(argument))
        case "Solarize":
            return ImageOps.solarize(frame, int(argument))
        case "SolarizeAdd":
            return frame.point(
                [min(i + int(argument), 255) if i < 128 else i for i in range(256)] * 3
            )
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return getattr(ImageEnhance, name)(frame).enhance(argument)
        case "Rotate":
            return frame.rotate(argument, Image.Resampling.BICUBIC, fillcolor=fill)
        case "ShearX":
            matrix = (1, argument, 0, 0, 1, 0)
        case "ShearY":
            matrix = (1, 0, 0, argument, 1, 0)
        case "TranslateX":
            matrix = (1, 0, argument * frame.width, 0, 1, 0)
        case "TranslateY":
            matrix = (1, 0, 0, 0, 1, argument * frame.height)
        case _:
            raise ValueError(name)
    affine, bicubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
    return frame.transform(frame.size, affine, matrix, bicubic, fillcolor=fill)


def main() -> None:
    cv2.setNumThreads(1)
    clip = make_clip(16, 256, 340)
    centre = Box(46, 67, 164, 205)  # 0.4 of the frame, about the mean area of a crop
    print("| operation | Pillow, ms | ours, ms | ratio | ours cropped, ms |\n|" + " --- |" * 5)
    for name in randaugment.OPERATIONS:
        drawn = (randaugment.operation(name, VIDEO.magnitude + 0.137, 1),)
        times = time_alternately(
            {
                "Pillow": lambda drawn=drawn: plain(clip, drawn),
                "ours": lambda drawn=drawn: randaugment.apply(clip, drawn),
                "cropped": lambda drawn=drawn: randaugment.apply(clip, drawn, box=centre),
            }
        )
        print(line(name, {key: float(np.median(values)) for key, values in times.items()}))
    rng = np.random.default_rng(0)
    print(line("a clip of the recipe", recipe(rng, clip, VIDEO)))
    print(line("an image of the recipe", recipe(rng, make_clip(1, 224, 224), IMAGE)))


def recipe(
    rng: np.random.Generator, clip: np.ndarray, settings: randaugment.RandAugment
) -> dict[str, float]:
    """Returns mean seconds over many draws; a video is also cropped and resized to 224 pixels."""
    sums: dict[str, float] = {}
    height, width = clip.shape[1:3]
    for _ in range(DRAWS):
        drawn = settings.draw(rng)
        box = Box(0, 0, height, width)
        if len(clip) > 1:
            box = augmentation.random_box(height, width, rng, (0.08, 1.0))
        implementations: dict[str, Callable] = {
            "Pillow": lambda drawn=drawn, box=box: square(plain(clip, drawn), box),
            "ours": lambda drawn=drawn, box=box: square(randaugment.apply(clip, drawn), box),
            "cropped": lambda drawn=drawn, box=box: augmentation.resize(
                randaugment.apply(clip, drawn, box=box), 224, 224
            ),
        }
        for name, times in time_alternately(implementations, rounds=1).items():
            sums[name] = sums.get(name, 0.0) + times[0] / DRAWS
    return sums


def square(clip: np.ndarray, box: Box) -> np.ndarray:
    return augmentation.resize(box.crop(clip, Box(0, 0, *clip.shape[1:3])), 224, 224)


def make_clip(frames: int, height: int, width: int) -> np.ndarray:
    """Returns a clip of moving smooth noise."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 4, 3), dtype=np.uint8)
    whole = cv2.resize(noise, (2 * width, height), interpolation=cv2.INTER_CUBIC)
    return np.stack([whole[:, 2 * i : 2 * i + width] for i in range(frames)])


def time_alternately(
    implementations: dict[str, Callable], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in implementations}
    for _ in range(rounds):
        for name, implementation in implementations.items():
            began = time.perf_counter()
            implementation()
            times[name].append(time.perf_counter() - began)
    return times


def line(name: str, seconds: dict[str, float]) -> str:
    ms = {key: 1000 * value for key, value in seconds.items()}
    return (
        f"| {name} | {ms['Pillow']:.1f} | {ms['ours']:.1f} | {ms['Pillow'] / ms['ours']:.1f} "
        f"| {ms['cropped']:.1f} |"
    )


if __name__ == "__main__":
    main()
