"""End-to-end tests of train, evaluate and describe on a tiny model, and their errors."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from mvit_jax import train
from mvit_jax.analysis import run_data
from mvit_jax.common.errors import UserError
from mvit_jax.data import pipeline
from mvit_jax.models.functional import Functional
from mvit_jax.training import build, run_folder
from mvit_jax.training.run import history, workdir
from mvit_jax.training.run.checkpoints import Checkpoints
from tests.support import commands, group, scoring, tiny
from tests.support.environment import of_process
from tests.support.group import final_state
from tests.support.pages import Page

RECIPE = tiny.RECIPE


@pytest.fixture(scope="module")
def run(reference, tmp_path_factory):
    """A copy of the reference run, to which tests of the evaluation add their files."""
    return shutil.copytree(reference, tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_writes_its_config_checkpoints_and_events(run):
    assert workdir.recorded_config(run).optim.lr == 2e-3
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["8", "9"]
    assert len(list((run / "best").iterdir())) == 1
    assert list(run.glob("events.*"))
    log = history.read(run)
    assert [line["step"] for line in log.train] == [2, 4, 6, 8, 9]
    assert [line["step"] for line in log.val] == [3, 6, 9]
    (start,) = log.starts
    assert start["videos"] == 24 and start["classes"] == 8 and start["devices"] == 1
    sizes = {name: values.size for name, values in final_state(run).items()}
    assert start["parameters"] == sum(sizes[n] for n in sizes if n.startswith("['params']"))


def test_training_writes_a_report_with_the_evaluate_command(reference):
    page = Page((reference / run_data.REPORT).read_text())
    assert f"python -m mvit_jax.evaluate --workdir={reference}" in page.text
    assert page.count("svg") == 5


def test_a_report_that_cannot_be_written_is_only_logged(run, tmp_path, capsys):
    shutil.copy(run / "config.json", tmp_path)
    (tmp_path / run_data.REPORT).mkdir()
    train.report(str(tmp_path))
    message = f"the report {tmp_path / run_data.REPORT} could not be written"
    assert message in capsys.readouterr().out


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_parameters(run, digits, tmp_path):
    """SIGTERM stops the run after step 5; the loss logged at step 6 is then of step 6 alone."""
    config = tiny.config(digits, **RECIPE)

    with group.at_step(5, group.stop):
        assert train.train(config, str(tmp_path)) == 128 + signal.SIGTERM
    assert Checkpoints(tmp_path).step() == 5
    assert train.train(config, str(tmp_path)) == 0
    group.assert_same_state(tmp_path, run)
    resumed, whole = history.read(tmp_path), history.read(run)
    assert [line["step"] for line in resumed.starts] == [0, 5]
    for kind in ("loss", "learning_rate"):
        values = {line["step"]: line[kind] for line in resumed.train}
        assert values.keys() == {line["step"] for line in whole.train}
        for line in whole.train:
            if line["step"] != 6:  # of step 6 alone, where `whole` has the mean of 5 and 6
                assert values[line["step"]] == line[kind]
    assert [line["top1"] for line in resumed.val] == [line["top1"] for line in whole.val]


@pytest.mark.slow
def test_matrix_products_run_in_the_precision_of_the_config(digits, tmp_path, monkeypatch):
    """In training, validation and test; the caller's precision is restored afterwards."""
    seen, apply = [], Functional.apply

    def spy(*args, **options):
        seen.append(jax.config.jax_default_matmul_precision)
        return apply(*args, **options)

    monkeypatch.setattr(Functional, "apply", spy)
    config = tiny.config(digits, **(RECIPE | {"precision": "high", "epochs": 1.0}))
    assert train.train(config, str(tmp_path)) == 0
    trained = len(seen)
    scoring.score(config, tmp_path, build.videos(config, "test"), which="last")
    assert len(seen) > trained >= 2 and set(seen) == {"high"}
    assert jax.config.jax_default_matmul_precision == "highest"


