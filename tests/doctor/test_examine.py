"""The doctor as a process, also with a broken or missing torch; its checks and its output."""

import io
import json
import os
import subprocess
import sys

import pytest

from pylorus.doctor.examine import format_check_lines, format_json, print_checks, report_early_end
from pylorus.doctor.packages import Check, State, get_worst_state, run_guarded


@pytest.fixture
def doctor(tmp_path):
    """`pylorus doctor --json` in an empty folder, with a torch of the test's own making: an exit code and lines."""

    def start(torch: str):
        fakes = tmp_path / "fakes"
        (fakes / "torch").mkdir(parents=True)
        (fakes / "torch" / "__init__.py").write_text(torch)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(fakes), os.environ.get("PYTHONPATH", "")])}
        code = "from pylorus.cli import main; main(['doctor', '--json'])"
        work = tmp_path / "work"
        work.mkdir()
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert "Traceback" not in found.stderr
        assert list(work.iterdir()) == []
        return found.returncode, {check["name"]: check for check in json.loads(found.stdout)["checks"]}

    return start


@pytest.mark.slow
def test_a_broken_torch_is_one_error_and_the_other_checks_run(doctor):
    code, lines = doctor("raise OSError('libcudart.so.12: cannot open shared object file')")
    assert code == 1
    assert lines["torch"]["state"] == "wrong"
    assert "can't be imported: OSError: libcudart.so.12: cannot open" in lines["torch"]["found"]
    assert lines["torch"]["mend"].startswith("pip install --force-reinstall --no-deps 'torch==2")
    assert lines["skipped checks"]["state"] == "warning"
    assert [line for line in lines.values() if line["state"] == "wrong"] == [lines["torch"]]
    assert lines["results"]["state"] == lines["fonts"]["state"] == "good"


@pytest.mark.slow
def test_a_torch_that_crashes_python_is_named_with_the_signal(doctor):
    code, lines = doctor("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert code == 1
    assert lines["loading torch"]["state"] == "wrong"
    assert "SIGILL" in lines["loading torch"]["found"]
    assert "lacks an instruction" in lines["loading torch"]["mend"]
    assert lines["memory"]["state"] in ("good", "warning")


def test_a_package_that_hangs_or_exits_is_an_error():
    late = report_early_end("loading torch", -9, in_time=False, said="")
    assert "not finished within 600 s" in late.found
    ended = report_early_end("loading cv2", 3, in_time=True, said="libGL: no such file")
    assert ended.found.startswith("Python ended with exit code 3 (libGL: no such file)")


@pytest.mark.slow
def test_the_first_process_imports_no_compiled_package():
    code = (
        "import sys\nfrom pylorus.doctor import examine\n"
        "list(examine.check_packages()), list(examine.check_extras()), list(examine.check_space())\n"
        "print([name for name in ('torch', 'cv2', 'numpy', 'pandas', 'matplotlib', 'hydra') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


HASH = "0123456789abcdef" * 4
CHECKS = [
    Check("Packages", "torch", State.WRONG, "does not load: " + "word " * 30, "pip install --force-reinstall 'torch'"),
    Check("Packages", "extra", State.OPTIONAL, "not installed", "pip install 'pylorus[extra]'"),
    Check("Packages", "fonts", State.GOOD, "Latin only", "install Noto"),
    Check("Weights", "resnet50", State.WARNING, f"resnet50.tv_in1k SHA-256 {HASH}, damaged", "Bring it anew."),
    Check("Weights", "a name that is longer than the column", State.GOOD, "found"),
]


def test_lines_fit_the_terminal_and_commands_are_not_wrapped():
    for width in (80, 120):
        lines = [line for check in CHECKS for line in format_check_lines(check, width=width, coloured=False)]
        assert max(map(len, lines)) <= width
        assert sum(HASH in line for line in lines) == 1
        assert not [line for line in lines if line != line.rstrip()]


def test_a_problem_is_followed_by_its_remedy():
    text = "\n".join(format_check_lines(CHECKS[0], width=80, coloured=False))
    assert text.startswith("  wrong     torch")
    assert "fix: pip install" in text
    (absent,) = format_check_lines(CHECKS[1], width=80, coloured=False)
    assert absent.split(maxsplit=2) == ["optional", "extra", "not installed: pip install 'pylorus[extra]'"]
    (good,) = format_check_lines(CHECKS[2], width=80, coloured=False)
    assert good.split(maxsplit=2) == ["good", "fonts", "Latin only; optional: install Noto"]


def test_a_pipe_gets_no_colour_and_each_area_one_heading():
    output = io.StringIO()
    assert print_checks(CHECKS, output) is State.WRONG
    text = output.getvalue()
    assert "\x1b" not in text
    assert text.count("\nPackages\n") == text.count("\nWeights\n") == 1
    assert text.endswith("\n2 good, 1 warning, 1 wrong; 1 optional extra not installed\n")
    assert "\x1b[31mwrong" in "\n".join(format_check_lines(CHECKS[0], width=80, coloured=True))


def test_json_holds_every_line_and_the_worst_state():
    text, state = format_json(CHECKS)
    content = json.loads(text)
    assert state is State.WRONG
    assert content["state"] == "wrong"
    assert content["checks"][3]["found"].endswith("damaged")
    assert set(content["checks"][0]) == {"area", "name", "state", "found", "mend"}


FINE = Check("area", "thing", State.GOOD, "there, 3 × ü")


def test_a_check_is_unchanged_after_a_json_round_trip():
    assert Check.from_json(FINE.to_json()) == FINE
    assert "\n" not in Check("area", "thing", State.WRONG, "two\nlines").to_json()


def test_one_error_takes_precedence_over_warnings():
    lines = [FINE, Check("a", "b", State.WARNING, "c"), Check("a", "b", State.WRONG, "c"), FINE]
    assert get_worst_state(lines) is State.WRONG
    assert get_worst_state(lines[:2]) is State.WARNING
    assert get_worst_state([]) is State.GOOD


def test_a_check_that_fails_keeps_its_results_and_adds_an_error():
    def breaks():
        yield FINE
        raise RuntimeError("first line\nsecond line")

    first, second = run_guarded("area", "what", breaks)
    assert first == FINE
    assert second.state is State.WRONG
    assert second.found == "the check itself failed: RuntimeError: first line"
