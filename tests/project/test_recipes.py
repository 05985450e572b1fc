"""The recipes in configs/, against the papers' and the released configs' values typed anew.

Learning rates are typed as in the source: for one node, times nodes.
"""

import dataclasses
from functools import lru_cache

import jax
import numpy as np
import pytest

from mvit_jax.config import check
from mvit_jax.models.cost import cost
from mvit_jax.models.functional import functional
from mvit_jax.models.plan import plan
from mvit_jax.models.variants import PUBLISHED, variant
from mvit_jax.training import build
from mvit_jax.weights import adapt
from tests.support import tiny
from tests.support.marks import nightly, slow

GREY, IMAGENET = ((0.45,) * 3, (0.225,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NODES = 16  # of 8 GPUs: the papers' 128 GPUs

# epochs, warm-up, batch in clips, repeats, highest, first and last learning rate at that batch,
# weight decay, gradient clipping, layer decay, mixup and cutmix
SCRATCH = (200, 30, 16 * 2 * NODES, 2, 1e-4 * NODES, 1e-6 * NODES, 1e-6 * NODES, 0.05, 1, 1, True)
FROM_1K = (100, 15, 512, 2, 4.8e-4, 4.8e-6, 4.8e-6, 0.05, 1, 1, True)
FROM_21K = (75, 11.25, 512, 2, 1.6e-4, 1.6e-6, 1.6e-6, 0.05, 1, 1, True)
LONG = (30, 0, 128, 1, 1.6e-5, 1.6e-7, 1.6e-7, 1e-8, 1, 1, False)
FIVE = (5, 0, 128, 2, 1.6e-5, 1.6e-7, 1.6e-7, 0.05, 1, 1, True)
MASKFEAT_S = (100, 20, 512, 2, 6e-4 * NODES, 1e-6 * NODES, 1e-6 * NODES, 0.05, 5, 0.75, True)
MASKFEAT_L = (75, 5, 256, 1, 6e-4 * NODES, 1e-8 * NODES, 1e-5 * NODES, 0.05, 5, 0.875, True)
IN_V1 = (300, 70, 4096, 1, 2.5e-4 * 16, 1e-8 * 16, 1e-6 * 16, 0.05, 1, 1, True)
IN_V2 = (300, 70, 2048, 1, 2e-3, 1e-8 * 8, 1e-6 * 8, 0.05, 1, 1, True)
IN_V2_L = (300, 70, 2048, 1, 2e-3, 1e-8 * 8, 1e-6 * 8, 0.1, 1, 1, True)
IN_384 = (30, 0, 256, 1, 4e-5, 4e-7, 4e-7, 1e-8, 1, 1, True)
IN_384_L = (30, 0, 64, 1, 5e-4, 5e-6, 5e-6, 1e-8, 1, 1, False)
IN_21K = (90, 13.5, 2048, 1, 6.75e-5 * 8, 1e-8 * 8, 1e-6 * 8, 0.01, 1, 1, True)
IN_21K_L = (90, 13.5, 2048, 1, 1e-4 * 8, 1e-8 * 8, 1e-6 * 8, 0.1, 1, 1, True)
IN_21K_H = (60, 9, 2048, 1, 1e-4 * 8, 1e-8 * 8, 1e-6 * 8, 0.1, 1, 1, True)
IN_FROM_21K = (30, 4.5, 64, 1, 7e-5, 7e-7, 7e-7, 0.05, 1, 1, False)
IN_512 = (3, 0, 64, 1, 7e-5, 7e-7, 7e-7, 1e-8, 1, 1, True)
SSV2_V1 = (100, 3, 512, 1, 0.02, 8e-4, 8e-6, 1e-4, 0, 1, True)
SSV2_S = (100, 3, 16 * 8, 1, 0.0025 * 8, 1e-4 * 8, 1e-6 * 8, 1e-4, 0, 1, True)
SSV2_B = (100, 3, 16 * 8, 1, 0.0015 * 8, 1e-4 * 8, 1e-6 * 8, 1e-4, 0, 1, True)
SSV2_L = (40, 3, 8 * 16, 1, 0.00125 * 16, 1e-6 * 16, 1e-6 * 16, 1e-4, 2, 1, False)
CHARADES = (200, 30, 256, 1, 0.6, 0.024, 2.4e-4, 1e-7, 0, 1, False)
AVA = (30, 5, 16 * 8, 1, 0.075 * 8, 1e-6 * 8, 1e-6 * 8, 1e-8, 0, 1, False)

# recipe: (schedule, frames x stride, pixels, drop path, views, inflation, published)
NO_RESULT = "no result"
ROWS = {
    "kinetics:vit_b_8x8": (SCRATCH, "8x8", 224, 0.2, "5x1", None, "68.5 / 86.9"),
    "kinetics:vit_b_8x8_in21k": (FROM_21K, "8x8", 224, 0.2, "5x1", "centre", "79.3 / 93.9"),
    "kinetics:mvit_s_16x4": (SCRATCH, "16x4", 224, 0.2, "5x1", None, "76.0 / 92.1"),
    "kinetics:mvit_s_16x4_max": (SCRATCH, "16x4", 224, 0.2, "5x1", None, "74.3"),
    "kinetics:mvit_b_16x4": (SCRATCH, "16x4", 224, 0.2, "5x1", None, "78.4 / 93.5"),
    "kinetics:mvit_b_16x4_max": (SCRATCH, "16x4", 224, 0.2, "5x1", None, "77.2"),
    "kinetics:mvit_b_32x3": (SCRATCH, "32x3", 224, 0.2, "5x1", None, "80.2 / 94.4"),
    "kinetics:mvit_b_64x3": (FIVE, "64x3", 224, 0.2, "3x3", None, "81.2 / 95.1"),
    "kinetics:mvit_b24_32x3": (SCRATCH, "32x3", 224, 0.3, "5x1", None, "80.4 / 94.8"),
    "kinetics:mvitv2_s_16x4": (SCRATCH, "16x4", 224, 0.2, "5x1", None, "81.0 / 94.6"),
    "kinetics:mvitv2_s_16x4_in1k": (FROM_1K, "16x4", 224, 0.2, "5x1", "centre", "82.2"),
    "kinetics:mvitv2_s_16x4_in21k": (FROM_21K, "16x4", 224, 0.2, "5x1", "centre", "82.6"),
    "kinetics:mvitv2_b_32x3": (SCRATCH, "32x3", 224, 0.3, "5x1", None, "82.9 / 95.7"),
    "kinetics:mvitv2_b_32x3_in1k": (FROM_1K, "32x3", 224, 0.3, "5x1", "centre", "83.3"),
    "kinetics:mvitv2_b_32x3_in21k": (FROM_21K, "32x3", 224, 0.3, "5x1", "centre", "84.3"),
    "kinetics:mvitv2_l_16x4": (SCRATCH, "16x4", 224, 0.75, "5x1", None, NO_RESULT),
    "kinetics:mvitv2_l_16x4_in1k": (FROM_1K, "16x4", 224, 0.75, "5x1", "centre", NO_RESULT),
    "kinetics:mvitv2_l_16x4_in21k": (FROM_21K, "16x4", 224, 0.75, "5x1", "centre", NO_RESULT),
    "kinetics:mvitv2_l_40x3": (LONG, "40x3", 224, 0.75, "5x1", None, "81.4"),
    "kinetics:mvitv2_l_40x3_in1k": (LONG, "40x3", 224, 0.75, "5x1", None, "83.4"),
    "kinetics:mvitv2_l_40x3_in21k": (LONG, "40x3", 224, 0.75, "5x1", None, "84.5"),
    "kinetics:mvitv2_l_40x3_312": (LONG, "40x3", 312, 0.75, "5x1", None, "81.8"),
    "kinetics:mvitv2_l_40x3_312_in1k": (LONG, "40x3", 312, 0.75, "5x1", None, "84.4"),
    "kinetics:mvitv2_l_40x3_312_in21k": (LONG, "40x3", 312, 0.75, "5x3", None, "86.1 / 97.0"),
    "kinetics:maskfeat_s_16x4": (MASKFEAT_S, "16x4", 224, 0.1, "10x1", None, "82.2"),
    "kinetics:maskfeat_l_16x4": (MASKFEAT_L, "16x4", 224, 0.2, "10x1", None, "84.3"),
    "kinetics:k600_mvit_b_16x4": (SCRATCH, "16x4", 224, 0.2, "5x1", None, "82.1 / 95.7"),
    "kinetics:k600_mvit_b_32x3": (SCRATCH, "32x3", 224, 0.2, "5x1", None, "83.4 / 96.3"),
    "kinetics:k600_mvit_b24_32x3": (SCRATCH, "32x3", 224, 0.3, "5x1", None, "83.8 / 96.3"),
    "kinetics:k600_mvitv2_b_32x3": (SCRATCH, "32x3", 224, 0.3, "5x1", None, "85.5 / 97.2"),
    "kinetics:k600_mvitv2_l_16x4_in21k": (FROM_21K, "16x4", 224, 0.75, "5x1", "centre", NO_RESULT),
    "kinetics:k600_mvitv2_l_32x3_312_in21k": (LONG, "32x3", 312, 0.75, "4x3", None, "87.2 / 97.6"),
    "kinetics:k600_mvitv2_l_40x3_312_in21k": (LONG, "40x3", 312, 0.75, "4x3", None, "87.5 / 97.8"),
    "kinetics:k600_mvitv2_l_40x3_352_in21k": (LONG, "40x3", 352, 0.75, "4x3", None, "87.9 / 97.9"),
    "kinetics:k700_mvitv2_b_32x3": (SCRATCH, "32x3", 224, 0.3, "3x3", None, "76.6 / 93.2"),
    "kinetics:k700_mvitv2_l_16x4_in21k": (FROM_21K, "16x4", 224, 0.75, "3x3", "centre", NO_RESULT),
    "kinetics:k700_mvitv2_l_40x3_312_in21k": (LONG, "40x3", 312, 0.75, "3x3", None, "79.4 / 94.9"),
    "imagenet:mvit_b16": (IN_V1, "1x1", 224, 0.1, "1x1", None, "83.0"),
    "imagenet:mvit_b16_max": (IN_V1, "1x1", 224, 0.1, "1x1", None, "82.5"),
    "imagenet:mvit_b24": (IN_V1, "1x1", 224, 0.3, "1x1", None, "83.4"),
    "imagenet:mvit_b24_max": (IN_V1, "1x1", 224, 0.3, "1x1", None, "83.1"),
    "imagenet:mvit_b24_wide_320": (IN_V1, "1x1", 320, 0.3, "1x1", None, "84.8"),
    "imagenet:mvit_b24_wide_320_max": (IN_V1, "1x1", 320, 0.3, "1x1", None, "84.3"),
    "imagenet:mvitv2_t": (IN_V2, "1x1", 224, 0.1, "1x1", None, "82.3"),
    "imagenet:mvitv2_s": (IN_V2, "1x1", 224, 0.1, "1x1", None, "83.6"),
    "imagenet:mvitv2_b": (IN_V2, "1x1", 224, 0.3, "1x1", None, "84.4"),
    "imagenet:mvitv2_l": (IN_V2_L, "1x1", 224, 0.5, "1x1", None, "85.3"),
    "imagenet:mvitv2_b_384": (IN_384, "1x1", 384, 0.3, "1x1", None, "85.2 (85.6"),
    "imagenet:mvitv2_l_384": (IN_384_L, "1x1", 384, 0.5, "1x1", None, "86.0 (86.3"),
    "imagenet:mvitv2_s_in21k": (IN_21K, "1x1", 224, 0.1, "1x1", None, "weights"),
    "imagenet:mvitv2_b_in21k": (IN_21K, "1x1", 224, 0.3, "1x1", None, "weights"),
    "imagenet:mvitv2_l_in21k": (IN_21K_L, "1x1", 224, 0.5, "1x1", None, "weights"),
    "imagenet:mvitv2_h_in21k": (IN_21K_H, "1x1", 224, 0.8, "1x1", None, "weights"),
    "imagenet:mvitv2_l_from_21k": (IN_FROM_21K, "1x1", 224, 0.5, "1x1", None, "87.5"),
    "imagenet:mvitv2_h_from_21k": (IN_FROM_21K, "1x1", 224, 0.8, "1x1", None, "88.0"),
    "imagenet:mvitv2_l_384_from_21k": (IN_FROM_21K, "1x1", 384, 0.5, "1x1", None, "88.2 (88.4"),
    "imagenet:mvitv2_h_384_from_21k": (IN_FROM_21K, "1x1", 384, 0.8, "1x1", None, "88.3 (88.6"),
    "imagenet:mvitv2_h_512_from_21k": (IN_512, "1x1", 512, 0.8, "1x1", None, "88.3 (88.8"),
    "ssv2:mvit_b_16x4": (SSV2_V1, "16x4", 224, 0.4, "1x3", None, "64.7 / 89.2"),
    "ssv2:mvit_b_32x3": (SSV2_V1, "32x3", 224, 0.4, "1x3", None, "67.1 / 90.8"),
    "ssv2:mvit_b_64x3": (SSV2_V1, "64x3", 224, 0.4, "1x3", None, "67.7 / 90.9"),
    "ssv2:mvit_b_16x4_k600": (SSV2_V1, "16x4", 224, 0.4, "1x3", None, "66.2 / 90.2"),
    "ssv2:mvit_b_32x3_k600": (SSV2_V1, "32x3", 224, 0.4, "1x3", None, "67.8 / 91.3"),
    "ssv2:mvit_b24_32x3_k600": (SSV2_V1, "32x3", 224, 0.4, "1x3", None, "68.7 / 91.5"),
    "ssv2:vit_b_8x8_in21k": (SSV2_V1, "8x8", 224, 0.4, "1x3", None, "63.5 / 88.3"),
    "ssv2:mvitv2_s_16x4": (SSV2_S, "16x4", 224, 0.4, "1x3", None, "68.2 / 91.4"),
    "ssv2:mvitv2_b_32x3": (SSV2_B, "32x3", 224, 0.4, "1x3", None, "70.5 / 92.7"),
    "ssv2:mvitv2_b_32x3_in21k": (SSV2_B, "32x3", 224, 0.4, "1x3", None, "72.1 / 93.4"),
    "ssv2:mvitv2_l_40x3_312_in21k": (SSV2_L, "40x3", 312, 0.75, "1x3", None, "73.3 / 94.1"),
    "charades:mvit_b_16x4": (CHARADES, "16x4", 224, 0.45, "10x3", None, "40.0 mAP"),
    "charades:mvit_b_32x3": (CHARADES, "32x3", 224, 0.45, "10x3", None, "44.3 mAP"),
    "charades:mvit_b_64x3": (CHARADES, "64x3", 224, 0.45, "10x3", None, "46.3 mAP"),
    "charades:mvit_b_16x4_k600": (CHARADES, "16x4", 224, 0.45, "10x3", None, "43.9 mAP"),
    "charades:mvit_b_32x3_k600": (CHARADES, "32x3", 224, 0.45, "10x3", None, "47.1 mAP"),
    "charades:mvit_b24_32x3_k600": (CHARADES, "32x3", 224, 0.45, "10x3", None, "47.7 mAP"),
    "ava:mvit_b_16x4_k400": (AVA, "16x4", 224, 0.4, "1x1", None, "24.5 mAP"),
    "ava:mvit_b_16x4_k600": (AVA, "16x4", 224, 0.4, "1x1", None, "26.1 mAP"),
    "ava:mvit_b_32x3_k400": (AVA, "32x3", 224, 0.4, "1x1", None, "26.8 mAP"),
    "ava:mvit_b_32x3_k600": (AVA, "32x3", 224, 0.4, "1x1", None, "27.5 mAP"),
    "ava:mvit_b_64x3_k400": (AVA, "64x3", 224, 0.4, "1x1", None, "27.3 mAP"),
    "ava:mvit_b24_32x3_k600": (AVA, "32x3", 224, 0.4, "1x1", None, "28.7 mAP"),
    "ava:mvitv2_s_16x4_k400": (AVA, "16x4", 224, 0.4, "1x1", None, "26.8 mAP"),
    "ava:mvitv2_b_32x3_k400": (AVA, "32x3", 224, 0.4, "1x1", None, "28.1 mAP"),
    "ava:mvitv2_b_32x3_k600": (AVA, "32x3", 224, 0.4, "1x1", None, "29.9 mAP"),
    "ava:mvitv2_b_32x3_k700": (AVA, "32x3", 224, 0.4, "1x1", None, "31.3 mAP"),
    "ava:mvitv2_l_40x3_312_k700": (AVA, "40x3", 312, 0.4, "1x1", None, "33.5 mAP"),
}  # fmt: skip

CLASSES = {
    "kinetics": 400, "k600": 600, "k700": 700, "imagenet": 1000, "in21k": 19168, "ssv2": 174,
    "charades": 157, "ava": 80,
}  # fmt: skip


@lru_cache
def recipe(name):
    file, _, arg = name.partition(":")
    return tiny.load_config_file(file).get_config(arg)


def data_of(name):
    """Returns the data set of a recipe, a key of CLASSES."""
    file, _, arg = name.partition(":")
    if file == "kinetics":
        return arg[:4] if arg.startswith("k") else file
    return "in21k" if file == "imagenet" and arg.endswith("_in21k") else file


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_has_the_papers_values(name):
    schedule, sampling, size, drop_path, views, inflate, published = ROWS[name]
    epochs, warmup, batch, repeats, high, first, last, decay, clip, layers, mix = schedule
    c = recipe(name)
    check(c)
    factor = c.batch / c.optim.lr_batch
    rates = [rate * factor for rate in (c.optim.lr, c.optim.start_lr, c.optim.end_lr)]
    assert rates == pytest.approx([high, first, last])
    assert (c.epochs, c.optim.warmup_epochs, c.batch) == (epochs, warmup, batch)
    assert c.data.repeats == repeats
    assert (c.optim.weight_decay, c.optim.clip_norm, c.optim.layer_decay) == (decay, clip, layers)
    assert (c.augment.mixup, c.augment.cutmix) == ((0.8, 1.0) if mix else (0, 0))
    assert c.optim.name == ("sgd" if name.startswith(("ssv2", "charades", "ava")) else "adamw")
    assert (c.optim.momentum, c.optim.b1, c.optim.b2, c.optim.ema) == (0.9, 0.9, 0.999, 0)
    assert not c.optim.ema_warmup
    model = build.model_config(c, c.data.classes)
    assert (f"{model.frames}x{c.data.stride}", model.size) == (sampling, size)
    assert model.drop_path == drop_path
    images_or_maskfeat = name.startswith("imagenet") or "maskfeat" in name
    assert model.dropout == (0.0 if images_or_maskfeat else 0.5)
    assert f"{c.eval.clips}x{c.eval.crops}" == views
    assert c.init.inflate == inflate and inflate in (None, *adapt.INFLATIONS)
    normal = IMAGENET if name.startswith("imagenet") or "mvitv2_l" in name else GREY
    assert (tuple(c.data.mean), tuple(c.data.std)) == normal
    assert c.published.startswith(published)
    assert c.data.classes == model.num_classes == CLASSES[data_of(name)]
    assert plan(model)
    if not name.startswith("ava"):
        check_data_and_augmentation(name, c, size)


def check_data_and_augmentation(name, c, size):
    assert c.data.short_side == {224: 256, 312: 356, 320: 365, 352: 402, 384: 438, 512: 585}[size]
    a, data = c.augment, c.data
    assert (a.random_erase_prob, a.random_erase_mode, a.mixup_switch_prob) == (0.25, "pixel", 0.5)
    file = name.partition(":")[0]
    operations = "m7-n4"
    if file == "imagenet":
        operations = "m9-n4" if name.endswith("_max") else "m9-n6"
    elif "maskfeat" in name:
        operations = "m7-n2"
    assert a.randaugment == f"rand-{operations}-mstd0.5-inc1"
    assert a.label_smoothing == (0 if file == "charades" else 0.1)
    assert a.flip == (0 if file == "ssv2" else 0.5)
    if file == "ssv2":
        wide = (356, 446) if "_312" in name else (256, 320)
        assert (a.crop_area, a.jitter, data.sampling) == (None, wide, "segments")
    else:
        assert (a.crop_area, a.jitter) == ((0.08, 1.0), None)
        assert data.sampling == ("stride" if file == "charades" else "span")
    assert data.interpolation == ("bicubic" if file == "imagenet" else "bilinear")
    assert data.multi_label == (file == "charades")
    assert c.eval.ensemble == ("max" if file == "charades" else "mean")
    assert not c.eval.whole_image
    if file in ("kinetics", "charades"):
        assert a.short_side == (320 if "maskfeat" in name else int(size / 0.875))
    else:
        assert a.short_side is None


@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith("ava")])
def test_detection_recipes_change_nothing_but_scale_position_and_side(name):
    c = recipe(name)
    a, large = c.augment, "_312" in name
    assert (a.crop_area, a.jitter, a.flip) == (None, (356, 446) if large else (256, 320), 0.5)
    assert (a.randaugment, a.random_erase_prob, a.label_smoothing) == ("", 0, 0)
    assert (c.data.short_side, c.data.min_score) == (312 if large else 224, 0.9)
    assert (c.data.sampling, c.data.first_second, c.dtype) == ("key_frame", 900, "float32")
    assert not c.eval.full_frame and c.optim.loss_reduction == "global"


