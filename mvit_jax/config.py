"""Every key of an experiment, once: its default, its unit, what it means.

An experiment's file starts from `get_config()` here and changes values; keys that are not listed
here do not exist, and setting one is an error. From the command line:
`--config=configs/moving_digits.py --config.optim.lr=1e-3`.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    c = ConfigDict()
    # What a paper reports of this experiment, and where; for plans (--dry_run).
    c.published = config_dict.placeholder(str)
    c.seed = 0  # of weights, data order, augmentation, drop path
    c.epochs = 200.0  # passes over the training list; may be a fraction
    c.batch = 512  # clips a step, over all devices
    c.accumulate = 1  # parts that a step's batch is cut into to save memory
    # What the backward pass computes again and does not keep, to save memory: none; cheap (norms,
    # activations); first_stage (the blocks on its grid, which hold the most); blocks (all).
    c.remat = "none"
    c.dtype = "float32"  # what the model computes in: float32 or bfloat16; weights are float32
    c.precision = "default"  # of matrix products: default, high or highest. On a TPU "default"
    #                          multiplies float32 in bfloat16, on GPUs in TF32.

    # What a loss or gradient that is not finite does. Its update is never made; then stop ends the
    # run; skip goes on with the next batch; rollback too, from the last checkpoint's weights.
    c.on_nan = "stop"

    # Where weights start from. A workdir with checkpoints is gone on with, whatever stands here.
    c.resume = config_dict.placeholder(str)  # a run's folder: go on from its state, in this workdir
    c.init = ConfigDict()
    c.init.checkpoint = config_dict.placeholder(str)  # a run's or a converted folder: weights only
    c.init.inflate = config_dict.placeholder(str)  # image to video: centre, mean or repeat
    c.init.needed = config_dict.placeholder(str)  # the weights that a recipe cannot do without

    c.model = ConfigDict()
    c.model.variant = "mvit_b_16x4"  # a name of `python -m mvit_jax.describe --all`
    # The rest are fields of models/plan.py MViTConfig; what is not set is the variant's own.
    c.model.frames = config_dict.placeholder(int)  # frames of a clip
    c.model.size = config_dict.placeholder(int)  # side of the crop, pixels
    c.model.patch_kernel = config_dict.placeholder(tuple)  # of the cubes: (t, h, w), as all below
    c.model.patch_stride = config_dict.placeholder(tuple)  # of the cubes
    c.model.patch_padding = config_dict.placeholder(tuple)  # of the clip, on either side
    c.model.class_token = config_dict.placeholder(bool)  # else the head reads the mean of tokens
    c.model.positions = config_dict.placeholder(str)  # none, space, separate, joint or sincos
    c.model.stem_norm = config_dict.placeholder(bool)
    c.model.width = config_dict.placeholder(int)  # channels of the first stage
    c.model.heads = config_dict.placeholder(int)  # of the first stage
    c.model.growth = config_dict.placeholder(int)  # of both from stage to stage
    c.model.depths = config_dict.placeholder(tuple)  # blocks per stage
    c.model.expand = config_dict.placeholder(str)  # where channels grow: mlp or attention
    c.model.skip = config_dict.placeholder(str)  # where they do: normalised, plain or none
    c.model.mlp_ratio = config_dict.placeholder(int)  # hidden channels of the MLP, times the width
    c.model.pool_mode = config_dict.placeholder(str)  # conv, conv_unshared, max or avg
    c.model.pool_kernel = config_dict.placeholder(object)  # (t, h, w), "stride + 1", "stride", ...
    c.model.q_kernels = config_dict.placeholder(tuple)  # one for each block
    c.model.kv_kernels = config_dict.placeholder(tuple)
    c.model.q_stride = config_dict.placeholder(tuple)
    c.model.full_q_pool = config_dict.placeholder(bool)
    c.model.kv_stride = config_dict.placeholder(tuple)
    c.model.kv_adaptive = config_dict.placeholder(bool)
    c.model.pool_first = config_dict.placeholder(bool)
    c.model.pool_norm_eps = config_dict.placeholder(float)
    c.model.separate_qkv = config_dict.placeholder(bool)
    c.model.qkv_bias = config_dict.placeholder(bool)  # of the projections to Q, K and V
    c.model.relative_positions = config_dict.placeholder(str)  # none, space, time or both
    c.model.relative_distances = config_dict.placeholder(str)  # slowfast or torchvision
    c.model.residual_pool = config_dict.placeholder(str)  # none, grid or all
    c.model.mean_pooling = config_dict.placeholder(bool)
    c.model.drop_path = config_dict.placeholder(float)  # probability, at the last block
    c.model.dropout = config_dict.placeholder(float)  # probability, before the classifier

    c.data = ConfigDict()
    c.data.folder = config_dict.placeholder(str)  # must be given: holds the lists and labels.txt
    # What the folder holds. list: files of videos or images, named by lists; folders: CLASS/FILE in
    # a folder for each list; shards: what `prepare videos` wrote; ssv2, charades: frames, with the
    # lists of those sets; synthetic: nothing, clips are made up, for benchmarks.
    c.data.source = "list"
    # Or a set of images that TensorFlow Datasets has prepared, like "imagenet2012:5.1.0"; then the
    # folder is TFDS's data_dir, and the lists are splits, like "train[:90%]".
    c.data.tfds = config_dict.placeholder(str)
    c.data.prefix = ""  # set before each path of the lists
    c.data.separator = config_dict.placeholder(str)  # of path and label; else white space
    # Videos to train on and their classes, for plans that are made where the data is not.
    c.data.train_videos = config_dict.placeholder(int)
    c.data.classes = config_dict.placeholder(int)
    c.data.train_list = "train.csv"  # lines "path label"
    c.data.val_list = "val.csv"  # watched while training; "" for none
    c.data.test_list = "test.csv"  # of the test program
    # Which frames make a clip. span: evenly over frames * stride / 30 seconds (Kinetics); segments:
    # one of each of as many equal parts (SSv2); stride: each stride-th (Charades).
    c.data.sampling = "span"
    c.data.stride = 4  # frames between two sampled ones; of a span at 30 frames a second
    c.data.repeats = 1  # clips augmented out of each one that is decoded; batch counts them all
    # Whether a video has any number of classes (Charades): sigmoids, binary cross-entropy, mAP.
    c.data.multi_label = False
    c.data.short_side = 256  # to which test videos are scaled for one centre crop, pixels
    c.data.interpolation = "bilinear"  # or bicubic, with antialias, as for ImageNet
    c.data.mean = (0.45, 0.45, 0.45)  # of red, green, blue in [0, 1]
    c.data.std = (0.225, 0.225, 0.225)  # likewise; clips are (value - mean) / std
    c.data.threads = 4  # that decode, on each host; 0 to decode between the steps
    c.data.processes = 0  # that decode, on each host, each with the threads above; 0 for none
    # Seconds that a batch may take to load before the run saves and ends; 0 to wait for ever.
    c.data.timeout = 600.0
    # Share of broken videos above which a run ends: of a test's list, or of the clips drawn since
    # training was started (of at least 200).
    c.data.max_broken = 0.2

    c.augment = ConfigDict()
    # In this order: short_side, RandAugment, random crop, flip, erasing, mixing (images are cropped
    # before RandAugment).
    c.augment.short_side = config_dict.placeholder(int)  # of training frames, pixels; None: as is
    c.augment.randaugment = ""  # like rand-m7-n4-mstd0.5-inc1, as timm has it; "" for none
    c.augment.crop_area = config_dict.placeholder(tuple)
    c.augment.crop_area = (0.08, 1.0)  # share of the frame that a random crop takes; None for none
    # Or the short side drawn between these (its inverse uniformly), and a square cut at random.
    c.augment.jitter = config_dict.placeholder(tuple)
    c.augment.flip = 0.5  # probability of a left-right flip
    c.augment.erase = 0.0  # probability that a box is erased (random erasing)
    c.augment.erase_mode = "pixel"  # by normal noise, or "const": by the mean colour
    c.augment.mixup = 0.8  # alpha of its Beta distribution; 0 for none
    c.augment.cutmix = 1.0  # likewise
    c.augment.switch = 0.5  # probability of cutmix where both are on
    c.augment.group = 4  # clips that share one mixing weight; divides a device's clips
    c.augment.label_smoothing = 0.1  # share of the target that is spread over all classes

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # or sgd, with Nesterov's momentum
    # Clips for which the three rates below are meant: they are multiplied by batch / lr_batch, so
    # that another batch needs no other rates. None: they are taken as they are.
    c.optim.lr_batch = config_dict.placeholder(int)
    c.optim.lr = 1.6e-3  # at the end of the warm-up
    c.optim.start_lr = 1.6e-5  # at step 0
    c.optim.end_lr = 1.6e-5  # at the last step of the half cosine
    c.optim.warmup_epochs = 30.0  # over which the rate rises linearly
    c.optim.weight_decay = 0.05  # not of biases, norms and other one-dimensional tensors
    c.optim.layer_decay = 1.0  # rates fall by this factor from each block to the one before it
    c.optim.b1 = 0.9  # decay of AdamW's mean of gradients
    c.optim.b2 = 0.999  # and of the mean of their squares
    c.optim.momentum = 0.9  # of SGD
    c.optim.clip_norm = 1.0  # largest global norm of a gradient; 0 for no limit
    c.optim.ema = 0.0  # decay of the averaged weights that are then tested; 0 for none

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices that hold copies of the weights; -1 for all that are left
    c.mesh.fsdp = 1  # devices that share one copy

    c.log_every = 20  # steps
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # steps
    c.checkpoint.keep = 2  # the last ones; the best one is kept besides

    c.eval = ConfigDict()
    c.eval.every_epochs = 5.0  # between two validations of 1 clip x 1 crop; 0 for none
    c.eval.batch = 8  # videos at a time; rounded up to a multiple of the devices
    c.eval.clips = 5  # evenly spread over a test video
    c.eval.crops = 1  # 1 (centre) or 3
    c.eval.ensemble = "mean"  # of the scores of a video's views, or "max" (Charades)
    c.eval.whole_image = False  # squash all of an image to the crop: the papers' "resize" column
    return c.lock()
