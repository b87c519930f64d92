"""The whole doctor as a process, also where torch is broken, missing, or ends Python."""

import json
import os
import subprocess
import sys

import pytest

from pylorus.doctor.examine import report_early_end


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


def test_a_torch_that_does_not_load_is_one_wrong_line_and_the_rest_is_looked_at(doctor):
    code, lines = doctor("raise OSError('libcudart.so.12: cannot open shared object file')")
    assert code == 1
    assert lines["torch"]["state"] == "wrong"
    assert "can't be imported: OSError: libcudart.so.12: cannot open" in lines["torch"]["found"]
    assert lines["torch"]["mend"].startswith("pip install --force-reinstall --no-deps 'torch==2")
    assert lines["skipped checks"]["state"] == "warning"
    assert [line for line in lines.values() if line["state"] == "wrong"] == [lines["torch"]]
    assert lines["results"]["state"] == lines["fonts"]["state"] == "good"


def test_a_torch_that_ends_python_is_named_with_the_signal(doctor):
    code, lines = doctor("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert code == 1
    assert lines["loading torch"]["state"] == "wrong"
    assert "SIGILL" in lines["loading torch"]["found"]
    assert "lacks an instruction" in lines["loading torch"]["mend"]
    assert lines["memory"]["state"] in ("good", "warning")


def test_one_that_hangs_or_exits_is_a_line_too():
    late = report_early_end("loading torch", -9, in_time=False, said="")
    assert "not finished within 600 s" in late.found
    ended = report_early_end("loading cv2", 3, in_time=True, said="libGL: no such file")
    assert ended.found.startswith("Python ended with exit code 3 (libGL: no such file)")


def test_the_first_process_loads_nothing_that_may_be_broken():
    code = (
        "import sys\nfrom pylorus.doctor import examine\n"
        "list(examine.check_packages()), list(examine.check_extras()), list(examine.check_space())\n"
        "print([name for name in ('torch', 'cv2', 'numpy', 'pandas', 'matplotlib', 'hydra') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