def test_detection_recipes_have_shorter_names_and_whole_frames():
    get_config = tiny.load_config_file("ava").get_config
    for name in ("mvit_b_16x4", "mvit_b24_32x3", "mvitv2_b_32x3", "mvitv2_l_40x3_312"):
        first = next(row for row in ROWS if row.startswith(f"ava:{name}_k"))
        assert get_config(name) == recipe(first)
    whole = get_config("mvitv2_b_32x3_k700,full")
    assert whole.eval.full_frame
    assert whole.published == "32.3 mAP (whole frames; MViTv2, Table A.2)"
    assert get_config("mvit_b_16x4,full").published.endswith("none for whole frames")
    assert get_config("mvitv2_l_40x3_312,full").published.startswith("34.4 mAP")
    for unknown in ("mvit_b_16x4_k700", "mvit_b_16x4,centre", "mvit_b"):
        with pytest.raises(ValueError, match=f"no experiment '{unknown}': choose one of mvit_b_16"):
            get_config(unknown)


@pytest.mark.parametrize("file", ["kinetics", "imagenet", "ssv2", "charades", "ava"])
def test_every_recipe_of_a_config_file_is_in_the_table(file):
    message = f"configs/{file}.py has no experiment 'no_such': choose one of "
    with pytest.raises(ValueError, match=message) as error:
        tiny.load_config_file(file).get_config("no_such")
    named = str(error.value).partition("choose one of ")[2].split(", ")
    assert {f"{file}:{arg}" for arg in named} == {name for name in ROWS if name.startswith(file)}


