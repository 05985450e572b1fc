"""libtpu without a TPU: JAX neither loads it nor prints its lines."""

import os
import subprocess
import sys

import jax
import pytest

from mvit_jax.common import absent_tpu
from mvit_jax.training.distributed import launch
from tests.support import tiny

AGAIN = """
import os
from mvit_jax.common import absent_tpu
os.environ.pop("JAX_PLATFORMS", None)
absent_tpu._GPUS = ("dev/null",)
absent_tpu.skip()
"""


@pytest.mark.parametrize("start", ["import mvit_jax", "import jax, mvit_jax", AGAIN])
def test_importing_jax_prints_nothing_about_libtpu(start):
    """On a machine without accelerators, after `import jax` too, and on one with a GPU."""
    names = {*absent_tpu._CHOICES, "TPU_SKIP_MDS_QUERY", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES"}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", f"{start}\nimport jax; print(jax.devices())"],
        capture_output=True, text=True, cwd=tiny.ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0 and "Device(id=0)" in done.stdout, done
    for line in (
        "Failed to find host bounds", "InitGoogle", "unexpected worker hostname",
        "Source Location Trace", "libtpu",
    ):  # fmt: skip
        assert line not in done.stderr


@pytest.fixture
def environment(monkeypatch):
    """A machine with libtpu, without accelerators and without a chosen platform."""
    monkeypatch.setattr(absent_tpu, "_TPUS", ())
    monkeypatch.setattr(absent_tpu, "_GPUS", ())
    monkeypatch.setattr(absent_tpu, "_is_tpu", lambda device: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "libtpu" or None)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ())
    monkeypatch.setattr(os, "environ", {})
    return monkeypatch


def chosen():
    absent_tpu.skip()
    return {name: os.environ[name] for name in absent_tpu._CHOICES if name in os.environ}


def test_jax_uses_the_cpu_without_accelerators(environment):
    assert chosen() == {"JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize("name", absent_tpu._CHOICES)
def test_a_platform_chosen_by_the_user_is_respected(environment, name):
    os.environ[name] = "a choice"
    assert chosen() == {name: "a choice"}


def test_a_platform_chosen_after_importing_jax_is_respected(environment):
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "cuda,cpu")
    try:
        chosen()
        assert jax.config.jax_platforms == "cuda,cpu"
    finally:
        jax.config.update("jax_platforms", before)


def test_nothing_changes_on_a_machine_with_a_tpu(environment):
    environment.setattr(absent_tpu, "_TPUS", ("dev/nul[l]",))
    assert chosen() == {}
    environment.setattr(absent_tpu, "_TPUS", ())
    environment.setattr(absent_tpu, "_is_tpu", lambda device: True)
    assert chosen() == {}


@pytest.mark.parametrize(
    ("vendor", "kind", "answer"),
    [
        ("0x1ae0", "0x088000", True),
        ("0x1ae0", "0x020000", False),  # gVNIC
        ("0x1ae0", "0x010802", False),  # a local SSD
        ("0x10de", "0x030200", False),
    ],
)
def test_google_disks_and_network_cards_are_not_tpus(tmp_path, vendor, kind, answer):
    (tmp_path / "vendor").write_text(f"{vendor}\n")
    (tmp_path / "class").write_text(f"{kind}\n")
    assert absent_tpu._is_tpu(tmp_path) is answer


def test_an_unreadable_device_is_not_a_tpu(tmp_path):
    assert not absent_tpu._is_tpu(tmp_path)


def test_jax_chooses_with_a_gpu_or_another_plugin(environment):
    environment.setattr(absent_tpu, "_GPUS", ("dev/null",))
    assert "JAX_PLATFORMS" not in chosen()
    # A notebook on a GPU in Kubernetes is still a single process.
    assert launch.is_single_process(os.environ | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    environment.setattr(absent_tpu, "_GPUS", ())
    os.environ.clear()
    environment.setattr("importlib.util.find_spec", lambda name: True)
    assert "JAX_PLATFORMS" not in chosen()
