"""Plain text for terminals and logs: tables, sections, counts, the first line of an error."""

from collections.abc import Iterable, Sequence

Lines = list[tuple[str, str]]  # what, and what of it

_NUMBER = set("0123456789+-")


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_right: bool = True
) -> str:
    """Rows in aligned columns under a ruled header.

    Args:
      numbers_right: align numbers, but for those of the first column, to the right.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width)
            if numbers_right and i and cell[:1] in _NUMBER and " " not in cell
            else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def section(title: str, lines: Lines) -> str:
    """A title, and under it what stands beside what."""
    return f"{title}\n{indented(aligned(lines))}"


def aligned(lines: Lines) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines)


def indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def by(sizes: Iterable[int]) -> str:
    """ "16x224x224"."""
    return "x".join(map(str, sizes))


def plural(count: int, noun: str) -> str:
    """ "1 chip", "2 chips"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
