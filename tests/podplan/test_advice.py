"""Advice for experiments on pods, against figures worked by hand."""

import dataclasses
import json
import re

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle

from mvit_jax.common.errors import UserError
from mvit_jax.podplan import accelerators, advice
from mvit_jax.podplan import text as pod_text
from mvit_jax.podplan.accelerators import GIB
from mvit_jax.podplan.advice import Plan
from mvit_jax.podplan.compile import Figures, TooLarge
from mvit_jax.podplan.hlo.cost import Collective, Counts, Memory, Operation
from mvit_jax.training import build, in_memory

RECIPE = in_memory.read_config(
    "kinetics", "mvit_b_16x4"
)  # 200 epochs, 512 clips, rate 1.6e-3, group 4
KINDS = {"parameters": 0.5, "optimiser": 1.0, "average": 0.0, "batch": 0.25}


def figures(*, activations: float, milliseconds: float = 10.0) -> Figures:
    """Returns the figures of a step by its activations in GiB and its HBM time on a v5e."""
    kinds = {k: int(v * GIB) for k, v in (KINDS | {"program": 0.0}).items()}
    kinds["activations"] = int(activations * GIB)
    size = int(0.819e12 * milliseconds / 1000)
    work = Operation("dot", "dot", "matrix", "", 1, int(197e9), 0, 0, size, size)
    gradients = Collective("all-reduce", "", 1, 100_000_000, 256)
    memory = Memory(sum(kinds.values()), 0, 0, 0, 0)
    return Figures(Counts((work,), (gradients,), ()), memory, kinds, 0.0, 1.0)


def too_large(activations: float) -> TooLarge:
    kinds = {k: int(v * GIB) for k, v in (KINDS | {"activations": activations}).items()}
    return TooLarge(sum(kinds.values()), kinds, 1.0)


def plan(measured, config=RECIPE, topology="v5e:16x16", slices=1, fsdp=1, effort=0.0) -> Plan:
    model = build.model_config(config, 400)
    return Plan(
        config, model, 240_436, accelerators.parse(topology, slices), fsdp, effort, measured
    )


def recipe_with(**keys):
    return in_memory.read_config("kinetics", "mvit_b_16x4", **keys)


def config_keys(line: str) -> dict[str, int]:
    """Returns the integer keys that a line's flags set."""
    return {key: int(value) for key, value in re.findall(r"--config\.([\w.]+)=(\d+)(?= |$)", line)}


def test_the_hours_of_a_recipe_follow_from_its_steps():
    step_plan = plan(figures(activations=1))
    assert step_plan.clips == 2
    assert step_plan.steps == 200 * 240_436 * 2 // 512
    assert step_plan.roofline_bounds.longest == pytest.approx(0.010, rel=1e-6)
    assert step_plan.hours == pytest.approx(187_840 * 0.010 / 3600, rel=1e-4)  # 0.52
    assert step_plan.chip_hours == pytest.approx(256 * step_plan.hours)


def test_at_low_effort_hbm_traffic_is_no_bound():
    """Overstated traffic of 10 ms is no bound; arithmetic of 1 ms is.

    The all-reduce of 0.1 GB over 256 chips takes 2 x 255 / 256 x 0.1 GB / 200 GB/s, which is less.
    A step may thus take 1 ms, and hosts have to read 10 times as much as the traffic suggests.
    """
    quick = plan(figures(activations=1), effort=-1.0)
    assert quick.bounds.longest == pytest.approx(0.001) and quick.bounds.bound == "compute"
    assert quick.roofline_bounds.memory == pytest.approx(0.010, rel=1e-6)
    assert quick.hours == pytest.approx(187_840 * 0.001 / 3600)
    output = pod_text.text(quick, None)
    assert "1 ms at least, bound by arithmetic" in output
    assert re.search(r"memory \(HBM\) +10 ms by this program's traffic, overstated", output)
    assert "512,000 clips/s at most" in output
    assert re.search(r"clips +8,000 a second", output) and re.search(
        r"hours +0.0522 at least", output
    )
    assert pod_text.row(quick)[5:8] == ("10.00", "1.00", "arithmetic")
    _, right = pod_text.picture([quick]).axes
    labels = right.get_legend_handles_labels()[1]
    assert labels[1] == "HBM (overstated, no bound)" and "at least" not in right.get_xlabel()
    (entry,) = pod_text.report([quick], "kinetics")["plans"]
    assert entry["step_seconds_at_least"] == pytest.approx(0.001)
    assert entry["hbm_bytes_overstated"] and entry["bound_by"] == "compute"
    # At training's effort, memory is a bound.
    assert plan(figures(activations=1)).bounds.bound == "memory"
    assert "no bound" not in pod_text.text(plan(figures(activations=1)), None)


