"""Selection of a state dict among the nested entries of a checkpoint."""

import struct

import numpy as np
import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.weights.load import load
from mvit_jax.weights.tensor_files import read_tensors, state_dict, write_safetensors
from tests.weights import foreign
from tests.weights.test_tensor_files import storage, tensor, text, zipped

KIND = "v1 video"
OPTIMISER = {"state": {0: {"exp_avg": np.ones(3)}}, "param_groups": [{"lr": 0.1}]}


def weights(value=1.0):
    """Returns a state dict of four tensors that hold `value`."""
    shapes = {"norm.weight": (3,), "norm.bias": (3,), "fc.weight": (2, 3), "fc.bias": (2,)}
    return {name: np.full(shape, value) for name, shape in shapes.items()}


def prefixed(prefix, tensors):
    return {prefix + name: values for name, values in tensors.items()}


def nested(keys, container):
    for key in reversed(keys):
        container = {key: container}
    return container


def value_of(container, **selection):
    """Returns the value of the selected tensors, and the result."""
    read = state_dict(container, **selection)
    assert {name: v.shape for name, v in read.tensors.items()} == {
        name: v.shape for name, v in weights().items()
    }
    (value,) = {float(x) for v in read.tensors.values() for x in v.flat}
    return value, read


@pytest.mark.parametrize(
    "keys",
    [("model_state_dict",), ("net",), ("network",), ("params",), ("student",), ("weights",),
     ("my own name",), ("model", "net"), ("checkpoint", "inner", "weights"),
     ("a", "b", "c", "d"), ("net_adamw",), ("upgraded_model",), ("optimized_grads",)],
)  # fmt: skip
def test_a_state_dict_is_found_under_any_name(keys):
    container = weights(2.0)
    for key in reversed(keys):
        container = {"epoch": 3, "optimizer": OPTIMISER, key: container, "args": {"lr": 0.1}}
    value, read = value_of(container)
    assert (value, read.wrapper, read.alternatives, read.averaged) == (2, ".".join(keys), {}, False)
    assert {"epoch", "optimizer", "args"} <= set(read.dropped)


def test_an_optimisers_tensors_are_no_weights():
    container = {
        "optimizer_state_dict": {"exp_avg": weights(5.0), "exp_avg_sq": weights(6.0)},
        "loss": np.ones(()),
        "step": np.ones(()),
        "net": weights(2.0),
    }
    value, read = value_of(container)
    assert (value, read.wrapper, read.alternatives) == (2, "net", {})
    assert value_of({"metrics": {"loss": np.ones(())}, "net": weights(2.0)})[0] == 2


def test_other_values_among_tensors_are_left_out_by_name():
    value, read = value_of(weights(2.0) | {"_extra_state": None, "epoch": 3})
    assert value == 2 and read.dropped == ("_extra_state", "epoch")


AVERAGED = [  # plain and averaged entries
    ("state_dict", "state_dict_ema"), ("model", "model_ema"), ("net", "ema"),
    ("model_state_dict", "ema_state_dict"), ("student", "teacher"), ("module", "moduleEMA"),
    ("model", "swa_model"), ("model_state", "averaged.module"), ("model", "polyak"),
    ("model", "mean_model"), ("model", "momentum_encoder"),
]  # fmt: skip


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("plain", "averaged"), AVERAGED)
def test_averaged_weights_are_taken_unless_plain_ones_are_chosen(plain, averaged, order):
    outer, _, inner = averaged.partition(".")
    entries = {plain: weights(1.0), outer: {inner: weights(2.0)} if inner else weights(2.0)}
    container = dict([*entries.items()][::order])
    for chosen, expected, path, other, kind in (
        (None, 2, averaged, plain, "plain"),
        ("ema", 2, averaged, plain, "plain"),
        ("plain", 1, plain, averaged, "ema"),
    ):
        value, read = value_of(container, weights=chosen)
        assert (value, read.wrapper, read.alternatives) == (expected, path, {other: kind})
        assert read.averaged == (expected == 2)


def test_a_prefix_of_names_separates_averaged_weights_too(tmp_path):
    container = prefixed("model.", weights(1.0)) | prefixed("ema.", weights(2.0))
    write_safetensors(tmp_path / "x", container)
    for chosen, expected in ((None, 2), ("ema", 2), ("plain", 1)):
        value, read = value_of({"state_dict": container}, weights=chosen)
        assert value == expected
        assert read.wrapper == ("state_dict.ema" if expected == 2 else "state_dict.model")
        (values,) = {
            float(v.mean()) for v in read_tensors(tmp_path / "x", weights=chosen).tensors.values()
        }
        assert values == expected


def test_averaged_names_without_dots_are_those_of_the_plain_weights():
    """Stable Diffusion's LitEma stores parameter "norm.weight" as "model_ema.normweight"."""
    averaged = {name.replace(".", ""): values for name, values in weights(2.0).items()}
    counters = {"decay": np.ones(()), "num_updates": np.ones((), int)}
    container = prefixed(
        "model.", {f"{i}.{n}": v for i in range(9) for n, v in weights(1.0).items()}
    )
    copies = {f"{i}{n}": v for i in range(9) for n, v in averaged.items()}
    read = state_dict(container | prefixed("model_ema.", copies | counters))
    assert read.averaged and read.alternatives == {"model": "plain"}
    assert sorted(read.tensors) == sorted(name.removeprefix("model.") for name in container)
    assert {float(x) for values in read.tensors.values() for x in values.flat} == {2}


