"""Keys of the config, config files, and their packaging in a wheel."""

import dataclasses
import json
import shutil
import subprocess
import sys
import zipfile
from typing import get_args

import pytest

from mvit_jax import config
from mvit_jax.common.errors import UserError
from mvit_jax.data.augmentation import Interpolation
from mvit_jax.data.sampling import Sampling
from mvit_jax.data.source import SOURCES
from mvit_jax.describe import config_file
from mvit_jax.models.ops.dispatch import OPS
from mvit_jax.models.plan import MViTConfig
from mvit_jax.models.run_blocks import REMAT
from mvit_jax.training import build, custom, in_memory
from mvit_jax.training.evaluation.protocol import Ensemble
from mvit_jax.training.run import nan_policy, workdir
from mvit_jax.training.run_folder import RunFolder
from mvit_jax.weights.adapt import INFLATIONS
from mvit_jax.weights.state_dicts import WEIGHTS
from tests.support import commands, tiny
from tests.support.environment import of_process

RECIPES = ["kinetics:mvitv2_l_40x3_312_in21k", "imagenet:mvit_b16_max", "charades:mvit_b_16x4",
           "ssv2:mvitv2_s_16x4", "moving_digits:vit", "custom:mvitv2_t",
           "ava:mvitv2_s_16x4,full"]  # fmt: skip


def test_choices_are_those_of_the_code():
    assert {name: key.choices for name, key in config.KEYS.items() if key.choices} == {
        "remat": REMAT,
        "dtype": tuple(build.DTYPES),
        "precision": ("default", "high", "highest"),  # JAX's
        "ops": OPS,
        "on_nan": nan_policy.POLICIES,
        "init.inflate": INFLATIONS,
        "init.weights": WEIGHTS,
        "data.source": SOURCES,
        "data.sampling": get_args(Sampling),
        "data.interpolation": get_args(Interpolation),
        "augment.random_erase_mode": ("pixel", "const"),
        "optim.name": ("adamw", "sgd"),
        "optim.class_weights": ("balanced",),
        "optim.loss_reduction": ("global", "per_device"),
        "eval.crops": (1, 3),
        "eval.ensemble": get_args(Ensemble),
        **{f"model.{field.name}": get_args(field.type)
           for field in dataclasses.fields(MViTConfig)
           if str(field.type).startswith("typing.Lit") and field.name != "task"},
    }  # fmt: skip


def test_fields_of_the_architecture_are_keys():
    base = config.base()
    fields = {field.name for field in dataclasses.fields(MViTConfig)}
    assert set(base.model) - {"variant", *custom.KINDS} == fields - {"num_classes", "task"}
    assert base.is_locked
    config.check(base)
    assert all(config.value(base, name) == key.default for name, key in config.KEYS.items())
    assert all(config_file.meanings().values())


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("optim.lr", None, "optim.lr cannot be None: its default is 0.0016"),
        ("augment.randaugment", None, "augment.randaugment cannot be None: its default is ''"),
        ("eval.clips", True, "eval.clips must be a whole number, not True"),
        ("data.mean", 0.5, "data.mean must be values in brackets, like (1, 2), not 0.5"),
        ("data.classes", 0, "data.classes must be at least 1, not 0"),
        ("model.positions", "polar", "model.positions must be one of none, space, separate"),
    ],
)
def test_a_wrong_value_is_a_one_sentence_error(key, value, sentence):
    c = config.base()
    section, _, field = key.rpartition(".")
    plain = type(c)(c.to_dict(), type_safe=False)  # like values that were read from a file
    plain[section][field] = value
    with pytest.raises(UserError) as error:
        config.check(plain)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data.balanced": True, "optim.class_weights": "balanced"}, "both correct for rare"),
        ({"data.balanced": True, "data.multi_label": True}, "data.balanced=True requires one"),
        ({"optim.class_weights": "balanced", "data.multi_label": True}, "balanced requires one"),
    ],
)
def test_corrections_for_rare_classes_exclude_each_other_and_several_labels(changes, sentence):
    c = config.base()
    config.change(c, {"augment.mixup": 0.0, "augment.cutmix": 0.0} | changes)
    with pytest.raises(UserError, match=sentence):
        config.check(c)


def test_optional_keys_can_be_set_to_none():
    c = config.load("kinetics", "mvit_b_16x4")
    for name, key in config.KEYS.items():
        if key.can_be_none:
            c.update_from_flattened_dict({name: None})
    config.check(c)
    assert config.nearest("optim.lrr") == "; did you mean 'optim.lr'?"


def test_a_run_older_than_a_key_has_its_default(tmp_path):
    old = json.loads(config.base().to_json())
    del old["eval"]["ensemble"], old["mesh"]
    (tmp_path / "config.json").write_text(json.dumps(old | {"seed": 3}))
    c = workdir.recorded_config(tmp_path)
    config.check(c)
    assert (c.seed, c.eval.ensemble, c.mesh.fsdp) == (3, "mean", 1)
    workdir.record_config(c, tmp_path)  # resumes
    c.eval.ensemble = "max"
    with pytest.raises(UserError, match=r"eval\.ensemble was 'mean' and is now 'max'"):
        workdir.record_config(c, tmp_path)


