"""Runs of several real processes on this machine: results, output, failures, start."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mvit_jax import train
from mvit_jax.common.errors import UserError
from mvit_jax.training.distributed import device_table, failure, launch
from mvit_jax.training.run import history
from mvit_jax.training.run.checkpoints import Checkpoints
from tests.support import group, tiny
from tests.support.group import final_state
from tests.support.marks import nightly, slow

# Not AdamW: it would blow up the rounding of gradients that are zero in theory, the key biases.
SGD = ("--config.optim.name=sgd", "--config.optim.lr=0.1")
RECIPE = ("-m", "mvit_jax.train", "--config=configs/moving_digits.py", *tiny.RECIPE_FLAGS, *SGD)
EVALUATE = ("-m", "mvit_jax.evaluate")
# Many more steps than any test waits for.
LONG = (*group.TRAIN, "--config.epochs=1000", "--config.eval.every_epochs=0")


def printed(done):
    """Returns the printed lines without those of gloo, which connects CPUs."""
    return [line for line in done.out.splitlines() if "[Gloo]" not in line]


def run(program, count, devices, *, timeout=600, **more):
    done = group.finish(group.start(program, count, devices, **more), timeout)
    assert [d.status for d in done] == [0] * count, "\n".join(d.err[-2000:] for d in done)
    return done


def assert_alike(ours, theirs):
    """Up to rounding: gloo adds up what devices have in another order than one process does."""
    assert ours.keys() == theirs.keys() and len(ours) > 60
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_one_process_resumes_a_run_of_two_with_equal_results(digits, tmp_path):
    """SIGTERM to one of them stops both; process 0 alone prints and writes."""
    sgd = tiny.RECIPE | {"optim.name": "sgd", "optim.lr": 0.1}
    assert train.train(tiny.config(digits, **sgd), str(tmp_path / "one")) == 0
    program = [*RECIPE, f"--config.data.folder={digits}", f"--workdir={tmp_path / 'two'}"]
    two = group.start(program, 2, 1)
    lines = [line for line in group.lines_until(two[0], "step 2/") if "[Gloo]" not in line]
    two[1].send_signal(signal.SIGTERM)
    done = group.finish(two)
    assert [d.status for d in done] == [128 + signal.SIGTERM] * 2, done[0].err
    assert lines[0] == "2 processes on 1 host, 2 devices"
    assert [line.split()[:2] for line in lines[1:3]] == [["process", "0"], ["process", "1"]]
    step = Checkpoints(tmp_path / "two").step() or 0
    assert f"stopped at step {step} of 9" in done[0].out and 2 < step < 9
    assert printed(done[1]) == []
    assert len(list((tmp_path / "two").glob("events.*"))) == 1
    run(program, 1, 2)
    log, alone = (history.read(tmp_path / name) for name in ("two", "one"))
    assert [line["processes"] for line in log.starts] == [2, 1]
    losses = {line["step"]: line["loss"] for line in log.train}
    for theirs in alone.train:
        if not step < theirs["step"] < step + 2:  # a mean over fewer steps
            assert losses[theirs["step"]] == pytest.approx(theirs["loss"], rel=1e-6)
    assert [v["top1"] for v in log.val] == [v["top1"] for v in alone.val]
    assert_alike(final_state(tmp_path / "two"), final_state(tmp_path / "one"))


@pytest.mark.slow
def test_two_processes_evaluate_a_run_like_one(reference, tmp_path):
    """10 videos in batches of 8."""
    for name, count in (("one", 1), ("two", 2)):
        folder = shutil.copytree(reference, tmp_path / name)
        first, *rest = run([*EVALUATE, f"--workdir={folder}"], count, 1)
        assert "wrote " in first.out and all(printed(other) == [] for other in rest)
    folders = (tmp_path / "one", tmp_path / "two")
    ours, theirs = (json.loads((path / "evaluation.json").read_text()) for path in folders)
    assert ours == theirs and ours["videos"] == 10 == np.sum(ours["confusion"])
    ours, theirs = (np.load(path / "scores.npz") for path in folders)
    np.testing.assert_allclose(ours["probabilities"], theirs["probabilities"], atol=1e-6)
    assert ours["tested"].all()


@pytest.fixture(scope="module")
def one_process(digits, tmp_path_factory):
    """A run of 9 steps on four devices of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    run([*RECIPE, f"--config.data.folder={digits}", f"--workdir={folder}"], 1, 4)
    return folder


