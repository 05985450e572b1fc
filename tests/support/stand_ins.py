"""Stand-ins for the programs of clusters, which record their calls and print set answers.

Scripts run in a copy of the files of a clone that they need, with the stand-ins first on the path.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import tiny

# Flags of a training program: the space must survive all shells.
FLAGS = ("--config=c.py", "--workdir=a folder")
PREEMPTED, LOST = 143, 134

CLUSTER = (
    "gcloud", "kubectl", "xpk", "docker", "sbatch", "squeue", "scontrol", "scancel", "ssh-add",
)  # fmt: skip

# Isolated and without `site` (-IS), since scripts start many of them.
RECORDER = """#!{python} -IS
import json, os, sys
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open("{folder}/calls", "a") as file:
    file.write(json.dumps(call) + "\\n")
answers = json.load(open("{folder}/answers"))
for number, (part, outputs) in enumerate(answers):
    if part in " ".join(call):
        # In order; the last one repeats.
        answers[number][1] = outputs[1:] or outputs
        json.dump(answers, open("{folder}/answers", "w"))
        text, status = outputs[0]
        print(text)
        sys.exit(status)
"""

# A training program: records its start and ends with the next status of the file `statuses`. For
# the word `wait` it waits for SIGTERM, "saves" and ends with 143.
PROGRAM = """#!{python} -IS
import json, os, signal, sys, time
folder = "{folder}"
statuses = open(folder + "/statuses").read().split()
open(folder + "/statuses", "w").write(" ".join(statuses[1:]))
def saved(*_):
    time.sleep(0.5)
    open(folder + "/saved", "a").write("saved ")
    os._exit(143)
if statuses[0] == "wait":
    signal.signal(signal.SIGTERM, saved)
with open(folder + "/starts", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if statuses[0] == "wait":
    time.sleep(60)
sys.exit(int(statuses[0]))
"""

# srun for one process: like the real one, it forwards signals and ends with the process's status.
SRUN = """#!{python} -IS
import json, signal, subprocess, sys
with open("{folder}/calls", "a") as file:
    file.write(json.dumps(["srun", *sys.argv[1:]]) + "\\n")
command = sys.argv[1:]
while command[0].startswith("--"):
    command = command[1:]
process = subprocess.Popen(command)
signal.signal(signal.SIGTERM, lambda *_: process.terminate())
sys.exit(process.wait())
"""


@dataclass(frozen=True)
class Stage:
    """A folder `mvit_jax` with the files of a clone, and stand-ins."""

    folder: Path

    @property
    def clone(self) -> Path:
        return self.folder / "mvit_jax"

    def environment(self, **more: str) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "XLA"))}
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return inherited | {"PATH": path, "HOME": str(self.folder), "POLL": "0"} | more

    def start(self, command: Sequence[str | Path], **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(word) for word in command], cwd=self.clone, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.environment(**environment),
            start_new_session=True,  # for signals to the process group, as Ctrl-C sends them
        )  # fmt: skip

    def run(self, command: Sequence[str | Path], **environment: str) -> tuple[int, str, str]:
        """Returns exit status, standard output and standard error."""
        process = self.start(command, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def on_host(
        self, call: Sequence[str], home: Path | None = None, **environment: str
    ) -> tuple[int, str, str]:
        """Runs the command that a call of gcloud sends to the hosts, in a shell."""
        [command] = [w.removeprefix("--command=") for w in call if w.startswith("--command=")]
        return self.run(["bash", "-c", f"cd {home or self.folder}\n{command}"], **environment)

    def commit(self) -> None:
        """Commits the files in launch/."""
        git = ["git", "-c", "user.name=n", "-c", "user.email=e"]
        for command in (
            ["init", "-q"],
            ["add", "--all", "launch"],
            ["commit", "--allow-empty", "-qm", "all"],
        ):
            subprocess.run([*git, *command], cwd=self.clone, check=True)

    def answer(self, *answers: tuple[str, list[tuple[str, int]]]) -> None:
        """Sets output and status of successive calls that contain these words."""
        (self.folder / "answers").write_text(json.dumps(answers))

    def calls(self) -> list[list[str]]:
        return self._lines("calls")

    def trains(self, *statuses: int | str) -> None:
        """Sets the exit statuses of successive starts of the training program, or "wait"."""
        (self.folder / "statuses").write_text(" ".join(map(str, statuses)))

    def starts(self) -> list[list[str]]:
        return self._lines("starts")

    def _lines(self, name: str) -> list[list[str]]:
        path = self.folder / name
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def until(condition: Callable[[], object]) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("the condition is not met after 10 s")


def stage(folder: Path) -> Stage:
    staged = Stage(folder)
    shutil.copytree(tiny.ROOT / "launch", staged.clone / "launch")
    texts = {staged.clone / ".venv" / "bin" / "python": PROGRAM, folder / "bin" / "srun": SRUN}
    texts |= {folder / "bin" / name: RECORDER for name in CLUSTER}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(python=sys.executable, folder=folder))
        path.chmod(0o755)
    staged.answer()
    staged.trains()
    return staged
