"""The test protocol, and what the tests of all tasks share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from mvit_jax.common.errors import UserError

Ensemble = Literal["mean", "max"]


@dataclass(frozen=True)
class Protocol:
    """The test protocol: the views of a video and the ensemble of their probabilities.

    Attributes:
      clips: numbers of clips, spread evenly over a video. Each number n is a separate test with
        n x `crops` views.
      crops: square crops per clip, 1 or 3.
      batch: videos at a time; rounded up to a multiple of the number of devices.
      ensemble: "mean" of the views' probabilities (equivalent to the sum in the reference code), or
        "max" (Charades).
      max_broken: largest share of broken videos, 0 to 1. Broken videos are left out of the metrics
        and listed in the result.
    """

    clips: tuple[int, ...] = (1,)
    crops: int = 1
    batch: int = 8
    ensemble: Ensemble = "mean"
    max_broken: float = 1.0


def divisible_batch(protocol: Protocol, mesh: Mesh) -> int:
    """Returns the batch size of a test, rounded up to a multiple of the number of devices."""
    return -(-protocol.batch // mesh.size) * mesh.size


def check_failures(
    failures: Sequence[str],
    broken: int,
    count: int,
    protocol: Protocol,
    list_file: str,
    noun: str = "videos",
) -> None:
    """Checks the share of videos that could not be decoded; none decoded is no error here.

    Args:
      failures: sentences on these videos.
      broken: their number.
      count: number of all videos.
      protocol: the protocol with the largest share.
      list_file: name of the list in messages.
      noun: name of its elements.

    Raises:
      UserError: the share exceeds `protocol.max_broken`.
    """
    if protocol.max_broken * count < broken < count:
        raise UserError(
            f"{broken} of the {count} {noun} of {list_file} cannot be decoded, a "
            f"larger share than data.max_broken={protocol.max_broken:g}: repair or remove them, or "
            f"raise data.max_broken; the first: {failures[0]}"
        )


def gather(x: jax.Array) -> np.ndarray:
    """Returns an array in host memory, gathered if it is sharded over processes."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