@pytest.mark.nightly
def test_sigterm_to_one_of_four_processes_stops_a_run_that_two_resume(
    digits, tmp_path, one_process
):
    """The state is sharded in four, then in two, then replicated.

    The second start is stopped as well: before its first step, whose number is not 1.
    """
    folder = tmp_path / "run"
    program = [*RECIPE, f"--config.data.folder={digits}", f"--workdir={folder}"]
    four = group.start([*program, "--config.mesh.fsdp=4"], 4, 1)
    group.wait_for(four[0], "step 2/")
    four[2].send_signal(signal.SIGTERM)
    done = group.finish(four)
    assert [d.status for d in done] == [128 + signal.SIGTERM] * 4, done[0].err
    step = Checkpoints(folder).step() or 0
    assert f"stopped at step {step} of 9" in done[0].out and 2 < step < 8
    two = group.start([*program, "--config.mesh.fsdp=2"], 2, 2)
    group.wait_for(two[0], "from step")
    two[0].send_signal(signal.SIGINT)
    done = group.finish(two)
    assert [d.status for d in done] == [128 + signal.SIGINT, 128 + signal.SIGTERM], done[0].err
    assert Checkpoints(folder).step() == step + 1
    run(program, 2, 2)
    assert_alike(final_state(folder), final_state(one_process))
    assert [line["processes"] for line in history.read(folder).starts] == [4, 2, 2]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_its_message(digits, tmp_path):
    """Once before training, once in the middle, with the other blocked in a collective."""
    began = time.monotonic()
    missing = [[], ["--config.data.folder=/nonexistent"]]
    program = [*LONG, f"--config.data.folder={digits}", f"--workdir={tmp_path / 'run'}"]
    first, second = group.finish(group.start(program, 2, 1, each=missing))
    assert (first.status, second.status) == (1, 1)
    assert second.err.count("\n") == 1 and "no data folder /nonexistent" in second.err
    assert "error: process 1 (" in first.err and "no data folder /nonexistent" in first.err
    assert time.monotonic() - began < 150  # the default timeout is 300 s

    data = shutil.copytree(digits, tmp_path / "data")
    broken = [[], [f"--config.data.folder={data}", "--config.data.threads=0"]]
    two = group.start(program, 2, 1, each=broken)
    group.wait_for(two[0], "step 2/")
    for video in data.glob("**/*.mp4"):
        video.write_bytes(b"")
    first, second = group.finish(two)
    assert (first.status, second.status) == (1, 1)
    assert "error: 10 videos drawn from" in second.err
    assert "error: process 1 (" in first.err and "10 videos drawn from" in first.err
    assert "Traceback" not in first.err + second.err


@pytest.mark.parametrize("killed", [slow(1), nightly(0)])
def test_a_killed_process_ends_the_other(killed, digits, tmp_path):
    program = [*LONG, f"--config.data.folder={digits}", f"--workdir={tmp_path}"]
    two = group.start(program, 2, 1)
    group.wait_for(two[0], "step 2/")
    two[killed].kill()
    began = time.monotonic()
    done = group.finish(two)
    assert time.monotonic() - began < 80  # missing heartbeats are noticed after 90 s
    left = done[1 - killed]
    # JAX aborts by itself where process 0 is gone.
    assert left.status in (failure.LOST, -signal.SIGABRT) and failure.LOST == 128 + 6
    if killed == 1:
        assert left.status == failure.LOST and "Traceback" not in left.err
        assert re.search(
            r"error: process 1 or its host has died.*the same command on all", left.err
        )
    else:  # JAX itself is quicker
        assert "coordination service" in left.err or "the same command on all" in left.err


@pytest.mark.nightly
def test_a_kill_during_a_restore_leaves_the_checkpoint_in_place(digits, tmp_path, one_process):
    """The failed collective is not reported as an unreadable checkpoint."""
    folder = shutil.copytree(one_process, tmp_path / "run")
    dies = (
        "import orbax.checkpoint as ocp\n"
        "if '--process_id=1' in sys.argv:\n"
        "    ocp.CheckpointManager.restore = lambda *args, **kwargs: os._exit(9)"
    )
    shutil.rmtree(folder / "checkpoints" / "9")  # there is a step to do
    flags = [*RECIPE[2:], f"--config.data.folder={digits}", f"--workdir={folder}"]
    first, second = group.finish(group.start([*group.program(dies), *flags], 2, 2), 120)
    assert second.status == 9, second.err
    assert first.status in (failure.LOST, -signal.SIGABRT), first.err
    assert "cannot be read" not in first.err and not (folder / "damaged").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["config", "list of videos"])
