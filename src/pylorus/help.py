"""The text of `python train.py --help`: the groups with their files, and every key with its meaning."""

import dataclasses
import re
import textwrap
from pathlib import Path
from typing import Any, cast

from pylorus.config import GROUPS, Config
from pylorus.validation import iter_fields

USAGE = """\
Pylorus trains image classifiers for gastroscopy by transfer learning, stage by stage.

  python train.py                                            a demo on synthetic images
  python train.py data=folders data.root=DIR model=resnet50  your own images, in class folders
  python train.py -m model=vgg19,resnet50,inception_v3       a sweep: one run per value, and a comparison
  python train.py experiment=paper data.root=DIR             the protocol of the study
  python train.py resume=RUN                                 resume a run that was interrupted

GROUPS: choose one file from each, as in model=vgg19
"""

FLAGS = """
FLAGS

  -m                              run a sweep over comma-separated values
  --cfg job                       print the configuration instead of running it
  --hydra-help                    help of Hydra itself: launchers, sweepers, shell completion
"""


def format_help(conf: Path) -> str:
    """Return the complete help text; `$` is doubled because Hydra treats the text as a template.

    Args:
        conf: Folder of the configuration files.
    """
    lines = [USAGE]
    for group in GROUPS:
        files = sorted(path.stem for path in (conf / group).glob("*.yaml"))
        lines.append(f"  {group + '=':<12} {' | '.join(files)}")
    lines += ["", "KEYS: override one, as in optimizer.lr=1e-4", ""]
    lines += _format_keys(Config, "")
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).replace("$", "$$")
    return text + FLAGS


def _format_keys(schema: type, path: str) -> list[str]:
    lines: list[str] = []
    for field, kind in iter_fields(schema):
        name = f"{path}{field.name}"
        if dataclasses.is_dataclass(kind):
            lines += ["", f"{name}: {_get_first_line(kind)}", *_format_keys(cast(type, kind), f"{name}."), ""]
        elif field.name == "stages":
            stage = kind.__args__[1]
            lines += ["", f"{name}.<stage>: {_get_first_line(stage)}", *_format_keys(stage, f"{name}.<stage>."), ""]
        else:
            lines += _format_entry(name, field)
    return lines


def _format_entry(name: str, field: dataclasses.Field[Any]) -> list[str]:
    metadata = field.metadata
    default = field.default if field.default is not dataclasses.MISSING else {}
    default_text = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
    allowed = list(metadata["choices"])
    low, high = metadata["low"], metadata["high"]
    if low is not None:
        allowed.append(f"{low} to {high}" if high is not None else f"{low} or more")
    allowed_text = f" [{' | '.join(allowed)}]" if allowed else ""
    text = f"{metadata['meaning']}{allowed_text} (default: {default_text})"
    head = f"  {name:<31} "
    return textwrap.wrap(text, width=112, initial_indent=head, subsequent_indent=" " * 34)


def _get_first_line(schema: Any) -> str:
    return str(schema.__doc__).splitlines()[0]
