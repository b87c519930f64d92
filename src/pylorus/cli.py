"""The command line `pylorus COMMAND`: a parser for each command, and the module that does its work.

Nothing heavy is imported before a command needs it.
"""

import argparse
import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pylorus import __version__
from pylorus.core.arguments import CommandParser, complete_words
from pylorus.core.errors import INTERRUPTED, TRAIN_COMMAND, PylorusError
from pylorus.core.formatting import expand_words, format_command, format_count, handle_closed_pipe, setup_terminal
from pylorus.core.system import explain_limit, format_stop, format_system_error
from pylorus.deploy.commands import add_model_commands
from pylorus.deploy.signature import add_trust_option
from pylorus.report.plan import add_plan_command


def add_train_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `train` and `bakeoff` to the command line."""
    command = commands.add_parser(
        "train",
        help="train a model, or several and compare them (a sweep)",
        description="Train a model, or several and compare them (a sweep, with -m). The same as `python train.py` "
        "in a clone. `pylorus train --help` explains groups, keys and options.",
        usage="pylorus train [OPTION ...] [KEY=VALUE ...]",
        prefix_chars="\0",  # no word is an option of this parser: Hydra parses them all
        add_help=False,
    )
    command.add_argument("words", nargs=argparse.REMAINDER, metavar="WORD", help="key, group or option of Hydra")
    command.set_defaults(act=_run_train)
    _add_bakeoff(commands)


def _run_train(arguments: argparse.Namespace) -> None:
    """Hand the words over to Hydra, which reads them from `sys.argv`."""
    sys.argv = ["pylorus", *arguments.words]
    importlib.import_module("pylorus.launch.main").main()  # as train.py does; the other commands never need it


def _add_bakeoff(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "bakeoff",
        help="compare pretrained networks on your images by heads on their frozen features",
        description="Compare pretrained networks on one image set. Each network processes each image once; many heads "
        "(learning rate, weight decay, class weighting, seed) are trained on these features at once, chosen by "
        "validation, and tested once. Writes one page with accuracy against cost, and prints the command that "
        "fine-tunes the winner. The same command continues an interrupted bake-off.",
    )
    command.add_argument("root", type=Path, metavar="ROOT", help="ROOT/CLASS/… or ROOT/{train,val,test}/CLASS/…")
    command.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="MODEL",
        help="networks, separated by spaces or commas: a file of conf/model, such as resnet50, or a timm model",
    )
    command.add_argument(
        "--weights",
        metavar="W",
        help="initial weights: hub, none (random), or a folder with a file NAME.safetensors for each network (default: "
        "what the model's file says; otherwise hub)",
    )
    command.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="a new folder, or that of an earlier bake-off"
    )
    command.add_argument(
        "--group", metavar="REGEX", help="regular expression that finds the patient in a path below ROOT"
    )
    command.add_argument(
        "--image-size",
        nargs="+",
        type=int,
        default=(),
        metavar="N",
        help="sides of the input in pixels, each of which is one more network in the comparison (default: the size "
        "that each network was designed for)",
    )
    unset = argparse.SUPPRESS  # the defaults are those of `BakeoffOptions`
    command.add_argument(
        "--lr", nargs="+", type=float, default=unset, metavar="LR", help="learning rates of the heads (default: eight)"
    )
    command.add_argument(
        "--weight-decay",
        nargs="+",
        type=float,
        default=unset,
        metavar="WD",
        help="weight decays of the heads (default: four)",
    )
    command.add_argument(
        "--class-weights",
        nargs="+",
        choices=("none", "balanced"),
        default=unset,
        help="class weightings of the heads (default: both)",
    )
    command.add_argument(
        "--loss",
        nargs="+",
        choices=("cross_entropy", "logit_adjusted"),
        default=unset,
        help="losses of the heads; logit_adjusted, without class weights, is for classes of very different frequency "
        "(default: cross_entropy)",
    )
    command.add_argument(
        "--seeds", type=int, default=unset, metavar="N", help="number of seeds for each kind of head (default: three)"
    )
    command.add_argument("--epochs", type=int, metavar="N", help="epochs of the heads (default: the stage pretrain's)")
    command.add_argument(
        "--patience",
        type=int,
        default=unset,
        metavar="N",
        help="epochs without a lower validation loss after which a head stops; 0: it never does (default: five)",
    )
    command.add_argument(
        "--set",
        nargs="+",
        default=(),
        metavar="KEY=VALUE",
        help="further keys of a run, such as data.crop=auto, data.classes=[A,B] or cache.folder=DIR",
    )
    command.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="folder with model files of your own, as DIR/model/NAME.yaml"
    )
    command.set_defaults(act=_run_bakeoff)


def _run_bakeoff(arguments: argparse.Namespace) -> None:
    from pylorus.launch.bakeoff import BakeoffOptions, run_bakeoff

    lists = {"lrs": "lr", "weight_decays": "weight_decay", "class_weights": "class_weights", "losses": "loss"}
    given = vars(arguments)
    further: dict[str, Any] = {name: tuple(given[option]) for name, option in lists.items() if option in given}
    further |= {"seeds": given["seeds"]} if "seeds" in given else {}
    further |= {"patience": given["patience"] or None} if "patience" in given else {}
    options = BakeoffOptions(
        models=tuple(name for word in arguments.models for name in word.split(",") if name),
        weights=arguments.weights,
        group=arguments.group,
        sizes=tuple(arguments.image_size),
        epochs=arguments.epochs,
        overrides=tuple(arguments.set),
        config_dir=arguments.config_dir,
        **further,
    )
    run_bakeoff(arguments.root, arguments.output, options)


def add_evidence_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `report`, `plan`, `doctor` and `weights` to the command line."""
    _add_report(commands)
    add_plan_command(commands)
    _add_doctor(commands)
    _add_weights(commands)


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    report = commands.add_parser(
        "report",
        help="write tables, figures and an HTML page for runs or a sweep",
        description="Write tables, figures and one HTML page, which opens offline, for a run, several runs or a sweep.",
    )
    report.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folder of a run or of a sweep")
    report.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder to write to (default: report/ in the run or sweep; ./report for several PATHs)",
    )
    report.add_argument(
        "--class", dest="class_name", metavar="NAME", help="class whose threshold is set (default: the bundle's)"
    )
    report.add_argument(
        "--sensitivity",
        type=float,
        metavar="SHARE",
        help="sensitivity to guarantee for new patients, 0 to 1 (default: the run's deploy.sensitivity)",
    )
    report.add_argument(
        "--guarantee",
        type=float,
        metavar="CONFIDENCE",
        help="confidence of this guarantee, 0 to 1 (default: the run's deploy.confidence)",
    )
    report.add_argument(
        "--published", action="store_true", help="show the results of the published study next to yours"
    )
    report.add_argument(
        "--margin",
        type=float,
        metavar="M",
        help="test non-inferiority and equivalence with this margin, such as 0.05 (default: the run's deploy.margin)",
    )
    report.add_argument(
        "--reference",
        metavar="NAME",
        help="with a margin: run or model that the others are compared with (default: the one selected by validation)",
    )
    report.add_argument(
        "--against",
        nargs="+",
        default=(),
        metavar="NAME=VALUE",
        help="with a margin: also compare with figures, such as sensitivity=0.9 specificity=135/150 auroc=0.95, or "
        "with the word published",
    )
    report.add_argument(
        "--thumbnails",
        action="store_true",
        help="show the most confident mistakes as images; whoever gets the page gets these images",
    )
    report.add_argument(
        "--names", action="store_true", help="show file names, groups and folders, which may identify patients"
    )
    report.add_argument(
        "--docx",
        action="store_true",
        help="also write a draft of a manuscript as a Word file, with the reporting checklists (needs pylorus[docx])",
    )
    report.add_argument("--latex", action="store_true", help="also write this draft as LaTeX")
    report.set_defaults(act=_run_report)


