"""A run's folder, opened once: its config and checkpoints, and scores of these."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tqdm import tqdm

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import AnyPath, to_path
from mvit_jax.config import Config, check
from mvit_jax.data.formats.video_list import read_class_names
from mvit_jax.data.source import Source
from mvit_jax.models.functional import Functional, first_difference
from mvit_jax.training import build, custom, evaluation
from mvit_jax.training.build import Settings
from mvit_jax.training.distributed import sharding
from mvit_jax.training.evaluation import Scores
from mvit_jax.training.run import workdir
from mvit_jax.training.run.checkpoints import Checkpoints
from mvit_jax.weights import adapt


class RunFolder:
    """The folder of a run, or of weights that `convert` wrote.

    A context manager, which closes the checkpoints.

    Attributes:
      path: of the folder.
      config: that the run was started with, and the changes; keys newer than the run have their
        defaults.

    Raises:
      UserError: the folder holds no run, or the changes are no values of their keys.
    """

    def __init__(self, folder: str | AnyPath, changes: Mapping[str, Any] | None = None) -> None:
        """Opens `folder`. `changes` of the config, like {"eval.crops": 1}, are for this opening
        alone; those to None are none."""
        self.path = to_path(folder)
        if self.path.is_file():
            raise UserError(
                f"{folder} is a file: make a folder of it first, "
                f"python -m mvit_jax.convert {folder} --variant=NAME --out=DIR"
            )
        self.config = workdir.frozen(self.path)
        changes = {key: value for key, value in (changes or {}).items() if value is not None}
        if changes:
            self.config.update_from_flattened_dict(changes)
            check(self.config)
        self._checkpoints: Checkpoints | None = None
        self._settings: dict[str, Settings] = {}  # by `which`

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
        """The checkpoints, opened when they are first used; all processes of a run must do so."""
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(self.path)
        return self._checkpoints

    def step(self, which: str = "last") -> int:
        """Returns the step of the "last" or "best" checkpoint."""
        step = self.checkpoints.step(which)
        assert step is not None  # `shapes` or `params` have raised
        return step

    def num_classes(self, which: str = "last") -> int:
        """Returns the classes of the checkpoint's classifier."""
        return self.checkpoints.shapes(which)["head"]["classifier"]["bias"].shape[0]

    def settings(self, which: str = "last") -> Settings:
        """Returns the run's settings, with the classes of the checkpoint's classifier. Warns once
        where the source of a custom module has changed.

        Raises:
          UserError: a custom module cannot be imported.
        """
        if which not in self._settings:
            digests = custom.digests(self.config)
            if changed := workdir.changed_modules(self.path, self.config, digests):
                print(f"warning: {changed}: this may be another model", file=sys.stderr)
            self._settings[which] = build.settings(self.config, self.num_classes(which))
        return self._settings[which]

    def params(self, which: str = "last") -> Any:
        """Reads parameters (the averaged ones, where the run has them) as NumPy arrays."""
        return self.checkpoints.read_params(which, self._item)

    def params_on(self, mesh: Mesh, which: str = "last") -> Any:
        """Reads the same in float32 onto `mesh`, which need not be the run's own."""
        shapes = jax.eval_shape(self.settings(which).model.init, jax.random.key(0))
        like = sharding.placed(shapes, sharding.state_shardings(mesh, shapes))
        return self.checkpoints.restore_params(like, which, self._item)

    def check_classes(self, names: tuple[str, ...], which: str = "last") -> None:
        """Checks the classes of a data set against the model's.

        Raises:
          UserError: their number or, as far as the folder's labels.txt tells, order differs.
        """
        count = self.num_classes(which)
        if count != len(names):
            raise UserError(
                f"the data's labels.txt names {len(names)} classes, and the model has {count}: use "
                "the list that it was trained with"
            )
        own = self.path / "labels.txt"
        if own.exists():
            ours = read_class_names(own)
            if ours != names and sorted(ours) == sorted(names):
                raise UserError(
                    f"the data's labels.txt has the classes of {own} in another order: labels "
                    "would mean other classes; bring them into the same order"
                )

    @property
    def _item(self) -> str:
        return "ema" if self.config.optim.ema > 0 else "params"


def read_params(folder: str | AnyPath, which: str = "last") -> tuple[Any, Functional]:
    """Reads parameters of a run's or a converted folder as NumPy arrays, and their model, which
    computes in float32.

    Raises:
      UserError: the folder holds no run or no such checkpoint.
    """
    with RunFolder(folder) as run:
        return run.params(which), replace(run.settings(which).model, dtype=jnp.dtype("float32"))


def score(
    run: RunFolder,
    videos: Source,
    *,
    which: str = "last",
    shuffle: bool = False,
    clips: Sequence[int] | None = None,
) -> tuple[list[Scores], Any]:
    """Scores a run's "last" or "best" checkpoint on a list of videos by the test protocol.

    Args:
      run: the folder, opened with the changes of this test.
      videos: the list.
      which: the checkpoint.
      shuffle: shuffles the frames of each clip.
      clips: numbers of clips; by default one, the config's.

    Returns:
      Scores for each number of clips, and the parameters, float32.
    """
    run.check_classes(videos.class_names, which)
    config, settings = run.config, run.settings(which)
    shown = jax.process_index() == 0 and sys.stderr.isatty()
    mesh = sharding.make_mesh()  # the run's own mesh may need more devices than are here
    with (
        jax.set_mesh(mesh),
        jax.default_matmul_precision(config.precision),
        tqdm(total=len(videos), unit="video", disable=not shown) as bar,
    ):
        params = run.params_on(mesh, which)
        apply = build.model_apply(config, settings.model, mesh)
        scores = evaluation.evaluate(
            evaluation.predictor(apply, settings.step, params, mesh),
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
    folder: str | AnyPath, model: Functional, inflate: adapt.Inflation | None
) -> tuple[Any, str]:
    """Returns the weights in `folder`, made to fit `model`, and a summary of what was done.

    Positions are resized, and what the model does not share with them, like a classifier of another
    number of classes, is new.
    """
    params, was = read_params(folder)
    params, report = adapt.carry_over(params, was, model, inflate)
    new = [line.path for line in report.lines if line.done.startswith("new")]
    what = "; ".join(f"{count} {done}" for done, count in report.counts.items())
    return params, f"weights from {folder}: {what}" + (f"; new: {', '.join(new)}" if new else "")


def check_resume(folder: str | AnyPath, model: Functional, config: Config) -> None:
    """Checks that `folder` (`config.resume`) holds a training state of this model, `config`'s.

    Raises:
      UserError: it does not.
    """
    path = to_path(folder)
    if not (path / "checkpoints").is_dir():
        raise UserError(f"resume={path} holds no checkpoint: check the folder")
    with RunFolder(path) as run:
        shapes, whole = run.checkpoints.shapes(), run.checkpoints.has_training()
    if not whole:
        raise UserError(
            f"resume={path} holds weights alone, no state of training: start from them with "
            f"--config.init.checkpoint={path}"
        )
    ours = jax.eval_shape(model.init, jax.random.key(0))
    difference = first_difference(ours, shapes)
    if difference:
        raise UserError(f"resume={path} is of another architecture: {difference}")
    ours, theirs = custom.digests(config), workdir.custom_digests(path)
    if ours != theirs:
        raise UserError(
            f"resume={path} has other custom modules, or their source has changed: name the same "
            "(model.block, model.attention, model.pooling)"
        )
