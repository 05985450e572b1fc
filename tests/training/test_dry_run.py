import re

import pytest

from mvit_jax import train
from mvit_jax.common.errors import UserError
from mvit_jax.training import build, dry_run
from tests.support import commands, tiny
from tests.support.ava_folder import FLAGS, write_ava


def described(file, arg, devices=8, **changes):
    config = tiny.load_config_file(file).get_config(arg)
    config.update_from_flattened_dict(changes)
    return dry_run.describe(config, devices)


def row(text, title, *names):
    """Returns the fields of the line in section `title` that begins with `names`."""
    section = next(part for part in text.split("\n\n") if part.startswith(title))
    lines = [re.split(r"\s{2,}", line.strip()) for line in section.splitlines()]
    return next(fields for fields in lines if fields[: len(names)] == list(names))


def test_the_plan_of_kinetics_requires_no_data():
    """Computed by hand: 240,436 videos twice in batches of 512; positions (56^2 + 8 + 1) x 96."""
    text = described("kinetics", "mvit_b_16x4")
    assert "published  78.4 / 93.5 (MViT, Table 4)" in text
    assert "36,610,672 parameters, 70.6 G multiply-adds" in text
    assert "weights    fresh" in text
    assert row(text, "Data", "train")[1].endswith("assuming 240,436 videos (data.train_videos)")
    assert row(text, "Steps", "batch")[1] == "512 clips = 256 videos x 2 clips"
    assert row(text, "Steps", "share")[1].startswith("64 clips per device, on 8 devices")
    assert row(text, "Steps", "steps")[1] == "187,840 = 200 epochs x 939.20"
    assert row(text, "Steps", "warm-up")[1] == "28,176.09 of them = 30 epochs"
    assert row(text, "Learning rate", "0") == ["0", "0.00", "1.6e-05"]
    assert row(text, "Learning rate", "28,177") == ["28,177", "30.00", "0.0016"]
    # Half of the cosine: the mean of the highest and the last learning rate.
    assert row(text, "Learning rate", "108,009")[2] == "0.000808"
    assert row(text, "Learning rate", "187,839")[2] == "1.6e-05"
    assert row(text, "Weight decay", "0.05", "positional embeddings")[2:] == ["3", "301,920"]
    assert row(text, "Weight decay", "0.05", "class token")[2:] == ["1", "96"]
    # Norms have scale and bias: 2 in each of 16 blocks, the last, 1 after each of 3 + 16 x 2 pools.
    norms = 16 * 2 + 1 + 3 + 16 * 2
    assert row(text, "Weight decay", "0", "scales of norms: one-dimensional")[2] == str(norms)
    # Linear layers have a bias: 4 in each of 16 blocks, 3 skips, the head, the patch embedding.
    assert row(text, "Weight decay", "0", "biases")[2] == str(norms + 16 * 4 + 3 + 1 + 1)
    parameters = re.findall(r"^  0\S*  .*  ([\d,]+)$", text, re.MULTILINE)
    assert len(parameters) == 6
    assert sum(int(n.replace(",", "")) for n in parameters) == 36_610_672
    views = row(text, "Tests", "views")[1]
    assert views == "5 clips x 1 crop: short side to 256, centre square of 224"
    assert row(text, "Tests", "validation")[1].startswith("every 9,392 steps")


def test_augmentation_is_listed_in_order_of_application():
    text = described("kinetics", "mvit_b_16x4")
    words = ["short side of 256", "RandAugment rand-m7-n4", "random crop of 8 to 100 %", "flip",
             "/ 0.225", "erasing", "cutmix (alpha 1) with probability", "smoothing"]  # fmt: skip
    section = text[text.index("Augmentation") : text.index("Steps")].splitlines()[1:]
    for number, (line, word) in enumerate(zip(section, words, strict=False), start=1):
        assert line.startswith(f"  {number}. ") and word in line
    image = described("imagenet", "mvitv2_s")
    assert image.index("random crop of 8 to 100 %") < image.index("RandAugment rand-m9-n6-")


