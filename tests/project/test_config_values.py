"""Wrong values of every key: one sentence that names the key, before any model is built.

The sets of valid values are written here anew, not read from the table of keys.
"""

import sys

import absl.flags
import grain  # noqa: F401  # before a test replaces absl.flags.FLAGS, where it registers its flags
import pytest

from mvit_jax import config
from mvit_jax.common import errors
from mvit_jax.common.errors import UserError
from mvit_jax.training import build, in_memory

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def names(text):
    return text.split()


FREE_TEXTS = names("""
    published resume init.checkpoint init.needed model.variant model.block model.attention
    model.pooling data.folder data.tfds data.prefix data.separator data.train_list data.val_list
    data.test_list data.train_boxes data.val_boxes data.test_boxes data.excluded data.class_list
    augment.randaugment
""")
NOT_NONE = names("""
    seed epochs batch accumulate remat dtype precision ops on_nan log_every model.variant
    data.source data.prefix data.train_list data.sampling data.stride data.repeats
    data.multi_label data.short_side data.interpolation data.mean data.std data.threads
    data.processes data.timeout data.max_broken augment.randaugment augment.flip
    augment.random_erase_prob augment.random_erase_mode augment.mixup augment.cutmix
    augment.mixup_switch_prob augment.mixup_group_size augment.label_smoothing optim.name optim.lr
    optim.start_lr optim.end_lr optim.warmup_epochs optim.weight_decay optim.layer_decay optim.b1
    optim.b2 optim.momentum optim.clip_norm optim.ema mesh.data mesh.fsdp checkpoint.every
    checkpoint.keep eval.every_epochs eval.batch eval.clips eval.crops eval.ensemble
    eval.whole_image eval.full_frame data.balanced data.min_score data.first_second
    optim.ema_warmup optim.loss_reduction
""")
ZERO = names("""
    seed data.threads data.processes data.timeout data.max_broken data.min_score
    data.first_second augment.flip augment.random_erase_prob augment.mixup augment.cutmix
    augment.mixup_switch_prob
    augment.label_smoothing optim.lr optim.start_lr optim.end_lr optim.warmup_epochs
    optim.weight_decay optim.layer_decay optim.b1 optim.b2 optim.momentum optim.clip_norm
    optim.ema optim.trained_blocks eval.every_epochs model.drop_path model.dropout
""")
UP_TO_ONE = names("""
    data.max_broken data.min_score augment.flip augment.random_erase_prob
    augment.mixup_switch_prob augment.label_smoothing optim.layer_decay
""")
BELOW_ONE = names("optim.b1 optim.b2 optim.momentum optim.ema model.drop_path model.dropout")
MAY_BE_EMPTY = names("model.q_kernels model.kv_kernels augment.crop_area augment.jitter")

# Wrong for every key of a type: texts of flags, and values in Python.
TEXTS = {
    int: ["x", "", "nan", "inf", "1.5", "(1,)", "-7"],
    float: ["x", "", "nan", "-inf", "1e999", "(1,)", "-7"],
    bool: ["x", "", "nan", "2", "(1,)"],
    str: ["x", "", "nan"],
    tuple: ["x", "nan", "(-1,-1,-1)", "('a',1,2)", "(nan,1,1)", "(1,2", "(1e999,1,1)"],
    object: ["x", "1", "(1,)", "(0,0,0)", "{}"],
}
VALUES = {
    int: ["4", 1.5, float("nan"), float("inf"), [1], -7, True, 10**30, 2**31],
    float: ["0.5", float("nan"), float("inf"), [1.0], -7.0],
    bool: ["True", 2, float("nan"), [True]],
    str: [1, float("nan"), ("a",), b"a", True],
    tuple: [0.5, float("nan"), "(1, 2)", (0,), (1,) * 9 + (-1,), (float("nan"),) * 3,
            ("a", "b", "c"), (None, None, None), (0, 0, 0, 0)],
    object: ["x", 3, (1, 2), (1.0, 1.0, 1.0), ()],
}  # fmt: skip


def wrong_texts(name):
    kind = config.KEYS[name].kind
    if name in FREE_TEXTS:
        return [""] if name in ("model.variant", "data.train_list") else []
    zero = ["0"] if kind in (int, float) and name not in ZERO else []
    one = ["1"] if name in BELOW_ONE else ["1.01"] if name in UP_TO_ONE else []
    length = ["1", "(1,)", "(1,1,1,1)"] if kind is tuple and name != "model.depths" else []
    return [*TEXTS[kind], *zero, *one, *length]


