"""The commands of README.md and docs/: found in fenced `sh` blocks and code spans, and made small enough to run.

For a new page: placeholders (DIR, RUN …) are defined in PLACEHOLDERS; a command that a test
machine can't run has its reason in NOT_RUN. Everything else is run as written, or fails.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import TINY

PROJECT = Path(__file__).parents[2]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]

PROGRAMS = r"(python|pylorus|make|pip|sbatch|bash|\.venv/bin/\S+) "
"""Start of a code span that is a command; `make` alone is a name."""

RUN = "outputs/2026-01-31/12-00-00-k3f9"
"""Location of a finished run of both stages in the folder of each page."""

PLACEHOLDERS = {
    # After an option, a word stands for what that option takes.
    r"(--output) (\S+\.(?:csv|json|parquet))\b": r"\1 out/\2",
    r"(--output) (DIR|OUT|for-a-colleague)": r"\1 out/folder",
    r"(--manifest) FILE\.csv": r"\1 images/manifest.csv",
    r"data\.manifest=FILE(\.csv)?": "data.manifest=images/manifest.csv",
    r"pylorus draw DIR": "pylorus draw drawn",
    # What the user has.
    r"\b(RUN_DIR|RUN_A|RUN)\b": RUN,
    r"\bRUN_B\b": "outputs/another",
    r"\bBUNDLE\b": f"{RUN}/model",
    r"\bKEY\b": "key",
    r"\b(DIR|ROOT|IMAGES|bloodcells)\b(?!-)": "images",
    r"\bOUT\b": "out/shards",
    r"\bSWEEP\b": "multirun/sweep",
    r"\bstage=three\b": "stage=gradual",
    # The prepared run has too few images to measure a loss on.
    r"(export .*--int8)": r"\1 --images images",
    # A run that has something left to do.
    r"resume=\S+": "resume=outputs/interrupted",
    # An ellipsis stands for the words of the sweep that goes on.
    r"-m … hydra\.sweep\.dir=multirun/2026-01-31/…": "-m stage=pretrain seed=0,1 hydra.sweep.dir=multirun/begun",
    r" …$": "",
    r" \[DIR …\]": "",
}
"""Patterns in the text of a command, and what takes their place; applied in this order."""

NOT_RUN = {
    r"^(python3 -m pip|pip (wheel|download)|python3 -m venv|\.venv/bin/python -m pip)|wheels/|--quiet SHA256SUMS": "fetches gigabytes, or uses them",
    r"^\.venv/bin/(pylorus|python train\.py)": "uses an environment and weights that were carried in; doctor and training are run elsewhere",
    r"^(openssl|chmod) ": "makes a password file, as any other tool would",
    r"^make ": "sets up an environment of gigabytes, or measures for minutes; the tests run in what `make test` made",
    r"^pip install|^\.venv/bin/pre-commit": "changes the environment that the tests run in",
    r"^python benchmarks/": "measures for minutes",
    r"^#!": "a job script for sbatch, which needs SLURM",
    r"trainer\.(devices=4|strategy=fsdp)": "starts several processes; tests/end_to_end/test_runs.py does",
    r"^torchrun ": "starts several processes; tests/training/test_processes.py does",
    r"^eval ": "changes the shell; tests/config/test_own_configuration.py asks for the script",
    r"--config-dir[= ]": "needs files of the user's; tests/config/test_own_configuration.py has some",
    r"hydra/launcher=slurm": "needs SLURM",
    r"hydra/launcher=ray_local": "needs the extra `ray`; benchmarks/engines/ray_local.sh runs it",
    r"hydra/launcher=joblib|experiment=search": "needs an extra; tests/end_to_end/test_engines.py runs it where it is installed",
    r"^pylorus sign |--trust ": "needs a key and the extra `sign`; tests/deploy/test_signature.py has both",
    r"^pylorus monitor ": "reads predictions of several periods; tests/deploy/test_monitor.py draws some",
    r"hydra\.sweep\.dir=SWEEP": "trains three networks for an ensemble; tests/deploy/test_ensemble.py does",
    r"^pylorus ensemble |ensemble/model": "needs several runs of one split; tests/deploy/test_ensemble.py has tiny ones",
    r"^pylorus recalibrate ": "needs labelled images of another clinic; tests/deploy/test_recalibrate.py has some",
    r"^pylorus validate BUNDLE site": "reads a table of the user's; tests/deploy/test_external.py has one",
    r"^pylorus bakeoff ": "compares networks whose weights are downloaded; tests/launch/test_bakeoff.py has tiny ones",
    r"^pylorus serve ": "serves until it is stopped; tests/deploy/ uses the page",
    r"^curl ": "asks a page that is served; tests/deploy/ does",
}
"""Patterns of commands that are not run here, and why; their words are checked all the same."""

BY_SHELL = r"(sha256sum|cd|mkdir|cp|mv|ls|unzip|tar) "
"""Beginnings of commands that bash runs, in the page's folder."""

SHARED = r"^(python train\.py(?!.*shards)|pylorus (audit|export|predict|report|train|validate)\b)"
"""Commands that are run once if several pages show them: the next command of a page rarely needs what they write."""

OWN_RUNS = {"docs/export.md", "docs/stress.md"}
"""Pages on which it does; other pages take the outcome of the commands that they share with these."""