def test_a_process_with_another_config_or_list_ends_all(kind, digits, tmp_path):
    """The processes would block in different collectives."""
    flags = ["--config.log_every=3"]
    if kind != "config":
        data = shutil.copytree(digits, tmp_path / "data")
        lines = (data / "train.csv").read_text().splitlines(keepends=True)
        (data / "train.csv").write_text("".join(lines[:-1]))
        flags = [f"--config.data.folder={data}"]
    program = [*LONG, f"--config.data.folder={digits}", f"--workdir={tmp_path / 'run'}"]
    two = group.start(program, 2, 1, each=[[], flags])
    first, second = group.finish(two, 120)
    assert (first.status, second.status) == (1, 1)
    assert f"has another {kind} than process 0: " in second.err
    expected = {
        "config": "log_every is 3, and 2 in process 0",
        "list of videos": "videos is 23, and 24",
    }
    assert expected[kind] in second.err and expected[kind] in first.err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("hung", [nightly(1), slow(0)])
def test_a_hanging_process_ends_all(hung, digits, tmp_path):
    """Its connections stay open; only its heartbeats stop."""
    flags = [*LONG[2:], f"--config.data.folder={digits}", f"--workdir={tmp_path}"]
    two = group.start([*group.program("failure.SILENT_BEATS = 6"), *flags], 2, 1)
    group.wait_for(two[0], "step 2/")
    two[hung].send_signal(signal.SIGSTOP)
    left = two[1 - hung]
    _, err = left.communicate(timeout=60)
    two[hung].kill()
    group.finish([two[hung]])
    assert left.returncode == failure.LOST
    silence = ("has not answered", "has sent no heartbeat")[hung]
    assert f"process {hung} {silence} for 12 s" in err and err.count("\n") == 1


@pytest.mark.parametrize("sent", [slow(signal.SIGTERM), nightly(signal.SIGKILL)])
def test_workers_end_with_their_run_on_sigterm_and_sigkill(sent, digits, tmp_path):
    """SIGTERM reaches the workers too, as from a scheduler; none outlives the main process."""
    workers = ["--config.data.processes=2", f"--config.data.folder={digits}"]
    program = [*LONG, *workers, f"--workdir={tmp_path}"]
    [process] = group.start(program, 1, 1)
    group.wait_for(process, "step 4/")
    output = subprocess.check_output(["pgrep", "-P", str(process.pid)])
    children = [int(pid) for pid in output.split()]
    assert len(children) >= 2
    for pid in (*children, process.pid) if sent == signal.SIGTERM else (process.pid,):
        os.kill(pid, sent)
    [done] = group.finish([process])
    if sent == signal.SIGTERM:
        assert done.status == 128 + sent and "stopped at step" in done.out, done.err
        assert "Traceback" not in done.err
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < until:
        time.sleep(0.5)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def small(work):
    """Returns a program of several processes with a short heartbeat timeout."""
    return group.together(work, "failure.SILENT_BEATS = 4")


@pytest.mark.nightly
def test_a_failed_process_exits_with_its_stderr_closed():
    fails = "assert coordination.is_process_0() and not time.sleep(100)"
    two = group.start(small(fails), 2, 1)
    for process in two:
        assert process.stdout and process.stderr
        process.stderr.close()
    assert [process.wait(60) for process in two] == [1, 1]


@pytest.mark.nightly
@pytest.mark.parametrize("fails", [0, 1])
def test_process_0_exits_after_a_process_that_exits_slowly(fails):
    """JAX aborts processes that outlive process 0, with another exit status."""
    slow = "end = os._exit; os._exit = lambda s: (time.sleep(coordination.service()[1]), end(s))"
    work = f"{slow}; assert coordination.service()[1] != {fails}; time.sleep(100)"
    for done in group.finish(group.start(small(work), 2, 1), 60):
        assert done.status == 1 and "AssertionError" in done.err, done.err


@pytest.mark.nightly
def test_process_0_may_exit_long_after_the_others():
    """Process 0 writes the report; the others have finished by then and are not lost."""
    run(small("time.sleep(20) if coordination.is_process_0() else None"), 2, 1)