def test_the_reading_rate_of_each_host():
    """512 clips in 10 ms are 51,200 a second, 800 on each of 64 hosts, from 400 videos."""
    model = build.model_config(RECIPE, 400)
    reading = advice.input_rate(RECIPE, model, 64, 0.010)
    assert reading.clips == pytest.approx(800) and reading.videos == pytest.approx(400)
    assert reading.cores["files"] == pytest.approx(800 / 38)
    assert reading.cores["shards"] == pytest.approx(800 / 56)
    once = advice.input_rate(recipe_with(**{"data.repeats": 1}), model, 64, 0.010)
    assert once.videos == pytest.approx(800)
    assert once.cores["files"] == pytest.approx(2 * 800 / 38)


def test_images_have_their_own_reading_rate():
    config = in_memory.read_config("imagenet", "mvitv2_s")
    model = build.model_config(config, 1000)
    reading = advice.input_rate(config, model, 4, 0.1)
    assert reading.clips == pytest.approx(config.batch / 0.4)
    assert reading.cores == {"JPEGs": pytest.approx(reading.clips / 290)}


def test_the_mixup_group_size_changes_only_to_fit_on_one_chip():
    same, note = advice.fit_config(RECIPE, 128)  # 4 clips a chip
    assert same is RECIPE and note == ""
    config, note = advice.fit_config(RECIPE, 256)
    assert config.augment.mixup_group_size == 2 and RECIPE.augment.mixup_group_size == 4
    assert "--config.augment.mixup_group_size=2" in note and "NOTHING" not in note
    with pytest.raises(UserError, match="mixup_group_size=4 does not divide the 2"):
        build.check_batch(RECIPE, 256)
    build.check_batch(config, 256)
    unmixed = recipe_with(**{"augment.mixup": 0.0, "augment.cutmix": 0.0})
    assert advice.fit_config(unmixed, 256) == (unmixed, "")


@pytest.mark.parametrize("largest", [None, 3, 6, 7, 12, 13, 14, 30])
@pytest.mark.parametrize("chips", ["v5e:16x16", "v5e:8x8"])
def test_every_suggested_batch_is_valid_in_training(chips, largest):
    """Uses the mixup group size of the flags, or the config's."""
    step_plan = plan(figures(activations=1.5), topology=chips)
    (line,) = [x for x in advice.advice(step_plan, largest) if "--config.batch=" in x] or [""]
    if not line:
        assert largest is not None and largest < step_plan.clips + 2
        return
    keys = config_keys(line)
    config = recipe_with(**keys)
    build.check_batch(config, step_plan.topology.chips)
    assert largest is None or step_plan.clips < config.batch // step_plan.topology.chips <= largest


def test_an_indivisible_batch_is_refused_with_a_divisible_one():
    with pytest.raises(UserError, match=r"--config.batch=2048 .*rate 0.0064\)") as error:
        advice.fit_config(RECIPE, 1024)  # two clips of each decoded video on every chip
    assert "batch=512 cannot be divided over 1,024 chips" in str(error.value)
    config, _ = advice.fit_config(recipe_with(batch=2048), 1024)
    build.check_batch(config, 1024)


def test_flags_for_another_batch_scale_the_learning_rate():
    assert "0.0064" in advice.batch_flags(RECIPE, 2048, 256)
    plain = recipe_with(**{"optim.lr_batch": None})
    flags = dict(word.removeprefix("--config.").split("=") for word in
                 advice.batch_flags(plain, 2048, 256).split())  # fmt: skip
    assert flags == {
        "batch": "2048", "optim.lr": "0.0064", "optim.start_lr": "6.4e-05",
        "optim.end_lr": "6.4e-05",
    }  # fmt: skip


def test_the_largest_batch_keeps_the_mixup_group_size():
    """With 1.5 GiB of state and 0.75 + 0.125 GiB a clip, 90 % of 15.75 GiB hold 14 clips."""
    step_plan = plan(figures(activations=1.5))
    usage, larger = advice.advice(step_plan)
    assert usage == "512 clips on 256 chips are 2 per chip and take 21% of its memory"
    assert larger == (
        "12 per chip should fit, estimated from this step's memory: --config.batch=3072 "
        "(optim.lr_batch makes the peak learning rate 0.0096)"
    )
    assert advice.advice(step_plan, 19)[1].startswith("16 per chip fit: --config.batch=4096 (")
    assert advice.largest_batch(step_plan, 3) == 2  # no group of 4: a multiple of the repeats
    alone = plan(
        figures(activations=1.5), recipe_with(**{"augment.mixup": 0.0, "augment.cutmix": 0.0})
    )
    assert advice.largest_batch(alone) == 14
    assert advice.advice(plan(figures(activations=13)))[1:] == [
        "about the largest number that fits"
    ]


