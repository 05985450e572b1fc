"""Predicts the most probable classes of video or image files with a trained model.

    python -m mvit_jax.predict FILE... --workdir=DIR
    python -m mvit_jax.predict FILE... --checkpoint=DIR --top=3 --json=FILE
    python -m mvit_jax.predict FILE... --workdir=DIR --pictures=DIR --grad_cam
    python -m mvit_jax.predict FILE... --workdir=DIR --features=FILE.npz --features_of=stage:2
    python -m mvit_jax.predict FILE... --workdir=DIR --boxes=FILE.csv --pictures=DIR
    python -m mvit_jax.predict FILE... --workdir=DIR --detector=FILE.onnx --pictures=DIR
    python -m mvit_jax.predict --serve --workdir=DIR

DIR is a workdir (--workdir) or a folder that `convert` wrote (--checkpoint). Probabilities are
combined over K clips x C crops, as in the test program. A video longer than K clips is read in
overlapping windows, each as long as a clip. The video's probabilities are then combined over all
windows, and a timeline is added. --clips=K disables windows. Class names are the lines of
DIR/labels.txt, or else of the data folder's labels.txt. A file that cannot be decoded is reported;
the other files are still processed, and the exit status is 1. Of a run with averaged weights (EMA),
these are used; --weights=plain uses the others.

--pictures writes NAME_prediction.png for each file. --grad_cam adds Grad-CAM to this figure:
brighter parts contributed more to the score of the most probable class. NAME_grad_cam.gif and .mp4
animate it.

--features writes the features of the files that can be decoded: "names", text [files], and
"features", float32 [files, channels], the mean over a file's clips. --features_of=head is the
vector that the head classifies, stage:K the mean over the grid after stage K, from 0. With
--features_per=clip and --clips=K, features are [files, K, channels].

A model of action detection scores the persons of key frames. --boxes is a csv file of their boxes
in AVA's format, whose seconds count from --first_second on, 900 for AVA's videos. --detector is a
person detector, an ONNX file (pip install -e '.[onnx]'), for the middle frame of each second. Boxes
that overlap from second to second are one person. --pictures writes NAME_boxes.png, a sheet of key
frames, and NAME_boxes.mp4, the video around them, with the classes of at least --min_score.

--serve serves a page for uploads (pip install -e '.[demo]').
"""

import io
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from mvit_jax.analysis import render
from mvit_jax.common import errors
from mvit_jax.common.files import (
    AnyPath,
    check_writable,
    expanded,
    is_local,
    local_path,
    to_path,
    write_atomically,
)
from mvit_jax.common.text import plural, printable
from mvit_jax.data.media.images import DecodeError
from mvit_jax.predict import box_figures, figures, tables
from mvit_jax.predict.boxes import (
    BoxPredictor,
    KeyFrames,
    Progress,
    Shown,
    described,
    detect,
    is_detection,
    read_boxes,
)
from mvit_jax.predict.detector import MIN_SCORE, PersonDetector
from mvit_jax.predict.predictor import Prediction, Predictor
from mvit_jax.training.run import runtime
from mvit_jax.weights.state_dicts import WEIGHTS

# Other programs have flags of the same names, and tests import them all.
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a run.", allow_override=True)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A folder of converted weights.", allow_override=True
)
_WHICH = flags.DEFINE_enum(
    "which", "last", ["last", "best"], "The checkpoint of the run.", allow_override=True
)
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    None,
    WEIGHTS,
    "Plain or averaged (ema) weights; by default averaged ones if the run has any.",
    allow_override=True,
)
_CLIPS = flags.DEFINE_integer(
    "clips",
    None,
    "Clips per video, in place of windows; by default eval.clips.",
    allow_override=True,
)
_CROPS = flags.DEFINE_integer(
    "crops", None, "Crops per clip, 1 or 3; by default eval.crops.", allow_override=True
)
_TOP = flags.DEFINE_integer("top", 5, "Number of classes per file.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for the results as JSON.")
_PICTURES = flags.DEFINE_string("pictures", None, "Folder for a figure of each file.")
_GRAD_CAM = flags.DEFINE_bool("grad_cam", False, "Draw Grad-CAM; requires --pictures.")
_FEATURES = flags.DEFINE_string("features", None, "File for features, in NumPy's format npz.")
_FEATURES_OF = flags.DEFINE_string("features_of", "head", "head, or stage:K from stage:0.")
_FEATURES_PER = flags.DEFINE_enum(
    "features_per", "video", ["video", "clip"], "Mean over clips, or each of --clips=K clips."
)
_BOXES = flags.DEFINE_string("boxes", None, "Boxes of persons in AVA's format, a csv file.")
_DETECTOR = flags.DEFINE_string("detector", None, "Person detector, an ONNX file.")
_FIRST_SECOND = flags.DEFINE_integer(
    "first_second", 0, "Second of --boxes at which the videos begin.", lower_bound=0
)
_MIN_PERSON = flags.DEFINE_float(
    "min_person", MIN_SCORE, "Smallest score of a person, of --boxes or --detector.", 0.0, 1.0
)
_MIN_SCORE = flags.DEFINE_float(
    "min_score", 0.3, "Smallest probability of a class that is drawn at a box.", 0.0, 1.0
)
_SERVE = flags.DEFINE_bool("serve", False, "Serve a page for uploads, until Ctrl-C.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address of the page; local by default.")
_PORT = flags.DEFINE_integer("port", 7860, "Port of the page; 0 for any free port.", 0, 65535)
_MAX_MB = flags.DEFINE_integer("max_mb", 200, "Largest upload of the page, MB.", lower_bound=1)
_MAX_MINUTES = flags.DEFINE_float("max_minutes", 10.0, "Longest video of the page.", 0.01)


