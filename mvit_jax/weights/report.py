"""Report of a weight conversion: one line per tensor."""

from collections import Counter
from dataclasses import dataclass, field

from mvit_jax.common.errors import UserError
from mvit_jax.common.text import table

Shape = tuple[int, ...] | None


@dataclass(frozen=True)
class Line:
    """One tensor: its name and shape in the file and in the model, and the conversion."""

    source: str  # name in the file; "" if the file has no such tensor
    source_shape: Shape
    path: str  # path in the model; "" if the model has no such tensor
    shape: Shape
    done: str  # copied, transposed, split, joined, resized, inflated, new, unused, ...
    problem: bool = False  # True: the checkpoint does not fit because of this tensor


@dataclass
class Report:
    """Report of a conversion: one line per tensor, notes and problems."""

    title: str
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # that concern the whole file

    @property
    def ok(self) -> bool:
        """True if neither the file nor a tensor has a problem."""
        return not self.problems and not any(line.problem for line in self.lines)

    @property
    def counts(self) -> dict[str, int]:
        """The number of tensors by conversion; tensors with a problem count as "problem"."""
        return dict(Counter("problem" if line.problem else line.done for line in self.lines))

    def summary(self) -> str:
        """Returns a few lines: the counts, the notes and the problems."""
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
        header = ("tensor in the file", "shape", "tensor in the model", "shape", "done")
        return f"{table(header, rows, numbers_right=False)}\n\n{self.summary()}"


class WeightsError(UserError):
    """Error for a checkpoint that does not fit the model; `report` lists every tensor."""

    def __init__(self, report: Report) -> None:
        super().__init__(report.summary())
        self.report = report


def _shape(shape: Shape) -> str:
    return "-" if shape is None else "x".join(map(str, shape)) or "scalar"


def _sentence(line: Line) -> str:
    name, shape = (line.source, line.source_shape) if line.source else (line.path, line.shape)
    return f"{name} {_shape(shape)}: {line.done}"
