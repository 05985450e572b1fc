r"""AVA v2.2 (MViT, Table 8; MViTv2, Table A.2): action detection, fine-tuned from Kinetics.

    python -m mvit_jax.train --config=configs/ava.py:mvit_b_16x4 --workdir=runs/ava \
        --config.data.folder=DIR --config.init.checkpoint=RUN
    python -m mvit_jax.evaluate --workdir=runs/ava

The argument after the colon is VARIANT[_k400|_k600|_k700][,full]. Without a suffix, it is the
model's first pretraining in the tables. With `,full`, `evaluate` tests boxes in the whole frame
instead of the centre square. RUN is the workdir of a training with configs/kinetics.py on that data
set, or a folder of released weights converted by `python -m mvit_jax.convert`. Training starts with
a new head, and positions are resized. `--dry_run` prints the plan with the published result.

DIR has the layout of PySlowFast's instructions:

    annotations/ava_train_v2.2.csv, annotations/ava_val_v2.2.csv
    annotations/ava_action_list_v2.2_for_activitynet_2019.pbtxt
    annotations/ava_val_excluded_timestamps_v2.2.csv
    annotations/person_box_67091280_iou90/ava_detection_..., two lists of detected persons
    frames/VIDEO/VIDEO_000001.jpg, or videos/VIDEO.mp4

Frames are 30 a second, in the resolution of the videos. Scaled frames cost several points of mAP.

Results are the frame mAP at an IoU of 0.5 over 60 classes of the validation set, from one clip
around each key frame. No run on AVA was made with this code.

Of MViT, a config was released only within other projects. The recipe is MViT's appendix D.2: SGD,
30 epochs with 5 of warm-up, weight decay 1e-8, drop path rate 0.4, sigmoids. Training boxes are
the labelled ones and detected persons with a score of at least 0.9. Assumptions:

* Batch and learning rate: both papers state 512 clips, but the configs of other projects have 128
  clips at the same rate of 0.6. It is 0.6 for 128 clips here, scaled linearly with the batch
  (`optim.lr_batch`). First and last rates are 8e-6, as in these configs.
* The papers have one recipe for all sizes. It is assumed for MViTv2, too.
* PySlowFast averages the loss over the boxes of each GPU, so that a box on a GPU with few boxes
  counts more. Here it is the mean over all boxes of the batch, which no number of devices changes;
  PySlowFast's mean is `--config.optim.loss_reduction=per_device`.
* The short side of training frames is drawn from 256 to 320 pixels, for 312 pixels from 356 to 446
  (MViTv2-L's jitter on SSv2). Test frames have a short side of the crop's size.
* Whole frames are tested by stretched relative positions. The papers do not state how their column
  "full" was computed. `--config.model.relative_resize=clamp` is the other published way.
* Training boxes are those of the list with "include_negative" in its name. Boxes without labels
  count as negative for every class.
* Temporal jitter of MeMViT and validation on every fourth second alone are not implemented.
* 211,000 key frames are assumed where the lists are missing.
* MeMViT (memory over clips) is not implemented.
"""

from functools import partial
from typing import Any

from mvit_jax import config
from mvit_jax.models.variants import preprocessing

LISTS = "annotations"
BOXES = f"{LISTS}/person_box_67091280_iou90/ava_detection"


