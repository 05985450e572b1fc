"""Makes `names.npz`: the tensors that torchvision's and timm's full-size models load strictly.

`python -m tests.reference.make_names`, from the repository's root; needs the extra `parity` (torch,
torchvision, timm), which the tests themselves do not.
"""

from pathlib import Path

import numpy as np

from tests.reference.make_outputs import packed, unpacked

FILE = Path(__file__).with_name("names.npz")

TORCHVISION = ("mvit_v1_b", "mvit_v2_s")
TIMM = {  # and their numbers of classes
    "mvitv2_tiny": 1000,
    "mvitv2_small": 1000,
    "mvitv2_base": 1000,
    "mvitv2_large": 1000,
    "mvitv2_base_cls": 19168,
    "mvitv2_large_cls": 19168,
    "mvitv2_huge_cls": 19168,
}


def shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the shapes of every model's tensors by name, without allocating them."""
    import timm
    import torch
    from torchvision.models import video

    with torch.device("meta"):
        models = {f"torchvision {name}": getattr(video, name)() for name in TORCHVISION}
        for name, classes in TIMM.items():
            models[f"timm {name}"] = timm.create_model(name, num_classes=classes)
    return {
        name: {key: tuple(values.shape) for key, values in model.state_dict().items()}
        for name, model in models.items()
    }


def stored() -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the stored `shapes`."""
    return {model: unpacked(values) for model, values in np.load(FILE).items()}


def main() -> None:
    texts = {}
    for model, tensors in shapes().items():
        texts[model] = packed(dict(sorted(tensors.items())))
        print(f"{model}: {len(tensors)} tensors")
    np.savez_compressed(FILE, **texts)
    print(f"{FILE.name}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