def test_the_mixup_group_size_is_the_papers_batch_per_gpu():
    groups = {name: recipe(name).augment.mixup_group_size for name in ROWS}
    assert groups["kinetics:mvit_b_16x4"] == groups["kinetics:mvitv2_b_32x3"] == 4
    assert groups["imagenet:mvitv2_s"] == 256 // 8
    assert groups["ssv2:mvitv2_s_16x4"] == 16 // 8
    assert groups["ssv2:mvit_b_16x4"] == 8
    assert all(recipe(name).batch % group == 0 for name, group in groups.items())


def test_recipes_name_the_weights_that_they_need():
    def needed(name):
        return recipe(name).init.needed

    scratch = (SCRATCH, IN_V1, IN_V2, IN_V2_L, IN_21K, IN_21K_L, IN_21K_H)
    for name, (schedule, *_) in ROWS.items():
        assert (needed(name) is None) == (schedule in scratch), name
    assert needed("kinetics:mvit_b_64x3") == "weights of mvit_b_32x3 trained on Kinetics-400"
    assert needed("kinetics:mvitv2_s_16x4_in1k") == "weights of mvitv2_s trained on ImageNet-1k"
    assert "model.expand=attention" in needed("kinetics:mvitv2_l_16x4_in1k")
    assert needed("charades:mvit_b_64x3").endswith("kinetics.py:mvit_b_64x3")
    # The named weights are those of a recipe of that file.
    for name in ROWS:
        if name.startswith(("ssv2", "charades", "ava")):
            assert f"kinetics:{needed(name).rpartition(':')[2]}" in ROWS, name


