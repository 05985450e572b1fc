"""Tables of predictions for terminals."""

import sys
from typing import Any

from mvit_jax.common.text import printable, table
from mvit_jax.predict.windows import clock, interval

PERSONS = 20  # printed of a file


def show(results: list[dict[str, Any]]) -> bool:
    """Prints the results, and failures to stderr; returns True if a file failed."""
    done = [result for result in results if "classes" in result]
    if done:
        print(_align(classes(done)))
    people = [result for result in results if "persons" in result]
    if people:
        print(_align(persons(people)))
    for result in done:
        if "timeline" in result:
            line = result["timeline"]
            print(
                f"\n{printable(result['file'])}: {clock(line['seconds'])}, means over "
                f"{len(line['windows'])} windows above, over time:\n{_align(segments(line))}"
            )
    written = [path for result in results for path in result.get("pictures", ())]
    if written:
        print("wrote " + ", ".join(map(printable, written)))
    failures = [result for result in results if "error" in result]
    for result in failures:
        between = " " if result["error"].startswith("cannot be decoded") else ": "
        print(f"{printable(result['file'])}{between}{result['error']}", file=sys.stderr)
    return bool(failures)


def classes(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Returns rows of file, class and probability, headings first."""
    rows = [("file", "class", "probability")]
    for result in results:
        for rank, entry in enumerate(result["classes"]):
            file = printable(result["file"]) if rank == 0 else ""
            rows.append((file, entry["class"], f"{entry['probability']:.4f}"))
    return rows


def persons(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Returns rows of file, person, time, class and mean probability, headings first."""
    rows: list[tuple[str, ...]] = [("file", "person", "time", "class", "probability")]
    for result in results:
        file = printable(result["file"])
        for person in result["persons"][:PERSONS]:
            start = [file, str(person["track"]), moments(person)]
            for entry in person["classes"]:
                rows.append((*start, entry["class"], f"{entry['probability']:.2f}"))
                start = [""] * 3
            file = ""
        if not result["persons"]:
            rows.append((file, "none", "", "", ""))
        elif len(result["persons"]) > PERSONS:
            rows.append(("", f"and {len(result['persons']) - PERSONS} more, see --json", *[""] * 3))
    return rows


def moments(person: dict[str, Any]) -> str:
    """Returns the time of a person's only box, or those of the first and the last one."""
    start, end = person["start"], person["end"]
    return interval(start, end) if end > start else clock(start, 1)


def segments(timeline: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns rows of time, class and probability, headings first."""
    rows = [("time", "class", "probability")]
    for s in timeline["segments"]:
        rows.append((interval(s["start"], s["end"]), s["class"], f"{s['probability']:.2f}"))
    return rows


def _align(rows: list[tuple[str, ...]]) -> str:
    return table(rows[0], rows[1:], numbers_right=False)
