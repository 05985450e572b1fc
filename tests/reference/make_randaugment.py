"""Makes `randaugment.npz`: two small frames after each of timm's RandAugment operations.

`python -m tests.reference.make_randaugment`, from the repository's root; needs the extra `parity`
(timm), which the tests themselves do not. The frames are not stored: `frames` draws them.
"""

from pathlib import Path
from unittest import mock

import numpy as np

FILE = Path(__file__).with_name("randaugment.npz")
MAGNITUDES = (3.37, 7.0, 9.81)  # two are no round numbers, nor are their arguments
FILL = (124, 116, 104)
OPERATIONS = {  # ours: timm's
    "AutoContrast": "AutoContrast",
    "Equalize": "Equalize",
    "Invert": "Invert",
    "Rotate": "Rotate",
    "Posterize": "PosterizeIncreasing",
    "Solarize": "SolarizeIncreasing",
    "SolarizeAdd": "SolarizeAdd",
    "Color": "ColorIncreasing",
    "Contrast": "ContrastIncreasing",
    "Brightness": "BrightnessIncreasing",
    "Sharpness": "SharpnessIncreasing",
    "ShearX": "ShearX",
    "ShearY": "ShearY",
    "TranslateX": "TranslateXRel",
    "TranslateY": "TranslateYRel",
}


def frames() -> np.ndarray:
    """Returns frames [2, 18, 22, 3]: noise without extreme values, and areas of one colour."""
    rng = np.random.default_rng(5)
    noise = rng.integers(20, 230, (18, 22, 3), dtype=np.uint8)
    plain = np.full((18, 22, 3), (200, 90, 30), np.uint8)
    plain[4:11, 3:12] = (10, 250, 128)
    plain[:, 15:] = np.arange(18, dtype=np.uint8)[:, None, None] * 14
    return np.stack([noise, plain])


def key(name: str, magnitude: float, sign: int) -> str:
    return f"{name} {magnitude} {sign}"


def main() -> None:
    from PIL import Image
    from timm.data import auto_augment

    settings = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    made = {}
    for name, theirs in OPERATIONS.items():
        for magnitude in MAGNITUDES:
            operation = auto_augment.AugmentOp(theirs, 1.0, magnitude, hparams=settings)
            for sign, drawn in ((1, 0.1), (-1, 0.9)):  # negated if the draw is above a half
                with mock.patch.object(auto_augment.random, "random", lambda drawn=drawn: drawn):
                    outputs = [operation(Image.fromarray(frame)) for frame in frames()]
                made[key(name, magnitude, sign)] = np.stack([np.asarray(out) for out in outputs])
    np.savez_compressed(FILE, **made)
    print(f"{FILE.name}: {len(made)} outputs, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
