"""Access to a workdir: its config, checkpoints, parameters and test scores."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import TracebackType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float
from tqdm import tqdm

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import AnyPath, expanded, to_path
from mvit_jax.config import Config, change, check
from mvit_jax.data.formats.video_list import read_class_names
from mvit_jax.data.preprocess import Preprocess
from mvit_jax.data.source import Source
from mvit_jax.models.functional import Functional, Params, first_difference
from mvit_jax.models.variants import Preprocessing
from mvit_jax.training import build, custom
from mvit_jax.training.build import Settings
from mvit_jax.training.distributed import sharding
from mvit_jax.training.evaluation import testing
from mvit_jax.training.evaluation.boxes import BoxScores
from mvit_jax.training.evaluation.classification import Scores
from mvit_jax.training.run import workdir
from mvit_jax.training.run.checkpoints import Checkpoints
from mvit_jax.weights import adapt
from mvit_jax.weights.state_dicts import WEIGHTS


class RunFolder:
    """The workdir of a run, or a folder of converted weights (`convert`).

    A context manager that closes the checkpoints.

    Attributes:
      path: the folder.
      config: the run's config with the changes; keys newer than the run have their defaults.
      averages: True if the run has averaged weights (EMA) besides the plain ones.

    Raises:
      UserError: the folder holds no run or no such weights, or a change is invalid.
    """

    def __init__(
        self,
        folder: str | AnyPath,
        changes: Mapping[str, Any] | None = None,
        *,
        weights: str | None = None,
    ) -> None:
        """Opens a folder.

        Args:
          folder: the workdir.
          changes: values by dotted keys, like {"eval.crops": 1}. They override the config in
            memory, which is then checked. None values are ignored.
          weights: "plain" or "ema", the weights to read; by default averaged ones if the run has
            any.
        """
        self.path = to_path(folder)
        if self.path.is_file():
            raise UserError(
                f"{folder} is a file: make a folder of it first, "
                f"python -m mvit_jax.convert {folder} --variant=NAME --out=DIR"
            )
        self.config = workdir.recorded_config(self.path)
        if changes is not None:
            change(self.config, {k: value for k, value in changes.items() if value is not None})
            check(self.config)
        self.averages = self.config.optim.ema > 0
        if weights not in (None, *WEIGHTS):
            raise UserError(f"weights must be plain or ema, not {weights!r}")
        if weights == "ema" and not self.averages:
            raise UserError(f"{folder} has no averaged weights: leave out weights=ema")
        self._item = "ema" if self.averages and weights != "plain" else "params"
        self._checkpoints: Checkpoints | None = None
        self._settings: dict[str, Settings] = {}  # by checkpoint, "last" or "best"

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._checkpoints is not None:
            self._checkpoints.close()

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints, opened on first use; all processes must open them together."""
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(self.path)
        return self._checkpoints

    def step(self, which: str = "last") -> int:
        """Returns the step of the "last" or "best" checkpoint."""
        step = self.checkpoints.step(which)
        assert step is not None  # callers have read the checkpoint before, which raises if missing
        return step

    def num_classes(self, which: str = "last") -> int:
        """Returns the number of classes of the checkpoint's classifier."""
        return self.checkpoints.shapes(which)["head"]["classifier"]["bias"].shape[0]

    def settings(self, which: str = "last") -> Settings:
        """Returns the run's settings, with as many classes as the checkpoint's classifier.

        Prints a warning if the source of a custom module has changed since the run.

        Raises:
          UserError: a custom module cannot be imported.
        """
        if which not in self._settings:
            digests = custom.digests(self.config)
            if changed := workdir.changed_modules(self.path, self.config, digests):
                print(f"warning: {changed}: the model may differ from the run's", file=sys.stderr)
            self._settings[which] = build.settings(self.config, self.num_classes(which))
        return self._settings[which]

    def params(self, which: str = "last") -> Any:
        """Reads parameters as NumPy arrays."""
        return self.checkpoints.read_params(which, self._item)

    def params_on(self, mesh: Mesh, which: str = "last") -> Any:
        """Reads the parameters, as `params` does, in float32 and sharded over `mesh`."""
        shapes = jax.eval_shape(self.settings(which).model.init, jax.random.key(0))
        like = sharding.with_shardings(shapes, sharding.state_shardings(mesh, shapes))
        return self.checkpoints.restore_params(like, which, self._item)

    def check_classes(self, names: tuple[str, ...], which: str = "last") -> None:
        """Checks that a data set has the model's number of classes, and its order of them.

        Raises:
          UserError: the number of classes differs, or the folder's labels.txt has the same names in
            another order.
        """
        count = self.num_classes(which)
        if count != len(names):
            raise UserError(
                f"the data's labels.txt names {len(names)} classes, but the model has {count}: use "
                "the labels.txt of the training data"
            )
        check_order(self.path, names)

    def trained_classes(self, which: str = "last") -> tuple[str, ...] | None:
        """Returns the class names of the classifier from the folder's labels.txt.

        None if the file is missing, has another number of names, or numbers for names.
        """
        file = self.path / "labels.txt"
        names = read_class_names(file) if file.exists() else ()
        return _without_numbers(names) if len(names) == self.num_classes(which) else None


