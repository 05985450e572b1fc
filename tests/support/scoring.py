"""Scores of a run's checkpoint, without the files that `evaluate` writes."""

from typing import Any

from mvit_jax.training import run_folder


def score(config: Any, folder: Any, videos: Any, **options: Any) -> tuple[list[Any], int]:
    """Returns scores for each number of clips, and the step of the checkpoint."""
    with run_folder.RunFolder(folder) as run:
        run.config = config
        scores, _ = run_folder.score(run, videos, **options)
        return scores, run.step(options.get("which", "last"))