def test_training_a_complete_run_changes_nothing(run, digits, capsys):
    before = final_state(run)
    assert train.train(tiny.config(digits, **RECIPE), str(run)) == 0
    assert "is complete (9 of 9 steps)" in capsys.readouterr().out
    after = final_state(run)
    assert all((before[k] == after[k]).all() for k in before)


def test_a_changed_config_is_rejected_with_the_changed_keys(run, digits):
    changed = tiny.config(digits, **(RECIPE | {"optim.lr": 1e-3, "seed": 1}))
    with pytest.raises(UserError, match=r"optim.lr was 0.002 and is now 0.001; seed was 0"):
        train.train(changed, str(run))
    # Keys of paths and of speed may change.
    faster = tiny.config(digits, **(RECIPE | {"data.threads": 3, "log_every": 5}))
    assert train.train(faster, str(run)) == 0


def test_the_table_of_evaluations_fits_60_columns(tmp_path):
    result = {
        "list": "data/moving_digits/test.csv", "checkpoint": "last", "step": 12375, "clips": 5,
        "crops": 1, "ensemble": "mean", "classes": ["a", "b"], "top1": 98.25, "top5": 100.0,
        "videos": 10000, "left_out": [], "per_class": [97.0, 99.5], "confusion": [[1, 0], [0, 1]],
    }  # fmt: skip
    for name, shuffled in (("evaluation", False), ("evaluation_shuffled", True)):
        content = json.dumps(result | {"shuffled_frames": shuffled})
        (tmp_path / f"{name}.json").write_text(content)
    lines = run_data.summary(tmp_path).splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[0].split() == ["list", "frames", "step", "top-1", "top-5", "videos", "views"]
    assert lines[3].startswith("test  shuffled  last, 12375  98.25  100.00  10000   5 x 1")
    content = json.dumps(result | {"shuffled_frames": False, "left_out": ["x: y"], "map": 50.0})
    (tmp_path / "evaluation.json").write_text(content)
    header, _, first, _ = run_data.summary(tmp_path).splitlines()
    assert "left out" in header and "mAP" in header
    assert first.split()[-5:] == ["10000", "1", "5", "x", "1"] and "50.00" in first
    # Other data are tested: the shuffled test of the earlier list is not shown beside it.
    content = json.dumps(result | {"shuffled_frames": False, "videos": 16})
    (tmp_path / "evaluation.json").write_text(content)
    table = run_data.summary(tmp_path)
    assert "in order" in table and "shuffled" not in table


def evaluate(folder, *flags):
    return commands.run("evaluate", f"--workdir={folder}", *flags)


@pytest.mark.slow
def test_evaluation_counts_every_video_once_on_any_number_of_devices(run, digits):
    """10 videos in batches of 8 on 8 devices, and one by one on 1 device."""
    command = [sys.executable, "-m", "mvit_jax.evaluate", f"--workdir={run}"]
    results = []
    for flags, devices in (([], 8), (["--batch=1"], 1)):
        done = subprocess.run(
            [*command, *flags], env=of_process(devices), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "in order" in done.stdout
        results.append(json.loads((run / "evaluation.json").read_text()))
    assert results[0] == results[1]
    result = results[0]
    confusion = np.array(result["confusion"])
    assert result["videos"] == 10 == confusion.sum()
    labels = [int(line.split()[-1]) for line in (digits / "test.csv").read_text().splitlines()]
    np.testing.assert_array_equal(confusion.sum(1), np.bincount(labels, minlength=8))
    assert result["top1"] == pytest.approx(100 * np.trace(confusion) / 10)
    assert result["top1"] <= result["top5"] <= 100
    shares = [confusion[i, i] / n for i, n in enumerate(confusion.sum(1)) if n]
    assert result["mean_class"] == pytest.approx(100 * np.mean(shares))
    for name in ("confusion.png", "per_class.png"):
        assert min(Image.open(run / name).size) > 200
    page = Page((run / run_data.REPORT).read_text())
    assert page.ids["top1"] == f"{result['top1']:.1f} %" and page.ids["videos"] == "10"
    wrong = 10 - int(np.trace(confusion))
    assert page.count("img") == 10 + min(wrong, 8)


@pytest.mark.slow
def test_the_best_checkpoint_has_separate_files_and_runs_are_compared(run, tmp_path):
    status, output = evaluate(run, "--which=best", "--list=val", "--clips=1")
    assert status == 0, output
    result = json.loads((run / "evaluation_val_best.json").read_text())
    assert result["checkpoint"] == "best" and result["step"] == Checkpoints(run).step("best")
    shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("check*", "best", "ev*"))
    page = tmp_path / "side_by_side.html"
    folders = [str(run), str(tmp_path / "other")]
    status, output = commands.run("evaluate", "--compare", *folders, f"--out={page}")
    assert status == 0, output
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert f"{history.read(run).val[-1]['step']}" in rows[run.name]
    assert rows["other"].count("–") == 5
    assert Page(page.read_text()).ids["runs"].count("–") == 6  # and no test with shuffled frames
    status, output = commands.run("evaluate", "--compare", str(run), str(tmp_path))
    assert status == 1 and f"{tmp_path} holds no run" in output and output.count("\n") == 1


