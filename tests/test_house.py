"""The house rules: which room imports which, what importing costs, that configs know every key."""

import ast
import dataclasses
import re
import subprocess
import sys

import pytest

from mvit_jax.models.plan import MViTConfig
from tests import tiny

PACKAGE = tiny.ROOT / "mvit_jax"
# A room imports only from rooms after it; programs stand before all rooms.
ROOMS = ["training", "data", "weights", "inspection", "models", "errors"]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_rooms_import_only_from_rooms_further_down(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    programs = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "errors"}
    for name in imports(path):
        parts = name.split(".")
        if room != "models":
            assert parts[:2] != ["flax", "nnx"] and name != "flax.nnx", f"{path}: {name}"
        if parts[0] != "mvit_jax" or len(parts) < 2 or room == "__init__":
            continue
        assert parts[1] not in programs, f"{path} imports the program {name}"
        if room in ROOMS and parts[1] in ROOMS:
            assert ROOMS.index(parts[1]) >= ROOMS.index(room), f"{path} imports {name}"


def test_importing_is_quick_and_brings_no_tensorflow():
    code = (
        "import time; began = time.perf_counter()\n"
        "import sys, mvit_jax\n"
        "seconds = time.perf_counter() - began\n"
        "mvit_jax.create_model, mvit_jax.plan\n"
        "print(seconds, 'tensorflow' in sys.modules, 'torch' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    outputs = [done.stdout.split() for done in runs]
    # The quicker of two: machines are shared, and the first reads the files from disk.
    assert min(float(seconds) for seconds, *_ in outputs) < 3
    assert outputs[0][1:] == ["False", "False"]


def test_every_public_name_is_there():
    import mvit_jax

    for name in mvit_jax.__all__:
        assert getattr(mvit_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        _ = mvit_jax.creat_model


def test_the_base_config_has_every_field_of_an_architecture():
    base = tiny.load_config_file("base").get_config()
    fields = {field.name for field in dataclasses.fields(MViTConfig)}
    # The number of classes follows from the data.
    assert set(base.model) - {"variant"} == fields - {"num_classes"}
    assert base.is_locked


@pytest.mark.parametrize("arg", ["mvit", "vit"])
def test_the_default_experiment_keeps_its_labels_true(arg):
    config = tiny.load_config_file("moving_digits").get_config(arg)
    assert config.augment.flip == config.augment.cutmix == config.augment.mixup == 0
    assert config.augment.crop_area is None
    with pytest.raises(AttributeError):
        config.optim.learning_rate = 1


def test_programs_help():
    for name in ("train", "evaluate", "predict", "describe", "prepare"):
        # absl's --help exits with 1.
        done = subprocess.run(
            [sys.executable, "-m", f"mvit_jax.{name}", "--help"], capture_output=True, text=True
        )
        assert f"python -m mvit_jax.{name}" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_readmes_example_runs_and_its_shapes_are_true():
    readme = (tiny.ROOT / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(code) == 1
    check = "print(logits.shape, features['stages'][0].shape)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code[0]}\n{check}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(2, 8) (2, 4, 16, 16, 64)"
    assert "= (2, 4, 16, 16, 64)" in code[0]
