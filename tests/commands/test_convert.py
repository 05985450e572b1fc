"""End-to-end tests of the convert program: import, export and errors."""

import json
import re
import shutil
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from absl.testing import flagsaver
from flax.traverse_util import unflatten_dict

from mvit_jax import convert
from mvit_jax.common.errors import UserError
from mvit_jax.config import check
from mvit_jax.models.functional import functional
from mvit_jax.training import build, run_folder
from mvit_jax.training.run import workdir
from mvit_jax.training.run.checkpoints import Checkpoints
from mvit_jax.weights.load import load
from mvit_jax.weights.tensor_files import read_tensors, write_safetensors, write_torch
from tests.support import commands, tiny
from tests.support.ava_folder import write_ava
from tests.weights import foreign
from tests.weights.test_tensor_files import attacks, zipped

KIND = "v1 video"
NAMES = [f"sport {i}" for i in range(8)]
FIELDS = ["width=8", "depths=(1,2,1)", "size=32"]
VIDEO = ["--variant=mvit_b_16x4", *FIELDS, "frames=4", "kv_stride=(1,4,4)"]


def tensors_of(kind=KIND):
    shapes = foreign.shapes(kind)
    shapes |= {"head.projection.weight": (8, 32), "head.projection.bias": (8,)}
    tensors = {name: np.float32(0.7) * values for name, values in foreign.filled(shapes).items()}
    # Content has to outweigh positions, or all videos would get the same class.
    tensors["patch_embed.proj.weight"] *= 3
    return tensors | {name: 0 * v for name, v in tensors.items() if "pos_embed" in name}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in" / "checkpoint_epoch_00200.pyth"
    path.parent.mkdir()
    extra = {"epoch": 199, "cfg": "TRAIN:\n  ENABLE: True\n"}
    write_torch(path, tensors_of(), wrapper="model_state", extra=extra)
    return path


def run(*args) -> None:
    """Runs the program in this process; errors of flags are raised."""
    with flagsaver.flagsaver():
        convert.main(flags.FLAGS(["convert", *map(str, args)]))


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


# Import.


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder converted in a fresh interpreter, with class names, and the program's output."""
    here = tmp_path_factory.mktemp("convert")
    write_torch(here / "in.pyth", tensors_of(), wrapper="model_state", extra={"epoch": 199})
    (here / "names.txt").write_text("\n".join(NAMES) + "\n")
    status, output = commands.fresh(
        "convert", here / "in.pyth", f"--labels={here / 'names.txt'}", f"--out={here / 'out'}",
        *VIDEO,
    )  # fmt: skip
    assert status == 0, output
    return here / "out", output


def test_a_converted_folder_holds_config_weights_labels_and_origin(converted):
    folder, out = converted
    assert {p.name for p in folder.iterdir()} >= {
        "config.json", "checkpoints", "labels.txt", "origin.json", "report.txt"
    }  # fmt: skip
    assert not list(folder.parent.glob(".*"))
    assert folder.stat().st_mode & 0o777 == 0o755
    assert (folder / "labels.txt").read_text().splitlines() == NAMES
    expected = load(tensors_of(), "mvit_b_16x4", **foreign.fields(KIND))
    params, model = run_folder.read_params(folder)
    assert model.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, params, expected.params)
    names = [line.split(" ")[0] for line in (folder / "report.txt").read_text().splitlines()]
    assert all(names.count(name) == 1 for name in tensors_of())
    assert "92 tensors" in out and "transposed" in out and f"wrote {folder}" in out
    assert "problem" not in out


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("v1 video", (4, 36, (0.45,) * 3, (0.225,) * 3, "bilinear")),
        ("v2 image", (1, 36, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic")),
    ],
)
def test_a_converted_folder_has_the_preprocessing_of_its_variant(kind, expected, tmp_path):
    name = foreign.VARIANTS[kind]
    write_safetensors(tmp_path / "in.safetensors", tensors_of(kind))
    more = VIDEO[1:] if kind == "v1 video" else FIELDS
    run(tmp_path / "in.safetensors", f"--variant={name}", f"--out={tmp_path / 'out'}", *more)
    config = workdir.recorded_config(tmp_path / "out")
    data = config.data
    assert (data.stride, data.short_side, data.mean, data.std, data.interpolation) == expected
    assert config.eval.clips == (5 if kind == "v1 video" else 1)
    assert config.model.variant == name and config.model.size == 32
    assert config.init.checkpoint is None and config.resume is None