def check_order(folder: str | AnyPath, names: tuple[str, ...]) -> None:
    """Raises `UserError` if a folder's labels.txt has the classes `names` in another order."""
    file = to_path(folder) / "labels.txt"
    if not file.exists():
        return
    trained = read_class_names(file)
    if trained != names and sorted(trained) == sorted(names):
        raise UserError(
            f"the data's labels.txt has the classes of {file} in another order, so labels "
            "would mean other classes: use the same order"
        )


def read_params(
    folder: str | AnyPath, which: str = "last", weights: str | None = None
) -> tuple[Any, Functional]:
    """Reads the parameters of a workdir or a folder of converted weights, and their model.

    Args:
      folder: the workdir.
      which: the "last" or "best" checkpoint.
      weights: "plain", or "ema" for averaged weights; by default averaged ones if the run has any.

    Returns:
      Parameters as NumPy arrays, and the model in float32.

    Raises:
      UserError: the folder holds no run, no such checkpoint or no such weights.
    """
    with RunFolder(folder, weights=weights) as run:
        return run.params(which), replace(run.settings(which).model, dtype=jnp.dtype("float32"))


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A trained model with its parameters, preprocessing and class names; made by `load_run`.

        run = mvit_jax.load_run("runs/moving_digits")
        probabilities = run(run.preprocess("video.mp4", clips=5)).mean(0)
        run.class_names[int(probabilities.argmax())]

    Attributes:
      model: the model in float32, with custom modules if the run has any:
        `logits, features = run.model.apply(run.params, clips)`.
      params: float32 parameters, nested as in the model.
      preprocess: the run's test preprocessing, for files and raw frames; see `mvit_jax.preprocess`.
      class_names: name of each class; "class 0" and so on if there is no labels.txt.
      step: number of training steps; 0 for converted weights.
      config: the run's config.
    """

    model: Functional
    params: Params = field(repr=False)
    preprocess: Preprocess
    class_names: tuple[str, ...]
    step: int
    config: Config = field(repr=False)

    def __call__(
        self, clips: Float[Any, "batch ..."], boxes: Float[Any, "batch boxes 4"] | None = None
    ) -> Float[Array, "batch *boxes classes"]:
        """Returns the probabilities of the classes.

        Args:
          clips: normalised clips `[batch, T, H, W, 3]`, or images `[batch, H, W, 3]`.
          boxes: for detection alone: x1, y1, x2, y2 in pixels of the clips.

        Returns:
          Softmax of the logits; sigmoids if the run is multi-label, as for detection.
        """
        with jax.default_matmul_precision(self.config.precision):
            return self._probabilities(self.params, clips, boxes)

    @cached_property
    def _probabilities(self) -> Callable[[Params, Any, Any], Array]:
        activation = jax.nn.sigmoid if self.config.data.multi_label else jax.nn.softmax
        apply = self.model.apply
        return jax.jit(lambda params, *inputs: activation(apply(params, *inputs)[0]))


def load_run(
    folder: str | os.PathLike[str], *, which: str = "last", weights: str | None = None
) -> TrainedModel:
    """Loads the model of a run, or of a folder that `convert` wrote.

    Args:
      folder: the workdir, local or gs://BUCKET/DIR.
      which: the "last" or "best" checkpoint.
      weights: "plain", or "ema" for averaged weights; by default averaged ones if the run has any.

    Raises:
      UserError: the folder holds no run, no such checkpoint or no such weights, a custom module
        cannot be imported, or labels.txt has a wrong number of names.
    """
    with RunFolder(to_path(folder), weights=weights) as run:
        params, settings = run.params(which), run.settings(which)
        names = class_names(run.config, run.path, run.num_classes(which))
        step, config = run.step(which), run.config
    clips = settings.clips
    # Without a key frame, the clip is the video's middle.
    sampling = "stride" if clips.sampling == "key_frame" else clips.sampling
    preprocessing = Preprocessing(
        frames=clips.frames, stride=clips.stride, size=clips.size, short_side=clips.short_side,
        mean=settings.step.mean, std=settings.step.std, interpolation=clips.interpolation,
        sampling=sampling, whole_image=clips.whole,
    )  # fmt: skip
    return TrainedModel(
        model=replace(settings.model, dtype=jnp.dtype("float32")),
        params=jax.tree.map(jnp.asarray, params),
        preprocess=Preprocess(preprocessing),
        class_names=names,
        step=step,
        config=config,
    )


def class_names(config: Config, folder: str | AnyPath, count: int) -> tuple[str, ...]:
    """Returns the class names from labels.txt, or "class 0" and so on if there is no such file.

    The model's folder is searched before the data folder.

    Raises:
      UserError: the file does not have `count` names.
    """
    folders = [to_path(folder)]
    folders += [expanded(config.data.folder)] if config.data.folder else []
    for file in (parent / "labels.txt" for parent in folders):
        if file.is_file():
            names = read_class_names(file)
            if len(names) != count:
                raise UserError(
                    f"{file} names {len(names)} classes, and the model has {count}: put the list "
                    f"that it was trained with at {folders[0] / 'labels.txt'}"
                )
            return names
    return tuple(f"class {label}" for label in range(count))


def score(
    run: RunFolder,
    videos: Source,
    *,
    which: str = "last",
    shuffle: bool = False,
    clips: Sequence[int] | None = None,
) -> tuple[list[Scores] | list[BoxScores], Any]:
    """Scores a checkpoint on a list of videos by the test protocol of its config.

    Args:
      run: the workdir, opened with the changes of this test.
      videos: the list of videos.
      which: the "last" or "best" checkpoint.
      shuffle: True to shuffle the frames of each clip.
      clips: numbers of clips per video, each a separate test; by default `eval.clips`.

    Returns:
      Scores for each number of clips, and the float32 parameters on the devices.

    Raises:
      UserError: the classes do not match the model's, there is no such checkpoint, or too many
        videos are broken.
    """
    run.check_classes(videos.class_names, which)
    config, settings = run.config, run.settings(which)
    show_bar = jax.process_index() == 0 and sys.stderr.isatty()
    mesh = sharding.make_mesh()  # the run's mesh may need more devices than are attached
    with (
        jax.set_mesh(mesh),
        jax.default_matmul_precision(config.precision),
        tqdm(total=len(videos), unit="video", disable=not show_bar) as bar,
    ):
        params = run.params_on(mesh, which)
        apply = build.model_apply(config, settings.model, mesh)
        scores = testing.evaluate(
            testing.predictor(apply, settings.step, params, mesh, settings.model.config.task),
            params,
            videos,
            settings.clips,
            replace(settings.test, clips=tuple(clips or (config.eval.clips,))),
            mesh=mesh,
            loader=settings.loader,
            shuffle_seed=config.seed if shuffle else None,
            progress=lambda done: bar.update(done - bar.n),
        )
    return scores, params


def initial_params(
    folder: str | AnyPath,
    model: Functional,
    inflate: adapt.Inflation | None,
    class_names: Sequence[str] | None = None,
    weights: str | None = None,
) -> tuple[Any, str]:
    """Returns the weights in `folder`, adapted to `model`, and a summary for the log.

    Positional embeddings are resized. Tensors that do not match are newly initialised. The
    classifier is new if the classes or the tasks differ; for the same classes in another order, it
    is reordered.

    Args:
      folder: the workdir of a run, or a folder of converted weights.
      model: the target.
      inflate: conversion between image and video kernels; None allows none.
      class_names: class names of the data, compared with those of `folder`; None compares only
        the numbers of classes.
      weights: "plain" or "ema", as for `read_params`.

    Raises:
      UserError: the folder holds no weights, or the weights do not fit the model.
    """
    with RunFolder(folder, weights=weights) as run:
        params, source = run.params(), run.settings().model
        kind = {"ema": "averaged ", "params": "plain "}[run._item] if run.averages else ""
        trained = run.trained_classes()
    change, note = _compare_classes(trained, class_names, source.config.num_classes)
    if source.config.task != model.config.task:  # boxes are classified by other features
        change, note = "replace", f"the classifier is new, because the task is {model.config.task}"
    if change == "reorder":
        assert trained is not None and class_names is not None
        order = [trained.index(name) for name in class_names]
        head = {name: values[..., order] for name, values in params["head"]["classifier"].items()}
        params = params | {"head": params["head"] | {"classifier": head}}
    params, report = adapt.convert_params(
        params, source, model, inflate, new_classifier=change == "replace"
    )
    new = [line.path for line in report.lines if line.done.startswith("new")]
    parts = ["; ".join(f"{count} {done}" for done, count in report.counts.items())]
    parts += [f"new: {', '.join(new)}"] if new else []
    parts += [note] if note else []
    return params, f"{kind}weights from {folder}: {'; '.join(parts)}"


def _compare_classes(
    trained: tuple[str, ...] | None, names: Sequence[str] | None, count: int
) -> tuple[Literal["keep", "reorder", "replace"], str]:
    """Decides what happens to a classifier of `count` classes; returns a note for the log, too.

    Args:
      trained: class names of the classifier, or None if unknown.
      names: class names of the data, or None if unknown.
      count: number of classes of the classifier. Another number of `names` needs no decision, as
        `adapt.convert_params` initialises a classifier of another shape.
    """
    if names is None or len(names) != count:
        return "keep", ""
    names = _without_numbers(tuple(names))
    if trained is None or names is None:
        unknown = "the weights" if trained is None else "the data"
        return "keep", f"the classes were not compared, as {unknown} have no labels.txt"
    if names == trained:
        return "keep", ""
    if len(set(names)) == count and set(names) == set(trained):
        return "reorder", "the classifier was reordered: the data have its classes in another order"
    old, new = next((a, b) for a, b in zip(trained, names, strict=True) if a != b)
    return "replace", (
        f"the classifier is new, because the data have other classes: {new!r} instead of {old!r}"
    )


def _without_numbers(names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Returns the names, or None for numbers, which stand for names where labels.txt is missing."""
    return None if names == tuple(str(label) for label in range(len(names))) else names


