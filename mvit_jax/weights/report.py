"""What became of every tensor of a checkpoint, for people to read."""

from collections import Counter
from dataclasses import dataclass, field

from mvit_jax.common.errors import UserError
from mvit_jax.common.text import table

Shape = tuple[int, ...] | None


@dataclass(frozen=True)
class Line:
    """One tensor: what it is called there and here, and what was done to it."""

    source: str  # its name in the file; "" where there is none
    source_shape: Shape
    path: str  # ours; "" where there is none
    shape: Shape
    done: str  # copied, transposed, split, joined, resized, inflated, new, unused, ...
    problem: bool = False  # it should have been loaded and was not


@dataclass
class Report:
    """One line per tensor, and all problems together."""

    title: str
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # of the file as a whole

    @property
    def ok(self) -> bool:
        """Whether all that should have been loaded was."""
        return not self.problems and not any(line.problem for line in self.lines)

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors each thing was done to."""
        return dict(Counter("problem" if line.problem else line.done for line in self.lines))

    def summary(self) -> str:
        """A few lines: what was done how often, notes, problems."""
        parts = [self.title]
        parts += ["; ".join(f"{count} {done}" for done, count in self.counts.items())]
        parts += self.notes
        parts += [f"problem: {problem}" for problem in self.problems]
        parts += [f"problem: {_sentence(line)}" for line in self.lines if line.problem]
        return "\n".join(part for part in parts if part)

    def __str__(self) -> str:
        rows = [
            (line.source or "-", _shape(line.source_shape), line.path or "-", _shape(line.shape),
             ("problem: " if line.problem else "") + line.done)
            for line in self.lines
        ]  # fmt: skip
        header = ("tensor in the file", "shape", "tensor here", "shape", "done")
        return f"{table(header, rows, numbers_right=False)}\n\n{self.summary()}"


class WeightsError(UserError):
    """A checkpoint that is not loaded; `report` has every tensor."""

    def __init__(self, report: Report) -> None:
        super().__init__(report.summary())
        self.report = report


def _shape(shape: Shape) -> str:
    return "-" if shape is None else "x".join(map(str, shape)) or "scalar"


def _sentence(line: Line) -> str:
    name, shape = (line.source, line.source_shape) if line.source else (line.path, line.shape)
    return f"{name} {_shape(shape)}: {line.done}"
