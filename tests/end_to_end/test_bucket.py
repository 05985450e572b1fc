"""Runs in a bucket, compared with runs in a folder.

The bucket is a server on this machine. Its clients are the real libraries: TensorFlow, TensorStore,
Orbax and Google's client.
"""

import json
import shutil
import signal

import pytest

from mvit_jax.training.run import history
from tests.support import bucket, events, group, tiny

RECIPE = (*tiny.RECIPE_FLAGS[len(tiny.FLAGS) :], "--config.checkpoint.every=4")
EVALUATED = {"evaluation.json", "confusion.png", "per_class.png", "scores.npz", "videos.csv"}


@pytest.fixture(scope="module")
def run(digits):
    """Runs a program with the environment of a bucket, or of none; returns its output."""

    def run(name, *flags, storage=None, stop=None, status=0):
        program = ("-m", f"mvit_jax.{name}")
        if name == "train":
            program = (*group.TRAIN, *RECIPE, f"--config.data.folder={digits}")
        environment = {} if storage is None else storage.environment
        started = group.start([*program, *flags], 1, 1, **environment)
        if stop is not None:
            group.wait_for(started[0], stop)
            started[0].send_signal(signal.SIGTERM)
        [done] = group.finish(started, 500)
        assert done.status == status, done
        return done

    return run


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    with bucket.serve(tmp_path_factory.mktemp("keys"), "a-bucket") as storage:
        yield storage


@pytest.fixture(scope="module")
def bucket_run(run, storage):
    """A run in the bucket, stopped and continued."""
    folder = "gs://a-bucket/runs/b"
    done = run("train", f"--workdir={folder}", storage=storage, stop="step 2/", status=143)
    assert "the same command resumes" in done.out
    done = run("train", f"--workdir={folder}", "--profile=2:3", storage=storage)
    assert "(resumed)" in done.out and f"wrote {folder}/report.html" in done.out
    return folder


def copied(storage, prefix, folder):
    """Copies the objects with a prefix to files; returns their folder."""
    for name in storage.names("a-bucket", f"{prefix}/"):
        path = folder / name.removeprefix(f"{prefix}/")
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.buckets["a-bucket"][name])
    return folder


@pytest.mark.slow
def test_a_run_in_a_bucket_ends_with_the_same_parameters(reference, bucket_run, storage, tmp_path):
    folder = copied(storage, "runs/b", tmp_path)
    group.assert_same_state(folder, reference)
    assert not [path for path in tiny.ROOT.iterdir() if path.name.startswith("gs:")]