def check_resume(
    folder: str | AnyPath,
    model: Functional,
    config: Config,
    class_names: Sequence[str] | None = None,
) -> None:
    """Checks that a run can resume from the workdir `folder` (`config.resume`).

    Raises:
      UserError: the folder has no checkpoint or no optimiser state, or its architecture, classes or
        custom modules differ.
    """
    path = to_path(folder)
    if not (path / "checkpoints").is_dir():
        raise UserError(f"resume={path} holds no checkpoint: check the folder")
    with RunFolder(path) as run:
        shapes, resumable = run.checkpoints.shapes(), run.checkpoints.has_training()
        trained = run.trained_classes()
    if not resumable:
        raise UserError(
            f"resume={path} holds weights without a training state: start from the weights with "
            f"--config.init.checkpoint={path}"
        )
    expected = jax.eval_shape(model.init, jax.random.key(0))
    difference = first_difference(expected, shapes)
    if difference:
        raise UserError(f"resume={path} is for another architecture: {difference}")
    change, _ = _compare_classes(
        trained, class_names, shapes["head"]["classifier"]["bias"].shape[0]
    )
    if change != "keep":
        raise UserError(
            f"resume={path} was trained on other classes, or on these in another order: use that "
            f"run's labels.txt, or start from its weights with --config.init.checkpoint={path}"
        )
    if any(config.model[kind] != run.config.model[kind] for kind in custom.KINDS):
        raise UserError(
            f"resume={path} has other custom modules: set model.block, model.attention and "
            "model.pooling as in that run"
        )
    if changed := workdir.changed_modules(path, config, custom.digests(config)):
        raise UserError(f"resume={path}: {changed}; restore the source")