@pytest.mark.slow
def test_the_plan_of_a_fine_tuning_recipe_names_its_weights(tmp_path):
    """168,913 videos, 40 epochs in batches of 128: 52,785.3 steps; published 213.1 M parameters."""
    text = described("ssv2", "mvitv2_l_40x3_312_in21k")
    assert "213,129,534 parameters" in text and "174 classes" in text
    assert "weights    MISSING: weights of configs/kinetics.py:mvitv2_l_40x3_312_in21k" in text
    assert row(text, "Steps", "steps")[1] == "52,785 = 40 epochs x 1,319.63"
    assert row(text, "Optimiser", "kind")[1].startswith("SGD, Nesterov momentum 0.9")
    assert row(text, "Optimiser", "clipping")[1] == "gradients to a global norm of 2"
    assert "mixup" not in text and "flip" not in text
    views = row(text, "Tests", "views")[1]
    assert views == "1 clip x 3 crops: short side to 312, three squares of 312"
    text = described("kinetics", "mvitv2_s_16x4_in1k", **{"init.checkpoint": str(tmp_path)})
    assert f"weights    from {tmp_path} (should be weights of mvitv2_s" in text
    assert "image to video: centre" in text
    text = described("kinetics", "mvit_b_64x3", **{"init.checkpoint": "no/such"})
    assert "from no/such (missing)" in text


def test_the_plan_lists_learning_rates_by_layers():
    """Layer decay of 0.75 ^ 17 for the patch embedding below 16 blocks, at 9.6e-3."""
    text = described("kinetics", "maskfeat_s_16x4")
    first = row(text, "Learning rates by layers", "0")
    assert first[:4] == ["0", "patch and positional embeddings", "0.007517", "7.216e-05"]
    assert row(text, "Learning rates by layers", "17")[1:4] == ["norm, head", "1", "0.0096"]
    assert row(text, "Learning rates by layers", "16")[1:4] == ["block 15", "0.75", "0.0072"]
    assert "by layers" not in described("kinetics", "mvit_b_16x4")


def test_the_plan_counts_trained_parameters():
    """By hand: the head of MViT-B has 769 x 400 parameters, a last block 12 x 768^2 and more."""
    changes = {"optim.layer_decay": 0.5}
    text = described("kinetics", "mvit_b_16x4", **changes, **{"optim.trained_blocks": 0})
    plan = row(text, "Optimiser", "trained")[1]
    assert plan == "307,600 of 36,610,672 parameters: the head; the others are frozen"
    assert row(text, "Weight decay", "0.05", "kernels")[2:] == ["1", "307,200"]
    assert row(text, "Learning rates by layers", "17")[1:] == [
        "norm, head", "1", "0.0016", "307,600"
    ]  # fmt: skip
    text = described("kinetics", "mvit_b_16x4", **changes, **{"optim.trained_blocks": 1})
    assert "parameters: the last block, norm and head" in row(text, "Optimiser", "trained")[1]
    assert row(text, "Learning rates by layers", "16")[2] == "0.5"
    assert row(described("kinetics", "mvit_b_16x4"), "Optimiser", "trained")[1] == "all parameters"


def test_another_batch_size_scales_rates_and_must_be_divisible():
    text = described("kinetics", "mvit_b_16x4", batch=256)
    assert row(text, "Optimiser", "rates")[1].endswith("for 512 clips; scaled by 0.5")
    assert row(text, "Learning rate", "0")[2] == "8e-06"
    assert "batch=512 is not divisible by 7 devices" in described(
        "kinetics", "mvit_b_16x4", devices=7
    )


def test_existing_lists_of_videos_are_counted(digits):
    """24 videos in batches of 8, 3 epochs."""
    text = dry_run.describe(tiny.config(digits, epochs=3.0), 8)
    assert row(text, "Data", "train") == ["train", f"{digits}/train.csv: 24"]
    assert row(text, "Data", "test") == ["test", f"{digits}/test.csv: 10"]
    assert row(text, "Steps", "steps")[1] == "9 = 3 epochs x 3.00"
    assert ", 8 classes" in text
    with pytest.raises(UserError, match=r"give --config.data.train_videos=N"):
        dry_run.describe(tiny.config("no/such"), 8)


@pytest.mark.parametrize("content", [b"a\n\nb\n", "a\nb\n".encode("utf-16")])
@pytest.mark.parametrize("videos", [None, 5])
def test_unreadable_data_end_the_plan_with_their_own_error(content, videos, tmp_path):
    config = tiny.config(tmp_path, **{"data.train_videos": videos})
    (tmp_path / "train.csv").write_text("a.mp4 0\n")
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"labels.txt(, line 2 is blank| is not UTF-8)") as plan:
        dry_run.describe(config, 1)
    assert "train_videos" not in str(plan.value)


