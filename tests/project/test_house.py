"""House rules: imports between rooms, cost of importing, public names, README examples."""

import ast
import re

import jax
import pytest

import mvit_jax
from mvit_jax.config import KEYS
from mvit_jax.models.functional import functional
from mvit_jax.weights.tensor_files import read_tensors
from tests.predict.small import textured, write_video
from tests.support import commands, tiny, warm
from tests.support.marks import nightly, slow

PACKAGE = tiny.ROOT / "mvit_jax"
# Imports allowed to each room, besides its modules; commands may import every room.
_RUN = "training/distributed training/state weights models models/plan config common"
ROOMS = {
    "analysis": "training training/run weights data models models/plan config common",
    "training": f"training/run data {_RUN}",
    "training/run": _RUN,
    "training/state": "common",
    "training/distributed": "common",
    "weights": "models models/plan models/ops common",
    "data": "models models/plan common",
    "config": "models/plan common",
    "models": "models/plan models/ops common",
    "models/ops": "models/plan common",
    "models/plan": "common",
    "common": "",
}
# Rooms inside another one that count as part of it.
INSIDE = {"data/formats": "data", "data/making": "data"}
COMMANDS = set(warm.programs())


def room_of(parts: tuple[str, ...]) -> str:
    """Returns the room of a module, given as the names after `mvit_jax`."""
    inner = "/".join(parts[:2])
    if inner in INSIDE:
        return INSIDE[inner]
    return inner if inner in ROOMS else parts[0]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_rooms_import_only_from_their_listed_rooms(path):
    room = room_of(path.relative_to(PACKAGE).with_suffix("").parts)
    for name in imports(path):
        parts = name.split(".")
        if room not in ("models", "models/ops"):
            assert not name.startswith("flax.nnx"), f"{path}: {name}"
        if parts[0] != "mvit_jax" or len(parts) < 2 or path.parent == PACKAGE:
            continue
        to = room_of(tuple(parts[1:]))
        assert to == room or to not in COMMANDS, f"{path} imports the command {name}"
        if room in ROOMS:
            assert to == room or to in ROOMS[room].split(), f"{path} imports {name}"


def test_only_build_reads_keys_of_the_config():
    """Below `training/build.py` no module reads a key of the config."""
    names = "run distributed evaluation loop.py step.py state.py optimizer.py"
    roots = [PACKAGE / "training" / name for name in names.split()]
    roots += [PACKAGE / name for name in ("weights", "data", "models", "common")]
    files = [f for root in roots for f in ([root] if root.suffix else root.rglob("*.py"))]
    sections = "|".join({name.partition(".")[0] for name in KEYS if "." in name} - {"model"})
    read = re.compile(rf"\bconfig\.({sections})\.")
    uses = [f"{f}: {m[0]}" for f in files for m in read.finditer(without_texts(f))]
    assert len(files) > 60 and not uses, uses


def without_texts(path) -> str:
    """Returns a module's code as Python writes it, without comments and with empty strings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


def test_no_room_has_more_than_13_names():
    for folder in [PACKAGE, *(p for p in PACKAGE.rglob("*") if p.is_dir())]:
        names = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/*")}
        names -= {"__init__", "__pycache__"}
        assert len(names) <= (15 if folder == PACKAGE else 13), (folder, sorted(names))


def test_importing_is_quick_and_loads_no_tensorflow():
    code = (
        "import time; began = time.process_time()\n"
        "import sys, mvit_jax\n"
        "seconds = time.process_time() - began\n"
        "mvit_jax.create_model, mvit_jax.plan\n"
        "print(seconds, 'tensorflow' in sys.modules, 'torch' in sys.modules)"
    )
    seconds, *loaded = commands.printed(code).split()
    assert float(seconds) < 3 and loaded == ["False", "False"]


def test_every_public_name_exists():
    for name in mvit_jax.__all__:
        assert getattr(mvit_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        _ = mvit_jax.creat_model


@pytest.mark.parametrize("arg", ["mvit", "vit"])
def test_the_default_experiment_has_no_augmentation_that_changes_labels(arg):
    config = tiny.load_config_file("moving_digits").get_config(arg)
    assert config.augment.flip == config.augment.cutmix == config.augment.mixup == 0
    assert config.augment.crop_area is None
    with pytest.raises(AttributeError):
        config.optim.learning_rate = 1


@pytest.mark.slow
def test_every_program_prints_help_and_every_benchmark_imports():
    for program in warm.programs():
        _, output = commands.run(program, "--help")  # absl's exits with 1
        assert f"python -m mvit_jax.{program}" in output
    for path in (tiny.ROOT / "benchmarks").glob("*.py"):
        commands.printed(f"import benchmarks.{path.stem}", fork=True)


def run_readme(block: int, check: str, folder, *, small: bool) -> tuple[str, str]:
    """Returns an example of the README, run in `folder`, and what `check` prints then.

    With `small`, its variant is a model of three narrow blocks.
    """
    readme = (tiny.ROOT / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(code) == 2
    program = f"import jax, mvit_jax\nfrom flax import nnx\n{code[block]}\n{check}"
    if small:
        narrow = f"dataclasses.replace(VARIANTS['mvit_b_16x4'], **{SMALL!r})"
        names = "import dataclasses; from mvit_jax.models.variants import VARIANTS"
        program = f"{names}; VARIANTS['mvit_b_16x4'] = {narrow}\n{program}"
    return code[block], commands.printed(program, fork=True, cwd=folder).splitlines()[-1]


SMALL = {"width": 16, "depths": (1, 1, 1)}
SIZES = [slow(True, id="small"), nightly(False, id="as it is")]


@pytest.mark.parametrize("small", SIZES)
def test_the_readmes_example_runs_with_the_stated_shapes(small, tmp_path):
    check = "print(logits.shape, features['stages'][0].shape)"
    code, printed = run_readme(0, check, tmp_path, small=small)
    assert printed == "(2, 8) (2, 4, 16, 16, 64)"
    assert "= (2, 4, 16, 16, 64)" in code


@pytest.mark.parametrize("small", SIZES)
def test_the_readmes_example_of_foreign_weights_runs(small, tmp_path):
    config = mvit_jax.variant("mvit_b_16x4", **SMALL if small else {})
    params = jax.jit(functional(config).init)(jax.random.key(0))
    mvit_jax.save_torch(params, config, tmp_path / "k400.pyth", "slowfast")
    write_video(tmp_path / "video.mp4", textured(80, 64))
    check = "print(clips.shape, report.ok, round(float(probabilities.sum()), 3))"
    _, printed = run_readme(1, check, tmp_path, small=small)
    assert printed == "(5, 16, 224, 224, 3) True 1.0"
    back = read_tensors(tmp_path / "back.pth").tensors
    assert back["conv_proj.weight"].shape == (config.width, 3, 3, 7, 7)