@pytest.mark.slow
def test_the_plain_weights_of_a_run_are_tested_beside_the_averaged_ones(run):
    """Their results have files of their own, and scores of the plain parameters."""
    status, output = evaluate(run, "--weights=plain", "--clips=1")
    assert status == 0, output
    assert "last, 9, plain weights" in output
    result = json.loads((run / "evaluation_plain.json").read_text())
    assert result["plain_weights"] is True and result["step"] == 9
    config = workdir.recorded_config(run)
    videos = build.videos(config, "test")
    config.eval.clips = 1
    params, model = run_folder.read_params(run, weights="plain")
    settings = build.settings(config, 8)
    scores = np.load(run / "scores_plain.npz")["probabilities"]
    for index in range(3):
        with videos.opened(index, 4) as video:
            views = pipeline.views(video, settings.clips, clips=1, crops=1)
        clip = ((views / 255 - 0.45) / 0.225).astype(np.float32)
        logits = jax.jit(model.apply)(params, clip)[0]
        np.testing.assert_allclose(scores[index], jax.nn.softmax(logits)[0], atol=1e-5)
    assert "last, step 9, plain weights" in Page((run / "report.html").read_text()).text
    for path in run.glob("*_plain.*"):
        path.unlink()


@pytest.mark.slow
def test_shuffled_frames_change_the_scores_deterministically(run):
    config = workdir.recorded_config(run)
    videos = build.videos(config, "test")
    [straight], _ = scoring.score(config, run, videos, which="last")
    [shuffled], _ = scoring.score(config, run, videos, which="last", shuffle=True)
    [again], _ = scoring.score(config, run, videos, which="last", shuffle=True)
    assert np.abs(straight.probabilities - shuffled.probabilities).max() > 1e-5
    np.testing.assert_array_equal(shuffled.probabilities, again.probabilities)


def test_the_best_checkpoint_reproduces_its_validation_accuracy(run, digits):
    config = workdir.recorded_config(run)
    videos = build.videos(config, "val")
    config.eval.clips = 1
    [scores], step = scoring.score(config, run, videos, which="best")
    # The same weights and protocol as the validation that chose it.
    best = Checkpoints(run).best_top1
    assert step == Checkpoints(run).step("best")
    assert scores.metrics()["top1"] == best