def test_the_plan_warns_of_averages_that_keep_their_start(digits):
    """0.9999 ^ 9 = 0.9991 of 9 steps; 0.9999 ^ 187,840 is nothing."""

    def plan(**changes):
        changes = {f"optim.{key}": value for key, value in changes.items()}
        return dry_run.describe(tiny.config(digits, epochs=3.0, **changes), 8)

    text = plan(ema=0.9999, ema_warmup=False)
    assert row(text, "Optimiser", "EMA")[1].startswith("decay 0.9999; the averaged parameters")
    assert "after 9 steps, 99.9 % of the averaged weights are still the initial ones" in text
    text = plan(ema=0.9999)  # the config file has the warm-up on
    assert row(text, "Optimiser", "EMA")[1].startswith("decay 0.9999, after a warm-up from 0;")
    assert "initial ones" not in text and "initial ones" not in plan(ema=0.5, ema_warmup=False)
    text = described("kinetics", "mvit_b_16x4", **{"optim.ema": 0.9999})
    assert row(text, "Optimiser", "EMA")[1].startswith("decay 0.9999; the averaged parameters")
    assert "initial ones" not in text


def test_charades_is_scored_by_mean_average_precision():
    text = described("charades", "mvit_b_16x4")
    assert row(text, "Tests", "scores")[1] == "sigmoids, maximum over the views"
    assert row(text, "Tests", "metrics")[1] == "mean average precision"
    assert "7,985" in row(text, "Data", "train")[1]


def test_the_plan_of_ava_has_boxes_beside_labels():
    """By hand: 211,000 key frames in batches of 128, 30 epochs: 49,453.1 steps."""
    text = described("ava", "mvit_b_16x4")
    assert "36,364,592 parameters, 70.6 G multiply-adds" in text
    assert "MISSING: weights of configs/kinetics.py:mvit_b_16x4;" in text
    assert row(text, "Data", "train")[1].endswith("assuming 211,000 key frames (data.train_videos)")
    assert row(text, "Data", "train boxes")[1].startswith(
        "the labelled ones and annotations/person"
    )
    assert row(text, "Data", "test boxes")[1].endswith("/ava_detection_val_boxes_and_labels.csv")
    assert row(text, "Data", "detected")[1] == "persons with a score of at least 0.9"
    assert row(text, "Data", "labels")[1] == "any number per box"
    assert row(text, "Data", "clips")[1].endswith("4 apart at 30 a second, around the key frame")
    assert "boxes are cut to the square" in text and "0.5, of pixels and boxes" in text
    assert row(text, "Steps", "batch")[1] == "128 clips = 128 key frames"
    assert row(text, "Steps", "steps")[1] == "49,453 = 30 epochs x 1,648.44"
    assert row(text, "Optimiser", "loss")[1] == "mean over all boxes of the batch and all classes"
    views = row(text, "Tests", "views")[1]
    assert views == "1 clip around the key frame: short side to 224, centre square of 224"
    assert row(text, "Tests", "metrics")[1].startswith("frame mAP at IoU 0.5")
    changes = {"optim.loss_reduction": "per_device", "model.relative_resize": "clamp", "batch": 64}
    text = described("ava", "mvitv2_s_16x4,full", **changes)
    assert row(text, "Optimiser", "loss")[1].endswith(
        "of each device and all classes, then over devices"
    )
    assert row(text, "Tests", "views")[1].endswith("per shape; relative positions are clamped")


def test_the_plan_counts_key_frames_and_names_missing_files_of_boxes(tmp_path):
    """Two key frames a video; the boxes of a labelled person and a detected one."""
    write_ava(tmp_path, videos=2)
    config = tiny.config(tmp_path, **FLAGS, epochs=2.0, batch=4)
    text = dry_run.describe(config, 1)
    assert row(text, "Data", "train")[1] == f"{tmp_path}/train.csv: 4 key frames, 10 boxes"
    assert row(text, "Data", "train boxes")[1] == "the labelled ones and boxes.csv"
    assert row(text, "Data", "classes")[1] == "classes.pbtxt, of which the mAP is the mean"
    assert row(text, "Steps", "steps")[1] == "2 = 2 epochs x 1.00" and ", 4 classes" in text
    config.data.train_videos = 9
    for name in ("train.csv", "test.csv", "boxes.csv"):
        (tmp_path / name).unlink()
    text = dry_run.describe(config, 1)
    assert "there is no list" in row(text, "Data", "train")[1]
    assert row(text, "Data", "test boxes")[1] == "boxes.csv (missing)"