def test_weights_of_action_detection_go_in_and_out(tmp_path):
    """80 classes as of AVA, in PySlowFast's names."""
    tensors = {
        name: np.repeat(values, 10, 0) if name.startswith("head") else values
        for name, values in tensors_of().items()
    }
    write_torch(tmp_path / "ava.pyth", tensors, wrapper="model_state")
    (tmp_path / "ava.pbtxt").write_text("item { name: 'stand' id: 12 }\nitem { name: 'go' id: 80 }")
    folder, labels = tmp_path / "out", f"--labels={tmp_path / 'ava.pbtxt'}"
    run(tmp_path / "ava.pyth", f"--out={folder}", labels, *VIDEO, "task=detection")
    config = workdir.recorded_config(folder)
    check(config)
    assert (config.data.source, config.data.classes, config.data.short_side) == ("ava", 80, 32)
    assert config.data.test_list == "annotations/ava_val_v2.2.csv"
    assert (folder / "labels.txt").read_text().splitlines()[11::68] == ["stand", "go"]
    params, model = run_folder.read_params(folder)
    assert model.config.task == "detection"
    kernel = params["head"]["classifier"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["head.projection.weight"].T)
    run(folder, "--to=slowfast", f"--out={tmp_path / 'again.pyth'}")
    again = read_tensors(tmp_path / "again.pyth").tensors
    foreign.same(again, tensors)
    for target, words in {
        "torchvision": "torchvision cannot hold this model: task is detection",
        "stablehlo": "classifies boxes, which --to=stablehlo does not support",
    }.items():
        with pytest.raises(UserError, match=words):
            run(folder, f"--to={target}", f"--out={tmp_path / target}")


@pytest.mark.slow
def test_converted_weights_of_action_detection_are_tested_on_boxes(tmp_path):
    """Weights of 4 classes, and a data set whose files have AVA's names."""
    tensors = {n: v[:4] if n.startswith("head") else v for n, v in tensors_of().items()}
    write_torch(tmp_path / "ava.pyth", tensors, wrapper="model_state")
    run(tmp_path / "ava.pyth", f"--out={tmp_path / 'out'}", *VIDEO, "task=detection")
    data = write_ava(tmp_path / "data", videos=2)
    config = workdir.recorded_config(tmp_path / "out").data
    for name, file in {
        config.val_list: "test.csv", config.val_boxes: "boxes.csv", config.excluded: "none.csv",
        config.class_list: "classes.pbtxt",
    }.items():  # fmt: skip
        (data / "none.csv").touch()
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / file, data / name)
    with run_folder.RunFolder(tmp_path / "out", {"data.folder": str(data)}) as opened:
        [scores], _ = run_folder.score(opened, build.videos(opened.config, "test"))
    # Two persons in each of 4 key frames, and a box without label in 2 of them.
    assert scores.probabilities.shape == (10, 4) and scores.metrics()["videos"] == 4
    assert np.std(scores.probabilities, axis=0).min() > 0


