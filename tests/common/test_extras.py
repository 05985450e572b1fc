"""Absent packages of extras: the model works without them, everything else has a sentence."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mvit_jax.common import errors, extras
from mvit_jax.common.errors import UserError
from tests.support import commands, tiny

PROJECT = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["project"]
BY_FLAX = ("msgpack", "optax", "orbax")  # flax imports them


def names(requirements):
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def third_party(tree):
    """Yields the modules that a file imports from outside, the standard library aside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            if module.partition(".")[0] not in {*sys.stdlib_module_names, "mvit_jax"}:
                yield module


def test_each_imported_module_is_of_the_package_or_has_a_pip_line_with_its_extra():
    core, by_module = names(PROJECT["dependencies"]), packages_distributions()
    lines = {extras.pip_line(e): names(r) for e, r in PROJECT["optional-dependencies"].items()}
    modules = {
        module
        for path in (tiny.ROOT / "mvit_jax").rglob("*.py")
        for module in third_party(ast.parse(path.read_text()))
    }
    assert len({module.partition(".")[0] for module in modules}) > 20
    for module in modules:
        top = module.partition(".")[0]
        if canonicalize_name(top) in {*core, "absl"}:
            assert extras.absence(module) is None
            continue
        sentence = extras.absence(module)
        assert sentence and " is not installed: pip install -e '.[" in sentence, module
        packages = lines[sentence.partition("installed: ")[2]]
        if top not in ("google", "fastapi", "starlette", "uvicorn"):  # of many packages, of gradio
            assert packages & {canonicalize_name(n) for n in by_module[top]}, (module, packages)


def test_the_public_names_load_and_work_without_the_extras():
    """In an interpreter in which modules of the extras are absent."""
    absent = [m for e in extras._EXTRAS.values() for m in e if m not in BY_FLAX]
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({absent!r}))\n"
        "import mvit_jax\n"
        "for name in set(mvit_jax.__all__) - {'preprocess', 'load_run', 'TrainedModel'}:\n"
        "    getattr(mvit_jax, name)\n"
        "config = mvit_jax.variant('mvit_b_16x4', frames=8, size=64, depths=(1,), width=16)\n"
        "print(mvit_jax.functional(config).shapes()['head/classifier/kernel'])\n"
        "try:\n"
        "    mvit_jax.preprocess\n"
        "except mvit_jax.UserError as error:\n"
        "    print(error)"
    )
    shape, sentence = commands.printed(code).splitlines()[-2:]
    assert shape == "(16, 400)"
    assert sentence.endswith("is not installed: pip install -e '.[train]'")


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("cv2", "OpenCV is not installed: pip install -e '.[train]'"),
        ("av.container", "PyAV is not installed: pip install -e '.[train]'"),
        ("tensorflow_datasets", "tensorflow_datasets is not installed: pip install -e '.[tfds]'"),
        ("avocado", None),
    ],
)
def test_absent_modules_end_programs_in_one_sentence(module, sentence, capsys):
    absent = ModuleNotFoundError(f"No module named {module!r}", name=module)

    def main(argv):
        raise absent

    # While the program is imported.
    extras._excepthook(ModuleNotFoundError, absent, None)
    printed = capsys.readouterr().err
    assert printed == f"error: {sentence}\n" if sentence else "ModuleNotFoundError" in printed
    # While it runs.
    if sentence is None:
        with pytest.raises(ModuleNotFoundError):
            errors._guarded(main, [])
        return
    with pytest.raises(SystemExit) as end:
        errors._guarded(main, [])
    assert end.value.code == 1 and capsys.readouterr().err == f"error: {sentence}\n"


def test_a_required_module_that_is_absent_is_a_user_error(monkeypatch):
    extras.require("numpy")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match="scikit-learn is not installed: pip install"):
        extras.require("sklearn")


@pytest.mark.parametrize(
    ("command", "program"),
    [
        (["python", "-X", "dev", "-m", "mvit_jax.train", "--workdir=a"], True),
        (["python", "-m", "pytest", "mvit_jax.train"], False),
        (["python", "-c", "import mvit_jax"], False),
    ],
)
def test_only_the_programs_are_explained_to(command, program):
    assert extras._program(command) is program