def main(argv: list[str]) -> None:
    files = argv[1:]
    folder = _folder()
    runtime.cache_compiled_programs()
    if _SERVE.value:
        _serve(folder, files)
        return
    if not files:
        raise errors.UserError("give video or image files, or --serve")
    if _GRAD_CAM.value and _PICTURES.value is None:
        raise errors.UserError("--grad_cam requires --pictures=DIR, the folder for the figures")
    if _FEATURES.value is not None and _FEATURES_PER.value == "clip" and _CLIPS.value is None:
        raise errors.UserError(
            "--features_per=clip requires --clips=K: otherwise long videos have more clips than "
            "short ones"
        )
    for file in (_JSON.value, _FEATURES.value):
        if file is not None and is_local(to_path(file)):
            check_writable(file)
    pictures = None if _PICTURES.value is None else local_path(_PICTURES.value)
    if pictures is not None:
        _make_folder(pictures)
    model = {"which": _WHICH.value, "weights": _WEIGHTS.value}
    results: dict[str, Any] = {"folder": str(folder), **model}
    features: list[tuple[str, np.ndarray]] = []
    if _detects(folder):
        persons = _person_source()
        shown = Shown(_TOP.value, _MIN_SCORE.value)
        results |= predict_boxes(BoxPredictor(folder, **model), files, persons, shown, pictures)
    else:
        predictor = Predictor(
            folder, **model, clips=_CLIPS.value, crops=_CROPS.value,
            features=None if _FEATURES.value is None else _FEATURES_OF.value,
        )  # fmt: skip
        results |= predict(
            predictor, files, top=_TOP.value, pictures=pictures, grad_cam=_GRAD_CAM.value,
            add_features=lambda *named: features.append(named),
        )  # fmt: skip
    failed = tables.show(results["files"])
    if _JSON.value is not None:
        write_atomically(_JSON.value, json.dumps(results, indent=1) + "\n")
    if _FEATURES.value is not None and features:
        write_features(_FEATURES.value, features, _FEATURES_PER.value)
        print(f"wrote {_FEATURES.value}: features of {plural(len(features), 'file')}")
    if failed:
        sys.exit(1)


def _folder() -> AnyPath:
    """Returns the model's folder; requires either --workdir or --checkpoint."""
    folders = [value for value in (_WORKDIR.value, _CHECKPOINT.value) if value is not None]
    if _CHECKPOINT.value in ("last", "best") and not Path(_CHECKPOINT.value).is_dir():
        raise errors.UserError(
            f"--checkpoint must be a folder: give --workdir=DIR --which={_CHECKPOINT.value}"
        )
    if len(folders) != 1:
        raise errors.UserError(
            "give --workdir=DIR, the folder of a run, or --checkpoint=DIR, converted weights"
        )
    return to_path(folders[0])


def _detects(folder: AnyPath) -> bool:
    """Returns True for a model of action detection.

    Raises:
      UserError: flags do not match the task of the model.
    """
    detects = is_detection(folder)
    persons = [
        name for name, flag in (("--boxes", _BOXES), ("--detector", _DETECTOR)) if flag.value
    ]
    if not detects:
        if persons:
            raise errors.UserError(
                f"{persons[0]} requires a model of action detection, but this one classifies whole "
                f"videos: leave {persons[0]} out, or give the workdir of such a model"
            )
        return False
    unused = {
        "--clips": _CLIPS, "--crops": _CROPS, "--grad_cam": _GRAD_CAM, "--features": _FEATURES,
    }  # fmt: skip
    for name, flag in unused.items():
        if flag.value:
            raise errors.UserError(
                f"{name} is not for models of action detection, which score boxes: leave it out"
            )
    if len(persons) != 1:
        raise errors.UserError(
            "this model scores the boxes of persons: give either --boxes=FILE.csv, with lines "
            "`video,second,x1,y1,x2,y2,,score`, or --detector=FILE.onnx, a person detector"
        )
    return True