@pytest.mark.slow
def test_a_failure_of_process_0_fails_processes_that_have_finished():
    """The exit status of each process is that of the run."""
    two = group.start(small("assert not coordination.is_process_0() or time.sleep(8)"), 2, 1)
    first, second = group.finish(two, 60)
    assert (first.status, second.status) == (1, 1)
    assert "AssertionError" in first.err and "process 0 (" in second.err


@pytest.mark.slow
def test_a_broken_connection_is_reported_with_its_message():
    """A wrong network interface is not reported as "another process has died"."""
    broken = "exec(\"raise RuntimeError('NCCL error: no socket interface\\\\nmore')\")"
    two = group.start(small(f"time.sleep(100) if coordination.is_process_0() else {broken}"), 2, 1)
    first, second = group.finish(two, 60)
    assert (first.status, second.status) == (failure.LOST, failure.LOST)
    for done in (first, second):
        assert "(NCCL error: no socket interface): the same command on all" in done.err
    assert "Traceback" in second.err and "Traceback" not in first.err


@pytest.mark.nightly
def test_sigterm_ends_an_evaluation_in_several_processes(one_process):
    """JAX handles the signal there, and an evaluation has no loop that checks a flag."""
    sleeps = (
        "from mvit_jax.evaluate import __main__ as evaluate\n"
        "evaluate.test = lambda folder: print('tests', flush=True) or time.sleep(100)"
    )
    program = group.program(sleeps, "evaluate.main")
    two = group.start([*program, f"--workdir={one_process}"], 2, 1)
    for process in two:
        group.wait_for(process, "tests")
    for process in two:
        process.send_signal(signal.SIGTERM)
    ended = (-signal.SIGTERM, -signal.SIGABRT, failure.LOST)
    assert all(done.status in ended for done in group.finish(two, 60))


@pytest.mark.slow
def test_missing_processes_end_the_start_with_a_one_sentence_error(tmp_path):
    program = group.together("pass", "coordination.START_SECONDS = 2")
    flags = [f"--coordinator=127.0.0.1:{group.free_port()}", "--num_processes=2"]
    for process in (0, 1):
        began = time.monotonic()
        alone = group.start([*program, *flags, f"--process_id={process}"], 1, 1)
        [done] = group.finish(alone, 60)
        assert done.status == failure.LOST and done.err.count("\n") == 1, done.err
        late = "timed out after 2 s: not all processes have connected to 127.0.0.1"
        assert f"error: process {process} of 2 {late}" in done.err
        assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("node1", 2, 0), "--coordinator=node1 must be HOST:PORT"),
        (("node1:80", 2, 2), "--process_id=2 must be from 0 to 1"),
        (("node1:80", 0, 0), "--num_processes=0 must be at least 1"),
        (("node1:80", None, None), "give --coordinator=HOST:PORT, --num_processes and --process"),
    ],
)
def test_incomplete_or_wrong_cluster_flags_are_an_error(flags, sentence, no_cluster):
    with pytest.raises(UserError, match=re.escape(sentence)):
        launch.connect(*flags)


@pytest.fixture
def no_cluster(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION", "TPU_")):
            monkeypatch.delenv(name)
    # JAX connects no processes once its backends are in use, as they are here.
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    return monkeypatch


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_STEP_NUM_TASKS": "8"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "pod"}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        SLURM,  # a batch script that uses no srun
        SLURM | STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # a shell of salloc, or srun --ntasks=1
        KUBERNETES,  # a notebook
    ],
)
def test_a_single_process_starts_without_a_cluster(environ, no_cluster, capfd, recwarn):
    for name, value in environ.items():
        no_cluster.setenv(name, value)
    launch.connect()
    assert not jax.distributed.is_initialized()
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_a_pod_of_an_indexed_job_does_not_start_as_a_single_process(no_cluster):
    for name, value in (KUBERNETES | {"JOB_COMPLETION_INDEX": "1"}).items():
        no_cluster.setenv(name, value)
    no_cluster.setitem(sys.modules, "kubernetes", None)
    with (
        pytest.warns(UserWarning, match="Kubernetes"),
        pytest.raises(UserError, match=r"without the package kubernetes .* or --num_processes=1"),
    ):
        launch.connect()
    launch.connect(num_processes=1)


