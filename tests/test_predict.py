"""The program that names a file's classes, against the test program's own scores."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from contextlib import closing

import jax
import numpy as np
import pytest
from PIL import Image

import mvit_jax
from mvit_jax import predict, train
from mvit_jax.errors import UserError
from mvit_jax.models import mvit
from mvit_jax.training import experiment, workdir
from mvit_jax.training.checkpoints import Checkpoints
from mvit_jax.training.step import init_state
from tests import tiny


def fresh(config, seed):
    """A state of random weights."""
    model = experiment.model_config(config, 8)
    optimizer, _ = experiment.make_optimizer(config, experiment.videos(config, "train"))
    return init_state(mvit.init(model, jax.random.key(seed)), optimizer, config.optim.ema)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A run with random weights: others in its best, its last and its averaged last state."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = tiny.config(digits, **{"optim.ema": 0.5})
    workdir.freeze(config, folder)
    state = fresh(config, 0)
    larger = jax.tree.map(lambda leaf: 1.5 * leaf, state.params)
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save_if_best(state, 2, 50.0)
        checkpoints.save(dataclasses.replace(state, ema=larger), 3)
    return folder


@pytest.fixture(scope="module")
def paths(digits):
    lines = (digits / "test.csv").read_text().splitlines()
    return [str(digits / line.split()[0]) for line in lines[:3]]


def program(*flags):
    return subprocess.run(
        [sys.executable, "-m", "mvit_jax.predict", *map(str, flags)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_files_get_the_probabilities_of_the_test_program(run, digits, paths):
    config = workdir.frozen(run)
    scores, _ = experiment.score(config, run, experiment.videos(config, "test"), which="last")
    # Another order, one file twice, and one that is not there.
    asked = [paths[2], paths[0], paths[2], str(run / "gone.mp4")]
    result = predict.predict(workdir.frozen(run), run, asked, which="last", top=8)
    assert (result["checkpoint"], result["step"]) == ("last", 3)
    assert (result["clips"], result["crops"]) == (2, 1)
    assert [file["file"] for file in result["files"]] == asked
    assert result["files"].pop()["error"] == "there is no such file"
    for file, row in zip(result["files"], (2, 0, 2), strict=True):
        found = {c["class"]: c["probability"] for c in file["classes"]}
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert sum(found.values()) == pytest.approx(1, abs=1e-5)
        for label, name in enumerate((digits / "labels.txt").read_text().split()):
            assert found[name] == pytest.approx(scores.probabilities[row, label], abs=1e-6)


def test_the_program_prints_a_table_writes_json_and_names_broken_files(run, paths, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    done = program(
        paths[0], broken, paths[1], f"--workdir={run}", "--clips=1", "--top=2",
        "--checkpoint=best", f"--json={tmp_path / 'out.json'}",
    )  # fmt: skip
    assert done.returncode == 1
    assert f"{broken} cannot be decoded: it is not a video" in done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["clips"] == 1 and result["step"] == 2 and result["workdir"] == str(run)
    first, failed, second = result["files"]
    assert failed.keys() == {"file", "error"} and failed["file"] == str(broken)
    header, ruler, *lines = done.stdout.splitlines()
    assert header.split() == ["file", "class", "probability"] and set(ruler) == {"-", " "}
    cells = [line.split() for line in lines]
    for rows, file in ((cells[:2], first), (cells[2:], second)):
        assert rows[0][0] == file["file"]
        for row, found in zip(rows, file["classes"], strict=True):
            assert row[-2:] == [found["class"], f"{found['probability']:.4f}"]
    # Columns begin where those of the first line do.
    starts = [header.index(name) for name in ("class", "probability")]
    assert all(line[start - 1] == " " != line[start] for line in lines for start in starts)


def test_without_files_it_says_what_to_give():
    with pytest.raises(UserError, match="give video or image files and --workdir=DIR"):
        predict.main(["predict"])


def test_a_folder_without_data_and_names_will_do(run, tmp_path):
    """And where nothing can be decoded, the result says so."""
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    config = workdir.frozen(run)
    config.data.folder = None
    workdir.freeze(config, tmp_path)
    config = workdir.frozen(tmp_path)
    experiment.check(config)
    result = predict.predict(config, tmp_path, ["/no/a.mp4", "/no/a.png"], which="last", top=1)
    assert [file["error"] for file in result["files"]] == [
        "there is no such file",
        "it is an image, and the model takes clips of 4 frames",
    ]
    assert predict.class_names(config, tmp_path, 3) == ("class 0", "class 1", "class 2")
    with pytest.raises(UserError, match=r"no data folder: give .* --data=DIR"):
        experiment.videos(config, "test")


def test_names_come_from_the_run_or_else_from_the_data(digits, tmp_path):
    config = tiny.config(digits)
    names = tuple((digits / "labels.txt").read_text().split())
    assert predict.class_names(config, tmp_path, 8) == names
    (tmp_path / "labels.txt").write_text("one thing\nanother\n")
    assert predict.class_names(config, tmp_path, 2) == ("one thing", "another")
    with pytest.raises(UserError, match=r"labels.txt names 2 classes, and the model has 8"):
        predict.class_names(config, tmp_path, 8)


IMAGES = {
    "model.variant": "mvit_b16",
    "model.frames": 1,
    "model.patch_kernel": (1, 7, 7),
    "model.patch_stride": (1, 8, 8),
    "model.patch_padding": (0, 3, 3),
    "model.depths": (1,),
    "data.interpolation": "bicubic",
    "data.short_side": 36,
    "data.mean": (0.485, 0.456, 0.406),
    "data.std": (0.229, 0.224, 0.225),
    "augment.crop_area": (0.3, 1.0),
    "eval.clips": 1,
    "eval.every_epochs": 0.0,
}


@pytest.fixture
def images(tmp_path):
    """Dark and bright images, the last one broken."""
    data, rng = tmp_path / "data", np.random.default_rng(0)
    data.mkdir()
    lines = []
    for index in range(24):
        level = 60 if index % 2 == 0 else 190
        pixels = rng.integers(level - 50, level + 50, (40 + index, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{index}.jpg")
        lines.append(f"{index}.jpg {index % 2}\n")
    for name, part in (("train", lines[:16]), ("test", lines[16:])):
        (data / f"{name}.csv").write_text("".join(part))
    (data / "labels.txt").write_text("dark\nbright\n" + "none\n" * 6)
    (data / "23.jpg").write_bytes((data / "23.jpg").read_bytes()[:1000])
    return data


def test_images_are_predicted_as_by_preprocess_and_apply(images, tmp_path):
    config = tiny.config(images, **IMAGES)
    workdir.freeze(config, tmp_path)
    state = fresh(config, 0)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(state, 1)
    files = [str(images / f"{index}.jpg") for index in (23, 17)]
    result = predict.predict(config, tmp_path, files, which="last", top=2)["files"]
    assert "damaged or cut off" in result[0]["error"]
    model = experiment.model_config(config, 8)
    image = mvit_jax.preprocess("mvit_b16", size=32)(files[1])
    logits, _ = jax.jit(functools.partial(mvit.apply, config=model))(state.params, image)
    expected = np.sort(np.asarray(jax.nn.softmax(logits)[0]))[::-1]
    assert expected[0] - expected[2] > 1e-4  # or any image would give the same
    found = [c["probability"] for c in result[1]["classes"]]
    np.testing.assert_allclose(found, expected[:2], atol=1e-6)


@pytest.mark.slow
def test_a_model_trains_on_image_files_and_the_broken_one_is_left_out_of_the_test(images, tmp_path):
    config = tiny.config(images, **(IMAGES | {"epochs": 8.0, "eval.crops": 3}))
    folder = tmp_path / "run"
    assert train.train(config, str(folder)) == 0
    scores, _ = experiment.score(config, folder, experiment.videos(config, "test"), which="last")
    assert scores.metrics()["videos"] == 7 and scores.metrics()["top1"] == 100
    assert len(scores.failures) == 1 and "23.jpg: it is damaged" in scores.failures[0]