def test_imagenet_recipes_can_read_folders_of_images():
    plain, folders = (recipe(f"imagenet:mvitv2_s{end}") for end in ("", ",folders"))
    assert (plain.data.tfds, plain.data.val_list) == ("imagenet2012:5.1.0", "validation")
    assert (folders.data.tfds, folders.data.source) == (None, "folders")
    assert (folders.data.train_list, folders.data.val_list) == ("train", "val")
    assert (folders.optim.lr, folders.batch) == (plain.optim.lr, plain.batch)
    assert recipe("imagenet:mvitv2_s_in21k").data.tfds is None
    with pytest.raises(ValueError, match="no experiment 'mvitv2_s,shards'"):
        tiny.load_config_file("imagenet").get_config("mvitv2_s,shards")


def test_the_24_block_model_has_the_costs_of_the_released_config():
    """53.1 M parameters and 235.8 G multiply-adds by that config; the paper's have 3x3x3."""
    config = recipe("kinetics:mvit_b24_32x3")
    total = cost(build.model_config(config, 400))
    assert total.parameters / 1e6 == pytest.approx(53.1, rel=1e-3)
    assert total.multiply_adds / 1e9 == pytest.approx(235.8, rel=1e-3)
    assert recipe("kinetics:k600_mvit_b24_32x3").model.pool_kernel is None