def recipe(
    variant: str, kinetics: str, centre: str, whole: str | None = None, *, full: bool = False
) -> Any:  # a ConfigDict
    """Returns the recipe of `variant`.

    Args:
      variant: name of the variant.
      kinetics: recipe in configs/kinetics.py of the initial weights.
      centre: published mAP of the centre square.
      whole: published mAP of whole frames; None if there is none.
      full: tests whole frames.
    """
    c = config.base()
    table = "MViTv2, Table A.2" if variant.startswith("mvitv2") else "MViT, Table 8"
    c.published = f"{centre} mAP ({table})"
    if full and whole is None:
        c.published += " for the centre square; none for whole frames"
    elif full:
        c.published = f"{whole} mAP (whole frames; {table})"
    c.epochs = 30.0
    c.batch = 128
    c.init.needed = f"weights of configs/kinetics.py:{kinetics}"
    c.model.variant = variant
    c.model.drop_path = 0.4
    expected = preprocessing(variant)
    c.data.source = "ava"
    c.data.sampling = "key_frame"
    c.data.multi_label = True
    c.data.train_videos = 211_000
    c.data.classes = 80
    c.data.train_list = f"{LISTS}/ava_train_v2.2.csv"
    c.data.val_list = f"{LISTS}/ava_val_v2.2.csv"
    c.data.test_list = f"{LISTS}/ava_val_v2.2.csv"
    c.data.train_boxes = f"{BOXES}_train_boxes_and_labels_include_negative_v2.2.csv"
    c.data.val_boxes = f"{BOXES}_val_boxes_and_labels.csv"
    c.data.test_boxes = f"{BOXES}_val_boxes_and_labels.csv"
    c.data.min_score = 0.9
    c.data.excluded = f"{LISTS}/ava_val_excluded_timestamps_v2.2.csv"
    c.data.class_list = f"{LISTS}/ava_action_list_v2.2_for_activitynet_2019.pbtxt"
    c.data.stride = expected.stride
    c.data.short_side = expected.size
    c.data.mean = expected.mean
    c.data.std = expected.std
    c.augment.crop_area = None
    c.augment.jitter = (356, 446) if expected.size == 312 else (256, 320)
    c.augment.mixup = 0.0
    c.augment.cutmix = 0.0
    c.augment.label_smoothing = 0.0
    c.optim.name = "sgd"
    c.optim.lr_batch = 128
    c.optim.lr = 0.6
    c.optim.start_lr = 8e-6
    c.optim.end_lr = 8e-6
    c.optim.warmup_epochs = 5.0
    c.optim.weight_decay = 1e-8
    c.optim.clip_norm = 0.0
    c.checkpoint.every = 1000
    c.eval.clips = 1
    c.eval.full_frame = full
    return c


# By name: the variant, the Kinetics recipe of the initial weights, and the published mAP of centre
# squares and of whole frames.
RECIPES = {
    "mvit_b_16x4_k400": partial(recipe, "mvit_b_16x4", "mvit_b_16x4", "24.5"),
    "mvit_b_16x4_k600": partial(recipe, "mvit_b_16x4", "k600_mvit_b_16x4", "26.1"),
    "mvit_b_32x3_k400": partial(recipe, "mvit_b_32x3", "mvit_b_32x3", "26.8"),
    "mvit_b_32x3_k600": partial(recipe, "mvit_b_32x3", "k600_mvit_b_32x3", "27.5"),
    "mvit_b_64x3_k400": partial(recipe, "mvit_b_64x3", "mvit_b_64x3", "27.3"),
    "mvit_b24_32x3_k600": partial(recipe, "mvit_b24_32x3", "k600_mvit_b24_32x3", "28.7"),
    "mvitv2_s_16x4_k400": partial(recipe, "mvitv2_s_16x4", "mvitv2_s_16x4", "26.8", "27.6"),
    "mvitv2_b_32x3_k400": partial(recipe, "mvitv2_b_32x3", "mvitv2_b_32x3", "28.1", "29.0"),
    "mvitv2_b_32x3_k600": partial(recipe, "mvitv2_b_32x3", "k600_mvitv2_b_32x3", "29.9", "30.5"),
    "mvitv2_b_32x3_k700": partial(recipe, "mvitv2_b_32x3", "k700_mvitv2_b_32x3", "31.3", "32.3"),
    "mvitv2_l_40x3_312_k700": partial(
        recipe, "mvitv2_l_40x3_312", "k700_mvitv2_l_40x3_312_in21k", "33.5", "34.4"),
}  # fmt: skip


def get_config(arg: str = "mvit_b_16x4") -> Any:  # a ConfigDict
    name, comma, frame = arg.partition(",")
    matches = [each for each in RECIPES if each == name or each.startswith(f"{name}_k")]
    if not matches or (comma and frame != "full"):
        raise ValueError(
            f"configs/ava.py has no experiment {arg!r}: choose one of {', '.join(RECIPES)}"
        )
    return RECIPES[matches[0]](full=bool(comma))
