"""Every command of README.md and docs/ is run as written, on small synthetic images; `documented.py` says what is replaced.

Two pages run at a time, each in a separate folder and in order, so that a command may use the results of earlier ones. Work that
several pages show is done once.
"""

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import cv2
import pandas as pd
import pytest
from hydra.errors import HydraException

from pylorus.cli import build_parser
from pylorus.core.errors import PylorusError
from pylorus.core.io import read_json, write_json
from pylorus.data.synthetic import generate_image_set
from pylorus.launch.main import RESUME, check_overrides
from pylorus.launch.sweep import REQUIRED_PACKAGES
from tests.forking import FIGURES, ForkServer

from .documented import (
    BY_SHELL,
    ORDINARY,
    OWN_RUNS,
    PAGES,
    PROJECT,
    RUN,
    SHARED,
    Command,
    commands_of,
    hidden_commands,
    overrides_of,
    small,
    small_drawing,
)

COMMANDS = [command for page in PAGES for command in commands_of(page)]
SECONDS = 900  # of one command, on a machine that does other work
TRAINING = "python train.py"
LAUNCHERS = r"hydra/launcher=|hydra\.launcher\.|hydra\.sweeper\.|experiment=search"

pytestmark = pytest.mark.timeout(1800)  # of all pages together, on a machine that does other work


@dataclass
class Outcome:
    """What a command came to: its exit code and what it printed."""

    code: int
    printed: str


def shell(fork_server: ForkServer, words: list[str], folder: Path) -> Outcome:
    """Runs a command as a fork."""
    output = folder / "printed.txt"
    figures = {FIGURES: "1"} if "--docx" in words else {}  # a Word file needs them
    with output.open("wb") as file:
        process = fork_server.start(words, cwd=folder, env={**os.environ, **figures}, stdout=file, stderr=file)
        code = process.wait(SECONDS)
    return Outcome(code, output.read_text(errors="replace"))


def is_name(command: Command) -> bool:
    """Whether only a command's name is mentioned, as in "what `pylorus draw` makes"."""
    return re.fullmatch(r"pylorus [a-z]+", command.text) is not None


def runs(command: Command) -> bool:
    return command.not_run is None and not is_name(command)


def small_words(command: Command) -> list[str]:
    """Return the arguments that are run: those of the page, made small."""
    words = shlex.split(command.filled)
    if words[:2] in (TRAINING.split(), ["pylorus", "train"]):
        return [*TRAINING.split(), *small(words[2:])]
    return small_drawing(words) if words[:2] == ["pylorus", "draw"] else words


def describe_work(command: Command) -> frozenset[str]:
    """Return the words that decide what a command does; sweeps do the same on images of any source."""
    words = small_words(command)
    ordinary = rf"{ORDINARY}|data\.root=" if "-m" in words else ORDINARY
    return frozenset(word for word in words if not re.match(ordinary, word))


def is_used_later(command: Command) -> bool:
    """Whether a later command of the page names the folder that this one is told to write."""
    folders = re.findall(r"\bdir=(\S+)", command.filled)
    later = [other.filled for other in COMMANDS if other.page == command.page and other.line > command.line]
    return any(re.search(rf"{re.escape(folder)}(?![\w-])", text) for folder in folders for text in later)


def fill(folder: Path, prepared: Path, *, draws_images: bool) -> None:
    """What a user has: images with a manifest, a film, a finished run, another one, one that was interrupted."""
    folder.mkdir()
    if not draws_images:
        shutil.copytree(prepared / "images", folder / "images")
    shutil.copy(prepared / "film.mp4", folder)
    for name, source in ((RUN, "both"), ("outputs/another", "one"), ("outputs/interrupted", "both")):
        shutil.copytree(prepared / source, folder / name)
    interrupted = folder / "outputs" / "interrupted"
    for part in ("finetune", "model", "report"):
        shutil.rmtree(interrupted / part)
    status = read_json(interrupted / "status.json")
    write_json(interrupted / "status.json", {**status, "state": "interrupted"})