def test_the_program_prints_the_plan_and_writes_no_files(tmp_path):
    flags = ["--config=configs/kinetics.py:mvit_b_64x3", "--dry_run"]
    status, output = commands.run("train", *flags, cwd=tmp_path)
    assert status == 0 and "published  81.2 / 95.1 (MViT, Table 4)" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mesh.fsdp": 3}, "mesh.fsdp=3 does not divide the 1 devices"),
        ({"mesh.data": 0}, "mesh.data must be -1"),
        ({"mesh.data": 3}, "mesh.data=3 x mesh.fsdp=1 requires 3 devices, but there are 1"),
        ({"data.repeats": 3}, "batch=8 is not divisible by 1 devices x data.repeats=3"),
        ({"accumulate": 3}, "batch=8 is not divisible by 1 devices x accumulate=3"),
        ({"augment.mixup": 1.0, "augment.mixup_group_size": 3}, "does not divide the 8 clips"),
        ({"data.short_side": 16}, "crops of 32 pixels cannot be cut"),
        ({"augment.jitter": (16, 64)}, "crops of 32 pixels cannot be cut"),
        ({"data.std": (0.2, 0.2, 0.0)}, "data.std must be 3 numbers"),
        (
            {"data.multi_label": True, "data.source": "ssv2"},
            "data.multi_label is on, but each video",
        ),
        ({"data.source": "charades"}, "a video of Charades has any number of labels"),
        ({"augment.randaugment": "rand-m7"}, "RandAugment's string 'rand-m7'"),
        ({"model.variant": "mvit_c"}, "mvit_c"),
        ({"model.block": "nothing:Block"}, "model.block=nothing:Block cannot be imported"),
        ({"model.patch_padding": (0, 0, 0), "model.size": 4}, "is too small"),
        ({"epochs": 1e300}, "1e+300 epochs are"),
        ({"data.train_list": "labels.txt"}, "labels.txt, line 1"),
        ({"data.val_list": "labels.txt"}, "labels.txt, line 1"),
    ],
)
def test_the_plan_is_refused_where_training_is(changes, sentence, digits, tmp_path):
    config = tiny.config(digits, **changes)
    with pytest.raises(UserError) as training:
        train.train(config, str(tmp_path / "run"))
    with pytest.raises(UserError) as plan:
        dry_run.describe(config, 1)
        build.device_mesh(config)
    assert sentence in str(training.value) == str(plan.value)
    assert not (tmp_path / "run").exists()


def test_a_plan_that_does_not_fit_the_devices_is_printed_and_refused(tmp_path):
    flags = ["--config=configs/moving_digits.py", "--config.data.train_videos=800"]
    status, output = commands.run("train", *flags, "--dry_run", "--config.mesh.fsdp=2")
    refusal = "mesh.fsdp=2 does not divide the 1 devices; set a divisor of 1"
    assert status == 1 and "Learning rate" in output
    assert output.endswith(f"error: {refusal}\n")
    assert row(output, "Steps", "share")[1].endswith(refusal)


def test_values_that_do_not_fit_the_length_of_the_run_are_warned_of(digits, monkeypatch):
    """Step 9,391 of 9,392 is epoch 9.9989 of a warm-up of 30: 1.6e-5 + 1.584e-3 x 0.3333."""
    text = described("kinetics", "mvit_b_16x4", epochs=10.0)
    sentence = (
        "the warm-up lasts the whole run (optim.warmup_epochs=30, epochs=10): the learning rate "
        "only rises, to 0.000544 of 0.0016; for a shorter warm-up set "
        "--config.optim.warmup_epochs=1"
    )
    assert text.endswith(f"\n\nWarning: {sentence}")
    assert "Warning" not in described("kinetics", "mvit_b_16x4")
    # 24 videos in batches of 8: 9 steps in 3 epochs, 0.9 ^ 9 = 0.387.
    constant = {"epochs": 3.0, "optim.ema": 0.9, "optim.ema_warmup": False}
    [sentence] = build.warnings(tiny.config(digits, **constant), 24)
    assert "after 9 steps, 38.7 % of the averaged weights are still the initial ones" in sentence
    assert not build.warnings(tiny.config(digits, **constant | {"optim.ema": 0.5}), 24)
    assert len(build.warnings(tiny.config(digits, **constant | {"epochs": 0.5}), 24)) == 2


def test_training_without_the_weights_of_a_recipe_raises(tmp_path):
    config = tiny.load_config_file("kinetics").get_config("mvit_b_64x3")
    with pytest.raises(UserError, match=r"weights of mvit_b_32x3 .* --config.init.checkpoint=DIR"):
        train.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