def _run_report(arguments: argparse.Namespace) -> None:
    from pylorus.report.page import write_report
    from pylorus.report.results import ReportOptions

    options = ReportOptions(
        class_name=arguments.class_name,
        sensitivity=arguments.sensitivity,
        guarantee=arguments.guarantee,
        published=arguments.published,
        margin=arguments.margin,
        reference=arguments.reference,
        against=tuple(arguments.against),
        thumbnails=arguments.thumbnails,
        names=arguments.names,
        docx=arguments.docx,
        latex=arguments.latex,
    )
    page = write_report(arguments.paths, arguments.output, options=options)
    print(f"report: {page}")
    for suffix, is_asked in (("docx", arguments.docx), ("tex", arguments.latex)):
        if is_asked:
            print(f"manuscript: {page.with_name('manuscript.' + suffix)}")


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check this machine and say how to fix what is missing",
        description="Check Python, packages, GPU, memory, disks and weights on this machine, and say how to fix what "
        "is missing or wrong. Makes no network connection. Exit code 1 if something is wrong, else 0.",
    )
    doctor.add_argument("--data", type=Path, metavar="DIR", help="also check this folder of class folders")
    doctor.add_argument("--bundle", type=Path, metavar="DIR", help="also check this bundle (model/ of a run)")
    add_trust_option(doctor)
    doctor.add_argument(
        "--weights",
        type=Path,
        default=Path("weights"),
        metavar="DIR",
        help="folder with downloaded weight files (default: ./weights)",
    )
    doctor.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
    doctor.set_defaults(act=_run_doctor)


