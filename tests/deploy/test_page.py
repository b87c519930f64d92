"""The page in a headless Chromium, as users see it; skipped without Chromium."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest
from PIL import Image

from pylorus.deploy.model import load_bundle
from pylorus.deploy.predict import format_prediction_set

from .chromium import PROGRAM, Chromium

AIR_GAP = Path(__file__).parents[1] / "end_to_end" / "air_gap"
DONE = "document.querySelectorAll('.card').length == {} && !document.querySelector('.waiting')"
CARDS = "[...document.querySelectorAll('.card')].map((card) => card.innerText)"

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium on this machine")


class Server:
    """`pylorus serve` as a process of its own, cut off from every network but this machine."""

    def __init__(self, bundle: Path, folder: Path, *words: str):
        self.work, self.records = folder / "work", folder / "records"
        self.temporary = folder / "temporary"
        for made in (self.work, self.records, self.temporary):
            made.mkdir()
        paths = [str(AIR_GAP), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYLORUS_TEST_AIR_GAP": str(self.records),
            "TMPDIR": str(self.temporary),
        }
        program = [sys.executable, "-c", "from pylorus.cli import main; main()", "serve", str(bundle), "--port", "0"]
        self.process = subprocess.Popen(
            [*program, *words],
            cwd=self.work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said: list[str] = []
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("page: "):
                break
        else:
            raise AssertionError("".join(self.said))
        self.address = self.said[-1].split()[1]

    def end(self) -> tuple[int, str]:
        """Return its exit code and last output after Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def kept(self) -> list[Path]:
        """Return the files in its working folder and in its temporary folder."""
        return [*self.work.rglob("*"), *(path for path in self.temporary.rglob("*") if path.is_file())]

    def attempts(self) -> str:
        """Tries to leave this machine."""
        record = self.records / "attempts"
        return record.read_text() if record.is_file() else ""


