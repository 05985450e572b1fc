"""Fonts for names in scripts that matplotlib's own font lacks, such as Chinese and Hindi."""

import functools
import sys
import unicodedata
from collections.abc import Iterable

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

# Fonts that draw a box for any character, or bitmaps that matplotlib cannot draw.
_UNUSABLE = ("Last Resort", "LastResort", "Color Emoji")
_EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH")


def complete(figure: Figure) -> bool:
    """Adds installed fonts to the texts of a drawn figure that lack glyphs.

    Prints a note on stderr, once per script, if no installed font has the glyphs.

    Returns:
      True if a text has another font now, so that the figure must be drawn again.
    """
    default = _characters(_default())
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    missing = {c for text in texts for c in text.get_text() if c.isprintable()} - default
    if not missing:
        return False
    families, without = installed_for(missing)
    if without:
        _note(frozenset(map(_font, without)), min(without))
    for text in texts:
        if families and missing.intersection(text.get_text()):
            text.set_fontfamily([*text.get_fontfamily(), *families])
    return bool(families)


def path_for(text: str) -> str:
    """Returns the file of matplotlib's font, or of an installed one if that lacks characters."""
    missing = {c for c in text if c.isprintable()} - _characters(_default())
    if not missing:
        return _default()
    families, without = installed_for(missing)
    if without:
        _note(frozenset(map(_font, without)), min(without))
    return font_manager.findfont(families[0]) if families else _default()


def _default() -> str:
    return font_manager.findfont(font_manager.FontProperties())


def installed_for(characters: set[str]) -> tuple[list[str], set[str]]:
    """Returns names of installed fonts that together have most of these characters, and the rest.

    Fonts that were installed after matplotlib cached its list are included.
    """
    families, rest = [], set(characters)
    manager = font_manager.fontManager
    listed = {entry.fname for entry in manager.ttflist}
    paths = sorted(listed.union(font_manager.findSystemFonts()), key=lambda p: "Regular" not in p)
    while rest:
        best = max(paths, key=lambda path: len(rest & _characters(path)))
        if not rest & _characters(best):
            break
        if best not in listed:
            manager.addfont(best)
        families.append(FT2Font(best).family_name)
        rest -= _characters(best)
    return families, rest


@functools.cache
def _characters(path: str) -> frozenset[str]:
    """Returns the characters of a font; none if it cannot be used."""
    try:
        font = FT2Font(path)
        if any(name in font.family_name for name in _UNUSABLE):
            return frozenset()
        return frozenset(map(chr, font.get_charmap()))
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def _font(character: str) -> str:
    """Returns the name of a free font that has the script of a character."""
    script = unicodedata.name(character, "").partition(" ")[0].partition("-")[0]
    if script in _EAST_ASIAN:
        return "Noto Sans CJK (Debian: fonts-noto-cjk)"
    return f"Noto Sans {script.capitalize()} (Debian: fonts-noto-core)"


@functools.cache
def _note(fonts: Iterable[str], example: str) -> None:
    print(
        f"note: no installed font has the character {example}, which figures show as a box: "
        f"install {' and '.join(sorted(fonts))}",
        file=sys.stderr, flush=True,
    )  # fmt: skip
