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

from tests.support.stand_ins import ASKED, LOST, PREEMPTED, Stage, until

KILLED = 137


def tpu(clone: Stage, name: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    return clone.run([f"launch/tpu_vm/{name}.sh", *arguments], **environment)


RESOURCE = ["gcloud", "compute", "tpus", "queued-resources"]
EVERYWHERE = ["--zone=z", "--node=all", "--worker=all"]


def test_tpus_are_asked_for_and_waited_for_where_they_cannot_be_asked_too(clone):
    states = [("", 1), ("WAITING_FOR_RESOURCES", 0), ("PROVISIONING", 0), ("ACTIVE", 0)]
    clone.answer(("describe", states))
    status, out, err = tpu(clone, "create", "m", "z", "v5litepod-16", "--spot")
    assert status == 0, err
    assert "WAITING_FOR_RESOURCES" in out and "m is ACTIVE" in out
    made, *asked = clone.calls()
    assert made == [
        *RESOURCE, "create", "m", "--zone=z", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=m", "--spot",
    ]  # fmt: skip
    assert asked == 4 * [[*RESOURCE, "describe", "m", "--zone=z", "--format=value(state.state)"]]


@pytest.mark.parametrize(
    ("kind", "answer", "status", "words"),
    [
        ("v4-32", ("", 1), 1, "the request stays, and costs"),
        ("v4-32", ("FAILED", 0), 1, "m is FAILED"),
        ("v9-32", ("", 0), 2, "no runtime is known for TYPE v9-32"),
    ],
)
def test_tpus_that_do_not_come_are_an_error(kind, answer, status, words, clone):
    clone.answer(("describe", [answer]))
    ended, _, err = tpu(clone, "create", "m", "z", kind)
    assert ended == status and words in err
    assert status == 2 or "delete.sh m z" in err


@pytest.mark.parametrize("script", ["create", "keep"])
def test_who_interrupts_is_told_what_still_costs(script, clone):
    clone.answer(("list", [("", 0)]), ("describe", [("WAITING_FOR_RESOURCES", 0)]))
    more = ("b", *ASKED) if script == "keep" else ()
    command = [f"launch/tpu_vm/{script}.sh", "m", "z", "v5litepod-16", *more]
    process = clone.start(command, POLL="60")
    until(lambda: any("describe" in call for call in clone.calls()))
    os.killpg(process.pid, signal.SIGTERM)  # all of them, as Ctrl-C
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "costs" in err.splitlines()[-1] and "launch/tpu_vm/delete.sh m z" in err.splitlines()[-1]


@contextmanager
def a_training_runs(folder: Path) -> Iterator[None]:
    with (folder / "train.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_a_host_has_the_code_of_the_last_commit_and_keeps_what_is_its_own(clone, tmp_path):
    """What is sent runs in an empty home, to which `git archive` stands in for scp."""
    home, old = tmp_path / "home", clone.clone / "launch/old.py"
    home.mkdir()
    host, log = home / "mvit_jax", home / "mvit_jax" / "train.log"
    (clone.clone / "launch/tpu_vm/on_host/install.sh").write_text("#!/bin/sh\n")  # not here
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
    with a_training_runs(host):
        status, _, err = install()
        assert status == 1 and "a training is running" in err
    assert install()[0] == 0
    assert not (host / "launch/old.py").exists() and log.exists()


def test_training_goes_on_without_the_connection(clone):
    """What is sent to the hosts is run here as their shell would run it."""
    clone.trains(0)
    assert tpu(clone, "train", "m", "z", *ASKED)[0] == 0
    [call] = clone.calls()
    assert call[:-1] == [*RESOURCE, "ssh", "m", *EVERYWHERE]
    assert clone.on_host(call)[0] == 0
    log = clone.clone / "train.log"
    until(lambda: "ended with status 0" in log.read_text())
    assert clone.starts() == [["-m", "mvit_jax.train", *ASKED]]
    assert (clone.clone / "train.status").read_text() == "0\n"


def test_a_host_where_a_training_runs_is_left_alone_and_named(clone):
    assert tpu(clone, "train", "m", "z", *ASKED)[0] == 0
    with a_training_runs(clone.clone):
        status, _, err = clone.on_host(clone.calls()[0])
    assert status == 1 and "a training is already running" in err and not clone.starts()
    clone.answer(("--command", [("", 1)]))  # one of the hosts refuses
    status, out, _ = tpu(clone, "train", "m", "z", *ASKED)
    assert status == 1 and "started on all" not in out


HOST = ("launch/tpu_vm/on_host/train.sh", *ASKED)


@pytest.mark.parametrize(
    ("statuses", "starts", "end"),
    [
        ((0,), 1, 0),
        ((1,), 1, 1),
        ((PREEMPTED, PREEMPTED, 0), 3, 0),
        ((KILLED, 0), 2, 0),  # the others wait for it
        ((LOST, KILLED) * 10, 11, LOST),
        ((PREEMPTED,) * 12 + (0,), 13, 0),
        ((127,), 1, 127),  # there is no such program
    ],
)
def test_a_host_starts_again_after_a_preemption_alone(statuses, starts, end, clone):
    clone.trains(*statuses)
    assert clone.run(HOST)[0] == end
    assert clone.starts() == starts * [["-m", "mvit_jax.train", *ASKED]]
    assert (clone.clone / "train.status").read_text() == f"{end}\n"
    assert not (clone.clone / "train.pid").exists()


def test_a_host_that_is_asked_to_stop_lets_the_program_save_and_does_not_start_again(clone):
    clone.trains("wait", 0)
    process = clone.start(HOST)
    until(clone.starts)
    assert clone.run(HOST)[0] == 1  # there is one already
    assert tpu(clone, "stop", "m", "z")[0] == 0
    status, said, err = clone.on_host(clone.calls()[-1])
    assert status == 0 and said.endswith(": stopped\n"), err
    assert (clone.clone / "train.status").exists()  # it was waited for
    out, _ = process.communicate(timeout=20)
    assert process.returncode == PREEMPTED, out
    assert (clone.folder / "saved").read_text() == "saved " and len(clone.starts()) == 1
    with subprocess.Popen(["sleep", "60"]) as other:  # has the number now: the host was off
        (clone.clone / "train.pid").write_text(f"{other.pid}\n")
        assert clone.on_host(clone.calls()[-1])[0] == 0 and other.poll() is None
        other.kill()


@pytest.mark.parametrize("said", ["none", "0", "134", "running"])
def test_what_a_host_says(said, clone):
    assert tpu(clone, "status", "m", "z")[0] == 0
    assert clone.calls()[0][:-1] == [*RESOURCE, "ssh", "m", *EVERYWHERE]
    if said != "none":
        (clone.clone / "train.status").write_text(f"{said}\n")
    with a_training_runs(clone.clone if said == "running" else clone.folder):
        status, out, err = clone.on_host(clone.calls()[0])
    assert (status, err) == (0, "")
    assert re.fullmatch(rf"training on \S+: {said}\n", out)


ONCE, AGAIN = ["install", "train"], ["delete", "create", "install", "train", "delete"]
TAKEN = [*5 * ["ACTIVE"], "SUSPENDING", "SUSPENDED", "", "ACTIVE"]


def slow(*values: object, name: str):
    return pytest.param(*values, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("states", "hosts", "end", "did"),
    [
        pytest.param(
            ["", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "CREATING", "ACTIVE"],
            ["none none", "running running", "none none", "0 0"],
            0, ["create", *ONCE, *AGAIN], id="again until it is complete",
        ),
        *(
            slow(TAKEN, ["none", "running", *3 * [ended], "none", "0"], 0, [*ONCE, *AGAIN],
                 name=f"{ended} before they are taken away")
            for ended in ("143 running", "1 134", "silent")
        ),
        slow(["ACTIVE"], ["none", "running", *5 * ["134 143"], "running", "0"], 0,
             [*ONCE, *ONCE, "delete"], name="hosts that stay are started again"),
        slow(["ACTIVE"], ["none", "1 running"], 1, ONCE, name="left where it failed"),
        slow(["ACTIVE"], ["none", "134"], 1, 6 * ONCE, name="not for ever"),
        slow(["ACTIVE"], ["none", "134 silent"], 1, ONCE, name="a host hangs"),
        slow(["ACTIVE"], ["none", *20 * ["running silent"], "0"], 0, [*ONCE, "delete"],
             name="others train"),
        slow(["ACTIVE"], ["running", "running", "0"], 0, ["delete"], name="a second keep"),
        slow(["ACTIVE"], ["0", "running", "0"], 0, [*ONCE, "delete"], name="another run before"),
    ],
)  # fmt: skip
def test_spot_tpus_are_kept(states, hosts, end, did, clone):
    assert keep(clone, states, hosts) == (end, did)


def keep(
    clone: Stage, states: list[str], hosts: list[str], **environment: str
) -> tuple[int, list[str]]:
    """The end of keep.sh, and what it did, when the TPUs go through these states, and status.sh
    has these words for the hosts: where one is "silent", the call fails."""
    told = []
    for words in hosts:
        lines = [f"training on h: {word}" for word in words.split() if word != "silent"]
        told.append(("\n".join(["gcloud says: 1", *lines]), int("silent" in words)))
    clone.answer(
        ("list", [(state, 0) for state in states]),
        ("describe", [("ACTIVE", 0)]),
        ("train.status", told),
    )
    for name in ("install", "train"):  # have tests of their own
        (clone.clone / f"launch/tpu_vm/{name}.sh").write_text(
            f'#!/usr/bin/env bash\ngcloud {name} "$@"\n'
        )
    command = ["launch/tpu_vm/keep.sh", "m", "z", "v5litepod-16", "b", *ASKED]
    done = clone.run(command, **environment)
    words = ("create", "delete", "install", "train")
    calls = clone.calls()
    assert all(c[2:] == ["m", "z", "b"] for c in calls if c[1] == "install")
    assert all(c[2:] == ["m", "z", *ASKED] for c in calls if c[1] == "train")
    return done[0], [word for call in calls for word in call if word in words]


@pytest.mark.slow
def test_spot_tpus_that_never_come_are_asked_for_at_longer_and_longer_intervals(clone):
    slept = clone.folder / "slept"
    stand_in = clone.folder / "bin" / "sleep"
    stand_in.write_text(f'#!/bin/sh\necho "$1" >>{slept}\n')
    stand_in.chmod(0o755)
    states = [*8 * ["FAILED", ""], "ACTIVE", "SUSPENDED", "", "ACTIVE"]
    status, did = keep(clone, states, ["none", "0"], POLL="60")
    assert status == 0 and did.count("delete") == 10
    pauses = [int(text) for text in slept.read_text().split()]
    assert pauses == [0, 60, 180, 420, 900, 1860, 3600, 3600, 0]
