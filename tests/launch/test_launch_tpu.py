"""The scripts for TPU VMs, with stand-ins for `gcloud` and for the training program."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.stand_ins import ASKED, LOST, PREEMPTED, Stage, stage, until

KILLED = 137


@pytest.fixture
def clone(tmp_path):
    return stage(tmp_path)


def tpu(clone: Stage, name: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    return clone.run([f"launch/tpu_vm/{name}.sh", *arguments], **environment)


RESOURCE = ["gcloud", "compute", "tpus", "queued-resources"]
EVERYWHERE = ["--zone=z", "--node=all", "--worker=all"]


def test_tpus_are_asked_for_and_waited_for(clone):
    clone.answer(("describe", [("WAITING_FOR_RESOURCES", 0), ("PROVISIONING", 0), ("ACTIVE", 0)]))
    status, out, err = tpu(clone, "create", "m", "z", "v5litepod-16", "--spot")
    assert status == 0, err
    assert "WAITING_FOR_RESOURCES" in out and "m is ACTIVE" in out
    made, *asked = clone.calls()
    assert made == [
        *RESOURCE, "create", "m", "--zone=z", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=m", "--spot",
    ]  # fmt: skip
    assert asked == 3 * [[*RESOURCE, "describe", "m", "--zone=z", "--format=value(state.state)"]]


def test_several_slices_are_nodes_of_one_resource(clone):
    clone.answer(("describe", [("ACTIVE", 0)]))
    assert tpu(clone, "create", "m", "z", "v5p-16", SLICES="2")[0] == 0
    assert {"--node-count=2", "--node-prefix=m"} <= set(clone.calls()[0])
    assert "--node-id=m" not in clone.calls()[0]


def test_waiting_goes_on_where_the_request_cannot_be_asked_for_a_moment(clone):
    clone.answer(("describe", [("", 1), ("", 1), ("WAITING_FOR_RESOURCES", 0), ("ACTIVE", 0)]))
    status, out, err = tpu(clone, "create", "m", "z", "v4-32")
    assert status == 0 and "m is ACTIVE" in out, err
    clone.answer(("describe", [("", 1)]))
    status, _, err = tpu(clone, "create", "m", "z", "v4-32")
    assert status == 1 and "the request stays, and costs" in err and "delete.sh m z" in err


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


def test_tpus_that_do_not_come_are_an_error(clone):
    clone.answer(("describe", [("FAILED", 0)]))
    status, _, err = tpu(clone, "create", "m", "z", "v4-32")
    assert status == 1 and "m is FAILED" in err
    status, _, err = tpu(clone, "create", "m", "z", "v9-32")
    assert status == 2 and "no runtime is known for TYPE v9-32" in err


def commit(clone: Stage) -> None:
    git = ["git", "-C", str(clone.clone), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "--all", "launch"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)


@contextmanager
def a_training_runs(folder: Path) -> Iterator[None]:
    with (folder / "train.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_a_host_has_the_code_of_the_last_commit_and_keeps_what_is_its_own(clone, tmp_path):
    """What is sent runs in an empty home, to which `git archive` stands in for scp."""
    home, old = tmp_path / "home", "launch/old.py"
    home.mkdir()
    host, git = home / "mvit_jax", ["git", "-C", clone.clone, "archive", "--prefix=mvit_jax/"]
    (clone.clone / "launch/tpu_vm/on_host/install.sh").write_text("#!/bin/sh\n")  # not here

    def install() -> tuple[int, str, str]:
        commit(clone)
        subprocess.run([*git, f"--output={home}/mvit_jax.tar.gz", "HEAD"], check=True)
        assert tpu(clone, "install", "m", "z", "b")[0] == 0
        return clone.on_host(clone.calls()[-1], home)

    (clone.clone / old).write_text("")
    assert install()[0] == 0 and (host / old).exists()
    copied, installed = clone.calls()
    assert copied[:5] == [*RESOURCE, "scp"] and copied[6:] == ["m:mvit_jax.tar.gz", *EVERYWHERE]
    assert not Path(copied[5]).exists()  # of no use any more
    assert installed[:-1] == [*RESOURCE, "ssh", "m", *EVERYWHERE]
    assert installed[-1].endswith(" && mvit_jax/launch/tpu_vm/on_host/install.sh b")
    (clone.clone / old).unlink()
    own = (host / "train.log", host / "launch" / "mine.py")
    for path in own:
        path.write_text("")
    with a_training_runs(host):
        status, _, err = install()
        assert status == 1 and "a training is running" in err and (host / old).exists()
    (clone.clone / "launch/new.py").write_text("")
    assert install()[0] == 0
    assert not (host / old).exists() and (host / "launch/new.py").exists()
    assert (host / "launch/tpu_vm/on_host/train.sh").exists() and all(p.exists() for p in own)


def test_training_goes_on_without_the_connection(clone):
    """What is sent to the hosts is run here as their shell would run it."""
    clone.trains(0)
    assert tpu(clone, "train", "m", "z", *ASKED)[0] == 0
    [call] = clone.calls()
    assert call[:-1] == [*RESOURCE, "ssh", "m", *EVERYWHERE]
    assert clone.on_host(call)[0] == 0
    until((clone.clone / "train.status").exists)
    assert clone.starts() == [["-m", "mvit_jax.train", *ASKED]]
    assert "ended with status 0" in (clone.clone / "train.log").read_text()


def test_a_host_where_a_training_runs_is_left_alone_and_named(clone):
    (clone.clone / "train.status").write_text("its own\n")
    assert tpu(clone, "train", "m", "z", *ASKED)[0] == 0
    with a_training_runs(clone.clone):
        status, _, err = clone.on_host(clone.calls()[0])
    assert status == 1 and "a training is already running" in err
    assert (clone.clone / "train.status").read_text() == "its own\n" and not clone.starts()
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


@pytest.mark.slow
def test_a_host_that_is_asked_to_stop_between_two_starts_stops(clone):
    """The script's own `echo` of the time between them, which a shell takes from its environment,
    sends the signal."""
    clone.trains(PREEMPTED, "wait", 0)
    echo = '() { builtin echo "$@"; [[ $1 != preempted* ]] || kill -TERM $$; }'
    status, out, _ = clone.run(HOST, **{"BASH_FUNC_echo%%": echo})
    assert status == PREEMPTED and out.count("preempted") == 1
    assert len(clone.starts()) <= 2  # the second may end before it begins


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


def test_stopping_where_nothing_runs_is_no_error_and_hits_no_other_process(clone):
    assert tpu(clone, "stop", "m", "z")[0] == 0
    stop = clone.calls()[-1]
    assert clone.on_host(stop)[0] == 0  # nothing has run yet
    clone.trains(0)
    assert clone.run(HOST)[0] == 0
    assert clone.on_host(stop)[0] == 0
    with subprocess.Popen(["sleep", "60"]) as other:  # has the number now: the host was off
        (clone.clone / "train.pid").write_text(f"{other.pid}\n")
        assert clone.on_host(stop)[0] == 0 and other.poll() is None
        other.kill()
    shutil.rmtree(clone.clone / "launch")
    clone.clone.rename(clone.folder / "elsewhere")
    clone.clone.mkdir()
    assert clone.on_host(stop)[0] == 0


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


def test_spot_tpus_are_asked_for_again_until_the_run_is_complete(clone):
    states = ["", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "CREATING", "ACTIVE"]
    status, did = keep(clone, states, ["none none", "running running", "none none", "0 0"])
    assert status == 0
    assert did == ["create", *ONCE, "delete", "create", *ONCE, "delete"]


ONCE = ["install", "train"]


@pytest.mark.slow
@pytest.mark.parametrize("ended", ["143 running", "1 134", "silent"])
def test_how_the_training_ends_before_the_tpus_are_taken_away_does_not_matter(ended, clone):
    states = [*5 * ["ACTIVE"], "SUSPENDING", "SUSPENDED", "", "ACTIVE"]
    hosts = ["none", "running", *3 * [ended], "none", "0"]
    assert keep(clone, states, hosts) == (0, [*ONCE, "delete", "create", *ONCE, "delete"])


@pytest.mark.slow
@pytest.mark.parametrize("ended", ["134 143", "none running"])
def test_training_is_started_again_on_hosts_that_stay(ended, clone):
    hosts = ["none", "running", *5 * [ended], "running", "0"]
    assert keep(clone, ["ACTIVE"], hosts) == (0, [*ONCE, *ONCE, "delete"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ended", "did"),
    [
        ("1 running", ONCE),
        ("134", 6 * ONCE),  # not for ever
        ("134 silent", ONCE),  # a host hangs
    ],
)
def test_spot_tpus_are_left_where_the_training_failed(ended, did, clone):
    assert keep(clone, ["ACTIVE"], ["none", ended]) == (1, did)


@pytest.mark.slow
def test_a_host_that_cannot_be_reached_is_no_reason_while_the_others_train(clone):
    hosts = ["none", *20 * ["running silent"], "0"]
    assert keep(clone, ["ACTIVE"], hosts) == (0, [*ONCE, "delete"])


@pytest.mark.slow
def test_a_host_that_hangs_is_not_waited_for_for_ever(clone):
    """Short time limits stand in for the long ones."""
    (clone.clone / "launch/tpu_vm/status.sh").write_text("#!/usr/bin/env bash\nsleep 60\ntrue\n")
    timeout = clone.folder / "bin" / "timeout"
    timeout.write_text(
        f"""#!/usr/bin/env bash
        [[ $* == *status.sh* ]] || exit 1
        exec {shutil.which("timeout")} 0.05 "${{@:2}}"
        """
    )
    timeout.chmod(0o755)
    assert keep(clone, ["ACTIVE"], []) == (1, [])


@pytest.mark.slow
def test_a_second_keep_takes_over_what_runs(clone):
    assert keep(clone, ["ACTIVE"], ["running", "running", "0"]) == (0, ["delete"])


@pytest.mark.slow
def test_what_ran_before_on_the_tpus_is_not_this_run(clone):
    assert keep(clone, ["ACTIVE"], ["0", "running", "0"]) == (0, [*ONCE, "delete"])


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