def _run_doctor(arguments: argparse.Namespace) -> None:
    from pylorus.doctor.examine import DoctorOptions, format_json, print_checks, run_checks
    from pylorus.doctor.packages import State

    checks = run_checks(DoctorOptions(arguments.weights, arguments.data, arguments.bundle, tuple(arguments.trust)))
    if arguments.json:
        text, state = format_json(checks)
        print(text)
    else:
        state = print_checks(checks)
    sys.exit(1 if state is State.WRONG else 0)


def _add_weights(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "weights",
        help="list pretrained weights, verify those that are here, and fetch others",
        description="List pretrained weights with their origin, input size and licence; verify those on this machine "
        "(SHA-256, and whether every key matches), and print the command that fetches the others on a machine with a "
        "network; or fetch them into a folder. list and check make no network connection. Exit code of check and "
        "fetch: 1 if a file is missing or wrong, else 0.",
    )
    command.add_argument("action", choices=("list", "check", "fetch"), help="list them, verify them, or fetch them")
    command.add_argument(
        "models", nargs="*", metavar="MODEL", help="a file of conf/model, such as resnet50, or a timm model"
    )
    command.add_argument(
        "--weights",
        type=Path,
        default=Path("weights"),
        metavar="DIR",
        help="folder with downloaded weight files (default: ./weights)",
    )
    command.set_defaults(act=_run_weights)


def _run_weights(arguments: argparse.Namespace) -> None:
    if arguments.action == "fetch" and not arguments.models:
        raise PylorusError("weights fetch: found no MODEL. `pylorus weights list` shows those of conf/model.")
    from pylorus.doctor.weights import print_fetched_weights, print_weight_checks, print_weights

    if arguments.action == "list":
        print_weights(arguments.models, arguments.weights)
        return
    act = print_weight_checks if arguments.action == "check" else print_fetched_weights
    if not act(arguments.models, arguments.weights):
        sys.exit(1)


