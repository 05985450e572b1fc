"""The locks: packages of the programs, and additional ones of tests, pages and linters.

One pair is of Python 3.11 and 3.12, one of newer Pythons.
"""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import tiny
from tests.support.environment import of_process

PROJECT = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PROGRAMS = [*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["tfds"]]
PAIRS = ("requirements", "requirements-newest")
INSTALLED = PAIRS[sys.version_info >= (3, 13)]  # as the Makefile chooses


def lock(name):
    """Returns the versions of a lock by package."""
    lines = [x for x in (tiny.ROOT / name).read_text().splitlines() if not x.startswith("#")]
    versions = {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in lines)}
    assert all(versions.values()) and len(versions) == len(lines)
    return versions


def closure(requirements):
    """Returns the names of all packages that the requirements lead to, by installed metadata."""
    left, seen = [(Requirement(text), "") for text in requirements], set()
    names = set()
    while left:
        requirement, extra = left.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        names.add(name)
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                left += [(Requirement(text), extra) for text in distribution(name).requires or ()]
    return names


def test_each_required_package_is_in_its_lock():
    programs, tools = lock(f"{INSTALLED}.txt"), lock(f"{INSTALLED}-dev.txt")
    assert closure(PROGRAMS) == programs.keys()
    assert closure([*PROGRAMS, *EXTRAS["dev"], *EXTRAS["docs"]]) <= programs.keys() | tools.keys()
    for extra in (
        "tpu",
        "gcs",
        "prepare",
        "demo",
        "onnx",
    ):  # which the scripts of launch/ constrain
        assert closure(EXTRAS[extra]) <= programs.keys() | tools.keys()


@pytest.mark.parametrize("pair", PAIRS)
def test_the_locks_are_in_the_stated_ranges(pair):
    programs, tools = lock(f"{pair}.txt"), lock(f"{pair}-dev.txt")
    assert not programs.keys() & tools.keys()
    for text in [*PROGRAMS, *EXTRAS["dev"], *EXTRAS["docs"]]:
        requirement = Requirement(text)
        versions = programs if text in PROGRAMS else programs | tools
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Runs Python where the packages of the first lock are installed, and no others."""
    packages = tmp_path_factory.mktemp("packages")
    for name in lock(f"{INSTALLED}.txt"):
        for file in distribution(name).files or ():
            if ".." not in file.parts:  # programs
                link = packages / file
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.locate())
    path = os.pathsep.join((str(packages), str(tiny.ROOT)))

    def python(*arguments):
        done = subprocess.run(
            [sys.executable, "-S", *map(str, arguments)], capture_output=True, text=True,
            cwd=tiny.ROOT, env=of_process(1) | {"PYTHONPATH": path},
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return python


@pytest.mark.slow
def test_the_programs_run_with_the_first_lock_alone(python, digits, tmp_path):
    run, data = f"--workdir={tmp_path / 'run'}", f"--config.data.folder={digits}"
    config = f"--config={tiny.ROOT / 'configs' / 'moving_digits.py'}"
    video = next((digits / "videos" / "test").iterdir())
    for program, *flags in (
        ("train", config, run, data, "--config.epochs=1", *tiny.FLAGS),
        ("evaluate", run),
        ("predict", video, run),
        ("convert", tmp_path / "run", "--to=torchvision", f"--out={tmp_path / 'weights.pt'}"),
        ("convert", tmp_path / "run", "--to=stablehlo", f"--out={tmp_path / 'model.mlir'}"),
        ("describe", "mvit_b_16x4"),
        ("prepare", "check", digits),
    ):
        done = python("-m", f"mvit_jax.{program}", *flags)
        assert done.returncode == 0, (program, done.stderr)
    assert list((tmp_path / "run").glob("events.*"))
    code = (
        "import clu.parameter_overview, tensorflow_datasets; from importlib.util import find_spec\n"
        "assert not any(map(find_spec, ('pytest', 'tensorflow')))"
    )
    assert python("-c", code).returncode == 0


@pytest.mark.parametrize(
    ("package", "flags"),
    [
        ("gradio", ("predict", "--serve", "--workdir={run}")),
        ("apache_beam", ("prepare", "videos", "--csv={digits}/val.csv", "--out={run}/packed")),
        ("libtpu", ("podplan", "--config=configs/moving_digits.py", "--topology=v5e:2x2",
                    "--config.data.folder={digits}")),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_missing_package_is_a_one_sentence_error(python, digits, tmp_path, package, flags):
    program, *flags = (flag.format(run=tmp_path, digits=digits) for flag in flags)
    done = python("-m", f"mvit_jax.{program}", *flags)
    assert done.returncode == 1
    sentence = done.stderr.splitlines()[-1]
    assert package in sentence and "pip install" in sentence and sentence.startswith("error: ")
