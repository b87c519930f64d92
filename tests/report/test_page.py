import html.parser
import re

import pytest

from pylorus.report.page import write_report
from pylorus.report.results import ReportOptions

FAST = ReportOptions(resamples=100)


class Reader(html.parser.HTMLParser):
    """Collects anchors, targets, pictures and whether every opened element is closed."""

    EMPTY = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.targets, self.pictures, self.loose = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.targets += [values["href"]] if "href" in values else []
        self.pictures += [values] if tag == "img" else []
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open.pop() != tag:
            self.loose.append(tag)


def read(text):
    reader = Reader()
    reader.feed(text)
    return reader


@pytest.fixture
def page(written):
    return (written / "report" / "report.html").read_text()


def test_the_page_asks_for_nothing_outside_itself(make_run, undrawn):
    options = ReportOptions(published=True, resamples=100)
    text = write_report([make_run()], options=options).read_text()
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text)
    assert "<script" not in text
    assert "<link" not in text


def test_the_drawn_figures_ask_for_nothing_outside_themselves_either(written):
    namespaces = r"http://www\.w3\.org/(2000/svg|1999/xlink)|http://www\.w3\.org/Graphics/SVG/1\.1/DTD/svg11\.dtd"
    for figure in (written / "report" / "figures").glob("*.svg"):
        text = re.sub(r"<metadata>.*?</metadata>", "", figure.read_text(), flags=re.S)
        assert not re.search(r"https?://", re.sub(namespaces, "", text)), figure.name


def test_every_element_is_closed_and_every_link_of_the_contents_leads_somewhere(page):
    found = read(page)
    assert (found.open, found.loose) == ([], [])
    assert len(found.ids) == len(set(found.ids))
    assert {target.removeprefix("#") for target in found.targets} <= set(found.ids)
    assert "#summary" in found.targets


def test_every_figure_has_words_for_those_who_can_not_see_it(page):
    pictures = read(page).pictures
    assert len(pictures) == 10
    assert all(len(picture["alt"]) > 20 for picture in pictures)


def test_tables_and_figures_are_numbered_without_a_gap(page):
    for word in ("Table", "Figure"):
        numbers = [int(number) for number in re.findall(rf"<b>{word} (\d+)\.</b>", page)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert numbers


def test_every_caption_of_test_results_says_its_level_and_cites_the_split(page):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, flags=re.S)
    exempt = ("Runs", "Machine and versions", "Draft of the", "Structure of")
    told = [caption for caption in captions if not any(word in caption for word in exempt)]
    assert len(told) > 15
    for caption in told:
        assert re.search(r"(Image|Patient)-level; .*split [0-9a-f]{12}", caption), caption


def test_neither_folders_nor_file_names_nor_groups_are_on_the_page_or_in_any_table(make_run, tmp_path, undrawn):
    run = make_run(images_per_group=2, error="cannot read /hospital/patients/x.jpg", state="failed", finished=1)
    page = write_report([run], options=FAST)
    for file in [page, *(run / "report" / "tables").iterdir()]:
        text = file.read_text().replace(r"patient_\d+", "")  # the regular expression names nobody
        for secret in ("/hospital", ".jpg", "test_GC_patient", "patient_0", str(tmp_path)):
            assert secret not in text, (file.name, secret)


def test_with_names_files_groups_and_errors_are_shown(make_run, undrawn):
    run = make_run(images_per_group=2, error="cannot read /hospital/patients/x.jpg", state="failed", finished=1)
    text = write_report([run], options=ReportOptions(names=True, resamples=100)).read_text()
    assert "/hospital/patients" in text
    assert "cannot read" in text
    assert re.search(r"test_G[CU]_patient_\d+", text)


def test_names_of_classes_are_text_and_never_markup(make_run, undrawn):
    run = make_run(names=("<b>bold", "a&b", '"c"'))
    text = write_report([run], options=FAST).read_text()
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold" in text
    found = read(text)
    assert (found.open, found.loose) == ([], [])


def test_a_blank_of_the_checklist_is_marked_for_the_author(page):
    assert '<span class="blank">[author: objectives and hypotheses]</span>' in page
