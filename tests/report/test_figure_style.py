import io
import logging
import re
import warnings
from pathlib import Path

import pytest
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from pylorus.report import figure_style, page
from pylorus.report.evidence import collect_evidence
from pylorus.report.figure_style import (
    Drawing,
    add_legend_above,
    create_figure,
    find_cjk_font_file,
    render_png,
    wrap_text,
)
from pylorus.report.results import ReportOptions


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


HARD_NAMES = {
    "special": ["$alpha$ & $beta_1$", "_normal", r"a\b\frac{1}{2}", "<b>bold</b> & 50 %", "x^2_3 {curly} #1 ~"],
    "long": ["gastric_intestinal_metaplasia_type_2", "chronic_atrophic_gastritis_with_bile", "early_cancer_type_0-IIc"],
    "many": [f"class_{number:02d}_of_a_long_name_in_35_char" for number in range(27)],
    "scripts": ["胃炎", "胃溃疡 (慢性)", "قرحة المعدة", "\N{GRINNING FACE} polyp", "Ärztin größer", "язва желудка"],
}


@pytest.fixture
def no_fonts(monkeypatch):
    """A machine whose only fonts are matplotlib's."""
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    caches = (figure_style._load_cjk_font, figure_style._find_font_files, figure_style._warn_of_missing_fonts)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def build_drawings(folder):
    options = ReportOptions(resamples=20)
    sections = page.build_sections(collect_evidence([folder], options))
    return list(page._iter_drawings(sections))


@pytest.fixture
def drawn_texts(monkeypatch):
    """The texts that are drawn; an axis also has labels outside its limits, which are not."""
    drawn = []
    draw = Text.draw

    def record(self, renderer, *arguments, **options):
        drawn.append(self)
        return draw(self, renderer, *arguments, **options)

    monkeypatch.setattr(Text, "draw", record)
    return drawn


@pytest.mark.parametrize("kind", HARD_NAMES)
def test_class_names_are_whole_plain_and_apart_in_every_figure(make_run, no_fonts, drawn_texts, kind):
    names = HARD_NAMES[kind]
    folder = make_run(names=names, test_each=[6] * len(names), val_each=[4] * len(names), network=False)
    drawings = build_drawings(folder)
    assert {"confusion-matrices", "roc", "indices-resnet50-finetune"} <= {drawing.key for drawing in drawings}
    for drawing in drawings:
        drawn_texts.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as of a missing glyph, or a layout that was not applied
            FigureCanvasAgg(drawing.figure).draw()
        canvas, boxes = drawing.figure.bbox, []
        for text in {id(text): text for text in drawn_texts if text.get_text().strip()}.values():
            assert not text.get_parse_math()
            box = text.get_window_extent()
            outside = (canvas.x0 - box.x0, box.x1 - canvas.x1, canvas.y0 - box.y0, box.y1 - canvas.y1)
            assert max(outside) <= 1, (drawing.key, text.get_text(), outside)
            if text.get_rotation() == 0:  # the boxes of slanted labels overlap
                boxes.append((text.get_text(), box))
        check_apart(drawing.key, boxes)


def check_apart(key, boxes):
    for number, (text, box) in enumerate(boxes):
        for other_text, other in boxes[number + 1 :]:
            overlap = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(overlap) < 2, (key, text, other_text, overlap)


def test_letters_stand_for_what_no_font_can_draw_and_the_caption_explains_them(make_run, no_fonts):
    drawings = build_drawings(make_run(names=["胃炎", "胃溃疡 (慢性)", "GC"], network=False))
    confusion = next(drawing for drawing in drawings if drawing.key == "confusion-matrices")
    assert "no installed font can draw: [A] 胃炎, [B] 胃溃疡, [C] 慢性." in confusion.notes[-1]
    words = {text.get_text() for text in confusion.figure.findobj(Text)}
    assert {"[A]", "[B] ([C])", "GC"} <= words


def test_a_legend_has_labels_that_begin_with_an_underscore():
    figure = create_figure(2, legend=["_normal", "GC"])
    axes = figure.subplots()
    handles = [*axes.plot([0, 1]), *axes.plot([1, 0])]
    add_legend_above(figure, handles, ["_normal", "GC"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_normal", "GC"]


def test_a_figure_is_safe_whoever_draws_it(no_fonts):
    figure = create_figure(2)
    text = figure.subplots().text(0, 0, r"$\frac{1}{2}$ 胃癌")
    file = io.BytesIO()
    figure.savefig(file)
    assert not text.get_parse_math()
    assert text.get_text() == r"$\frac{1}{2}$ [U+80C3 U+764C]"


def test_no_figure_is_created_past_the_style():
    source = Path(figure_style.__file__).parents[1]
    found = [
        path.name
        for path in source.rglob("*.py")
        if re.search(r"(?<![\w])(plt|pyplot|Figure\(figsize)", path.read_text("utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("intestinal_metaplasia", ["intestinal_", "metaplasia"]),
        ("GC, predicted as _normal", ["GC, predicted", "as _normal"]),
        ("abcdefghijklmnopqrstuvw", ["abcdefghijklm", "nopqrstuvw"]),
        ("a\nb", ["a", "b"]),
        ("", [""]),
    ],
)
def test_text_is_wrapped_by_its_measured_width(text, lines):
    assert wrap_text(text, 0.9, 8).split("\n") == lines
