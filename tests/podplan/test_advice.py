"""What a step means for an experiment on a pod, against figures worked by hand."""

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
    """A step of so many GiB of activations whose HBM traffic takes so long on a v5e."""
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


def plan(found, config=RECIPE, topology="v5e:16x16", slices=1, fsdp=1, effort=0.0) -> Plan:
    model = build.model_config(config, 400)
    return Plan(config, model, 240_436, accelerators.parse(topology, slices), fsdp, effort, found)


def changed(**keys):
    return in_memory.read_config("kinetics", "mvit_b_16x4", **keys)


def taken(line: str) -> dict[str, int]:
    """Keys that a line's flags set, of whole numbers."""
    return {key: int(value) for key, value in re.findall(r"--config\.([\w.]+)=(\d+)(?= |$)", line)}


def test_hours_of_a_recipe():
    made = plan(figures(activations=1))
    assert made.clips == 2
    assert made.steps == 200 * 240_436 * 2 // 512
    assert made.roofs.longest == pytest.approx(0.010, rel=1e-6)
    assert made.hours == pytest.approx(187_840 * 0.010 / 3600, rel=1e-4)  # 0.52
    assert made.chip_hours == pytest.approx(256 * made.hours)


def test_with_little_effort_main_memory_bounds_nothing():
    """It takes 10 ms of traffic that is overstated; arithmetic 1 ms, and the sum of 0.1 GB over
    256 chips 2 x 255 / 256 x 0.1 GB / 200 GB/s, the shorter. A step may thus take 1 ms, and hosts
    have to read 10 times as much as the traffic says."""
    quick = plan(figures(activations=1), effort=-1.0)
    assert quick.bounds.longest == pytest.approx(0.001) and quick.bounds.bound == "compute"
    assert quick.roofs.memory == pytest.approx(0.010, rel=1e-6)
    assert quick.hours == pytest.approx(187_840 * 0.001 / 3600)
    said = pod_text.text(quick, None)
    assert "1 ms at least, bound by arithmetic" in said
    assert re.search(r"memory \(HBM\) +10 ms by this program's traffic, overstated", said)
    assert "512,000 clips/s at most" in said
    assert re.search(r"clips +8,000 a second", said) and re.search(r"hours +0.0522 at least", said)
    assert pod_text.row(quick)[5:8] == ("10.00", "1.00", "arithmetic")
    _, right = pod_text.picture([quick]).axes
    labels = right.get_legend_handles_labels()[1]
    assert labels[1] == "HBM (overstated, no bound)" and "at least" not in right.get_xlabel()
    (entry,) = pod_text.report([quick], "kinetics")["plans"]
    assert entry["step_seconds_at_least"] == pytest.approx(0.001)
    assert entry["hbm_bytes_overstated"] and entry["bound_by"] == "compute"
    # As training compiles it, memory counts.
    assert plan(figures(activations=1)).bounds.bound == "memory"
    assert "no bound" not in pod_text.text(plan(figures(activations=1)), None)


def test_what_each_host_must_read():
    """512 clips in 10 ms are 51,200 a second; on 64 hosts 800, out of 400 videos."""
    model = build.model_config(RECIPE, 400)
    need = advice.reading(RECIPE, model, 64, 0.010)
    assert need.clips == pytest.approx(800) and need.videos == pytest.approx(400)
    assert need.cores["files"] == pytest.approx(800 / 38)
    assert need.cores["shards"] == pytest.approx(800 / 56)
    once = advice.reading(changed(**{"data.repeats": 1}), model, 64, 0.010)
    assert once.videos == pytest.approx(800)
    assert once.cores["files"] == pytest.approx(2 * 800 / 38)


def test_images_are_read_at_a_rate_of_their_own():
    config = in_memory.read_config("imagenet", "mvitv2_s")
    model = build.model_config(config, 1000)
    need = advice.reading(config, model, 4, 0.1)
    assert need.clips == pytest.approx(config.batch / 0.4)
    assert need.cores == {"JPEGs": pytest.approx(need.clips / 290)}