@pytest.mark.slow
def test_evaluate_and_predict_run_on_a_converted_folder(converted, digits, tmp_path):
    folder = shutil.copytree(converted[0], tmp_path / "model")
    lines = [line.split() for line in (digits / "test.csv").read_text().splitlines()]
    status, output = commands.run(
        "predict", *(digits / path for path, _ in lines), f"--workdir={folder}", "--clips=1",
        "--top=8", f"--json={tmp_path / 'out.json'}",
    )  # fmt: skip
    assert status == 0, output
    expected = np.zeros((8, 8), int)
    predicted = json.loads((tmp_path / "out.json").read_text())["files"]
    for file, (_, label) in zip(predicted, lines, strict=True):
        classes = file["classes"]
        assert {c["class"] for c in classes} == set(NAMES)
        assert sum(c["probability"] for c in classes) == pytest.approx(1, abs=1e-5)
        expected[int(label), NAMES.index(classes[0]["class"])] += 1
    probabilities = [file["classes"][0]["probability"] for file in predicted]
    assert np.std(probabilities) > 1e-3  # not the same for every video
    status, output = commands.run(
        "evaluate", f"--workdir={folder}", f"--data={digits}", "--clips=1"
    )
    assert status == 0, output
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["videos"] == 10 and result["step"] == 0
    np.testing.assert_array_equal(result["confusion"], expected)


def test_an_image_model_is_inflated_to_a_video_model(tmp_path):
    write_torch(tmp_path / "in.pth", tensors_of("v2 image"))
    run(tmp_path / "in.pth", f"--out={tmp_path / 'out'}", "--inflate=mean",
        "--variant=mvitv2_s_16x4", *VIDEO[1:], "num_classes=8")  # fmt: skip
    params, model = run_folder.read_params(tmp_path / "out")
    assert model.config.patch_kernel == (3, 7, 7) and model.config.frames == 4
    image = tensors_of("v2 image")["patch_embed.proj.weight"]
    for frame in params["patch_embed"]["proj"]["kernel"]:
        np.testing.assert_allclose(frame, np.einsum("oihw->hwio", image) / 3, rtol=1e-6)


def test_weights_selects_plain_or_averaged_weights_of_a_file(tmp_path, capsys):
    averaged = {f"ema.{name}": 2 * values for name, values in tensors_of().items()}
    write_safetensors(
        tmp_path / "in", averaged | {f"net.{name}": v for name, v in tensors_of().items()}
    )
    for flag, factor, other in (
        ([], 2, "'net' (weights=plain reads it)"),
        (["--weights=plain"], 1, "'ema' (weights=ema reads it)"),
    ):
        out = tmp_path / f"out{factor}"
        run(tmp_path / "in", f"--out={out}", *VIDEO, *flag)
        params, _ = run_folder.read_params(out)
        np.testing.assert_array_equal(params["norm"]["scale"], factor * tensors_of()["norm.weight"])
        assert other in capsys.readouterr().out and other in (out / "report.txt").read_text()


# Export.


@pytest.mark.parametrize("to", ["slowfast", "safetensors"])
def test_imported_tensors_are_exported_bit_for_bit(to, converted, tmp_path, capsys):
    folder = converted[0]
    run(folder, f"--to={to}", f"--out={tmp_path / 'out'}")
    read = read_tensors(tmp_path / "out")
    assert read.format == ("torch" if to == "slowfast" else "safetensors")
    foreign.same(read.tensors, tensors_of())
    assert (
        f"wrote {tmp_path / 'out'}: 92 tensors in the format of slowfast" in capsys.readouterr().out
    )


def test_a_folder_of_an_earlier_version_is_exported(converted, tmp_path):
    folder = shutil.copytree(converted[0], tmp_path / "in")
    origin = json.loads((folder / "origin.json").read_text())
    origin["family"] = origin.pop("format")
    (folder / "origin.json").write_text(json.dumps(origin))
    run(folder, "--to=slowfast", f"--out={tmp_path / 'out'}")
    foreign.same(read_tensors(tmp_path / "out").tensors, tensors_of())


