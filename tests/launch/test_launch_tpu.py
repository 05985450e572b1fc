"""The scripts for TPU VMs, with stand-ins for `gcloud` and for the training program."""

import fcntl
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.stand_ins import FLAGS, LOST, PREEMPTED, Stage, until

KILLED = 137


def tpu(clone: Stage, name: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    return clone.run([f"launch/tpu_vm/{name}.sh", *arguments], **environment)


RESOURCE = ["gcloud", "compute", "tpus", "queued-resources"]
EVERYWHERE = ["--zone=z", "--node=all", "--worker=all"]


def test_create_requests_tpus_and_polls_until_they_are_active(clone):
    states = [("", 1), ("WAITING_FOR_RESOURCES", 0), ("PROVISIONING", 0), ("ACTIVE", 0)]
    clone.answer(("describe", states))
    status, out, err = tpu(clone, "create", "m", "z", "v5litepod-16", "--spot")
    assert status == 0, err
    assert "WAITING_FOR_RESOURCES" in out and "m is ACTIVE" in out
    request, *polls = clone.calls()
    assert request == [
        *RESOURCE, "create", "m", "--zone=z", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=m", "--spot",
    ]  # fmt: skip
    assert polls == 4 * [[*RESOURCE, "describe", "m", "--zone=z", "--format=value(state.state)"]]


@pytest.mark.parametrize(
    ("kind", "answer", "status", "words"),
    [
        ("v4-32", ("", 1), 1, "the request stays, and costs"),
        ("v4-32", ("FAILED", 0), 1, "m is FAILED"),
        ("v9-32", ("", 0), 2, "no runtime is known for TYPE v9-32"),
    ],
)
def test_create_fails_if_the_tpus_do_not_become_active(kind, answer, status, words, clone):
    clone.answer(("describe", [answer]))
    ended, _, err = tpu(clone, "create", "m", "z", kind)
    assert ended == status and words in err
    assert status == 2 or "delete.sh m z" in err


@pytest.mark.parametrize("script", ["create", "keep"])
def test_an_interrupted_script_names_the_request_that_still_costs(script, clone):
    clone.answer(("list", [("", 0)]), ("describe", [("WAITING_FOR_RESOURCES", 0)]))
    more = ("b", *FLAGS) if script == "keep" else ()
    command = [f"launch/tpu_vm/{script}.sh", "m", "z", "v5litepod-16", *more]
    process = clone.start(command, POLL="60")
    until(lambda: any("describe" in call for call in clone.calls()))
    os.killpg(process.pid, signal.SIGTERM)  # the process group, as Ctrl-C does
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "costs" in err.splitlines()[-1] and "launch/tpu_vm/delete.sh m z" in err.splitlines()[-1]


@contextmanager
def training_active(folder: Path) -> Iterator[None]:
    with (folder / "train.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_install_replaces_the_code_on_a_host_and_keeps_its_log(clone, tmp_path):
    """The command sent runs in an empty home; `git archive` is a stand-in for scp."""
    home, old = tmp_path / "home", clone.clone / "launch/old.py"
    home.mkdir()
    host, log = home / "mvit_jax", home / "mvit_jax" / "train.log"
    (clone.clone / "launch/tpu_vm/on_host/install.sh").write_text("#!/bin/sh\n")  # a stand-in
    old.write_text("")

    def install() -> tuple[int, str, str]:
        clone.commit()
        archive = ["git", "archive", "--prefix=mvit_jax/", f"--output={home}/mvit_jax.tar.gz"]
        subprocess.run([*archive, "HEAD"], cwd=clone.clone, check=True)
        assert tpu(clone, "install", "m", "z", "b")[0] == 0
        return clone.on_host(clone.calls()[-1], home)

    assert install()[0] == 0 and (host / "launch/old.py").exists()
    copied, installed = clone.calls()
    assert copied[:5] == [*RESOURCE, "scp"] and copied[6:] == ["m:mvit_jax.tar.gz", *EVERYWHERE]
    assert installed[:-1] == [*RESOURCE, "ssh", "m", *EVERYWHERE]
    assert installed[-1].endswith(" && mvit_jax/launch/tpu_vm/on_host/install.sh b")
    old.unlink()
    log.write_text("")
    with training_active(host):
        status, _, err = install()
        assert status == 1 and "a training is running" in err
    assert install()[0] == 0
    assert not (host / "launch/old.py").exists() and log.exists()


def test_training_continues_without_the_connection(clone):
    """The command sent to the hosts runs in a shell of this machine."""
    clone.trains(0)
    assert tpu(clone, "train", "m", "z", *FLAGS)[0] == 0
    [call] = clone.calls()
    assert call[:-1] == [*RESOURCE, "ssh", "m", *EVERYWHERE]
    assert clone.on_host(call)[0] == 0
    log = clone.clone / "train.log"
    until(lambda: "ended with status 0" in log.read_text())
    assert clone.starts() == [["-m", "mvit_jax.train", *FLAGS]]
    assert (clone.clone / "train.status").read_text() == "0\n"


def test_train_fails_on_a_host_with_a_running_training(clone):
    assert tpu(clone, "train", "m", "z", *FLAGS)[0] == 0
    with training_active(clone.clone):
        status, _, err = clone.on_host(clone.calls()[0])
    assert status == 1 and "a training is already running" in err and not clone.starts()
    clone.answer(("--command", [("", 1)]))  # one host fails
    status, out, _ = tpu(clone, "train", "m", "z", *FLAGS)
    assert status == 1 and "started on all" not in out


HOST = ("launch/tpu_vm/on_host/train.sh", *FLAGS)


@pytest.mark.parametrize(
    ("statuses", "starts", "end"),
    [
        ((0,), 1, 0),
        ((1,), 1, 1),
        ((PREEMPTED, PREEMPTED, 0), 3, 0),
        ((KILLED, 0), 2, 0),  # the other hosts wait for this one
        ((LOST, KILLED) * 10, 11, LOST),
        ((PREEMPTED,) * 12 + (0,), 13, 0),
        ((127,), 1, 127),  # command not found
    ],
)
def test_hosts_restart_training_after_preemption_but_not_after_errors(statuses, starts, end, clone):
    clone.trains(*statuses)
    assert clone.run(HOST)[0] == end
    assert clone.starts() == starts * [["-m", "mvit_jax.train", *FLAGS]]
    assert (clone.clone / "train.status").read_text() == f"{end}\n"
    assert not (clone.clone / "train.pid").exists()


def test_stop_lets_the_program_save_and_prevents_a_restart(clone):
    clone.trains("wait", 0)
    process = clone.start(HOST)
    until(clone.starts)
    assert clone.run(HOST)[0] == 1  # already running
    assert tpu(clone, "stop", "m", "z")[0] == 0
    status, out, err = clone.on_host(clone.calls()[-1])
    assert status == 0 and out.endswith(": stopped\n"), err
    assert (clone.clone / "train.status").exists()  # stop waits for the end
    out, _ = process.communicate(timeout=20)
    assert process.returncode == PREEMPTED, out
    assert (clone.folder / "saved").read_text() == "saved " and len(clone.starts()) == 1
    with subprocess.Popen(["sleep", "60"]) as other:  # has the same number after a reboot
        (clone.clone / "train.pid").write_text(f"{other.pid}\n")
        assert clone.on_host(clone.calls()[-1])[0] == 0 and other.poll() is None
        other.kill()


@pytest.mark.parametrize("state", ["none", "0", "134", "running"])
def test_status_prints_the_state_of_a_host(state, clone):
    assert tpu(clone, "status", "m", "z")[0] == 0
    assert clone.calls()[0][:-1] == [*RESOURCE, "ssh", "m", *EVERYWHERE]
    if state != "none":
        (clone.clone / "train.status").write_text(f"{state}\n")
    with training_active(clone.clone if state == "running" else clone.folder):
        status, out, err = clone.on_host(clone.calls()[0])
    assert (status, err) == (0, "")
    assert re.fullmatch(rf"training on \S+: {state}\n", out)


ONCE, AGAIN = ["install", "train"], ["delete", "create", "install", "train", "delete"]
TAKEN = [*5 * ["ACTIVE"], "SUSPENDING", "SUSPENDED", "", "ACTIVE"]


def slow(*values: object, name: str):
    return pytest.param(*values, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("states", "hosts", "end", "actions"),
    [
        pytest.param(
            ["", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "CREATING", "ACTIVE"],
            ["none none", "running running", "none none", "0 0"],
            0, ["create", *ONCE, *AGAIN], id="recreated until complete",
        ),
        *(
            slow(TAKEN, ["none", "running", *3 * [ended], "none", "0"], 0, [*ONCE, *AGAIN],
                 name=f"{ended} before the TPUs are preempted")
            for ended in ("143 running", "1 134", "silent")
        ),
        slow(["ACTIVE"], ["none", "running", *5 * ["134 143"], "running", "0"], 0,
             [*ONCE, *ONCE, "delete"], name="remaining hosts restart"),
        slow(["ACTIVE"], ["none", "1 running"], 1, ONCE, name="left after an error"),
        slow(["ACTIVE"], ["none", "134"], 1, 6 * ONCE, name="limited restarts"),
        slow(["ACTIVE"], ["none", "134 silent"], 1, ONCE, name="a host hangs"),
        slow(["ACTIVE"], ["none", *20 * ["running silent"], "0"], 0, [*ONCE, "delete"],
             name="other hosts train"),
        slow(["ACTIVE"], ["running", "running", "0"], 0, ["delete"], name="a second keep"),
        slow(["ACTIVE"], ["0", "running", "0"], 0, [*ONCE, "delete"], name="after another run"),
    ],
)  # fmt: skip
def test_keep_recreates_spot_tpus_until_training_is_complete(states, hosts, end, actions, clone):
    assert keep(clone, states, hosts) == (end, actions)


def keep(
    clone: Stage, states: list[str], hosts: list[str], **environment: str
) -> tuple[int, list[str]]:
    """Runs keep.sh; returns its exit status and the actions that it took.

    The TPUs go through `states`; status.sh prints the words of `hosts`, and fails for "silent".
    """
    answers = []
    for words in hosts:
        lines = [f"training on h: {word}" for word in words.split() if word != "silent"]
        answers.append(("\n".join(["gcloud says: 1", *lines]), int("silent" in words)))
    clone.answer(
        ("list", [(state, 0) for state in states]),
        ("describe", [("ACTIVE", 0)]),
        ("train.status", answers),
    )
    for name in ("install", "train"):  # tested above
        (clone.clone / f"launch/tpu_vm/{name}.sh").write_text(
            f'#!/usr/bin/env bash\ngcloud {name} "$@"\n'
        )
    command = ["launch/tpu_vm/keep.sh", "m", "z", "v5litepod-16", "b", *FLAGS]
    done = clone.run(command, **environment)
    words = ("create", "delete", "install", "train")
    calls = clone.calls()
    assert all(c[2:] == ["m", "z", "b"] for c in calls if c[1] == "install")
    assert all(c[2:] == ["m", "z", *FLAGS] for c in calls if c[1] == "train")
    return done[0], [word for call in calls for word in call if word in words]


@pytest.mark.slow
def test_keep_sh_retries_unavailable_tpus_at_growing_intervals(clone):
    slept = clone.folder / "slept"
    stand_in = clone.folder / "bin" / "sleep"
    stand_in.write_text(f'#!/bin/sh\necho "$1" >>{slept}\n')
    stand_in.chmod(0o755)
    states = [*8 * ["FAILED", ""], "ACTIVE", "SUSPENDED", "", "ACTIVE"]
    status, actions = keep(clone, states, ["none", "0"], POLL="60")
    assert status == 0 and actions.count("delete") == 10
    pauses = [int(text) for text in slept.read_text().split()]
    assert pauses == [0, 60, 180, 420, 900, 1860, 3600, 3600, 0]