@pytest.fixture(scope="module")
def server(bundle_folder, tmp_path_factory):
    started = Server(bundle_folder, tmp_path_factory.mktemp("server"))
    yield started
    if started.process.poll() is None:
        started.end()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    started = Chromium(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture
def tab(browser, server):
    """A tab with the page, ready."""

    def opened(**looks: object):
        new = browser.new_tab(server.address, **looks)
        new.until("!!document.querySelector('[data-ready]')")
        return new

    return opened


@pytest.fixture
def images(synthetic_root, tmp_path):
    """Three files of other names."""
    for place, path in enumerate(sorted(synthetic_root.glob("*/*"))[::10]):
        Image.open(path).save(tmp_path / f"frame {place}.png")
    return sorted(tmp_path.glob("*.png"))


@needs_browser
def test_images_can_be_chosen_and_results_viewed_and_downloaded(tab, images, bundle_folder, browser, tmp_path):
    page = tab()
    page.choose_files("#files", images)
    page.until(DONE.format(3))
    bundle = load_bundle(bundle_folder)
    names = bundle.description.short_names
    expected = bundle.predict_images(bundle.input.load_images(images))
    for place, (text, path) in enumerate(zip(page.run(CARDS), images, strict=True)):
        assert path.name in text
        assert ("No answer" in text) == bool(expected.why[place])
        likeliest = expected.predicted[place]
        assert f"{names[likeliest]}\n{100 * expected.probabilities[place, likeliest]:.1f} %" in text
        assert ("Gastric cancer: " in text) == (not expected.why[place])
        if not expected.why[place]:
            assert f"Gastric cancer: {'positive' if expected.positive[place] else 'negative'}" in text
        members = [name for name, member in zip(names, expected.sets[place], strict=True) if member]
        assert f"Prediction set (50 %): {', '.join(members) or 'empty'}" in text
    assert page.run("document.querySelector('.card img').naturalWidth") == 448
    none = int((expected.why != "").sum())
    assert page.run("document.getElementById('status').textContent").startswith(f"3 files: {3 - none} answered")
    assert page.run("document.querySelectorAll('#table tbody tr').length") == 3
    browser.ask(
        "Browser.setDownloadBehavior",
        behavior="allow",
        downloadPath=str(tmp_path / "got"),
        browserContextId=page.context,
    )
    page.run("document.getElementById('download').click()")
    file = tmp_path / "got" / "predictions.csv"
    end = time.monotonic() + 30
    while not file.is_file() and time.monotonic() < end:
        time.sleep(0.05)
    with file.open(encoding="utf-8-sig", newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["file"] for row in rows] == [path.name for path in images]
    found = [[float(row[f"probability/{name}"]) for name in names] for row in rows]
    assert np.allclose(found, expected.probabilities, atol=1e-6)
    assert [row["prediction_set"] for row in rows] == [format_prediction_set(names, row) for row in expected.sets]
    assert "too small to guarantee a sensitivity of 95 % for GC" in page.run("document.body.innerText")


@needs_browser
def test_invalid_and_large_files_show_an_error_and_20_mb_pass(tab, images, tmp_path):
    wrong = tmp_path / "notes.jpg"
    wrong.write_text("no image")
    full, over = tmp_path / "full.png", tmp_path / "over.png"
    content = images[0].read_bytes()
    full.write_bytes(content + bytes(20_000_000 - len(content)))
    over.write_bytes(content + bytes(20_100_000 - len(content)))
    page = tab()
    page.choose_files("#files", [wrong, full, over])
    page.until(DONE.format(3))
    first, second, third = page.run(CARDS)
    assert "Not processed" in first
    assert "no readable JPEG" in first
    assert "Not processed" not in second
    assert "over the limit of 20 MB" in third
    assert "2 not processed" in page.run("document.getElementById('status').textContent")


@needs_browser
def test_two_concurrent_users_see_only_their_own_results(tab, images):
    users = [tab(), tab()]
    sent = [[images[0], images[1]], [images[2]]]
    for page, files in zip(users, sent, strict=True):
        page.choose_files("#files", files)
    for page, files in zip(users, sent, strict=True):
        page.until(DONE.format(len(files)))
        shown = page.run("[...document.querySelectorAll('.card .name')].map((name) => name.textContent)")
        assert shown == [path.name for path in files]


@needs_browser
def test_files_can_be_dropped_and_names_are_escaped(tab):
    page = tab()
    page.run(
        "(() => { const held = new DataTransfer();"
        "held.items.add(new File(['no image'], '<img src=x onerror=window.hacked=1>.png'));"
        "document.getElementById('drop').dispatchEvent(new DragEvent('drop', {dataTransfer: held, bubbles: true, cancelable: true})); })()"
    )
    page.until(DONE.format(1))
    assert "<img src=x onerror=window.hacked=1>.png" in page.run(CARDS)[0]
    assert page.run("window.hacked") is None
    page.run("document.getElementById('clear').click()")
    assert page.run("document.querySelectorAll('.card').length") == 0
    assert page.run("document.getElementById('summary').hidden") is True


@needs_browser
def test_a_downloaded_table_contains_no_formulas_and_preserves_unusual_names(tab):
    names = ["=1+1.png", "@a", "-b", 'quo"te, comma.png', "plain.png"]
    script = f"import('./static/table.js').then((table) => table.asCsv({json.dumps([{'file': name, 'error': 'bad'} for name in names])}, ['A']))"
    rows = list(csv.reader(tab().run(script).splitlines()))
    assert rows[0] == ["file", "predicted", "probability/A", "decision", "abstain", "why", "unlikeness", "error"]
    assert [row[0] for row in rows[1:]] == ["'=1+1.png", "'@a", "'-b", 'quo"te, comma.png', "plain.png"]
    assert all(row[1:] == ["", "", "", "", "", "", "bad"] for row in rows[1:])


@needs_browser
def test_a_busy_or_stopped_server_is_reported(tab, images):
    page = tab()
    page.run("window.fetch = async () => new Response('<html>', {status: 502})")
    page.choose_files("#files", images[:1])
    page.until(DONE.format(1))
    assert "the server answered 502" in page.run(CARDS)[0]
    page.run("window.fetch = async () => { throw new TypeError('gone') }")
    page.choose_files("#files", images[1:2])
    page.until(DONE.format(2))
    assert "the server did not answer; is it still running?" in page.run(CARDS)[1]


@needs_browser
def test_the_page_sends_requests_only_to_its_server(tab, images, server):
    page = tab()
    page.choose_files("#files", images)
    page.until(DONE.format(3))
    asked = {event["request"]["url"].split(",")[0] for event in page.events("Network.requestWillBeSent")}
    assert all(url.startswith((server.address, "data:image/jpeg;base64")) for url in asked), asked
    assert page.events("Log.entryAdded") == page.events("Runtime.exceptionThrown") == []
    for attempt in (
        "fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')",
        "new Promise((done) => Object.assign(new Image(), {onload: () => done('sent'), onerror: () => done('refused'), src: 'http://127.0.0.1:9/a.png'}))",
        "new Promise((done) => document.head.append(Object.assign(document.createElement('script'), {onload: () => done('sent'), onerror: () => done('refused'), src: 'http://127.0.0.1:9/a.js'})))",
    ):
        assert page.run(attempt) == "refused"
    blocked = " ".join(event["entry"]["text"] for event in page.events("Log.entryAdded"))
    for directive in ("connect-src", "img-src", "script-src"):
        assert f"violates the following Content Security Policy directive: \"{directive} 'self'" in blocked


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_the_page_fits_the_screen_and_always_shows_the_disclaimer(tab, images, width, height, dark):
    page = tab(width=width, height=height, dark=dark)
    page.choose_files("#files", images)
    page.until(DONE.format(3))
    page.run("document.querySelector('details').open = true")
    assert page.run("document.documentElement.scrollWidth <= window.innerWidth")
    for place in (0, 100_000):
        page.run(f"window.scrollTo(0, {place})")
        top, text = page.run(
            "[document.querySelector('.notice').getBoundingClientRect().top, document.querySelector('.notice').innerText]"
        )
        assert top == 0
        assert text.startswith("Research use only. Not a medical device.")
    assert page.run(CONTRAST) == []


CONTRAST = """(() => {
  const light = (text) => {
    const parts = text.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255).map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll('body *')].filter((element) => !element.disabled && element.checkVisibility() && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())).map((element) => {
    const [one, other] = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
    return [(one + 0.05) / (other + 0.05), element.className, element.textContent.slice(0, 30)];
  }).filter(([ratio]) => ratio < 4.5);
})()"""
"""Texts of less than WCAG's contrast of 4.5 to 1."""


@needs_browser
def test_the_page_works_with_keyboard_and_screen_reader(tab, images):
    page = tab()
    reached = []
    for _ in range(6):
        page.press("Tab", 9)
        reached.append(page.run("document.activeElement.id || document.activeElement.textContent"))
    assert reached[:2] == ["Skip to the images", "to-card"]
    assert {"files", "Data, training, performance and limitations"} <= set(reached)
    page.choose_files("#files", images[:1])
    page.until(DONE.format(1))
    nodes = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in page.ask("Accessibility.getFullAXTree")["nodes"]
        if not node.get("ignored") and "role" in node
    ]
    spoken = ("button", "image", "checkbox", "link", "region", "table", "list")
    assert [role for role, name in nodes if role in spoken and role != "list" and role != "table" and not name] == []
    assert ("list", "Probabilities") in nodes
    assert ("image", f"{images[0].name}, as the network sees it") in nodes
    assert page.run("document.getElementById('status').getAttribute('aria-live')") == "polite"
    assert page.run("document.getElementById('status').textContent").startswith(images[0].name)


PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def show_answers(page, answers: list[dict], images: list[Path]) -> None:
    """Upload an image for each of these answers, which take the place of the server's."""
    common = {"error": "", "abstain": False, "why": "", "unlikeness": 0.5, "image": PIXEL, "heat_map": PIXEL}
    rows = json.dumps([common | {"prediction_set": [answer["predicted"]]} | answer for answer in answers])
    page.run(
        f"(() => {{ const rows = {rows}; window.fetch = async () => Response.json({{results: [rows.shift()]}}) }})()"
    )
    for number, image in enumerate(images[: len(answers)], 1):
        page.choose_files("#files", [image])
        page.until(DONE.format(number))


def answer(predicted: str, decision: str, *probabilities: float, **others: object) -> dict:
    """Return an answer of the server with these probabilities of GC, GU and CG."""
    shares = dict(zip(("GC", "GU", "CG"), probabilities, strict=True))
    return {"predicted": predicted, "decision": decision, "probability": shares, **others}


@needs_browser
def test_a_card_has_one_verdict_that_the_numbers_below_it_explain(tab, images):
    page = tab()
    answers = [answer("GU", "GC", 0.339, 0.5, 0.161), answer("GC", "not GC", 0.5, 0.3, 0.2)]
    show_answers(page, [*answers, answer("GU", "not GC", 0.0004, 0.9, 0.0996)], images)
    verdicts = page.run(
        "[...document.querySelectorAll('.card')].map((card) => card.querySelector('.verdict').innerText)"
    )
    assert verdicts == ["Gastric cancer: positive", "Gastric cancer: negative", "Gastric cancer: negative"]
    first, second, third = page.run(CARDS)
    assert "The probability, 33.9 %, reaches the threshold of" in first
    assert "Most probable class: gastric ulcer (50.0 %)." in first
    assert "The probability, 50.0 %, is below the threshold of" in second
    assert "No other class is more probable." in second
    assert "The probability, < 0.1 %, is below the threshold of" in third
    for text in (first, second, third):
        assert text.count("positive") + text.count("negative") == 1
        assert "Gastric ulcer GU\n" in text
    results = page.run("[...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[1].innerText)")
    assert results == verdicts