def _person_source() -> KeyFrames:
    """Returns the function of an opened video that returns its persons."""
    if _DETECTOR.value is not None:
        return partial(detect, PersonDetector(_DETECTOR.value, _MIN_PERSON.value))
    boxes = expanded(_BOXES.value or "")
    if not boxes.is_file():
        raise errors.UserError(f"there is no file {boxes}: --boxes must be a csv file of boxes")
    return partial(
        read_boxes, boxes, min_score=_MIN_PERSON.value,
        first_second=_FIRST_SECOND.value,
    )  # fmt: skip


def _serve(folder: AnyPath, files: list[str]) -> None:
    unused = {
        "--clips": _CLIPS, "--json": _JSON, "--pictures": _PICTURES, "--grad_cam": _GRAD_CAM,
        "--features": _FEATURES,
    }  # fmt: skip
    extra = [*files, *(name for name, flag in unused.items() if flag.value)]
    if extra:
        raise errors.UserError(
            f"with --serve, files are uploaded on the page: leave out {', '.join(extra)}"
        )
    from mvit_jax.predict import server  # needs gradio, an optional dependency

    def load() -> Predictor | server.BoxPage:
        model = {"which": _WHICH.value, "weights": _WEIGHTS.value}
        if not _detects(folder):
            return Predictor(folder, **model, crops=_CROPS.value)
        shown = Shown(_TOP.value, _MIN_SCORE.value)
        return server.BoxPage(BoxPredictor(folder, **model), _person_source(), shown)

    server.serve(
        load, host=_HOST.value, port=_PORT.value, top=_TOP.value,
        limits=server.Limits(_MAX_MB.value, _MAX_MINUTES.value),
    )  # fmt: skip


def predict(
    predictor: Predictor,
    files: list[str],
    *,
    top: int,
    pictures: Path | None = None,
    grad_cam: bool = False,
    add_features: Callable[[str, np.ndarray], object] = lambda file, features: None,
) -> dict[str, Any]:
    """Predicts files and writes their figures.

    Args:
      predictor: the model.
      files: paths of video or image files.
      top: number of classes per file.
      pictures: folder for the figures; None draws none.
      grad_cam: draw Grad-CAM too.
      add_features: called with each decoded file and its features, if the predictor computes any.

    Returns:
      A JSON-serialisable dict. "files" has an entry per file, with "classes" or "error". For a long
      video, "timeline" has the classes of all "windows", and "segments", which are intervals with
      the same most probable class throughout. Times are in seconds.
    """

    def answer(result: dict[str, Any], path: Path, stem: str, progress: Progress) -> None:
        prediction = predictor.predict(path, progress=progress)
        if prediction.features is not None:
            add_features(result["file"], prediction.features)
        result |= _described(prediction, predictor.names, top)
        if pictures is not None:
            written = _draw(predictor, prediction, result["file"], pictures / stem, top, grad_cam)
            result["pictures"] = [str(path) for path in written]

    results = _each_file(files, pictures, "window", answer)
    config = predictor.config.eval
    return {
        "step": predictor.step, "clips": config.clips, "crops": config.crops, "files": results,
    }  # fmt: skip


def predict_boxes(
    predictor: BoxPredictor,
    files: list[str],
    persons: KeyFrames,
    shown: Shown,
    pictures: Path | None = None,
) -> dict[str, Any]:
    """Predicts the actions of persons in files and writes their figures.

    Args:
      predictor: the model.
      files: paths of video files.
      persons: returns the key frames of an opened video, with the boxes of persons.
      shown: choice of classes.
      pictures: folder for the figures; None draws none.

    Returns:
      A JSON-serialisable dict. "files" has an entry per file: that of `boxes.described`, or
      "error".
    """

    def answer(result: dict[str, Any], path: Path, stem: str, progress: Progress) -> None:
        prediction = predictor.predict(path, persons, progress=progress)
        result |= described(prediction, predictor.names, shown)
        if pictures is not None:
            written = box_figures.write(
                path, prediction, predictor.names, shown, pictures / stem, progress
            )
            result["pictures"] = [str(path) for path in written]

    results = _each_file(files, pictures, "key frame", answer)
    return {"step": predictor.step, "files": results}


