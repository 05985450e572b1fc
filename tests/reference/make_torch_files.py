"""Makes `torch_files/`: small files written by torch, in each of its formats.

`python -m tests.reference.make_torch_files`, from the repository's root; needs the extra `parity`,
which the tests themselves do not. The values are formulas, here and in the test alike.
"""

import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).with_name("torch_files")
GRID = np.arange(24, dtype=np.float32).reshape(4, 6) / 8 - 1


def expected() -> dict[str, np.ndarray]:
    """Returns the arrays of `plain`; bfloat16 differs."""
    return {
        "float": GRID,
        "tied": GRID,
        "transposed": GRID.T,
        "part": GRID[1:3, ::2],
        "half": GRID.astype(np.float16),
        "bfloat16": GRID,
        "double": GRID.astype(np.float64),
        "int64": np.arange(-2, 3),
        "int32": np.arange(3, dtype=np.int32),
        "int16": np.arange(3, dtype=np.int16),
        "int8": np.arange(-3, 0, dtype=np.int8),
        "uint8": np.arange(250, 256, dtype=np.uint8),
        "bool": np.array([True, False, True]),
        "scalar": np.array(7),
        "empty": np.zeros((0, 3), np.float32),
        "expanded": np.array([[5, 5, 5]]),
        "parameter": np.array([0.25, -0.5], np.float32),
    }


def plain():
    import torch

    grid = torch.from_numpy(GRID.copy())
    made = OrderedDict((name, torch.from_numpy(v.copy())) for name, v in expected().items())
    made |= {"float": grid, "tied": grid, "transposed": grid.T, "part": grid[1:3, ::2]}
    made["bfloat16"] = grid.to(torch.bfloat16)
    made["expanded"] = torch.tensor([[5]]).expand(1, 3)
    made["parameter"] = torch.nn.Parameter(made["parameter"])
    return made


def checkpoint():
    """Returns a checkpoint as PySlowFast writes it, with values of other programs."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(6.0).reshape(3, 2))
    optimizer = torch.optim.AdamW([model[0].weight], lr=1e-3)
    model(torch.ones(2, 2)).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(6.0).reshape(3, 2))
    return {
        "epoch": 3,
        "model_state": model.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "cfg": "TRAIN:\n  ENABLE: true\n",
        "best": np.float64(0.75),
        "matrix": np.eye(2, dtype=np.int32),
        "milestones": {1, 2},
        "kinds": [torch.float32, torch.Size([1, 2]), torch.device("cpu"), None, -(2**40), b"\xff"],
    }


def main() -> None:
    import torch

    warnings.simplefilter("ignore")
    FOLDER.mkdir(exist_ok=True)
    old = {"_use_new_zipfile_serialization": False}
    torch.save(plain(), FOLDER / "plain.pt")
    torch.save(plain(), FOLDER / "plain_legacy.pt", **old)
    torch.save(plain(), FOLDER / "plain_legacy_protocol4.pt", pickle_protocol=4, **old)
    torch.save({"odd": torch.arange(3).to(torch.uint16)}, FOLDER / "untyped_legacy.pt", **old)
    torch.save(checkpoint(), FOLDER / "checkpoint.pyth")
    short = checkpoint()
    del short["optimizer_state"]
    short["model_state"] = torch.nn.Linear(2, 3).state_dict()
    short["model_state"]["weight"] = torch.arange(6.0).reshape(3, 2)
    torch.save(short, FOLDER / "checkpoint_protocol5.pyth", pickle_protocol=5)
    torch.save(checkpoint(), FOLDER / "checkpoint_legacy.pyth", **old)


if __name__ == "__main__":
    main()