def test_an_accumulated_batch_is_in_memory_as_a_whole():
    """Two micro-batches of 4 clips: 2 GiB of batch and 14 GiB for a micro-batch."""
    kinds = {"parameters": GIB, "optimiser": 2 * GIB, "average": 0, "batch": 2 * GIB}
    measured = TooLarge(19 * GIB, kinds | {"activations": 14 * GIB}, 1.0)
    step_plan = plan(measured, recipe_with(batch=512, accumulate=2), "v5e:8x8")
    # Half of another clip's activations are held at a time.
    assert advice.bytes_per_clip(step_plan) == 2 * GIB
    (parts,) = [line for line in advice.advice(step_plan) if "accumulate" in line]
    assert parts.startswith("--config.accumulate=4 ")  # 3 + 2 + 7 GiB


def test_a_step_that_does_not_fit_gets_suggestions():
    """4 clips of 6.25 GiB each: 2 fit beside 1.5 GiB of state."""
    step_plan = plan(too_large(24.75), topology="v5e:8x16")
    smaller, remat, parts, split, half = advice.advice(step_plan)
    assert smaller.startswith(
        "2 per chip should fit, estimated from this step's memory: --config.batch=256 "
    )
    assert "--config.augment.mixup_group_size=2" in smaller and "--config.remat=blocks" in remat
    assert parts.startswith("--config.accumulate=2 ") and "--config.dtype=bfloat16" in half
    assert split.startswith("--config.mesh.fsdp=128 shards 1.50 GiB of parameters")
    assert not any("batch=" in line for line in advice.advice(step_plan, 0))
    output = pod_text.text(step_plan, None)
    assert "DOES NOT FIT: it needs 26.50 of 15.75 GiB" in output and "hours" not in output
    assert f"Ways to make it fit\n  - {smaller}" in output
    # With too large a state, fewer clips do not help.
    kinds = {"parameters": 8 * GIB, "optimiser": 16 * GIB, "average": 0, "batch": 0}
    huge = advice.advice(plan(TooLarge(30 * GIB, kinds | {"activations": 6 * GIB}, 1.0)))
    assert not any("batch" in line for line in huge)


def test_the_text_describes_a_step_that_fits():
    output = pod_text.text(plan(figures(activations=1.5)), None)
    assert "fits: 3.25 of 15.75 GiB" in output
    assert re.search(r"optimiser +1.000", output) and "average" not in output
    assert re.search(r"all-reduce +256 +100 MB", output)
    assert "10 ms at least, bound by memory (HBM)" in output
    assert "lower bounds" in output
    assert re.search(r"hours +0.522 at least", output)
    assert re.search(r"chip-hours +134 at least", output)
    assert re.search(r"videos +400 a second", output)
    assert "effort 0" in output


def test_table_figure_and_report_include_steps_that_do_not_fit():
    plans = [plan(figures(activations=1.5)), plan(too_large(24.75))]
    rows = [pod_text.row(p) for p in plans]
    assert all(len(row) == len(pod_text.header(plans[0])) for row in rows)
    assert rows[0][:5] == ("256 x 1", "none", "2", "512", "3.25")
    assert rows[1][6] == "does not fit"
    report = json.loads(json.dumps(pod_text.report(plans, "configs/kinetics.py:mvit_b_16x4")))
    assert (report["config"], report["videos"]) == ("configs/kinetics.py:mvit_b_16x4", 240_436)
    fits, unfit = report["plans"]
    assert fits["fits"] and not unfit["fits"]
    assert (fits["data"], fits["fsdp"], fits["augment_group"]) == (256, 1, 2)
    assert fits["hours"] == plans[0].hours
    assert fits["clips_a_second_at_most"] == pytest.approx(51_200)
    assert fits["host_at_most"]["videos"] == pytest.approx(400)
    assert fits["host_at_most"]["cores"]["files"] == pytest.approx(800 / 38)
    assert [fits["advice"], unfit["advice"]] == [advice.advice(p) for p in plans]
    left, right = pod_text.picture(plans).axes
    bars = [bar for bar in left.patches if isinstance(bar, Rectangle) and bar.get_y() < 0.5]
    assert sum(bar.get_width() for bar in bars) == pytest.approx(3.25)
    assert any(text.get_text() == "does not fit" for text in right.texts)


def test_legends_of_the_figure_neither_overlap_nor_leave_it():
    collectives = (
        Collective("all-reduce", "", 1, 10**8, 4, True),
        Collective("x", "", 1, 10**8, 256),
    )
    measured = figures(activations=1.5)
    kinds = dict.fromkeys([*measured.kinds], GIB)
    counts = dataclasses.replace(measured.counts, collectives=collectives)
    measured = dataclasses.replace(measured, kinds=kinds, counts=counts)
    step_plan = plan(measured, recipe_with(batch=2048), slices=4, effort=-1.0)
    picture = pod_text.picture([step_plan])
    FigureCanvasAgg(picture).draw()
    legends = [axes.get_legend() for axes in picture.axes]
    left, right = (legend.get_window_extent() for legend in legends if legend is not None)
    assert 0 <= left.x0 < left.x1 <= right.x0 < right.x1 <= picture.bbox.width