def test_the_mixing_group_must_be_on_one_chip_and_only_then_changes():
    same, said = advice.fitted(RECIPE, 128)  # 4 clips a chip
    assert same is RECIPE and said == ""
    config, said = advice.fitted(RECIPE, 256)
    assert config.augment.mixup_group_size == 2 and RECIPE.augment.mixup_group_size == 4
    assert "--config.augment.mixup_group_size=2" in said and "NOTHING" not in said
    with pytest.raises(UserError, match="mixup_group_size=4 does not divide the 2"):
        build.check_batch(RECIPE, 256)
    build.check_batch(config, 256)
    unmixed = changed(**{"augment.mixup": 0.0, "augment.cutmix": 0.0})
    assert advice.fitted(unmixed, 256) == (unmixed, "")


@pytest.mark.parametrize("largest", [None, 3, 6, 7, 12, 13, 14, 30])
@pytest.mark.parametrize("chips", ["v5e:16x16", "v5e:8x8"])
def test_training_takes_every_batch_that_is_offered(chips, largest):
    """With the group that the line names, or else the config's own."""
    made = plan(figures(activations=1.5), topology=chips)
    (line,) = [x for x in advice.advice(made, largest) if "--config.batch=" in x] or [""]
    if not line:
        assert largest is not None and largest < made.clips + 2
        return
    keys = taken(line)
    offered = changed(**keys)
    build.check_batch(offered, made.topology.chips)
    assert largest is None or made.clips < offered.batch // made.topology.chips <= largest


def test_a_batch_that_does_not_divide_the_mesh_is_refused_with_one_that_does():
    with pytest.raises(UserError, match=r"--config.batch=2048 .*rate 0.0064\)") as refused:
        advice.fitted(RECIPE, 1024)  # two clips of each decoding on every chip
    assert "batch=512 does not divide into 1,024 chips" in str(refused.value)
    config, _ = advice.fitted(changed(batch=2048), 1024)
    build.check_batch(config, 1024)


def test_flags_for_another_batch_keep_the_rate_in_proportion():
    assert "0.0064" in advice.batch_flags(RECIPE, 2048, 256)
    plain = changed(**{"optim.lr_batch": None})
    flags = dict(word.removeprefix("--config.").split("=") for word in
                 advice.batch_flags(plain, 2048, 256).split())  # fmt: skip
    assert flags == {
        "batch": "2048", "optim.lr": "0.0064", "optim.start_lr": "6.4e-05",
        "optim.end_lr": "6.4e-05",
    }  # fmt: skip


def test_the_largest_batch_keeps_the_mixing_group():
    """1.5 GiB of state, 1.75 GiB a clip or 0.75 + 0.125: 90 % of 15.75 GiB hold 14 clips."""
    small = plan(figures(activations=1.5))
    told, larger = advice.advice(small)
    assert told == "512 clips on 256 chips are 2 a chip, which take 21% of its memory"
    assert larger == (
        "12 a chip should fit, by this step's memory: --config.batch=3072 "
        "(optim.lr_batch makes the peak learning rate 0.0096)"
    )
    assert advice.advice(small, 19)[1].startswith("16 a chip fit: --config.batch=4096 (")
    assert advice.largest_batch(small, 3) == 2  # no group of 4: whole repeats
    alone = plan(figures(activations=1.5), changed(**{"augment.mixup": 0.0, "augment.cutmix": 0.0}))
    assert advice.largest_batch(alone) == 14
    assert advice.advice(plan(figures(activations=13)))[1:] == ["that is about as many as fit"]


def test_a_batch_that_is_accumulated_lies_in_memory_as_a_whole():
    """8 clips in 2 parts: 2 GiB of batch, 0.25 a clip, and 14 GiB of the 4 that are worked on."""
    kinds = {"parameters": GIB, "optimiser": 2 * GIB, "average": 0, "batch": 2 * GIB}
    found = TooLarge(19 * GIB, kinds | {"activations": 14 * GIB}, 1.0)
    made = plan(found, changed(batch=512, accumulate=2), "v5e:8x8")
    assert advice.bytes_per_clip(made) == 2 * GIB  # with half of the clips in a micro-batch
    (parts,) = [line for line in advice.advice(made) if "accumulate" in line]
    assert parts.startswith("--config.accumulate=4 ")  # 3 + 2 + 7 GiB