@pytest.mark.slow
def test_logs_config_and_report_are_written_to_the_bucket(reference, bucket_run, storage, tmp_path):
    folder = copied(storage, "runs/b", tmp_path)
    ours, theirs = history.read(folder), history.read(reference)
    first, again = (start["step"] for start in ours.starts)
    assert first == 0 and 2 <= again < 9
    assert [t["step"] for t in ours.train] == [t["step"] for t in theirs.train] == [2, 4, 6, 8, 9]
    # The line that was begun before the stop is a mean over fewer steps.
    for mine, other in zip(ours.train, theirs.train, strict=True):
        if not again < mine["step"] < again + 2:
            assert mine["loss"] == other["loss"]
    assert [v["top1"] for v in ours.val] == [v["top1"] for v in theirs.val]
    assert ours.spent["step"] > 0
    assert (folder / "labels.txt").read_bytes() == (reference / "labels.txt").read_bytes()
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (folder, reference))
    theirs["checkpoint"]["every"] = 4
    assert ours == theirs
    assert "train/loss" in events.read_scalars(folder)
    assert list(folder.glob("profile/plugins/profile/*/*.xplane.pb"))
    assert "<svg" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside(reference, bucket_run, storage, run, tmp_path):
    names = [n for n in storage.names("a-bucket", "runs/b/checkpoints/9/params/") if "/d/" in n]
    assert names
    for name in names:
        content = bytearray(storage.buckets["a-bucket"][name])
        content[len(content) // 2] ^= 1
        storage.put("a-bucket", name, bytes(content))
    done = run("train", f"--workdir={bucket_run}", storage=storage)
    assert f"moved to {bucket_run}/damaged/9; training resumes from step 8" in done.out
    folder = copied(storage, "runs/b", tmp_path)
    assert sorted(path.name for path in (folder / "damaged").iterdir()) == ["9"]
    group.assert_same_state(folder, reference)


@pytest.mark.slow
@pytest.mark.parametrize("denied", ["digests.json", "params.*alt=media"])
def test_a_checkpoint_without_read_permission_is_not_moved(
    bucket_run, storage, run, denied, monkeypatch
):
    before = storage.names("a-bucket", "runs/b/checkpoints/")
    pattern = f"^GET .*a-bucket/(o/)?runs.*checkpoints.*{denied}"
    monkeypatch.setattr(storage, "denied", pattern)
    done = run("train", f"--workdir={bucket_run}", storage=storage, status=1)
    # Later lines are of TensorStore's threads, whose other reads are still under way.
    [line] = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: the checkpoint gs://a-bucket/runs/b/checkpoints/")
    assert "cannot be read (" in line
    assert storage.names("a-bucket", "runs/b/checkpoints/") == before


@pytest.mark.nightly
def test_an_incomplete_checkpoint_is_ignored(reference, bucket_run, storage, run, tmp_path):
    """As after a kill in the middle of a save, in the first of a run and in a later one."""
    objects = dict(storage.buckets["a-bucket"])
    for name in storage.names("a-bucket", "runs/b/"):
        new = name.replace("runs/b/", "runs/killed/")
        step = name.split("/")[3] if "/checkpoints/" in name else None
        if not (step == "9" and name.endswith(("/d", "commit_success.txt"))):
            storage.put("a-bucket", new, objects[name])
    done = run("train", "--workdir=gs://a-bucket/runs/killed", storage=storage)
    assert "from step 8 to 9 (resumed)" in done.out and "damaged" not in done.out
    group.assert_same_state(copied(storage, "runs/killed", tmp_path), reference)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_evaluated_in_the_bucket(
    reference, bucket_run, storage, run, tmp_path
):
    run("evaluate", f"--workdir={bucket_run}", "--batch=4", storage=storage)
    folder = copied(storage, "runs/b", tmp_path)
    assert {path.name for path in folder.iterdir()} >= EVALUATED
    assert json.loads((folder / "evaluation.json").read_text())["videos"] == 10
    assert "Not tested yet" not in (folder / "report.html").read_text()


@pytest.mark.nightly
def test_programs_read_a_run_in_a_bucket(reference, bucket_run, storage, run, digits, tmp_path):
    results, here = {}, shutil.copytree(reference, tmp_path / "here")
    for name, folder, where in (("here", here, None), ("there", bucket_run, storage)):
        run("evaluate", f"--workdir={folder}", "--batch=4", storage=where)
        video = next(iter(sorted(digits.rglob("*.mp4"))))
        output = tmp_path / f"{name}.json"
        run("predict", str(video), f"--workdir={folder}", f"--json={output}", storage=where)
        program = tmp_path / f"{name}.bin"
        run("convert", str(folder), "--to=stablehlo", f"--out={program}", storage=where)
        results[name] = [json.loads(output.read_text())["files"], program.read_bytes()]
    assert results["here"] == results["there"]
    folder = copied(storage, "runs/b", tmp_path / "copy")
    ours, theirs = (json.loads((f / "evaluation.json").read_text()) for f in (folder, here))
    assert ours == theirs


@pytest.mark.nightly
def test_a_run_resumes_from_a_run_in_a_bucket(reference, bucket_run, storage, run, tmp_path):
    done = run(
        "train", f"--workdir={tmp_path / 'on'}", f"--config.resume={bucket_run}",
        "--config.epochs=4", storage=storage,
    )  # fmt: skip
    assert f"resumes from the last checkpoint of {bucket_run}" in done.out
    done = run(
        "train", f"--workdir={tmp_path / 'new'}", f"--config.init.checkpoint={bucket_run}",
        "--config.epochs=0.4", storage=storage,
    )  # fmt: skip
    assert f"weights from {bucket_run}" in done.out


@pytest.mark.slow
def test_two_processes_write_one_run_to_a_bucket(storage, digits, tmp_path):
    """The same as one process with two devices, in a folder."""
    for where, processes in ((tmp_path / "one", 1), ("gs://a-bucket/runs/two", 2)):
        flags = [*RECIPE, f"--config.data.folder={digits}", f"--workdir={where}"]
        environment = storage.environment if processes == 2 else {}
        started = group.start([*group.TRAIN, *flags], processes, 2 // processes, **environment)
        done = group.finish(started, 500)
        assert all(d.status == 0 for d in done), done
    group.assert_same_state(copied(storage, "runs/two", tmp_path / "two"), tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workdir", "denied", "message"),
    [
        ("gs://no-such-bucket/runs/b", None, "there is no bucket gs://no-such-bucket"),
        ("gs://a-bucket/new", "^GET /storage/v1/b/a-bucket", "roles/storage.objectUser"),
        ("gs://a-bucket/new", "^POST /upload", "the workdir gs://a-bucket/new cannot be"),
        ("s3://a-bucket/new", None, "s3://a-bucket/new is neither a local folder nor in a bucket"),
    ],
    ids=["missing", "not read", "not written", "of another kind"],
)
def test_bucket_errors_end_with_a_one_sentence_error(
    storage, run, workdir, denied, message, monkeypatch
):
    monkeypatch.setattr(storage, "denied", denied)
    done = run("train", f"--workdir={workdir}", storage=storage, status=1)
    [line] = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in done.err