def test_a_run_older_than_the_ema_warm_up_keeps_its_constant_decay(tmp_path):
    old = json.loads(config.base().to_json())
    del old["optim"]["ema_warmup"]
    older, other, new = (tmp_path / name for name in ("older", "other", "new"))
    for folder in (older, other):
        folder.mkdir()
    (older / "config.json").write_text(json.dumps(old))
    now = config.load("moving_digits")
    workdir.record_config(now, other)
    assert now.optim.ema_warmup and workdir.recorded_config(other).optim.ema_warmup
    assert not workdir.recorded_config(older).optim.ema_warmup
    for folders, warmup in (
        ([older, None], False), ([str(older)], False), ([other, older], True),
        ([new, older], False), ([new, None], True),
    ):  # fmt: skip
        resumed = workdir.with_recorded_behaviour(now, *folders)
        assert resumed.optim.ema_warmup == warmup and now.optim.ema_warmup
        assert (resumed is now) == warmup
    started = config.load("moving_digits")
    (older / "config.json").unlink()
    started.optim.ema_warmup = False
    workdir.record_config(started, older)
    values = json.loads((older / "config.json").read_text())
    del values["optim"]["ema_warmup"]
    (older / "config.json").write_text(json.dumps(values))
    workdir.record_config(
        workdir.with_recorded_behaviour(now, older), older
    )  # the same command resumes


def test_a_run_older_than_a_renamed_key_resumes(tmp_path):
    old = json.loads(config.base().to_json())
    new = old["augment"].pop("mixup_group_size"), old["augment"].pop("random_erase_prob")
    old["augment"] |= {"group": 2, "erase": 0.25}
    (tmp_path / "config.json").write_text(json.dumps(old))
    c = workdir.recorded_config(tmp_path)
    assert (c.augment.mixup_group_size, c.augment.random_erase_prob) == (2, 0.25) != new
    workdir.record_config(c, tmp_path)  # resumes
    with pytest.raises(UserError, match=r"augment\.mixup_group_size was 2 and is now 4"):
        workdir.record_config(config.base(), tmp_path)
    keys = set(config.KEYS)
    assert set(config.RENAMED.values()) <= keys and not keys & set(config.RENAMED)


def test_an_opened_run_is_checked_and_its_changes_too(tmp_path):
    values = json.loads(config.base().to_json())
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert RunFolder(tmp_path, {"eval.crops": 3, "eval.clips": None}).config.eval.crops == 3
    with pytest.raises(UserError, match=r"eval\.crop=1: there is no such key; did you mean"):
        RunFolder(tmp_path, {"eval.crop": 1})
    with pytest.raises(UserError, match=r"eval\.crops='x': "):
        RunFolder(tmp_path, {"eval.crops": "x"})
    values["eval"]["crops"] = 2
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"eval\.crops must be one of 1, 3, not 2"):
        RunFolder(tmp_path, {})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json cannot be read as a config"):
        RunFolder(tmp_path)


def test_old_names_of_keys_are_explained_in_files_and_notebooks(tmp_path):
    with pytest.raises(UserError, match=r"it is now called 'augment\.mixup_group_size'"):
        in_memory.read_config("moving_digits", **{"augment.group": 2})
    lines = "from mvit_jax import config\n\ndef get_config():\n    c = config.base()\n"
    (tmp_path / "mine.py").write_text(f"{lines}    c.augment.group = 2\n    return c\n")
    status, output = commands.run("train", f"--config={tmp_path}/mine.py", "--dry_run")
    assert status == 1
    assert output == "error: the config key augment.group is now called augment.mixup_group_size\n"


def test_config_files_load_without_jax_within_a_second():
    code = (
        "import sys, time; from mvit_jax import config\n"
        "for path in sorted(config.RECIPES.glob('*.py')): config.load(str(path))\n"
        "print(time.process_time(), [m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    )
    seconds, imported = commands.printed(code).split(maxsplit=1)
    assert float(seconds) < 1 and imported == "[]"


def test_config_files_of_the_working_directory_have_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load("ssv2").batch == 128
    code = "from mvit_jax import config\n\ndef get_config():\n    c = config.base()\n"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ssv2.py").write_text(f"{code}    c.batch = 7\n    return c\n")
    assert config.load("ssv2").batch == config.load("configs/ssv2.py").batch == 7
    assert config.load("charades").batch == 256
    with pytest.raises(UserError, match=r"there is no config 'ssv3': .* has ava, charades, custom"):
        config.load("ssv3")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_printed_experiment_loads_as_the_same_config(recipe):
    name, _, arg = recipe.partition(":")
    c = config.load(name, arg)
    namespace = {}
    exec(config_file.text(c, recipe), namespace)
    assert namespace["get_config"]() == c


def test_describe_prints_an_experiment(tmp_path):
    flags = ["--config=configs/kinetics.py:mvit_b_16x4", "--config.augment.crop_area=None",
             "--config.model.frames=None", "--config.optim.lr=1e-4"]  # fmt: skip
    status, output = commands.run("describe", *flags, cwd=tmp_path)
    assert status == 0 and all(len(line) <= 100 for line in output.splitlines())
    assert "    c.augment.crop_area = None\n" in output and "# c.model.width = 96  # chan" in output
    namespace = {}
    exec(output, namespace)
    c = namespace["get_config"]()
    assert (c.optim.lr, c.augment.crop_area, c.augment.random_erase_prob) == (1e-4, None, 0.25)
    assert all(f"c.{name} = " in output for name in config.KEYS)
    status, output = commands.run("describe", flags[0], "--config.batch=None", cwd=tmp_path)
    assert status == 1 and output == "error: batch cannot be None: its default is 512\n"


@pytest.mark.slow
def test_a_wheel_has_the_recipes(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "installed"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("mvit_jax", "configs"):
        shutil.copytree(tiny.ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(tiny.ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    shutil.rmtree(source)
    done = subprocess.run(
        [sys.executable, "-m", "mvit_jax.train", "--dry_run",
         "--config=configs/imagenet.py:mvitv2_t"],
        capture_output=True, text=True, cwd=tmp_path, env=of_process(1) | {"PYTHONPATH": folder},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "82.3 (MViTv2, Table 2)" in done.stdout