def test_what_does_not_fit_gets_what_may_help():
    """4 clips of 6.25 GiB each: 2 fit beside 1.5 GiB of state."""
    made = plan(too_large(24.75), topology="v5e:8x16")
    smaller, remat, parts, split, half = advice.advice(made)
    assert smaller.startswith("2 a chip should fit, by this step's memory: --config.batch=256 ")
    assert "--config.augment.mixup_group_size=2" in smaller and "--config.remat=blocks" in remat
    assert parts.startswith("--config.accumulate=2 ") and "--config.dtype=bfloat16" in half
    assert split.startswith("--config.mesh.fsdp=128 shards 1.50 GiB of parameters")
    assert not any("batch=" in line for line in advice.advice(made, 0))
    said = pod_text.text(made, None)
    assert "DOES NOT FIT: it would take 26.50 of 15.75 GiB" in said and "hours" not in said
    assert f"What may make it fit\n  - {smaller}" in said
    # A state that is too large by itself is not helped by fewer clips.
    kinds = {"parameters": 8 * GIB, "optimiser": 16 * GIB, "average": 0, "batch": 0}
    huge = advice.advice(plan(TooLarge(30 * GIB, kinds | {"activations": 6 * GIB}, 1.0)))
    assert not any("batch" in line for line in huge)


def test_the_text_says_all_of_a_step_that_fits():
    said = pod_text.text(plan(figures(activations=1.5)), None)
    assert "fits: 3.25 of 15.75 GiB" in said
    assert re.search(r"optimiser +1.000", said) and "average" not in said
    assert re.search(r"all-reduce +256 +100 MB", said)
    assert "10 ms at least, bound by memory (HBM)" in said
    assert "lower bounds" in said
    assert re.search(r"hours +0.522 at least", said)
    assert re.search(r"chip-hours +134 at least", said)
    assert re.search(r"videos +400 a second", said)
    assert "effort 0" in said


def test_a_table_a_picture_and_a_report_hold_what_fits_and_what_does_not():
    plans = [plan(figures(activations=1.5)), plan(too_large(24.75))]
    rows = [pod_text.row(p) for p in plans]
    assert all(len(row) == len(pod_text.header(plans[0])) for row in rows)
    assert rows[0][:5] == ("256 x 1", "none", "2", "512", "3.25")
    assert rows[1][6] == "does not fit"
    report = json.loads(json.dumps(pod_text.report(plans, "configs/kinetics.py:mvit_b_16x4")))
    assert (report["config"], report["videos"]) == ("configs/kinetics.py:mvit_b_16x4", 240_436)
    fits, not_ = report["plans"]
    assert fits["fits"] and not not_["fits"]
    assert (fits["data"], fits["fsdp"], fits["augment_group"]) == (256, 1, 2)
    assert fits["hours"] == plans[0].hours
    assert fits["clips_a_second_at_most"] == pytest.approx(51_200)
    assert fits["host_at_most"]["videos"] == pytest.approx(400)
    assert fits["host_at_most"]["cores"]["files"] == pytest.approx(800 / 38)
    assert [fits["advice"], not_["advice"]] == [advice.advice(p) for p in plans]
    left, right = pod_text.picture(plans).axes
    bars = [bar for bar in left.patches if isinstance(bar, Rectangle) and bar.get_y() < 0.5]
    assert sum(bar.get_width() for bar in bars) == pytest.approx(3.25)
    assert any(text.get_text() == "does not fit" for text in right.texts)


def test_legends_of_a_picture_neither_overlap_nor_leave_it():
    passed = (Collective("all-reduce", "", 1, 10**8, 4, True), Collective("x", "", 1, 10**8, 256))
    found = figures(activations=1.5)
    kinds = dict.fromkeys([*found.kinds], GIB)
    counts = dataclasses.replace(found.counts, collectives=passed)
    found = dataclasses.replace(found, kinds=kinds, counts=counts)
    made = plan(found, changed(batch=2048), slices=4, effort=-1.0)
    picture = pod_text.picture([made])
    FigureCanvasAgg(picture).draw()
    legends = [axes.get_legend() for axes in picture.axes]
    left, right = (legend.get_window_extent() for legend in legends if legend is not None)
    assert 0 <= left.x0 < left.x1 <= right.x0 < right.x1 <= picture.bbox.width