@needs_browser
def test_a_card_without_an_answer_has_a_reason_and_no_verdict_or_heat_map(tab, images):
    page = tab()
    unlike = answer("GC", "GC", 0.9, 0.06, 0.04, abstain=True, why="unlike", unlikeness=99.0)
    unsure = answer("GU", "GC", 0.2, 0.41, 0.39, abstain=True, why="unsure")
    show_answers(page, [unlike, unsure], images)
    first, second = page.run(CARDS)
    assert "No answer\n\nThe image is unlike those the model was trained on (unlikeness 99.000, limit" in first
    assert "No answer\n\nThe model is uncertain (gastric ulcer has 41.0 %, an answer needs" in second
    for text in (first, second):
        assert "Do not use the numbers below." in text
        assert "positive" not in text
        assert "Heat map" not in text
    results = page.run("[...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[1].innerText)")
    assert results == ["No answer: unlike the training images", "No answer: uncertain"]


@needs_browser
def test_without_a_threshold_the_most_probable_class_is_the_verdict(tab):
    model = {
        "classes": ["gastric_cancer", "ulcer"],
        "short_names": ["GC", "GU"],
        "decision": {"class": "GC", "threshold": None},
    }
    row = {"predicted": "GU", "decision": "not GC", "probability": {"GC": 0.2, "GU": 0.8}}
    words = f"{json.dumps(row)}, {json.dumps(model)}"
    page = tab()
    assert page.run(f"import('./static/table.js').then((table) => table.describeVerdict({words}))") == "Ulcer, 80.0 %"
    texts = page.run("import('./static/table.js').then((table) => table.percents(0.57094, 0.5711))")
    assert texts == ["57.09 %", "57.11 %"]


@needs_browser
@pytest.mark.parametrize(("width", "beside"), [(1280, True), (390, False)])
def test_the_heat_map_is_beside_the_image_and_below_it_on_a_phone(tab, images, width, beside):
    page = tab(width=width)
    show_answers(page, [answer("GU", "not GC", 0.1, 0.8, 0.1)], images)
    image, heat_map = page.run(
        "[...document.querySelectorAll('.card img')].map((image) => [image.alt, image.getBoundingClientRect().toJSON()])"
    )
    assert image[0] == f"{images[0].name}, as the network sees it"
    assert heat_map[0] == f"{images[0].name}, brightest where it most supports gastric ulcer"
    assert (image[1]["top"] == heat_map[1]["top"]) == beside
    assert (image[1]["left"] == heat_map[1]["left"]) != beside
    assert page.run("[...document.querySelectorAll('figcaption')].map((each) => each.innerText)") == [
        "Image",
        "Heat map: gastric ulcer",
    ]


@needs_browser
def test_everything_that_can_be_used_is_reached_by_tab_with_a_visible_focus(tab, images):
    page = tab()
    page.choose_files("#files", images[:1])
    page.until(DONE.format(1))
    focus = (
        "(() => { const at = document.activeElement; const style = getComputedStyle(at.id === 'files' ? at.parentElement : at);"
        "return [at.id || at.className || at.localName, parseFloat(style.outlineWidth) >= 2 && style.outlineStyle !== 'none']; })()"
    )
    reached = {}
    for _ in range(9):
        page.press("Tab", 9)
        name, visible = page.run(focus)
        reached[name] = visible
    assert {"skip", "to-card", "files", "download", "clear", "scroll", "summary"} <= set(reached)
    assert [name for name, visible in reached.items() if not visible and name != "body"] == []
    page.run("document.getElementById('clear').focus()")
    page.press("Enter", 13, "\r")
    assert page.run("document.querySelectorAll('.card').length") == 0
    assert page.run("document.activeElement.id") == "files"


def predicted(address: str, path: Path) -> dict:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        + path.read_bytes()
        + b"\r\n--x--\r\n"
    )
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    with urlopen(Request(f"{address}api/predict?image=1&heat_map=1", body, form), timeout=60) as answer:
        return json.load(answer)


def test_the_server_uses_only_loopback_writes_nothing_and_stops_with_ctrl_c(bundle_folder, images, tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(bundle_folder, folder)
    large = tmp_path / "large.png"
    large.write_bytes(images[0].read_bytes() + bytes(5_000_000))
    assert predicted(server.address, large)["results"][0]["error"] == ""
    sockets = psutil.Process(server.process.pid).net_connections()
    assert {each.laddr.ip for each in sockets} == {"127.0.0.1"}
    assert [each.status for each in sockets].count("LISTEN") == 1
    began = time.monotonic()
    code, said = server.end()
    assert code == 0, said
    assert said.strip() == "stopped"
    assert time.monotonic() - began < 30
    assert server.kept() == []
    assert server.attempts() == ""
