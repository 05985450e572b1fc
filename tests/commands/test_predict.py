"""The predict program, against the scores of the evaluate program."""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import mvit_jax
from mvit_jax import train
from mvit_jax.common.errors import UserError
from mvit_jax.data import pipeline
from mvit_jax.data.media.video import Video
from mvit_jax.models.functional import functional
from mvit_jax.predict import __main__ as predict
from mvit_jax.predict import tables
from mvit_jax.training import build, run_folder
from mvit_jax.training.run import workdir
from mvit_jax.training.run.checkpoints import Checkpoints
from tests.predict import small
from tests.support import commands, scoring, tiny
from tests.support.environment import of_process


@pytest.fixture(scope="module")
def run(digits):
    return small.shared_run(digits)[0]


@pytest.fixture(scope="module")
def predictor(digits):
    return small.shared_run(digits)[1]


@pytest.fixture(scope="module")
def paths(digits):
    lines = (digits / "test.csv").read_text().splitlines()
    return [str(digits / line.split()[0]) for line in lines[:3]]


def test_predictions_equal_the_scores_of_evaluate(run, predictor, digits, paths):
    config = workdir.recorded_config(run)
    [scores], _ = scoring.score(config, run, build.videos(config, "test"), which="last")
    # Another order, one file twice, and a missing one.
    files = [paths[2], paths[0], paths[2], str(run / "gone.mp4")]
    result = predict.predict(predictor, files, top=8)
    assert (result["step"], result["clips"], result["crops"]) == (3, 2, 1)
    assert [file["file"] for file in result["files"]] == files
    assert result["files"].pop()["error"] == "cannot be decoded: there is no such file"
    for file, row in zip(result["files"], (2, 0, 2), strict=True):
        probabilities = {c["class"]: c["probability"] for c in file["classes"]}
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        for label, name in enumerate((digits / "labels.txt").read_text().split()):
            assert probabilities[name] == pytest.approx(scores.probabilities[row, label], abs=1e-6)