def prepare(folder: Path, fork_server: ForkServer) -> None:
    """Draws images and trains on them twice."""
    generate_image_set(folder / "images", images=10, size=48, seed=3)
    paths = sorted((folder / "images").rglob("*.jpg"))
    film = cv2.VideoWriter(str(folder / "film.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5.0, (48, 48))
    for path in paths:
        film.write(cv2.imread(str(path)))
    film.release()
    rows = {"path": [path.relative_to(folder / "images") for path in paths], "label": [p.parent.name for p in paths]}
    patients = [int(re.findall(r"patient_(\d+)", path.name)[0]) for path in paths]
    rows["site"] = ["ABC"[patient // 3 % 3] for patient in patients]
    pd.DataFrame(rows).to_csv(folder / "images" / "manifest.csv", index=False)
    words = [
        "data=folders", "data.root=images", r"data.group=patient_\d+", "data.short_names=[GC,GU,CG]",
        "data.classes=[gastric_cancer,gastric_ulcer,chronic_gastritis]",
    ]  # fmt: skip
    for name, stages, more in (("both", [], ["report=true"]), ("one", ["stage=pretrain"], [])):
        done = shell(
            fork_server,
            ["python", "train.py", *small([*words, *stages, f"hydra.run.dir={folder / name}"]), *more],
            folder,
        )
        assert done.code == 0, done.printed


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer
) -> Iterator[dict[Command, Future[Outcome]]]:
    """The outcome to come of each command that runs, of the pages that were selected."""
    wanted = {
        item.callspec.params["command"].page
        for item in request.session.items
        if item.path == Path(__file__) and "outcomes" in getattr(item, "fixturenames", ())
    }
    futures: dict[Command, Future[Outcome]] = {command: Future() for command in COMMANDS if runs(command)}
    root = tmp_path_factory.mktemp("documented")
    done: dict[frozenset[str], Outcome] = {}
    alone = {  # what pages that need their own results run
        describe_work(command): future
        for command, future in futures.items()
        if command.page in OWN_RUNS & wanted and not re.match(BY_SHELL, command.filled)
    }

    def once(command: Command, folder: Path) -> Outcome:
        """Its outcome; pages that show the same work, which leaves nothing that the next command needs, share one."""
        if re.match(BY_SHELL, command.filled):
            ran = subprocess.run(["bash", "-c", command.filled], cwd=folder, capture_output=True, text=True)
            return Outcome(ran.returncode, ran.stdout + ran.stderr)
        words = small_words(command)
        if command.page in OWN_RUNS or not re.search(SHARED, " ".join(words)) or is_used_later(command):
            return shell(fork_server, words, folder)
        kind = describe_work(command)
        if kind in alone:
            return alone[kind].result(SECONDS)
        if (known := done.get(kind)) is None:
            known = done[kind] = shell(fork_server, words, folder)
        return known

    def run_page(page: str) -> None:
        folder = root / page.replace("/", "-")
        commands = [command for command in futures if command.page == page]
        try:
            fill(folder, root, draws_images=any(c.filled.startswith("pylorus draw images") for c in commands))
            for command in commands:
                futures[command].set_result(once(command, folder))
        except BaseException as error:  # a test that waits must hear of it
            for command in commands:
                if not futures[command].done():
                    futures[command].set_exception(error)

    prepare(root, fork_server)
    with ThreadPoolExecutor(2) as pool:
        lengths = Counter(command.page for command in futures)
        for page in sorted(wanted, key=lambda page: (page not in OWN_RUNS, -lengths[page])):
            pool.submit(run_page, page)
        try:
            yield futures
        finally:  # also where the tests were interrupted and pages are left
            pool.shutdown(wait=False, cancel_futures=True)
            for process in fork_server.started:
                process.kill()


@pytest.mark.parametrize("command", [command for command in COMMANDS if runs(command)], ids=str)
def test_documented_commands_work(command, outcomes):
    assert command.unknown_words() == [], "a placeholder that documented.py does not know; add it to PLACEHOLDERS"
    assert re.match(rf"(python train\.py|pylorus)( |$)|{BY_SHELL}", command.filled), (
        "the test does not know how to run this; teach it, or give the reason in NOT_RUN"
    )
    outcome = outcomes[command].result(timeout=1500)
    assert "Traceback" not in outcome.printed, outcome.printed
    if missing := re.search(r"pip install '?pylorus\[[\w,]+\]", outcome.printed):
        pytest.skip(f"needs an extra: {missing[0]}'")
    assert outcome.code in command.right_codes, outcome.printed


def combinations(words: list[str]) -> Iterator[list[str]]:
    """Return a sweep's arguments with the first values of all lists, then the second ones, and so on."""
    values = [
        [f"{word.partition('=')[0]}={value}" for value in word.partition("=")[2].split(",")]
        if "," in word and not re.search(r"=[\[{'(]", word)
        else [word]
        for word in words
    ]
    for together in zip_longest(*values):
        yield [value if value is not None else own[0] for value, own in zip(together, values, strict=True)]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.text.startswith(TRAINING)], ids=str)
def test_arguments_of_documented_training_commands_compose(command, compose_config):
    words = [word for word in shlex.split(command.filled)[2:] if not word.startswith(("-", "resume="))]
    for word in words:
        if word.startswith("hydra/launcher="):
            assert word in REQUIRED_PACKAGES
    for combination in combinations([word for word in words if not re.match(LAUNCHERS, word)]):
        compose_config(*[word for word in check_overrides(combination) if not word.startswith("hydra.")])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.text.startswith("pylorus ")], ids=str)