def test_lists_and_other_networks_with_many_tensors_are_named_as_not_read():
    container = {"model": weights(1.0), "ema": {"shadow_params": list(weights(2.0).values())}}
    value, read = value_of(container | {"optimizer": {"moments": [np.ones(3)] * 9}})
    assert (value, read.alternatives) == (1, {"ema.shadow_params": ""})
    other = {f"layers.{i}.weight": np.ones((2, 2)) for i in range(4)}
    _, read = value_of(
        {"detector": other, "model": weights()}, recognised=lambda names: "fc.bias" in names
    )
    assert read.alternatives == {"detector": ""}


def test_a_teacher_of_another_architecture_is_no_average():
    teacher = weights(2.0) | {"fc.weight": np.ones((7, 9)), "fc.bias": np.ones(7)}
    value, read = value_of({"teacher": teacher, "student": weights(1.0)})
    assert (value, read.wrapper, read.alternatives) == (1, "student", {"teacher": ""})


@pytest.mark.parametrize(
    ("container", "chosen", "message"),
    [
        ({"model": weights()}, "ema", "has no averaged weights, only model: leave out weights=ema"),
        (weights(), "ema", "has no averaged weights, only one state dict: leave out"),
        ({"ema": weights()}, "plain", "has no plain weights, only ema: leave out weights=plain"),
        (weights(), "best", "weights must be plain or ema, not 'best'"),
        (nested("abcdefghi", weights()), None, "has no state dict, it holds only 'a'"),
        ({"optimizer": {"mean": weights(), "scale": weights()}}, None, "has no state dict"),
    ],
)
def test_missing_weights_are_refused_with_the_reason(container, chosen, message):
    with pytest.raises(UserError, match=message):
        state_dict(container, weights=chosen)


def test_a_mapping_in_itself_is_no_endless_search():
    container = {"net": weights(2.0)}
    container["self"] = container
    assert value_of(container)[0] == 2
    empty = {}
    empty["self"] = empty
    with pytest.raises(UserError, match="has no state dict"):
        state_dict(empty)


def test_a_file_of_torch_has_its_averaged_weights_taken(tmp_path):
    def saved(key):
        return b"}" + text("a") + tensor(storage(key=key)) + b"s"

    value = b"}(" + text("net") + saved("0") + text("net_ema") + saved("1")
    value += text("epoch") + b"K\x03u"
    entries = {f"data/{key}": struct.pack("<2f", key, key) for key in (0, 1)}
    path = zipped(tmp_path / "x", value, entries)
    for chosen, expected in ((None, 1), ("ema", 1), ("plain", 0)):
        read = read_tensors(path, weights=chosen)
        np.testing.assert_array_equal(read.tensors["a"], [expected] * 2)
        assert set(read.dropped) == {"net" if expected else "net_ema", "epoch"}


# In checkpoints of MViT


def loaded(container, **options):
    return load(container, "mvit_b_16x4", **foreign.fields(KIND), **options)


def test_the_report_names_the_weights_that_were_read_and_the_others():
    plain = foreign.slowfast(KIND)
    averaged = {name: 2 * values for name, values in plain.items()}
    # As torchvision's references save them: an AveragedModel counts its updates.
    file = {
        "model": plain,
        "model_ema": prefixed("module.", averaged) | {"n_averaged": np.array(9)},
    }
    expected = {weights: loaded(state).params for weights, state in
                (("plain", plain), ("ema", averaged))}  # fmt: skip
    for chosen, kind in ((None, "ema"), ("ema", "ema"), ("plain", "plain")):
        result = loaded(file, weights=chosen)
        for path in ("norm", "head"):
            assert_equal(result.params[path], expected[kind][path])
        text = str(result.report)
        assert result.report.ok
        if kind == "ema":
            assert "read from the entry 'model_ema', averaged weights" in text
            assert "were not read: 'model' (weights=plain reads it)" in text
            assert "the number of averaged updates" in text
        else:
            assert "were not read: 'model_ema' (weights=ema reads it)" in text


def assert_equal(one, other):
    if isinstance(other, dict):
        assert one.keys() == other.keys()
        for name in other:
            assert_equal(one[name], other[name])
    else:
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("prefix", ["net.", "network.", "student.", "my_model.trunk."])
def test_any_prefix_of_most_names_is_removed(prefix):
    result = loaded({"state_dict": prefixed(prefix, foreign.slowfast(KIND))})
    assert result.report.ok and f"the prefix '{prefix}' was removed" in str(result.report)
    assert_equal(result.params, loaded(foreign.slowfast(KIND)).params)


def test_an_mvit_is_preferred_to_larger_networks_of_other_kinds():
    other = {f"layers.{i}.conv.weight": np.ones((2, 2, 1, 1)) for i in range(500)}
    result = loaded({"state_dict": other, "second": foreign.slowfast(KIND)})
    assert result.report.ok and "read from the entry 'second'" in str(result.report)