def test_the_program_prints_tables_and_writes_json_and_pictures(run, paths, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    long = small.write_video(tmp_path / "long.mp4", small.textured(150, height=32))
    pictures = tmp_path / "new" / "pictures"
    command = [
        sys.executable, "-m", "mvit_jax.predict", paths[0], broken, long, f"--workdir={run}",
        "--top=2", "--which=best", f"--json={tmp_path / 'out.json'}", f"--pictures={pictures}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=of_process(1))
    assert done.returncode == 1
    assert f"{broken} cannot be decoded: it is not a video" in done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["step"] == 2 and result["which"] == "best" and result["folder"] == str(run)
    first, failed, second = result["files"]
    assert failed.keys() == {"file", "error"} and failed["file"] == str(broken)
    header, ruler, *lines = done.stdout.splitlines()
    assert header.split() == ["file", "class", "probability"] and set(ruler) == {"-", " "}
    cells = [line.split() for line in lines]
    for rows, file in ((cells[:2], first), (cells[2:4], second)):
        assert rows[0][0] == file["file"]
        for row, entry in zip(rows, file["classes"], strict=True):
            assert row[-2:] == [entry["class"], f"{entry['probability']:.4f}"]
    # Columns begin where those of the first line do.
    starts = [header.index(name) for name in ("class", "probability")]
    assert all(line[start - 1] == " " != line[start] for line in lines[:4] for start in starts)
    # The timeline.
    assert "timeline" not in first
    line = second["timeline"]
    assert line["seconds"] == 5 and len(line["windows"]) == 18
    assert lines[5] == f"{long}: 0:05, means over 18 windows above, over time:"
    last = line["segments"][-1]
    assert cells[7 + len(line["segments"])][2] == "0:05.0"
    assert cells[7 + len(line["segments"])][-1] == f"{last['probability']:.2f}"
    assert line["windows"][1]["start"] == pytest.approx(8 / 30)
    assert [len(window["classes"]) for window in line["windows"]] == [2] * 18
    drawn = [f"{pictures / Path(file).stem}_prediction.png" for file in (paths[0], long)]
    assert first["pictures"] + second["pictures"] == drawn
    assert lines[-1] == f"wrote {drawn[0]}, {drawn[1]}"


@pytest.mark.slow
def test_pictures_are_written_as_png_gif_and_mp4(predictor, paths, tmp_path):
    long = small.write_video(tmp_path / "long.mp4", small.textured(150, height=32))
    folder = tmp_path / "pictures"
    folder.mkdir()
    files = [paths[0], str(long)]
    results = predict.predict(predictor, files, top=2, pictures=folder, grad_cam=True)["files"]
    stem = Path(paths[0]).stem
    ends = ("prediction.png", "grad_cam.gif", "grad_cam.mp4")
    expected = [str(folder / f"{name}_{end}") for name in (stem, "long") for end in ends]
    assert [path for result in results for path in result["pictures"]] == expected
    assert sorted(map(str, folder.iterdir())) == sorted(expected)
    with Image.open(folder / "long_prediction.png") as image:
        assert image.format == "PNG" and image.width > 1000
        assert len(image.convert("RGB").getcolors(2**24)) > 300
    with Image.open(folder / "long_grad_cam.gif") as image:
        assert image.format == "GIF" and image.size == (448, 224) and image.is_animated
    with Video(folder / "long_grad_cam.mp4") as video:
        assert video.num_frames == 8 * 4
        assert video.frames([0]).std() > 20
    with Video(folder / f"{stem}_grad_cam.mp4") as video:
        assert video.num_frames == 4


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "give --workdir=DIR"),
        (["a.mp4"], "give --workdir=DIR"),
        (["a.mp4", "--workdir=a", "--checkpoint=b"], "give --workdir=DIR"),
        (["--workdir=a"], "give video or image files, or --serve"),
        (["a.mp4", "--checkpoint=best"], "give --workdir=DIR --which=best"),
        (["a.mp4", "--checkpoint=/no/such"], "/no/such holds no run"),
        (["a.mp4", "--workdir=a", "--grad_cam"], "--grad_cam requires --pictures=DIR"),
        (["a.mp4", "--workdir=a", "--pictures=/dev/null/x"], "cannot be made"),
        (["a.mp4", "--workdir=a", "--features=/no/such/b.npz"], "make the folder /no/such first"),
        (["a.mp4", "--workdir=a", "--json=/tmp"], "it is a folder, name a file"),
        (["a.mp4", "--workdir=a", "--features=b", "--features_per=clip"], "requires --clips=K"),
        (["a.mp4", "--workdir=a", "--serve"], "leave out a.mp4"),
        (["--workdir=a", "--serve", "--clips=1"], "leave out --clips"),
    ],
)
def test_bad_flags_end_with_a_one_sentence_error(args, sentence):
    status, output = commands.run("predict", *args)
    assert status == 1 and sentence in output
    assert output.startswith("error: ") and output.count("\n") == 1


@pytest.mark.slow
def test_features_of_the_files_are_written(run, predictor, paths, tmp_path):
    """By definition: the middle of the module on the clips of the test protocol."""
    long = str(small.write_video(tmp_path / "long.mp4", small.textured(150, height=32)))
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    files = [long, str(tmp_path / "broken.mp4"), paths[0]]
    arrays = {}
    for per, flags in (("video", []), ("clip", ["--clips=3", "--features_of=stage:1"])):
        path = tmp_path / f"{per}.npz"
        status, output = commands.run(
            "predict", *files, f"--workdir={run}", f"--features={path}", f"--features_per={per}",
            *flags,
        )  # fmt: skip
        assert status == 1 and f"wrote {path}: features of 2 files" in output
        with np.load(path) as stored:
            arrays[per] = {name: stored[name] for name in stored.files}
        assert arrays[per]["names"].tolist() == [long, paths[0]]
    assert arrays["video"]["features"].dtype == np.float32
    assert arrays["video"]["features"].shape == (2, 32)
    assert arrays["clip"]["features"].shape == (2, 3, 32)
    params, model = run_folder.read_params(run)
    apply = jax.jit(model.apply)
    with Video(paths[0]) as video:
        settings = predictor._settings
        for per, clips in (("video", 2), ("clip", 3)):
            views = pipeline.views(video, settings, clips=clips, crops=1)
            _, features = apply(params, ((views / 255 - 0.45) / 0.225).astype(np.float32))
            head = np.asarray(features["tokens"][:, 0]).mean(0)
            grid = np.asarray(features["stages"][1]).mean((1, 2, 3))
            expected = head if per == "video" else grid
            np.testing.assert_allclose(arrays[per]["features"][1], expected, atol=1e-5)


