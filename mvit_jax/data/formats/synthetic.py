"""Synthetic videos without files, to benchmark everything but reading and decoding."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8


@dataclass(frozen=True)
class SyntheticVideo:
    """An opened video of noise; an `images.Footage`.

    Attributes:
      seed: random seed of the noise.
      num_frames: number of frames.
      height, width: size of a frame in pixels.
      fps: frames per second.
    """

    seed: int
    num_frames: int
    height: int
    width: int
    fps: float = 30.0

    def frames(
        self, indices: Sequence[int] | Int[np.ndarray, " frames"]
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        """Returns noise, brighter by 1 from frame to frame, modulo 256.

        Raises:
          IndexError: an index is out of range.
        """
        numbers = np.asarray(indices, np.int64)
        if numbers.min() < 0 or numbers.max() >= self.num_frames:
            raise IndexError(f"frames {indices} are out of range for {self.num_frames} frames")
        size = self.height * self.width * 3
        noise = np.frombuffer(np.random.default_rng(self.seed).bytes(size), np.uint8)
        steps = (numbers % 256).astype(np.uint8)
        return (noise + steps[:, None]).reshape(-1, self.height, self.width, 3)


@dataclass(frozen=True)
class Synthetic:
    """A data set of noise, by default in the size of Kinetics-400; a `data.source.Source`.

    Attributes:
      videos: number of videos.
      classes: number of classes; video `i` has class `i` modulo `classes`.
      num_frames: frames of a video; 1 for images.
      height, width: size of a frame in pixels.
      multi_label: multi-hot labels with two neighbouring classes per video.
    """

    videos: int = 240_000
    classes: int = 400
    num_frames: int = 300
    height: int = 256
    width: int = 340
    multi_label: bool = False

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(str(label) for label in range(self.classes))

    @property
    def list_file(self) -> str:
        return "synthetic"

    def __len__(self) -> int:
        return self.videos

    def label(
        self, index: int, frames: Int[np.ndarray, " frames"] | None = None
    ) -> int | UInt8[np.ndarray, " classes"]:
        if not self.multi_label:
            return index % self.classes
        label = np.zeros(self.classes, np.uint8)
        label[[index % self.classes, (index + 1) % self.classes]] = 1
        return label

    def item(self, index: int) -> str:
        return f"{self.list_file}/{index}"

    @contextlib.contextmanager
    def opened(self, index: int, clip_frames: int) -> Iterator[SyntheticVideo]:
        yield SyntheticVideo(index, self.num_frames, self.height, self.width)
