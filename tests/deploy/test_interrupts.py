"""Ctrl-C and `kill -9` in the middle of a command on a trained model: nothing is lost that the same command can't do."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from pylorus.cli import main

PROGRAM = """
import signal, sys, time
from importlib import import_module
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
from pylorus.cli import main
module, name = sys.argv.pop(1).split(":")
module = import_module(module)
original = getattr(module, name)
def call_slowly(*words, **options):
    Path("reached").touch()
    time.sleep(120)
    return original(*words, **options)
setattr(module, name, call_slowly)
main()
"""
"""Runs a command that stays in one of its functions."""


@pytest.fixture
def site(bundle_folder, synthetic_root, tmp_path):
    """A folder with a bundle without fingerprints, images, and predictions; the commands run in it."""
    shutil.copytree(bundle_folder, tmp_path / "run" / "model")
    model = tmp_path / "run" / "model"
    content = json.loads((model / "model.json").read_text())
    content.pop("fingerprints")
    (model / "model.json").write_text(json.dumps(content))
    (model / "fingerprints.safetensors").unlink()
    names = sorted(path.name for path in model.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((model / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (model / "SHA256SUMS").write_text("".join(lines))
    for name, copies in {"gastric_cancer": 3, "gastric_ulcer": 1, "chronic_gastritis": 1}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for number, path in enumerate(sorted((synthetic_root / name).iterdir())):
            for copy in range(copies):
                shutil.copy(path, tmp_path / "images" / name / f"p{number}{copy}_{path.name}")
    (tmp_path / "images" / "gastric_ulcer" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    return tmp_path


COMMANDS = {
    "plan": ("pylorus.report.plan:write_plan", ["--sensitivity", "0.9", "--prevalence", "0.2", "--output", "out"]),
    "monitor": ("pylorus.deploy.monitor:write_text", ["run/model", "p.csv", "--output", "out"]),
    "recalibrate": ("pylorus.deploy.recalibrate:compute_digest", ["run/model", "images", "--output", "out"]),
    "validate": ("pylorus.deploy.external:evaluate_known_images", ["run/model", "images", "--output", "out"]),
    "stress": ("pylorus.report.page:render_svg", ["run/model", "images", "--output", "out", "--limit", "20"]),
    "report": ("pylorus.report.page:render_svg", ["trained", "--output", "out"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number"), list(zip(COMMANDS, itertools.cycle([signal.SIGINT, signal.SIGKILL]), strict=False))
)
def test_a_command_that_is_ended_in_the_middle_leaves_nothing_incomplete_and_works_again(
    site, trained_run, fork_server, skip_rendering, monkeypatch, capsys, command, number
):
    function, words = COMMANDS[command]
    monkeypatch.chdir(site)
    if command == "monitor":
        run_command(["predict", "run/model", "images", "--output", "p.csv"])
    (site / "trained").symlink_to(trained_run.path)
    process = fork_server.start(
        [sys.executable, "-c", PROGRAM, function, command, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while not (site / "reached").exists() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130, errors
        lines = [line for line in errors.splitlines() if not line.startswith("note:")]
        assert [line.partition(";")[0] for line in lines] == ["interrupted"]
        assert not [path for path in site.rglob(".*") if not path.name.endswith(".parts")]
    assert not list(site.glob("out/*.html"))
    assert not (site / "out" / "SHA256SUMS").exists()
    capsys.readouterr()
    run_command([command, *words])
    assert (site / "out").is_dir()
    pages = {"plan": "plan.json", "monitor": "monitor.html", "recalibrate": "SHA256SUMS"}
    assert (site / "out" / pages.get(command, "report.html")).is_file()


def run_command(words):
    """Run a command in this process; unreadable files and alarms, which have exit codes of their own, are fine."""
    with suppress(SystemExit):
        main(words)