def test_features_do_not_change_predictions(run, predictor, paths):
    same = small.predictor_of(run, features="head").predict(paths[0])
    np.testing.assert_allclose(
        same.probabilities, predictor.predict(paths[0]).probabilities, atol=1e-6
    )
    for name in ("stage:2", "stage:-1", "stage", "neck"):
        with pytest.raises(UserError, match=r"stage 2 must be from 0 to 1|features of '"):
            small.predictor_of(run, features=name)


def test_pictures_of_different_files_have_different_names(tmp_path):
    names = ["a/x.mp4", "b/x.mp4", "b/x.png", "X.mp4", "x_2.mp4", "c/y", ".mp4"]
    stems = predict.picture_names(names, tmp_path)
    assert stems == ["x", "x_2", "x_3", "X_4", "x_2_2", "y", ".mp4"]
    # Pictures of earlier pictures lie beside them.
    files = [str(tmp_path / "x.mp4"), str(tmp_path / "x_grad_cam.mp4")]
    assert predict.picture_names(files, tmp_path) == ["x_2", "x_grad_cam"]


def test_predictions_survive_a_picture_that_cannot_be_written(predictor, paths, tmp_path):
    gone = tmp_path / "gone"
    (result,) = predict.predict(predictor, paths[:1], top=1, pictures=gone)["files"]
    assert len(result["classes"]) == 1
    assert "cannot be written" in result["error"] and "pictures" not in result


def test_a_folder_without_data_and_labels_can_be_used(run, tmp_path):
    """The folder is as `convert` writes it."""
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    config = workdir.recorded_config(run)
    config.data.folder = None
    workdir.record_config(config, tmp_path)
    predictor = small.predictor_of(tmp_path)
    assert predictor.names == tuple(f"class {i}" for i in range(8))
    files = ["/no/a.mp4", "/no/a.png", str(tmp_path)]
    result = predict.predict(predictor, files, top=1)
    assert [file["error"] for file in result["files"]] == [
        "cannot be decoded: there is no such file",
        "cannot be decoded: it is an image, but the model requires clips of 4 frames",
        "cannot be decoded: it is a directory",
    ]


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


@pytest.mark.slow
def test_image_predictions_equal_preprocess_and_apply(images, tmp_path, monkeypatch):
    config = tiny.config(images, **small.IMAGES)
    workdir.record_config(config, tmp_path)
    state = small.fresh(config, 0)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(state, 1)
    files = [str(images / f"{index}.jpg") for index in (23, 17)]
    predictor = small.predictor_of(tmp_path)
    flat = np.ones((1, 1, 32, 32), np.float32)
    monkeypatch.setattr(predictor, "grad_cam", lambda shown: flat)
    results = predict.predict(predictor, files, top=2, pictures=tmp_path, grad_cam=True)["files"]
    assert "damaged or cut off" in results[0]["error"]
    assert results[1]["pictures"] == [str(tmp_path / "17_prediction.png")]  # nothing moves
    model = build.model_config(config, 8)
    image = mvit_jax.preprocess("mvit_b16", size=32)(files[1])
    logits, _ = jax.jit(functional(model).apply)(state.params, image)
    expected = np.sort(np.asarray(jax.nn.softmax(logits)[0]))[::-1]
    assert expected[0] - expected[2] > 1e-4  # or any image would give the same
    probabilities = [c["probability"] for c in results[1]["classes"]]
    np.testing.assert_allclose(probabilities, expected[:2], atol=1e-6)


@pytest.mark.slow
def test_a_test_after_training_on_images_skips_a_broken_file(images, tmp_path):
    config = tiny.config(images, **(small.IMAGES | {"epochs": 8.0, "eval.crops": 3}))
    folder = tmp_path / "run"
    assert train.train(config, str(folder)) == 0
    [scores], _ = scoring.score(config, folder, build.videos(config, "test"), which="last")
    assert scores.metrics()["videos"] == 7 and scores.metrics()["top1"] == 100
    assert len(scores.failures) == 1 and "23.jpg: it is damaged" in scores.failures[0]


def test_a_name_that_is_not_utf8_is_one_row(capsys):
    result = {"file": "caf\udce9\n.mp4", "classes": [{"class": "b", "probability": 0.75}]}
    assert not tables.show([result])
    assert "\ncaf\\udce9\\n.mp4  b" in capsys.readouterr().out
