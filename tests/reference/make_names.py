"""Makes `names.npz`: the tensors that torchvision's and timm's full-size models load strictly.

`python -m tests.reference.make_names`, from the repository's root; needs the extra `parity` (torch,
torchvision, timm), which the tests themselves do not.
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("names.npz")

TORCHVISION = ("mvit_v1_b", "mvit_v2_s")
TIMM = {  # and their classes
    "mvitv2_tiny": 1000,
    "mvitv2_small": 1000,
    "mvitv2_base": 1000,
    "mvitv2_large": 1000,
    "mvitv2_base_cls": 19168,
    "mvitv2_large_cls": 19168,
    "mvitv2_huge_cls": 19168,
}


def shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Of every model, the shapes of its tensors by name. No tensor is ever made."""
    import timm  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    from torchvision.models import video  # pyright: ignore[reportMissingImports]

    with torch.device("meta"):
        models = {f"torchvision {name}": getattr(video, name)() for name in TORCHVISION}
        for name, classes in TIMM.items():
            models[f"timm {name}"] = timm.create_model(name, num_classes=classes)
    return {
        name: {key: tuple(values.shape) for key, values in model.state_dict().items()}
        for name, model in models.items()
    }


def stored() -> dict[str, dict[str, tuple[int, ...]]]:
    """The same from the file."""
    found = {}
    for model, text in np.load(FILE).items():
        rows = [row.split(" ") for row in text.tobytes().decode().splitlines()]
        found[model] = {name: tuple(map(int, shape.split("x"))) for name, shape in rows}
    return found


def main() -> None:
    texts = {}
    for model, tensors in shapes().items():
        rows = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in tensors.items())
        texts[model] = np.frombuffer("\n".join(rows).encode(), np.uint8)
        print(f"{model}: {len(rows)} tensors")
    np.savez_compressed(FILE, **texts)
    print(f"{FILE.name}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