def wrong_values(name):
    kind = config.KEYS[name].kind
    none = [None] if name in NOT_NONE else []
    zero = [0] if kind in (int, float) and name not in ZERO else []
    one = [1.0] if name in BELOW_ONE else [1.01] if name in UP_TO_ONE else []
    empty = [()] if kind is tuple and name not in MAY_BE_EMPTY else []
    return [*VALUES[kind], *none, *zero, *one, *empty]


def parsed(monkeypatch, *texts):
    """Returns the config of a command line, as all programs parse and check it."""
    argv = ["train", "--config=configs/moving_digits.py", *texts]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(absl.flags, "FLAGS", absl.flags.FlagValues())
    holder = config.define_flag()
    errors._parse(argv)
    errors.lock(holder.value)
    config.check(holder.value)
    return holder.value


def is_a_sentence(message, name):
    return name in message and "\n" not in message and "Traceback" not in message


@pytest.mark.parametrize("name", config.KEYS)
def test_wrong_values_on_the_command_line(name, monkeypatch, capsys):
    for text in wrong_texts(name):
        try:
            parsed(monkeypatch, f"--config.{name}={text}")
        except UserError as error:
            message = str(error)
        except SystemExit as end:
            assert end.code == 1
            message = capsys.readouterr().err.strip()
            assert message.startswith("error: ")
        else:
            pytest.fail(f"--config.{name}={text} is accepted")
        assert is_a_sentence(message, name), message


@pytest.mark.parametrize("name", config.KEYS)
def test_wrong_values_in_files_and_notebooks(name):
    plain = type(config.base())(config.base().to_dict(), type_safe=False)  # as read from a file
    section, _, field = name.rpartition(".")
    for value in wrong_values(name):
        with plain.unlocked():
            (plain[section] if section else plain)[field] = value
        with pytest.raises(UserError) as caught:
            config.check(plain)
        assert is_a_sentence(str(caught.value), name), caught.value
        with pytest.raises(UserError) as caught:
            in_memory.run(in_memory.read_config("moving_digits", **{name: value}))
        assert is_a_sentence(str(caught.value), name), caught.value


def test_true_is_no_number():
    base = config.base()
    with pytest.raises(UserError, match=r"^epochs=True: it must be a number"):
        base.epochs = True
    with pytest.raises(UserError, match=r"^optim.lr=True: it must be a number"):
        config.change(base, {"optim.lr": True})


@pytest.mark.parametrize("name", config.KEYS)
def test_none_on_the_command_line(name, monkeypatch):
    if name in NOT_NONE:
        with pytest.raises(UserError, match=rf"^{name} cannot be None: its default is"):
            parsed(monkeypatch, f"--config.{name}=None")
    else:
        assert config.value(parsed(monkeypatch, f"--config.{name}=None"), name) is None


def test_nothing_in_brackets_is_no_crop_and_an_empty_text_is_no_folder(monkeypatch):
    flags = ["--config.augment.crop_area=()", "--config.augment.jitter=", "--config.resume=",
             "--config.init.checkpoint=", "--config.data.tfds=", "--config.data.separator=",
             "--config.init.needed=", "--config.data.val_list="]  # fmt: skip
    c = parsed(monkeypatch, *flags)
    augmentation = build.settings(c, 8).clips.augmentation
    assert augmentation.crop_area is None and augmentation.jitter is None
    with pytest.raises(UserError, match="there is no data folder"):  # the first that is missing
        in_memory.run(c.copy_and_resolve_references())


def test_an_assignment_of_another_type_names_key_and_type():
    c = config.base()
    with pytest.raises(UserError, match=r"^data\.mean=0\.5: it must be values in brackets"):
        c.data.mean = 0.5
    with pytest.raises(UserError, match=r"^optim\.lr='fast': it must be a number$"):
        c.optim.update(lr="fast")
    with pytest.raises(UserError, match=r"^optim=None: it is a section"):
        c.optim = None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["augment.crop_area=(0.5,0.1)"], "augment.crop_area must be two shares"),
        (["augment.jitter=(64,32)"], "augment.jitter must be two short sides"),
        (["augment.crop_area=(0.1,1)", "augment.jitter=(64,80)"], "exclude each other"),
        (["mesh.data=0"], "mesh.data must be -1, for all other devices, or at least 1, not 0"),
        (["data.std=(0,0,0)"], "data.std must be 3 numbers, each above 0 and at most 1"),
        (["data.mean=(123,116,103)"], "data.mean must be 3 numbers, each from 0 to 1"),
        (["augment.jitter=(1.5,2)"], "augment.jitter must be 2 whole numbers, each at least 1"),
        (["epochs=inf"], "epochs must be a finite number, not inf"),
        (["model.width=0"], "model.width must be at least 1, not 0"),
    ],
)
def test_sentences(flags, sentence, monkeypatch):
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
        parsed(monkeypatch, *(f"--config.{flag}" for flag in flags))