def test_exported_kernels_have_the_axes_of_the_imported_file(tmp_path):
    """PySlowFast's image models have five, models without an origin those of MViTv2's code."""
    write_torch(tmp_path / "in.pyth", foreign.slowfast("v2 image"), wrapper="model_state")
    run(tmp_path / "in.pyth", "--variant=mvitv2_s", f"--out={tmp_path / 'out'}", *FIELDS)
    run(tmp_path / "out", "--to=slowfast", f"--out={tmp_path / 'back'}")
    back = read_tensors(tmp_path / "back").tensors
    assert {n: v.shape for n, v in back.items()} == foreign.shapes("v2 image")


def test_the_averaged_weights_of_a_run_are_exported(digits, tmp_path):
    config = tiny.config(digits, **{"optim.ema": 0.5})
    workdir.record_config(config, tmp_path / "run")
    shapes = functional(build.model_config(config, 8)).shapes()
    params = unflatten_dict(foreign.filled(shapes), sep="/")
    twice = jax.tree.map(lambda values: 2 * values, params)
    with closing(Checkpoints(tmp_path / "run")) as checkpoints:
        save = ocp.args.StandardSave
        checkpoints.last.save(3, args=ocp.args.Composite(params=save(params), ema=save(twice)))
    run(tmp_path / "run", "--to=slowfast", f"--out={tmp_path / 'out.pyth'}")
    made = read_tensors(tmp_path / "out.pyth").tensors
    # Exports have the averaged weights, as tests do.
    np.testing.assert_array_equal(made["norm.weight"], 2 * params["norm"]["scale"])
    run(tmp_path / "run", "--to=slowfast", "--weights=plain", f"--out={tmp_path / 'plain.pyth'}")
    made = read_tensors(tmp_path / "plain.pyth").tensors
    np.testing.assert_array_equal(made["norm.weight"], params["norm"]["scale"])
    with pytest.raises(UserError, match=r"no checkpoint in .*best"):
        run(tmp_path / "run", "--to=slowfast", "--which=best", f"--out={tmp_path / 'b.pyth'}")


# Errors.


def missing(path: Path) -> None:
    tensors = tensors_of()
    del tensors["norm.bias"], tensors["blocks.3.mlp.fc2.bias"]
    write_torch(path, tensors)


BAD = {  # damage to the file, parts of the error
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
                ["{source} is cut off or damaged"]),
    "runs code": (lambda p: zipped(p, attacks(p.parent / "ran")["REDUCE"][0]),
                  ["{source} refers to ", ".system"]),
    "missing": (missing, ["norm/bias", "blocks/3/mlp/fc2/bias"]),
    "another model": (lambda p: write_torch(p, {"conv1.weight": np.ones((2, 3, 7, 7), "f4")}),
                      ["{source}: not a checkpoint of an MViT", "conv1.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD)
def test_a_bad_file_ends_with_one_error_and_writes_nothing(damage, source, tmp_path):
    spoil, words = BAD[damage]
    spoil(source)
    before = files(tmp_path)
    status, output = commands.run("convert", source, f"--out={tmp_path / 'new' / 'out'}", *VIDEO)
    assert status == 1 and "Traceback" not in output
    report, _, error = output.rpartition("error: ")
    assert ("tensor in the file" in report) == (damage == "missing")  # the whole table, or nothing
    assert report or error.count("\n") == 1
    assert all(word.format(source=source) in error for word in words)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "SOURCE or --out is missing: give SOURCE --variant=NAME"),
        (["{source}"], "SOURCE or --out is missing: give SOURCE --variant=NAME"),
        (["{source}", "--out={out}"], "name the variant of SOURCE: --variant=NAME"),
        (["{source}", "--out={out}", "--variant=mvit_c"], "no variant 'mvit_c'"),
        (["{source}", "--out={out}", *VIDEO, "frame=8"], "there is no architecture field 'frame'"),
        (["{source}", "--out={out}", *VIDEO, "frames"], "must have the form field=value"),
        (["{source}", "--out={full}", *VIDEO], "already exists"),
        (["{source}", "--out={source}", *VIDEO], "already exists"),
        (["{source}", "--out={source}/deeper", *VIDEO], "cannot be created"),
        (["{source}", "--out={out}", "--labels={few}", *VIDEO],
         "--labels names 2 classes, but the model has 8"),
        (["{source}", "--out={out}", "--labels={out}", *VIDEO], "{out}"),
        (["{full}", "--out={out}", "--to=slowfast"], "holds no run (it has no config.json)"),
        (["{source}", "--out={out}", "--to=slowfast"], "is a file: make a folder of it first"),
        (["{full}", "--out={out}", "--to=timm", "--variant=mvitv2_t"], "leave out --variant"),
        (["{full}", "--out={out}", "--to=timm", "frames=3"], "leave out --variant, --labels"),
    ],
)  # fmt: skip
def test_bad_flags_end_with_a_one_sentence_error_and_write_nothing(args, words, source, tmp_path):
    paths = {"source": source, "out": tmp_path / "out", "full": tmp_path / "full",
              "few": tmp_path / "few.txt"}  # fmt: skip
    paths["full"].mkdir()
    (paths["full"] / "a file").write_text("kept")
    paths["few"].write_text("one\ntwo\n")
    before = files(tmp_path)
    message = rf"^.*{re.escape(words.format(**paths))}.*$"
    with pytest.raises(UserError, match=message):
        run(*(arg.format(**paths) for arg in args))
    assert files(tmp_path) == before