def test_the_options_of_a_pylorus_command_exist(command, capsys):
    words = shlex.split(command.filled)[1:]
    if is_name(command):
        with pytest.raises(SystemExit, match="0"):
            build_parser().parse_args([words[0], "--help"])
    else:
        assert build_parser().parse_args(words).act, capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.not_run and not c.text.startswith((TRAINING, "pylorus "))], ids=str
)
def test_files_named_by_commands_that_are_not_run_exist(command, compose_config):
    words = [] if command.text.startswith("#!") else shlex.split(command.filled)
    if command.text.startswith("#!"):
        subprocess.run(["bash", "-n"], input=command.text, text=True, check=True)
        for words_of_run in re.findall(r"set -- (data[.=]\S.*?);", command.text):
            compose_config(*[word for word in check_overrides(words_of_run.split()) if not word.startswith("hydra.")])
        assert words_of_run
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [name for extra in re.findall(r"\[(.*?)\]", command.text) for name in extra.split(",")]
        assert set(named) <= set(extras)
    elif words[0] == ".venv/bin/pre-commit":
        assert (PROJECT / ".pre-commit-config.yaml").is_file()
    elif words[0] == ".venv/bin/pylorus":
        assert build_parser().parse_args(words[1:]).act
    elif words[:2] == [".venv/bin/python", "train.py"]:
        for combination in combinations([word for word in words[2:] if word != "-m"]):
            compose_config(*check_overrides(combination))
    elif words[0] in ("python3", "pip", ".venv/bin/python", "openssl", "chmod", "sha256sum"):
        files = [word for word in words if word.endswith(".txt")]
        assert all((PROJECT / name).is_file() for name in files)
        assert shutil.which(words[0]) or words[0].startswith(".venv/")
    elif words[0] == "curl":
        assert re.search(r"https?://(127\.0\.0\.1|localhost)[:/]", command.text), "not a page of this machine"
    elif words[0] == "torchrun":
        overrides = [word for word in words if "=" in word]
        compose_config(*check_overrides(overrides))
    elif "--config-dir" in words or words[0] == "eval":
        assert "train.py" in command.text
        assert (PROJECT / "train.py").is_file()
    elif words[0] == "python":
        program = (PROJECT / words[1]).read_text()
        assert all(word in program for word in words[2:] if word.startswith("--"))
    else:
        pytest.fail("the test does not know what to ask of this command")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_in_a_block_that_is_run(page):
    assert hidden_commands(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_overrides_in_running_text_name_keys_and_files_that_exist(page):
    for words in overrides_of(page):
        plain = [word.replace("<stage>", "finetune").partition("|")[0] for word in words]
        plain = [
            word for word in plain if "hydra" not in word and word not in REQUIRED_PACKAGES
        ]  # whose extra may be missing
        plain = [word for word in plain if not word.startswith(RESUME)]  # no key: it names a run
        try:
            check_overrides([word for word in plain if not re.search(r"=(choice|tag|interval)\(", word)])
        except (PylorusError, HydraException) as error:
            pytest.fail(f"{' '.join(words)}: {error}")


def test_an_unknown_kind_of_command_fails():
    new = Command("docs/new.md", 1, "pylorus predict NEWTHING images")
    assert new.unknown_words() == ["NEWTHING"]
    assert runs(Command("docs/new.md", 1, "bash something.sh"))


def test_pages_and_commands_are_found():
    assert {page.name for page in PAGES} >= {"README.md", "tutorial.md", "sweeps.md"}
    assert len(COMMANDS) > 40
