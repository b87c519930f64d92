import logging
import warnings

import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from pylorus.report import figure_style
from pylorus.report.figure_style import Drawing, find_cjk_font_file, render_png


@pytest.fixture
def labelled_figure():
    figure = Figure()
    axes = figure.subplots()
    texts = [axes.text(0, number, words) for number, words in enumerate(("GC, 95 % − κ ≥ 0.5", "胃癌"))]
    return figure, texts


def test_names_in_other_scripts_get_a_font_that_has_them_and_other_texts_keep_theirs(labelled_figure, monkeypatch):
    monkeypatch.setattr(figure_style, "_load_cjk_font", lambda: "Some CJK")
    figure, (latin, chinese) = labelled_figure
    before = latin.get_fontfamily()
    figure_style.set_figure_fonts(figure)
    assert latin.get_fontfamily() == before
    assert chinese.get_fontfamily() == ["DejaVu Sans", "Some CJK"]


def test_missing_fonts_are_reported_once_with_a_remedy(labelled_figure, monkeypatch, caplog):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    figure_style._load_cjk_font.cache_clear()
    figure_style._find_font_files.cache_clear()
    figure, _ = labelled_figure
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render_png(Drawing("key", "Title", "", "alt", figure)).startswith(b"\x89PNG")
        figure_style.set_figure_fonts(figure)
    figure_style._load_cjk_font.cache_clear()
    figure_style._find_font_files.cache_clear()
    assert [record.message for record in caplog.records if "fonts-noto-cjk" in record.message] != []
    assert sum("fonts-noto-cjk" in record.message for record in caplog.records) == 1


def test_the_regular_font_weight_is_chosen_deterministically(tmp_path, monkeypatch):
    installed = [str(tmp_path / name) for name in ("NotoSansCJK-Bold.ttc", "NotoSansCJK-Regular.ttc", "Other.ttf")]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: installed)
    assert find_cjk_font_file() == tmp_path / "NotoSansCJK-Regular.ttc"
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "Other.ttf")])
    assert find_cjk_font_file() is None