def test_an_empty_target_folder_is_accepted_and_survives_a_failure(source, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError):
        run(source, f"--out={tmp_path / 'out'}", *VIDEO[:-1], "width=16")
    assert files(tmp_path / "out") == set()
    run(source, f"--out={tmp_path / 'out'}", *VIDEO)
    assert (tmp_path / "out" / "config.json").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_failed_write_leaves_no_files(source, tmp_path, monkeypatch):
    before = files(tmp_path)

    def full(self, params):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save_params", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left"):
        run(source, f"--out={tmp_path / 'out'}", *VIDEO)
    assert files(tmp_path) == before


@pytest.mark.parametrize("flag", ["--to=onnx", "--inflate=center"])
def test_flags_reject_values_outside_their_choices(flag, source, tmp_path):
    with pytest.raises(flags.Error, match="should be one of"):
        run(source, f"--out={tmp_path / 'out'}", *VIDEO, flag)


# Export of a program.


@pytest.mark.slow
def test_a_converted_folder_is_exported_to_a_program_for_jax(converted, tmp_path):
    folder, _ = converted
    status, out = commands.run(
        "convert", folder, "--to=stablehlo", f"--out={tmp_path / 'model'}", "--platforms=cpu,tpu"
    )
    assert status == 0, out
    assert "for cpu, tpu: uint8[batch,4,32,32,3], RGB from 0 to 255" in out
    assert "to logits float32[batch,8]" in out
    params, read = run_folder.read_params(folder)
    clips = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3)).astype(np.uint8)
    normalised = ((clips / 255 - 0.45) / 0.225).astype(np.float32)
    expected, _ = jax.jit(read.apply)(params, normalised)
    model = jax.export.deserialize(bytearray((tmp_path / "model").read_bytes())).call
    np.testing.assert_allclose(jax.jit(model)(clips), expected, atol=1e-5 * np.abs(expected).max())


def test_platforms_and_batch_flags_require_stablehlo(converted, tmp_path):
    for flag in ("--platforms=cpu", "--batch=2"):
        with pytest.raises(UserError, match="--platforms and --batch require --to=stablehlo"):
            run(converted[0], "--to=torchvision", flag, f"--out={tmp_path / 'model'}")
    run(converted[0], "--to=stablehlo", "--batch=2", f"--out={tmp_path / 'model'}")
    exported = jax.export.deserialize(bytearray((tmp_path / "model").read_bytes()))
    assert str(exported.in_avals[0]) == "uint8[2,4,32,32,3]"
