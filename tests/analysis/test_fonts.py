"""Fonts for scripts that matplotlib's own font lacks, with a font made of one glyph."""

import io

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from mvit_jax.analysis import fonts, plots


@pytest.fixture
def one_glyph(tmp_path, monkeypatch):
    """Installs a font that draws 日 as a triangle, and no other fonts but matplotlib's."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((500, 900))
    pen.lineTo((1000, 0))
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "sun"])
    builder.setupCharacterMap({ord("日"): "sun"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "sun": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "sun": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Only Sun", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=100)
    builder.setupPost()
    path = str(tmp_path / "OnlySun-Regular.ttf")
    builder.save(path)
    installed = []
    manager = font_manager.fontManager
    bundled = [e for e in manager.ttflist if "matplotlib" in e.fname]
    monkeypatch.setattr(manager, "ttflist", bundled)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: installed)
    fonts._note.cache_clear()
    return lambda: installed.append(path)


def ink(names):
    """Returns the dark pixels of a figure with the classes `names`."""
    content = plots.png(plots.class_accuracy([50.0] * len(names), names), dpi=60)
    return np.asarray(Image.open(io.BytesIO(content)).convert("L")) < 128


def test_an_installed_font_with_the_glyphs_is_used(one_glyph, capsys):
    box = ink(["日"])
    assert "no installed font has the character 日" in capsys.readouterr().err
    one_glyph()
    assert fonts.installed_for({"日", "本"}) == (["Only Sun"], {"本"})
    drawn = ink(["日"])
    assert drawn.shape != box.shape or (drawn != box).any()
    assert capsys.readouterr().err == ""


def test_a_missing_font_is_named_once(one_glyph, capsys):
    for _ in range(2):
        ink(["日本", "हिन्दी", "plain"])
    assert capsys.readouterr().err == (
        f"note: no installed font has the character {min('हिन्दी')}, which figures show as a box: "
        "install Noto Sans CJK (Debian: fonts-noto-cjk) and Noto Sans Devanagari (Debian: "
        "fonts-noto-core)\n"
    )


def test_names_of_the_default_font_need_no_other(monkeypatch):
    monkeypatch.setattr(fonts, "installed_for", None)  # is not called
    assert ink(["ä ж α", "x\ny"]).any()
