"""Commands in the pages about launching, run with stand-ins; flags and keys in all pages."""

import re
import shutil

import pytest

from mvit_jax.config import KEYS
from tests.launch.test_launch import LAUNCH, POD
from tests.project import test_docs
from tests.support import tiny

PAGES = [tiny.ROOT / "docs" / name for name in test_docs.ELSEWHERE]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_of_a_page_runs(page, clone):
    """Stand-ins record the calls, those of `python` and `pip` included."""
    for name in ("python", "python3", "pip", "ssh-agent"):
        shutil.copy(clone.folder / "bin" / "gcloud", clone.folder / "bin" / name)
    for name in ("python", "pip"):  # of the clone
        shutil.copy(clone.folder / "bin" / "gcloud", clone.clone / ".venv" / "bin" / name)
    clone.commit()
    (clone.clone / "mvit_jax-1.log").write_text("a step\n")
    clone.answer(
        ("describe shared", [("ACTIVE", 0)]),
        ("describe mvit", [("ACTIVE", 0)]),
        ("projects describe", [("123", 0)]),
        ("queued-resources list", [("", 0), ("", 0), ("ACTIVE", 0)]),
        ("train.status", [(f"training on a: {status}", 0) for status in ("0", "none", "0")]),
    )
    blocks = test_docs.blocks(page)
    assert {block.language for block in blocks} == {"sh"}
    script = "\n".join(block.code for block in blocks)
    status, out, err = clone.run(["bash", "-euo", "pipefail", "-c", script])
    assert status == 0, f"{out}\n{err}"
    calls = {" ".join(call) for call in clone.calls()}
    assert not any("WORKDIR" in call or "None" in call for call in calls)


def documented_commands() -> list[tuple[str, str, list[str]]]:
    """Returns file, program and flags of each command in launch/, the README and the pages."""
    commands = []
    pages = [tiny.ROOT / "README.md", *LAUNCH.rglob("*.s*"), *(tiny.ROOT / "docs").rglob("*.md")]
    texts = {path: path.read_text() for path in pages}
    [container] = POD["containers"]
    texts[LAUNCH / "gke" / "jobset.yaml"] = "python -m " + " ".join(container["args"])
    for path, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            scripts = r"train\.sh|keep\.sh|train\.sbatch|xpk\.sh"
            modules = r"(?:python -m |mvit_jax:cpu +)mvit_jax\.([a-z_]+)"
            program = re.search(rf"{modules}|({scripts}) ", line)
            if program:
                rest = re.split(r"[`;|#]| -- ", line[program.end() :])[0]
                flags = re.findall(r"--([a-z_]+(?:\.[a-z_.]+)?)(?==| |$)", rest)
                commands.append((path.name, program[1] or "train", flags))
    return commands


def test_flags_and_keys_of_all_commands_exist():
    commands = documented_commands()
    assert len({file for file, _, flags in commands if flags}) >= 15
    defined = {program: flags_of(program) for program in {program for _, program, _ in commands}}
    for file, program, flags in commands:
        for name in flags:
            if name.startswith("config."):
                assert name.removeprefix("config.") in KEYS, f"{file}: --{name}"
            else:
                assert name in defined[program], f"{file}: mvit_jax.{program} has no --{name}"


def flags_of(program: str) -> set[str]:
    """Returns the flags defined by a program and by the modules that it imports for flags."""
    package = tiny.ROOT / "mvit_jax"
    program = next(package.glob(f"{program}.py"), package / program / "__main__.py")
    texts = [program, package / "config.py", package / "training" / "distributed" / "launch.py"]
    pattern = r'DEFINE\w*\(\s*(?:\w+\(\),\s*)?"(\w+)"'
    defined = {name for path in texts for name in re.findall(pattern, path.read_text())}
    return defined | {"help", "config"}
