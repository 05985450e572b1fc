"""The compilation cache on disk, shared between processes."""

import os
from pathlib import Path

import pytest

from mvit_jax.training.run import runtime
from tests.support import commands

# Prints the numbers of compilation cache hits and misses.
PROGRAM = """
import jax
from mvit_jax.models.functional import functional
from mvit_jax.models.variants import variant
from mvit_jax.training.run import runtime
runtime.cache_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/", 1)[1]))
config = variant("mvit_b_16x4", frames=2, size=16, width=4, depths=(1,), num_classes=3)
model = functional(config)
params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
clip = jax.ShapeDtypeStruct((1, 2, 16, 16, 3), "float32")
jax.jit(model.apply).lower(params, clip).compile()
print(events.count("cache_hits"), events.count("cache_misses"))
"""


def run(folder: Path, **env) -> str:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "XDG_"))}
    env = inherited | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder)} | env
    return commands.printed(PROGRAM, env=env)


@pytest.mark.slow
def test_a_second_process_loads_the_compiled_program(tmp_path):
    assert run(tmp_path) == "0 1"
    assert list((tmp_path / "mvit_jax" / "compiled").glob("*/jit_apply-*"))
    assert run(tmp_path) == "1 0"


@pytest.mark.slow
def test_environment_variables_of_jax_take_precedence(tmp_path):
    variables = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    assert run(tmp_path / "default", **variables) == "0 1"
    assert list((tmp_path / "own").glob("jit_apply-*"))
    assert run(tmp_path / "default", JAX_ENABLE_COMPILATION_CACHE="0") == "0 0"
    assert not (tmp_path / "default").exists()


def test_an_unwritable_cache_folder_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert runtime.default_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = runtime.default_folder()
    assert folder and folder.is_dir() and folder.parent == tmp_path / "mvit_jax" / "compiled"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    at_home = runtime.default_folder()
    assert at_home == tmp_path / "home" / ".cache" / "mvit_jax" / "compiled" / folder.name


def test_cpus_with_other_instruction_sets_share_no_cache(monkeypatch):
    cores = "processor : {}\nmodel name : A\ncpu MHz : {}\nflags : fpu avx2{}\n\n"

    def name(*values):
        text = "".join(cores.format(core, *values) for core in range(2))
        monkeypatch.setattr(Path, "read_text", lambda path: text)
        return runtime.processor()

    assert name(2000, "") == name(3000, "")
    assert name(2000, "") != name(2000, " avx512f")