def _each_file(
    files: list[str], pictures: Path | None, unit: str, answer: Callable[..., None]
) -> list[dict[str, Any]]:
    """Returns an entry per file, with its answer, and an error if there is one.

    Args:
      files: paths of the files.
      pictures: folder of the figures, if any.
      unit: of the progress.
      answer: adds to an entry, of which it is called with the absolute path, the prefix of the
        figures and a function for the progress. An error leaves what was added before.
    """
    stems = picture_names(files, pictures) if pictures else files
    results: list[dict[str, Any]] = []
    for file, stem in zip(files, stems, strict=True):
        result: dict[str, Any] = {"file": file}
        results.append(result)
        try:
            with tqdm(unit=unit, desc=printable(Path(file).name), delay=2, disable=None) as bar:

                def progress(done: int, of: int, bar=bar) -> None:
                    bar.total = of
                    bar.update(done - bar.n)

                # Absolute, since FFmpeg takes "12:30.mp4" for an address.
                answer(result, expanded(file).absolute(), stem, progress)
        except DecodeError as error:
            result["error"] = f"cannot be decoded: {error.reason}"
        except errors.UserError as error:
            result["error"] = str(error)
    return results


def _described(prediction: Prediction, names: tuple[str, ...], top: int) -> dict[str, Any]:
    described: dict[str, Any] = {"classes": _top(prediction.probabilities, names, top)}
    line = prediction.timeline
    if line is not None:
        described["timeline"] = {
            "seconds": prediction.seconds,
            "segments": [
                {"start": s.start, "end": s.end, "class": names[s.label]}
                | {"probability": s.probability}
                for s in line.segments()
            ],
            "windows": [
                {"start": float(start), "end": float(end), "classes": _top(row, names, top)}
                for start, end, row in zip(line.starts, line.ends, line.probabilities, strict=True)
            ],
        }
    return described


def _top(probabilities: np.ndarray, names: tuple[str, ...], top: int) -> list[dict[str, Any]]:
    # A stable sort, so that ties have the same order on every platform.
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [{"class": names[i], "probability": float(probabilities[i])} for i in order]


def _draw(
    predictor: Predictor, prediction: Prediction, file: str, start: Path, top: int, grad_cam: bool
) -> list[Path]:
    """Writes a file's figures and returns their paths, which begin with `start`."""
    shown = prediction.shown
    heat = predictor.grad_cam(shown) if grad_cam else None
    drawn = figures.picture(
        file, prediction.probabilities, predictor.names, shown, prediction.times,
        top=top, timeline=prediction.timeline, grad_cam=heat,
    )  # fmt: skip
    written = [Path(f"{start}_prediction.png")]
    write_atomically(written[0], drawn)
    if heat is not None and shown.shape[0] * shown.shape[1] > 1:  # else nothing moves
        frames = figures.animate(shown, heat)
        fps = figures.animation_fps(shown, predictor.config.data.stride)
        written += [Path(f"{start}_grad_cam.gif"), Path(f"{start}_grad_cam.mp4")]
        render.save_gif(written[1], frames, fps)
        render.save_mp4(written[2], frames, fps)
    return written


def write_features(path: str, features: list[tuple[str, np.ndarray]], per: str) -> None:
    """Writes features as arrays "names" and "features" (.npz).

    Args:
      path: the file.
      features: names of files, and their features [clips, channels].
      per: "clip" for [videos, clips, channels], or "video" for the mean over the clips.
    """
    names, by_clip = zip(*features, strict=True)
    values = np.stack(by_clip if per == "clip" else [clips.mean(0) for clips in by_clip])
    arrays = io.BytesIO()
    np.savez_compressed(arrays, names=np.array(names), features=values)
    write_atomically(path, arrays.getvalue())


_ENDINGS = (
    "_prediction.png", "_grad_cam.gif", "_grad_cam.mp4", "_boxes.png", "_boxes.mp4",
)  # fmt: skip


def picture_names(files: list[str], folder: Path) -> list[str]:
    """Returns a unique prefix for each file's figures: the file's stem, numbered if needed.

    Prefixes differ even when case is ignored, and no figure overwrites an input file.
    """
    taken = {expanded(file).resolve() for file in files}
    names: list[str] = []
    for file in files:
        stem, number = Path(file).stem or "file", 1
        name = stem
        while name.casefold() in {n.casefold() for n in names} or any(
            (folder / f"{name}{ending}").resolve() in taken for ending in _ENDINGS
        ):
            number += 1
            name = f"{stem}_{number}"
        names.append(name)
    return names


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.UserError(
            f"--pictures={folder} cannot be made ({error.strerror}): choose another folder"
        ) from None
    if not os.access(folder, os.W_OK):
        raise errors.UserError(f"--pictures={folder} is not writable: choose another folder")


if __name__ == "__main__":
    errors.run(main)