@pytest.mark.parametrize(
    "after",
    [
        pytest.param("from step 0", marks=pytest.mark.nightly),
        pytest.param("step 4/", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_stops_a_run_with_worker_processes_and_saves_it(digits, tmp_path, after):
    """A terminal sends the signal to all processes of the group, workers included."""
    flags = [*tiny.FLAGS, f"--config.data.folder={digits}", f"--workdir={tmp_path / 'run'}"]
    command = [
        sys.executable, "-m", "mvit_jax.train", "--config=configs/moving_digits.py", *flags,
        "--config.data.processes=2", "--config.epochs=200", "--config.eval.every_epochs=0",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tiny.ROOT, env=of_process(1), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(after):
            break
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, err
    assert "leaked" not in err
    if after == "from step 0":  # workers that are starting may still print a traceback
        return
    assert "stopped at step" in out and "the same command resumes" in out
    assert "Traceback" not in err
    saved = [child.name for child in (tmp_path / "run" / "checkpoints").iterdir()]
    assert any(name.isdigit() for name in saved)


@pytest.mark.slow
def test_evaluate_writes_several_numbers_of_clips_and_scores_per_video(run, digits, tmp_path):
    """One pass over the list equals a pass for each number of clips."""
    folder = shutil.copytree(run, tmp_path / "run")
    status, output = evaluate(folder, "--clips=3,1", "--list=val")
    assert status == 0, output
    report = json.loads((folder / "views_val.json").read_text())
    assert [row["clips"] for row in report["views"]] == [1, 3]
    assert Image.open(folder / "views_val.png").size[0] > 300
    config = run_folder.RunFolder(folder).config
    videos = build.videos(config, "val")
    for row in report["views"]:
        [scores], _ = scoring.score(config, folder, videos, which="last", clips=[row["clips"]])
        assert row["top1"] == pytest.approx(scores.metrics()["top1"])
    assert json.loads((folder / "evaluation_val.json").read_text())["clips"] == 3
    stored = np.load(folder / "scores_val.npz")
    np.testing.assert_allclose(stored["probabilities"], scores.probabilities, atol=1e-6)
    assert stored["labels"].tolist() == scores.labels.tolist()
    assert stored["videos"].tolist() == [videos.item(i) for i in range(len(videos))]
    lines = (folder / "videos_val.csv").read_text().splitlines()
    assert lines[0] == "video,label,predicted,probability"
    for i, line in enumerate(lines[1:]):
        video, label, predicted, _ = line.split(",")
        assert (video, int(label)) == (videos.item(i), videos.label(i))
        assert int(predicted) == scores.probabilities[i].argmax()
    status, output = evaluate(folder, "--clips=0,2")
    assert status != 0 and "--clips=0,2 must be whole numbers of at least 1" in output


TRAIN = "--config=configs/moving_digits.py"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([TRAIN, "--config.optim.lrr=1"], "no config key 'lrr'; did you mean 'lr'?"),
        ([TRAIN, "--config.foo=1"], "there is no config key 'foo'"),
        ([TRAIN, "--config.augment.group=2"], "augment.group is now called augment.mixup_group"),
        ([TRAIN, "--config.augment.erase=0.1"], "now called augment.random_erase_prob"),
        ([TRAIN, "--config.optim.lr=fast"], "optim.lr=fast: it must be a number"),
        ([TRAIN + ":resnet"], "has no model 'resnet': choose mvit or vit"),
        (["--config=configs/no.py"], "there is no config file configs/no.py"),
        (["--config=configs/kinetics.py"], "pass --config.data.folder=DIR"),
        ([], "give --config=configs/moving_digits.py and --workdir=DIR"),
        ([TRAIN, "--config.data.folder=/nowhere"], "no data folder /nowhere"),
        ([TRAIN, "--confg=1"], "Unknown command line flag 'confg'"),
        ([TRAIN, "--config.on_nan=go"], "on_nan must be one of stop, skip, rollback, not 'go'"),
    ],
)
def test_bad_flags_end_with_a_one_sentence_error(flags, sentence, tmp_path):
    status, output = commands.run("train", *flags, f"--workdir={tmp_path / 'run'}")
    assert status == 1
    assert sentence in output and output.startswith("error: ") and output.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_missing_config_file_is_reported_before_a_missing_workdir():
    status, output = commands.run("train", "--config=configs/no.py")
    assert status == 1 and "there is no config file configs/no.py" in output


def change_list(data, old, new):
    path = data / "train.csv"
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("spoil", "changes", "sentence"),
    [
        (lambda d: change_list(d, " 0\n", " 8\n"), {}, "label 8"),
        (lambda d: change_list(d, " 0\n", " left\n"), {}, "line 1 looks like a header"),
        (lambda d: change_list(d, " 3\n", " left\n"), {}, "left"),
        (lambda d: change_list(d, "00000.mp4", "gone.mp4"), {"data.max_broken": 0.0}, "gone.mp4"),
        (lambda d: (d / "train.csv").unlink(), {}, "train.csv"),
        (lambda d: None, {"batch": 12}, "batch=12 is not divisible by 8 devices"),
        (lambda d: None, {"mesh.fsdp": 3}, "mesh.fsdp=3 does not divide the 8 devices"),
        (lambda d: None, {"model.variant": "mvit_c"}, "no variant 'mvit_c'; did you mean"),
        (lambda d: None, {"model.dropout": 1.5}, "dropout must be in [0, 1)"),
        (lambda d: (d / "labels.txt").unlink(), {}, "there is no labels.txt"),
        (lambda d: None, {"augment.flip": 2.0}, "augment.flip must be from 0 to 1, not 2.0"),
        (lambda d: None, {"augment.crop_area": (2.0, 0.1)}, "augment.crop_area must be 2 numbers"),
        (
            lambda d: None,
            {"eval.crops": 3, "eval.whole_image": True},
            "tests the whole image, without crops",
        ),
        (
            lambda d: None,
            {"augment.crop_area": (0.5, 1.0), "augment.jitter": (40, 50)},
            "exclude each other",
        ),
        (lambda d: None, {"augment.randaugment": "rand-m7-q3-inc1"}, "q3"),
        (lambda d: None, {"data.repeats": 3}, "data.repeats=3; set a multiple of 24"),
        (lambda d: None, {"data.sampling": "segments"}, "data.sampling=segments samples one clip"),
        (lambda d: None, {"data.multi_label": True, "data.source": "ssv2"}, "data.multi_label"),
        (
            lambda d: None,
            {"augment.jitter": (20, 40)},
            "short side may be 20: raise the lower bound",
        ),
        (lambda d: None, {"epochs": 0.0}, "epochs must be above 0"),
        (lambda d: None, {"accumulate": 3}, "accumulate=3"),
        (
            lambda d: None,
            {"augment.mixup": 1.0, "augment.mixup_group_size": 3},
            "augment.mixup_group_size=3",
        ),
    ],
)
def test_bad_data_and_config_values_fail_before_anything_is_written(
    digits, tmp_path, spoil, changes, sentence, eight_devices
):
    data = shutil.copytree(digits, tmp_path / "data")
    spoil(data)
    with pytest.raises(UserError) as error:
        train.train(tiny.config(data, **changes), str(tmp_path / "run"))
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_evaluate_fails_in_a_folder_without_a_run(tmp_path):
    status, output = commands.run("evaluate", f"--workdir={tmp_path}")
    assert status == 1 and "holds no run (it has no config.json)" in output


def test_describe_prints_costs_and_published_accuracy():
    status, output = commands.run("describe", "mvit_b_16x4")
    assert status == 0
    assert "36,610,672 parameters, 70.6 G multiply-adds" in output
    assert "8x14x14 + 1 = 1569" in output and "78.4 % top-1" in output
    status, output = commands.run("describe", "mvit_b_16x4", "pool_mode=max", "num_classes=10")
    assert status == 0 and "published" not in output


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["mvit_b_16x5"], "did you mean 'mvit_b_16x4'?"),
        (["mvit_b_16x4", "frame=8"], "did you mean 'frames'?"),
        (["mvit_b_16x4", "frames=abc"], "frames must be a whole number, not 'abc'"),
        (["mvit_b_16x4", "heads=2.0"], "heads must be a whole number, not 2.0"),
        (["mvit_b_16x4", "kv_stride=(1,'a',1)"], "kv_stride must be whole numbers"),
        (["mvit_b_16x4", "drop_path=x"], "drop_path must be a number"),
        (["mvit_b_16x4", "name=3"], "there is no architecture field 'name'"),
    ],
)
def test_bad_arguments_of_describe_end_with_a_one_sentence_error(args, sentence):
    status, output = commands.run("describe", *args)
    assert status == 1 and sentence in output and output.count("\n") == 1