ORDINARY = r"(seed|stage|augment|loss|optimizer\.lr|stages\.\w+\.(lr|epochs)|data\.(group|classes|short_names|folds?)|hydra\.\w+\.dir)="
"""Keys of training that take the same path through the program with every value: of commands that differ in these, one is run."""

EXIT_CODES = {r"^pylorus (doctor|weights (check|fetch))": (0, 1)}
"""Exit codes that are right, of commands for which it is not 0 alone."""

KNOWN_CAPITALS = {"PYTHONPATH", "GC", "GU", "CG", "A", "B", "C"}
"""Values in capitals that are no placeholders: names of classes and of sites."""

KEPT_DEPTHS = ("head", "all", "layer4")
"""Depths that the tests' network has too."""


@dataclass(frozen=True)
class Command:
    """A command as a page shows it, without its comment and with its lines joined."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.text.splitlines()[0]}"

    @property
    def filled(self) -> str:
        """Replace the placeholders of a text by existing files and values."""
        text = self.text
        for pattern, value in PLACEHOLDERS.items():
            text = re.sub(pattern, value, text)
        return text

    @property
    def not_run(self) -> str | None:
        """Why it is not run here; None where it is."""
        return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, self.text)), None)

    @property
    def right_codes(self) -> tuple[int, ...]:
        """The exit codes with which it says what the page says."""
        return next((codes for pattern, codes in EXIT_CODES.items() if re.search(pattern, self.text)), (0,))

    def unknown_words(self) -> list[str]:
        """Words in capitals that nothing is known of: placeholders without a value."""
        words = re.findall(r"(?<![\w.$])[A-Z][A-Z_]*\b", self.filled.replace("…", "ELLIPSIS"))
        return [word for word in words if word not in KNOWN_CAPITALS]


def commands_of(path: Path) -> Iterator[Command]:
    """All commands of a page, in their order."""
    page = str(path.relative_to(PROJECT))
    fence: str | None = None
    block: list[tuple[int, str]] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        mark = re.match(r"\s*```\s*(\S*)", line)
        if mark and fence is None:
            fence, block = mark[1], []
        elif mark:
            if fence in ("sh", "bash", "console"):
                yield from (Command(page, at, text) for at, text in _in_block(block))
            fence = None
        elif fence is not None:
            block.append((number, line))
        else:
            for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", line):
                if re.match(PROGRAMS, span):
                    yield Command(page, number, span.strip())


def _in_block(block: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    if block and block[0][1].startswith("#!"):
        yield block[0][0], "\n".join(line for _, line in block)
        return
    joined, start = "", None
    for number, line in block:
        start = start or number
        cut = re.sub(r"(^|\s+)#(\s.*)?$", "", line)
        if cut.endswith("\\"):
            joined += cut.removesuffix("\\").rstrip() + " "
            continue
        joined = (joined + cut.strip()).strip()
        if joined:
            yield start, joined
        joined, start = "", None


def hidden_commands(path: Path) -> list[str]:
    """Find lines that look like commands outside of `sh` blocks, where no test would run them."""
    text = re.sub(r"^```(sh|bash|console)\n.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^(?:    |\$ )?(?:python train\.py|pylorus [a-z]+|python benchmarks/)\b.*", text, re.MULTILINE)


def overrides_of(path: Path) -> Iterator[list[str]]:
    """Find code spans of a page that are arguments of `train.py`, such as `data.crop=auto`."""
    text = re.sub(r"^\s*```.*?^\s*```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        words = shlex.split(span) if span.count("'") % 2 == 0 else [span]
        if words and all(re.fullmatch(r"\+?[a-z][\w./<>]*=\S.*", word) for word in words):
            yield words


def small(words: list[str]) -> list[str]:
    """Return arguments of `train.py` for a fast version of the same work: a tiny network, one epoch, sweeps of one job."""
    if "--help" in words or "--cfg" in words or any(word.startswith("resume=") for word in words):
        return words
    kept: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        if key == "model" or key.startswith("model."):
            if "," in value and "seed=0" not in kept:
                kept.append("seed=0")  # the tests have but one network
            continue
        if key.endswith(".epochs") or (key.endswith(".learn") and value not in KEPT_DEPTHS):
            continue
        if key == "data.image_size":
            continue
        if key == "trainer.devices":
            word = "trainer.devices=2"  # as many as the smallest part of the split has images
        if "," in value and not value.startswith("["):
            values = value.split(",")
            word = f"{key}={values[0]}"  # tests/end_to_end/test_runs.py has sweeps of several jobs
        kept.append(word)
    if not any(word.startswith(("data=", "experiment=")) for word in words):
        kept.append("experiment=debug")
    alone = {"stage=pretrain", "stage=finetune"} & set(kept)  # keys of a stage that is not trained are refused
    kept = [
        word for word in kept if not (alone and re.match(r"stages\.", word) and word.split(".")[1] not in str(alone))
    ]
    return [
        *kept, "model=timm", f"model.name={TINY}", "model.weights=none", "data.image_size=64", "trainer=cpu",
        *(f"stages.{stage}.epochs=1" for stage in ("pretrain", "finetune") if f"stage={stage}" in kept or not alone),
        "report=false",
    ]  # fmt: skip


def small_drawing(words: list[str]) -> list[str]:
    """Return arguments of `pylorus draw` for few, small images."""
    return [*words, "--images", "10", "--size", "48"]
