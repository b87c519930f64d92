"""What people and programs read."""

import io
import json

from pylorus.doctor.check import Check, State
from pylorus.doctor.examine import format_check_lines, format_json, print_checks

HASH = "0123456789abcdef" * 4
CHECKS = [
    Check("Packages", "torch", State.WRONG, "does not load: " + "word " * 30, "pip install --force-reinstall 'torch'"),
    Check("Packages", "extra", State.GOOD, "not installed", "pip install 'pylorus[extra]'"),
    Check("Weights", "resnet50", State.WARNING, f"resnet50.tv_in1k SHA-256 {HASH}, damaged", "Bring it anew."),
    Check("Weights", "a name that is longer than the column", State.GOOD, "found"),
]


def test_lines_fit_into_the_terminal_and_words_to_be_copied_stay_whole():
    for width in (80, 120):
        lines = [line for check in CHECKS for line in format_check_lines(check, width=width, coloured=False)]
        assert max(map(len, lines)) <= width
        assert sum(HASH in line for line in lines) == 1
        assert not [line for line in lines if line != line.rstrip()]


def test_what_is_not_good_is_followed_by_its_mend():
    text = "\n".join(format_check_lines(CHECKS[0], width=80, coloured=False))
    assert text.startswith("  wrong    torch")
    assert "fix: pip install" in text
    good = "\n".join(format_check_lines(CHECKS[1], width=80, coloured=False))
    assert good.startswith("  good     extra")
    assert "optional: pip install 'pylorus[extra]'" in " ".join(good.split())


def test_a_pipe_gets_no_colour_and_each_area_one_heading():
    output = io.StringIO()
    assert print_checks(CHECKS, output) is State.WRONG
    text = output.getvalue()
    assert "\x1b" not in text
    assert text.count("\nPackages\n") == text.count("\nWeights\n") == 1
    assert text.endswith("\n2 good, 1 warning, 1 wrong\n")
    assert "\x1b[31mwrong" in "\n".join(format_check_lines(CHECKS[0], width=80, coloured=True))


def test_json_holds_every_line_and_the_worst_state():
    text, state = format_json(CHECKS)
    content = json.loads(text)
    assert state is State.WRONG
    assert content["state"] == "wrong"
    assert content["checks"][2]["found"].endswith("damaged")
    assert set(content["checks"][0]) == {"area", "name", "state", "found", "mend"}
