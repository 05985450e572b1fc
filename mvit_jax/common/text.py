"""Plain text for terminals and logs: tables, sections, counts and first lines of errors."""

from collections.abc import Iterable, Sequence

Lines = list[tuple[str, str]]  # name and text of each line

_NUMBER = set("0123456789+-")


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_right: bool = True
) -> str:
    """Returns rows in aligned columns under a ruled header.

    Args:
      numbers_right: right-align numbers in all columns but the first.
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
    """Returns a title and, indented under it, the lines in two aligned columns."""
    return f"{title}\n{indent(align(lines))}"


def align(lines: Lines) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines)


def indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def join_sizes(sizes: Iterable[int]) -> str:
    """Joins sizes by "x", as in "16x224x224"."""
    return "x".join(map(str, sizes))


def plural(count: int, noun: str) -> str:
    """Formats a count and its noun, as in "1 chip" or "2 chips"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def printable(name: str) -> str:
    """Escapes line breaks, and bytes of a file's name that are not UTF-8."""
    text = name.encode(errors="backslashreplace").decode()
    return text.replace("\n", "\\n").replace("\r", "\\r")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the error's type if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
