"""launch/ without a cluster: scripts with stand-ins for programs, linters for other files."""

import math
import os
import re
import shutil
import signal
import subprocess
import sysconfig
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from jax._src.clusters import cloud_tpu_cluster

from tests.support import tiny
from tests.support.stand_ins import FLAGS, LOST, PREEMPTED, until

LAUNCH = tiny.ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])
[PART] = yaml.safe_load((LAUNCH / "gke" / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
JOB_SPEC = PART["template"]["spec"]
POD = JOB_SPEC["template"]["spec"]


def check(program: str, path: Path) -> None:
    """Runs a linter that pip installs beside Python."""
    folders = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    executable = shutil.which(program, path=folders)
    assert executable, f"{program} is not installed: pip install -r requirements-dev.txt"
    done = subprocess.run([executable, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck_and_exit_on_errors(path):
    assert "\nset -euo pipefail\n" in path.read_text() and os.access(path, os.X_OK)
    check("shellcheck", path)


@pytest.mark.parametrize("path", [p for p in SCRIPTS if "on_host/install" not in str(p)], ids=str)
def test_missing_arguments_end_scripts_with_a_one_sentence_error(path, clone):
    status, out, err = clone.run([clone.clone / path.relative_to(tiny.ROOT)])
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 250
    assert "needs" in err and not clone.calls() and not clone.starts()


@pytest.mark.parametrize("path", [p for p in SCRIPTS if 'usage="' in p.read_text()], ids=str)
def test_scripts_print_their_usage(path, clone):
    status, out, err = clone.run([clone.clone / path.relative_to(tiny.ROOT), "--help"])
    assert (status, err) == (0, "") and not clone.calls()
    assert out.startswith(f"usage: {path.relative_to(tiny.ROOT)} ")


# Slurm.

JOB = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "8"}
SBATCH = ("launch/slurm/train.sbatch", *FLAGS)
AGAIN = ["scontrol", "requeue", "7"]


@pytest.mark.parametrize(
    ("status", "state", "again"),
    [
        (0, "RUNNING", False),
        (1, "RUNNING", False),
        (PREEMPTED, "RUNNING", True),
        (LOST, "RUNNING", True),
        (PREEMPTED, "COMPLETING", False),  # the user cancels the job
        (PREEMPTED, "PREEMPTED", False),  # Slurm requeues the job
    ],
)
def test_a_job_is_requeued_after_statuses_143_and_134_alone(status, state, again, clone):
    clone.trains(status)
    clone.answer(("squeue", [(state, 0)]))
    assert clone.run(SBATCH, **JOB)[0] == status
    assert (AGAIN in clone.calls()) == again
    python = ".venv/bin/python"
    assert clone.calls()[0] == [
        "srun", "--ntasks-per-node=8", "--gpus-per-node=8", "--kill-on-bad-exit=0", python, "-m",
        "mvit_jax.train", *FLAGS,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_job_ends_after_repeated_losses_of_processes(clone):
    """Slurm counts preempted starts as well, which are no losses."""
    clone.answer(("squeue", [("RUNNING", 0)]))
    statuses = [LOST, LOST, *12 * [PREEMPTED], *11 * [LOST]]
    clone.trains(*statuses)
    again = []
    for number, status in enumerate(statuses):
        before = clone.calls().count(AGAIN)
        assert clone.run(SBATCH, **JOB, SLURM_RESTART_COUNT=str(number))[0] == status
        again.append(clone.calls().count(AGAIN) > before)
    assert again == [*24 * [True], False]


def test_sigterm_to_the_job_reaches_the_program(clone):
    clone.trains("wait")
    clone.answer(("squeue", [("RUNNING", 0)]))
    process = clone.start(SBATCH, **JOB)
    until(clone.starts)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == PREEMPTED
    assert (clone.folder / "saved").read_text() == "saved "
    assert AGAIN in clone.calls()


def test_a_job_requires_one_process_per_gpu(clone):
    status, _, err = clone.run(SBATCH, **JOB | {"SLURM_NTASKS_PER_NODE": "1"})
    assert status == 2 and "1 processes and 8 GPUs" in err and not clone.calls()
    clone.trains(0)
    assert clone.run(SBATCH, SLURM_JOB_ID="7", SLURM_NTASKS_PER_NODE="1")[0] == 0  # a CPU
    text = (LAUNCH / "slurm" / "train.sbatch").read_text()
    assert "#SBATCH --signal=TERM@120\n#SBATCH --requeue\n" in text


# Kubernetes.


def test_the_jobset_has_a_container_for_each_host_of_the_slice():
    [container] = POD["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = POD["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert math.prod(map(int, topology.split("x"))) == chips * JOB_SPEC["parallelism"]
    assert JOB_SPEC["completions"] == JOB_SPEC["parallelism"]
    ports = {port["containerPort"] for port in container["ports"]}
    assert int(cloud_tpu_cluster.coordinator_port) in ports


@pytest.mark.parametrize("version", ["1.29", "1.33", "1.37"])
def test_kubernetes_accepts_the_job_of_the_jobset(version):
    head = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}}
    kubernetes_validate.validate(head | {"spec": JOB_SPEC}, version, strict=True)


def test_the_jobset_restarts_after_statuses_143_and_134_alone():
    _, codes = JOB_SPEC["podFailurePolicy"]["rules"]
    assert codes["action"] == "FailJob" and codes["onExitCodes"]["operator"] == "NotIn"
    assert codes["onExitCodes"]["values"] == [LOST, PREEMPTED]


def test_xpk_starts_the_same_run(clone):
    arguments = ["n", "c", "z", "v5litepod-16", "image:tag"]
    assert clone.run(["launch/gke/xpk.sh", *arguments, *FLAGS], DRY_RUN="1")[0] == 0
    [call] = clone.calls()
    assert call[:3] == ["xpk", "workload", "create"]
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in call[3:])
    command = flags.pop("command")
    assert command == r"exec python -m mvit_jax.train --config=c.py --workdir=a\ folder"
    assert flags == {
        "workload": "n", "cluster": "c", "zone": "z", "tpu-type": "v5litepod-16",
        "docker-image": "image:tag", "num-slices": "1", "max-restarts": "100",
        "termination-grace-period-seconds": "300", "dry-run": "", "skip-validation": "",
    }  # fmt: skip


# The image.


def test_the_dockerfile_passes_hadolint_and_its_sources_exist():
    check("hadolint", LAUNCH / "Dockerfile")
    text = (LAUNCH / "Dockerfile").read_text()
    # Programs run without root's rights, under an init process that forwards signals.
    assert re.search(r"^USER [1-9]\d*$", text, re.M)
    assert text.index("\nUSER ") < text.index('\nENTRYPOINT ["tini", "--", "python", "-m"]')
    copied = re.findall(r"^COPY (.*) \S+$", text, re.M)
    included = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    for source in " ".join(copied).split():
        assert (tiny.ROOT / source).exists() and f"!{source.partition('/__')[0]}" in included


def pins(path: Path) -> dict[str, str]:
    lines = (x for x in path.read_text().splitlines() if x and not x.startswith("#"))
    return {name.lower(): version for name, _, version in (x.partition("==") for x in lines)}


def test_gpu_requirements_are_pinned_and_agree_with_the_lock():
    cuda, lock = pins(LAUNCH / "cuda12.txt"), pins(tiny.ROOT / "requirements.txt")
    assert all(cuda.values()) and not cuda.keys() & lock.keys()
    assert cuda["jax-cuda12-plugin"] == cuda["jax-cuda12-pjrt"] == lock["jax"]
    assert {"nvidia-cudnn-cu12", "nvidia-nccl-cu12"} <= cuda.keys()