def small_model(name, **changes):
    """The architecture of a recipe, of one narrow block a stage; tokens as many as there."""
    c = recipe(name)
    model = build.model_config(c, c.data.classes)
    narrow = {"width": 16 * model.heads, "depths": (1,) * len(model.depths)}
    return dataclasses.replace(model, **narrow, **changes)


def source_of(name):
    """The small architecture of the weights that a recipe starts from."""
    needed, ending = recipe(name).init.needed, name.rpartition("_")[2]
    if "vit_b16" in needed:
        return variant("vit_b16", num_classes=21841, width=16 * 12, depths=(1,))
    if "maskfeat" in name:
        return small_model(name)
    if name.startswith(("ssv2", "charades", "ava")):
        return small_model(f"kinetics:{needed.rpartition(':')[2]}")
    source = needed.split()[2]
    if "ImageNet" in needed:
        grown = {"expand": "attention"} if "model.expand=attention" in needed else {}
        trained = f"{source}_in21k" if ending == "in21k" and "in21k" not in source else source
        return small_model(f"imagenet:{trained}", **grown)
    data = {"600": "k600_", "700": "k700_"}.get(needed[-3:], "")
    return small_model(f"kinetics:{data}{source}")


def alike(model):
    """Returns a model without what no shape of a block depends on."""
    return dataclasses.replace(
        model, num_classes=2, task="classification", drop_path=0.0, dropout=0.0
    )