@pytest.mark.parametrize(
    ("environ", "ids"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),
        # One task a node with all of its GPUs; JAX would use the first alone.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
         [0, 1, 2, 3]),
        # Each task sees its own GPU; JAX would look for one with the task's number.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3", "SLURM_STEP_TASKS_PER_NODE": "8",
                  "SLURM_GPUS_PER_TASK": "1"}, [0]),
        # One task per GPU, with all GPUs visible to each: JAX's default.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, None),
        (SLURM | {"CUDA_VISIBLE_DEVICES": ""}, None),
    ],
)  # fmt: skip
def test_slurm_tasks_use_the_gpus_allotted_to_them(environ, ids, no_cluster):
    assert launch.slurm_devices(environ) == ids


def test_the_slurm_coordinator_process_and_gpus_are_passed_to_jax(no_cluster):
    """The coordinator, the number of processes and the GPUs, as JAX works them out."""
    environ = SLURM | STEP | {
        "SLURM_PROCID": "1", "CUDA_VISIBLE_DEVICES": "4,5", "SLURM_STEP_TASKS_PER_NODE": "1(x8)",
    }  # fmt: skip
    for name, value in environ.items():
        no_cluster.setenv(name, value)
    seen = {}

    class Client:
        def connect(self):
            raise UserError("far enough")

    def client(address, process, **options):
        seen.update(address=address, process=process)
        return Client()

    from jax._src import distributed, xla_bridge

    no_cluster.setattr(distributed, "global_state", distributed.State())
    no_cluster.setattr("jaxlib._jax.get_distributed_runtime_client", client)
    before = xla_bridge.CUDA_VISIBLE_DEVICES.value
    try:
        with pytest.raises(UserError, match="far enough"):
            launch.connect()
        assert xla_bridge.CUDA_VISIBLE_DEVICES.value == "0,1"
    finally:
        jax.config.update("jax_cuda_visible_devices", before)
    assert seen == {"address": f"n1:{7 + 65535 - 2**12 + 1}", "process": 1}


def device_row(process, host="node1", devices=1, **changes):
    row = {
        "process": process, "host": host, "platform": "gpu", "kind": "NVIDIA H100",
        "devices": list(range(process * devices, (process + 1) * devices)),
        "hardware": [f"/{process * devices + i}" for i in range(devices)],
        "allotted": None, "slice": 0, "memory": 79.6,
    }  # fmt: skip
    return row | changes


def test_the_device_table_lists_processes_hosts_and_devices():
    rows = [device_row(0, devices=2), device_row(1, "node2", 2)]
    assert device_table.describe(rows).splitlines() == [
        "2 processes on 2 hosts, 4 devices",
        "  process 0  node1  2 x NVIDIA H100 of 80 GiB (gpu), devices 0, 1",
        "  process 1  node2  2 x NVIDIA H100 of 80 GiB (gpu), devices 2, 3",
    ]
    assert device_table.find_anomalies(rows) == []
    many = [device_row(i, f"node{i // 8}") for i in range(64)]
    assert device_table.describe(many).splitlines() == [
        "64 processes on 8 hosts, 64 devices",
        "  64 processes with 1 x NVIDIA H100 of 80 GiB (gpu) each",
    ]
    here = device_table.row({})
    assert here["platform"] == "cpu" and len(here["devices"]) == 8 and here["hardware"] == []


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([device_row(0), device_row(1, platform="cpu", hardware=[], kind="cpu")],
         r"no accelerator in process 1 \(node1\), unlike in the other"),
        ([device_row(0), device_row(1), device_row(2, devices=2, hardware=["/3", "/4"])],
         r"number of devices differs from the usual 1 in process 2 \(node1\)"),
        ([device_row(0), device_row(1, hardware=["/0"])],
         "several processes on node1 use the same GPU 0"),
        ([device_row(0, allotted="8"), device_row(1, allotted="8")],
         "node1 has 8 GPUs for this job, but its processes use 2"),
    ],
)  # fmt: skip
def test_suspicious_device_tables_are_reported(rows, sentence):
    [message] = device_table.find_anomalies(rows)
    assert re.search(sentence, message), message


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"), True),
        (ValueError("shapes do not fit"), False),
        (UserError("no barrier is in the way of gloo"), False),
        (OSError("connection reset"), False),  # a disk on a network, say
    ],
)
def test_errors_of_lost_peers_are_recognised(error, lost):
    assert failure._peer_lost(error) == lost
    try:
        raise KeyError("after that") from error
    except KeyError as later:
        assert failure._peer_lost(later) == lost
