"""End-to-end tests of the podplan program on a tiny model, and its errors."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from tests.support import tiny

EXPERIMENT = [
    "--config=configs/moving_digits.py", *tiny.FLAGS, "--config.data.train_videos=2000",
    "--config.optim.ema=0.9",
]  # fmt: skip


HERE = ["--topology=v5e:2x2"]
SWEEP = [*HERE, "--sweep", "--remat=none"]
WRONG = [
    (["--topology=v5e:16x32"], r"no slice v5e:16x32: v5e has 1x1 \(1\), .*16x16 \(256\)"),
    ([], "give --config=.* and --topology="),
    (["--topology=v5e:4x4"], r"batch=8 cannot be divided over 16 chips.*--config.batch=16 "),
    ([*HERE, "--config.mesh.fsdp=3"], "mesh.fsdp=3 does not divide the 4"),
    ([*HERE, "--config.mesh.data=3"], "mesh.data=3 x mesh.fsdp=1 requires 3 devices"),
    ([*HERE, "--slices=2", "--config.mesh.fsdp=8"], "mesh.fsdp=8 does not divide the 4 chips of"),
    ([*HERE, "--config.data.train_videos=0"], "data.train_videos must be at least 1, not 0"),
    (["--config=configs/custom.py", *HERE], "--config.data.train_videos=N"),  # of unknown size
    ([*HERE, "--effort=7"], "--effort=7 must be from -1 to 1"),
    ([*HERE, "--effort=nan"], "--effort=nan must be from -1 to 1"),
    ([*HERE, "--out=plan.jpg"], "--out=plan.jpg must be a .png file"),
    ([*HERE, "--out=/nowhere/plan.png"], "/nowhere/plan.png cannot be written: .* folder /nowhere"),
    ([*HERE, "--json=/nowhere/plan.json"], "/nowhere/plan.json cannot be written"),
    ([*HERE, "--json="], "--json is empty"),
    ([*HERE, "--fsdp=3"], "--fsdp needs --sweep"),
    ([*HERE, "--clips=x"], "--clips needs --sweep"),
    ([*HERE, "--remat=none"], "--remat needs --sweep"),
    ([*SWEEP, "--largest_batch"], "--largest_batch or --sweep, not both"),
    ([*SWEEP, "--clips=2,x"], "--clips must be numbers like 1,4, not 'x'"),
    ([*SWEEP, "--clips=0"], "--clips must be numbers like "),
    ([*SWEEP, "--clips="], "--clips is empty"),
    ([*SWEEP, "--fsdp=1,3"], "mesh.fsdp=3 does not divide the 4"),
    ([*SWEEP, "--fsdp="], "--fsdp is empty"),
    ([*HERE, "--sweep", "--remat="], "--remat is empty"),
    ([*HERE, "--sweep", "--remat=all"], "--remat=all must be one of none, cheap"),
    ([*SWEEP, "--clips=1", "--config.data.repeats=2"], "batch=4 cannot be divided over 4 chips"),
]
KINETICS = "--config=configs/kinetics.py:mvit_b_16x4"
# Flags after those of the experiment above, unless they have a --config of their own.
RUNS = {
    "kept": [*SWEEP, "--fsdp=1", "--clips=2,13", "--json={tmp}/kept.json"],
    "sweep": [
        "--topology=v5e:4x4", "--config.batch=16", "--sweep", "--fsdp=1,16", "--remat=none,blocks",
        "--clips=1,40", "--json={tmp}/sweep.json", "--out={tmp}/sweep.png",
    ],
    "sweep of pairs": [KINETICS, "--topology=v5e:2x4", "--sweep", "--fsdp=1", "--clips=2"],
    "repeats": [
        KINETICS, "--topology=v5e:16x16", "--largest_batch", "--json={tmp}/repeats.json"
    ],
    "none": [KINETICS, "--topology=v5e:1x1", "--config.model.frames=320", "--config.batch=2",
             "--config.remat=blocks", "--largest_batch"],
    "images": ["--config=configs/imagenet.py:mvitv2_s", "--topology=v5e:16x16",
               "--config.batch=256"],
    "boxes": ["--config=configs/ava.py:mvit_b_16x4", "--topology=v5e:4x4"],
}  # fmt: skip


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A folder, and status, output and errors of `podplan` with a stand-in for the compiler.

    The keys are those of RUNS and the indices of WRONG.
    """
    folder = tmp_path_factory.mktemp("plans")
    cases = {**dict(enumerate(flags for flags, _ in WRONG)), **RUNS}
    runs = [
        [flag.format(tmp=folder) for flag in flags]
        if any(flag.startswith("--config=") for flag in flags)
        else [*EXPERIMENT, *(flag.format(tmp=folder) for flag in flags)]
        for flags in cases.values()
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.podplans"], input=json.dumps(runs), text=True,
        capture_output=True, timeout=300, cwd=tiny.ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, dict(zip(cases, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("index", range(len(WRONG)), ids=[" ".join(flags) for flags, _ in WRONG])
def test_bad_flags_end_with_a_one_sentence_error_before_compilation(outputs, index):
    status, out, err = outputs[1][index]
    assert status == 1 and re.search(WRONG[index][1], err), (status, err)
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "compiling" not in out and "program" not in out


def test_an_interrupted_sweep_writes_the_plans_it_has(outputs):
    status, _, err = outputs[1]["kept"]
    assert status == 1 and "thirteen" in err
    (plan,) = json.loads((outputs[0] / "kept.json").read_text())["plans"]
    assert plan["clips_a_chip"] == 2 and plan["fits"]


def test_action_detection_is_planned(outputs):
    """211,000 key frames, 8 clips on each of 16 chips: 8 x 1.05 + 1.5 GiB fit."""
    status, out, err = outputs[1]["boxes"]
    assert status == 0, err
    assert re.search(r"steps +49,453: 30 epochs of 211,000", out) and "8 per chip" in out


def test_a_sweep_compares_all_combinations(outputs):
    status, out, err = outputs[1]["sweep"]
    assert status == 0, err
    report = json.loads((outputs[0] / "sweep.json").read_text())
    assert report["config"] == "configs/moving_digits.py" and report["videos"] == 2000
    combinations = [(p["data"], p["fsdp"], p["remat"], p["clips_a_chip"]) for p in report["plans"]]
    assert combinations == list(itertools.product([16], [1], ["none", "blocks"], [1, 40])) + list(
        itertools.product([1], [16], ["none", "blocks"], [1, 40])
    )
    assert [p["fits"] for p in report["plans"]] == [True, False] * 4
    # The bound is 1 ms of arithmetic; at low effort the 2 ms of main memory are overstated.
    assert {p.get("step_seconds_at_least") for p in report["plans"]} == {0.001, None}
    assert min(Image.open(outputs[0] / "sweep.png").size) > 300
    assert re.search(r"16 x 1  none +1 +16  +2.55 +2.00 +1.00 +arithmetic +16,000 ", out)


def test_a_sweep_prints_the_mixup_group_size_for_training(outputs):
    status, out, err = outputs[1]["sweep of pairs"]
    assert status == 0, err
    assert out.count("training needs, --config.augment.mixup_group_size=2") == 1


def test_the_largest_batch_is_a_multiple_of_the_repeats(outputs):
    """With 1.5 GiB and 1.05 GiB a clip, 13 clips fit 15.75 GiB, and 12 with two a video."""
    status, out, err = outputs[1]["repeats"]
    assert status == 0, err
    assert "per chip, 12 clips fit and take 90% of the memory, 14 do not" in out
    assert "12 per chip fit: --config.batch=3072 " in out
    report = json.loads((outputs[0] / "repeats.json").read_text())
    assert report["config"] == KINETICS.removeprefix("--config=")
    assert report["plans"][0]["largest_clips_a_chip"] == 12


def test_a_search_reports_that_no_batch_fits(outputs):
    """320 frames take 10.5 GiB with `blocks`, and two clips a video are the smallest batch."""
    status, out, err = outputs[1]["none"]
    assert status == 0, err
    assert "per chip, 0 clips fit, 2 do not" in out
    assert "per chip fit" not in out and "--config.accumulate=2 " in out


def test_a_plan_of_images_warns_that_mixup_has_no_effect(outputs):
    status, out, err = outputs[1]["images"]
    assert status == 0, err
    assert re.search(
        r"augment.mixup_group_size=1; .* image with itself, so mixup and cutmix DO NOTHING", out
    )
    assert "256 images on 256 chips are 1 per chip" in out
    assert "compiling (1 image per chip" in out and not re.search(r"\bclip|video", out)


@pytest.mark.slow
def test_a_plan_is_compiled_printed_and_written_as_json_and_figure(tmp_path):
    command = [
        sys.executable, "-m", "mvit_jax.podplan", *EXPERIMENT, "--topology=v4-8",
        f"--json={tmp_path / 'plan.json'}", f"--out={tmp_path / 'plan.png'}",
    ]  # fmt: skip
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=tiny.ROOT, env=os.environ | cache
    )
    out, err = done.stdout, done.stderr
    assert done.returncode == 0, err
    assert not list(tmp_path.glob("cache/*"))  # entries could be read only on a TPU
    assert "on v4:2x2x1: 4 chips of 1 host, mesh data 4 x fsdp 1" in out
    assert "v4-8 counts cores, 2 per chip" in out
    assert "fits: " in out and "of 30.75 GiB of a chip" in out
    assert re.search(r"all-reduce +4 ", out)
    assert "lower bounds" in out and re.search(r"chip-hours .*at least", out)
    assert "8 clips on 4 chips are 2 per chip" in out
    assert "overstated at this effort: no bound; --effort=0 measures it" in out
    assert "libtpu" not in err and "hostname" not in err  # no warnings about absent TPUs
    (plan,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert plan["fits"] and sum(plan["memory_by_kind"].values()) == plan["memory_bytes"]
    assert plan["steps"] == 6 * 2000 // 8
    seconds = max(time for part, time in plan["roofline_seconds"].items() if part != "memory")
    assert seconds == plan["step_seconds_at_least"] < plan["roofline_seconds"]["memory"]
    assert plan["chip_hours"] == pytest.approx(4 * plan["steps"] * seconds / 3600)
    assert min(Image.open(tmp_path / "plan.png").size) > 200