def transfer(name):
    """Returns the architectures that weights leave and enter, and how they are inflated."""
    c = recipe(name)
    return alike(source_of(name)), alike(small_model(name)), c.init.inflate


def whole(name):
    return alike(build.model_config(recipe(name), 2))


def shallow(name):
    """Returns the architecture with the kinds of blocks of each stage: its first, and another."""
    model = whole(name)
    return dataclasses.replace(model, depths=tuple(min(depth, 2) for depth in model.depths))


def distinct(key, names):
    """Returns the first of all names that have the same key."""
    return list({key(name): name for name in reversed(list(names))}.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", distinct(transfer, [n for n in ROWS if recipe(n).init.needed]))
def test_the_weights_that_a_recipe_names_fit_its_model(name):
    source, target, inflate = transfer(name)
    source = dataclasses.replace(source, num_classes=3)
    shapes = jax.eval_shape(functional(source).init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    fitted, report = adapt.convert_params(params, functional(source), functional(target), inflate)
    assert report.ok
    new = {line.path for line in report.lines if line.done == "new"}
    allowed = {"head/classifier/kernel", "head/classifier/bias"}
    if not source.class_token:
        allowed |= {"positions/class_token"}
    assert new <= allowed
    if inflate:  # nothing but the centre frame
        kernel = fitted["patch_embed"]["proj"]["kernel"]
        frames = [bool(frame.any()) for frame in kernel]
        assert frames == [i == len(frames) // 2 for i in range(len(frames))]


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        *(slow(name, shallow) for name in distinct(shallow, ROWS)),
        *(nightly(name, whole) for name in distinct(whole, ROWS)),
    ],
)
def test_the_architecture_of_a_recipe_can_be_built(name, architecture):
    assert functional(architecture(name)).shapes()["head/classifier/bias"] == (2,)


def test_every_published_row_of_the_variants_has_a_recipe():
    """mvit_b_32x2 stands in an ablation alone."""
    files = {"Kinetics-400": "kinetics:", "Kinetics-600": "kinetics:k6", "ImageNet-1k": "imagenet"}
    for model, row in PUBLISHED.items():
        names = [n for n in ROWS if n.startswith(files[row.data]) and model[:8] in n]
        listed = any(f"{row.top1}" in recipe(name).published for name in names)
        assert listed or model == "mvit_b_32x2", model