def add_image_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `draw`, `audit` and `pack_shards` to the command line."""
    _add_draw(commands)
    _add_audit(commands)
    _add_pack(commands)


def _add_draw(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "draw",
        help="generate synthetic gastroscopy images to try Pylorus with",
        description="Generate synthetic gastroscopy images in three class folders, to try Pylorus without real data.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("folder", type=Path, help="a new or empty folder")
    command.add_argument("--images", type=int, default=60, help="images per class")
    command.add_argument("--size", type=int, default=256, help="side of the square images, in pixels")
    command.add_argument("--images-per-patient", type=int, default=2, help="images per patient")
    command.add_argument("--seed", type=int, default=0, help="the same seed generates the same images")
    command.add_argument("--overlay", action="store_true", help="add burned-in text, as endoscopy consoles do")
    command.set_defaults(act=_run_draw)


def _run_draw(arguments: argparse.Namespace) -> None:
    from pylorus.data.synthetic import generate_image_set

    count = generate_image_set(
        arguments.folder,
        images=arguments.images,
        size=arguments.size,
        seed=arguments.seed,
        images_per_patient=arguments.images_per_patient,
        overlay=arguments.overlay,
    )
    print(f"Wrote {count} images to {arguments.folder}. To train on them:")
    print(f"  {TRAIN_COMMAND} {format_command([f'data.root={arguments.folder}'])} data.group='patient_\\d+'")


def _add_audit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "audit",
        help="check an image set for leaks, copies, damaged files and burned-in text",
        description="Check an image set for leaks between splits, near copies, damaged files, burned-in text and other "
        "problems. Exit code 1 if there is a leak or an error, 2 if the audit itself fails, else 0.",
    )
    command.add_argument("root", type=Path, metavar="ROOT", help="ROOT/CLASS/… or ROOT/{train,val,test}/CLASS/…")
    command.add_argument(
        "--manifest", type=Path, metavar="FILE", help="CSV or Parquet file that lists the images below ROOT"
    )
    command.add_argument(
        "--group", metavar="REGEX", help="regular expression that finds the patient in a path below ROOT"
    )
    command.add_argument(
        "--output", type=Path, default=Path("audit"), metavar="DIR", help="folder to write to (default: ./audit)"
    )
    command.add_argument(
        "--no-names", action="store_true", help="show neither file names nor pictures, so that the result can be shared"
    )
    command.add_argument(
        "--cache",
        type=Path,
        default=Path("outputs/cache"),
        metavar="DIR",
        help="cache of facts about files, by content (default: outputs/cache)",
    )
    command.set_defaults(act=_run_audit)


def _run_audit(arguments: argparse.Namespace) -> None:
    from pylorus.report.audit_page import audit_folder

    try:
        code = audit_folder(
            arguments.root,
            arguments.output,
            manifest=arguments.manifest,
            group=arguments.group,
            names=not arguments.no_names,
            cache=arguments.cache,
        )
    except BrokenPipeError:
        raise
    except (PylorusError, ValueError, OSError) as error:
        # Exit code 1 means that the images have faults; a script must not mistake a mistyped folder for that.
        print(f"error: {format_system_error(error)}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _add_pack(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "pack",
        help="pack an image set into shards (tar files)",
        description="Pack class folders, or the images that a manifest lists, into shards (tar files) for data=shards.",
    )
    command.add_argument("root", type=Path, metavar="ROOT", help="class folders, or a manifest next to its images")
    command.add_argument("output", type=Path, metavar="OUT", help="a new or empty folder")
    command.add_argument(
        "--group", metavar="REGEX", help="regular expression that finds the patient in a path below ROOT"
    )
    command.add_argument("--per-shard", type=int, default=1000, metavar="N", help="images per shard (default: 1000)")
    command.set_defaults(act=_run_pack)


def _run_pack(arguments: argparse.Namespace) -> None:
    from pylorus.data.sources import pack_shards

    shards = pack_shards(arguments.root, arguments.output, group=arguments.group, per_shard=arguments.per_shard)
    print(f"Wrote {format_count(len(shards), 'shard')} to {arguments.output}. To train on them:")
    print(f"  {TRAIN_COMMAND} data=shards {format_command([f'data.root={arguments.output}'])}")


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Exit with code 130 and one line after Ctrl-C, also where a library turned the KeyboardInterrupt into an error."""
    received: list[int] = []

    def handle_signal(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    has_handler = is_default and threading.current_thread() is threading.main_thread()
    if has_handler:
        signal.signal(signal.SIGINT, handle_signal)
    try:
        yield
    except BaseException as error:
        if not received and not isinstance(error, KeyboardInterrupt):
            raise
        name = str(error) if isinstance(error, KeyboardInterrupt) else ""
        words = "; ".join([f"interrupted{format_stop(name)}", *getattr(error, "__notes__", ())])
        print(f"\n{words}" if sys.stderr.isatty() else words, file=sys.stderr)  # the terminal has printed ^C
        sys.exit(INTERRUPTED)
    finally:
        if has_handler:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the command; errors that a user can fix are printed without a traceback."""
    words = sys.argv[1:] if arguments is None else arguments
    setup_terminal()
    with handle_closed_pipe(), exit_on_interrupt():
        try:
            if words[:1] == ["-sc"]:
                complete_words(build_parser(), words, run_train=lambda: _run_train(argparse.Namespace(words=words)))
            elif words[:1] == ["train"]:
                _run_train(argparse.Namespace(words=words[1:]))
            else:
                options = build_parser().parse_command(expand_words(words))
                options.act(options)
        except Exception as error:
            if words[:1] in (["-sc"], ["train"]) or isinstance(error, BrokenPipeError):
                raise  # Hydra's part of the command line prints the errors that a user can fix
            if not isinstance(error, PylorusError | ValueError | OSError) and explain_limit(error) is None:
                raise
            sys.exit(f"error: {format_system_error(error)}")


def build_parser() -> CommandParser:
    """Return the parser of all commands; the reference documentation is generated from it, too."""
    parser = CommandParser(
        prog="pylorus",
        description="Prepare images, train image classifiers for gastroscopy, report on runs, and use trained models. "
        "`pylorus COMMAND --help` describes a command.",
    )
    parser.add_argument("--version", action="version", version=f"pylorus {__version__}")
    commands: Any = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add_commands in (add_train_commands, add_image_commands, add_evidence_commands, add_model_commands):
        add_commands(commands)
    return parser


if __name__ == "__main__":
    main()
