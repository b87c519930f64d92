"""Commands on runs and on the machine: report, doctor."""

import argparse
import sys
from pathlib import Path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds them to the command line."""
    _add_report(commands)
    _add_doctor(commands)


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    report = commands.add_parser("report", help="tables, figures and a page from a run, several runs or a sweep")
    report.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folder of a run, or of a sweep")
    report.add_argument(
        "--output", type=Path, metavar="DIR", help="default: report in the run or sweep; ./report for several PATHs"
    )
    report.add_argument(
        "--class", dest="class_name", metavar="NAME", help="class that a threshold is fixed for (default: the bundle's)"
    )
    report.add_argument(
        "--sensitivity",
        type=float,
        metavar="SHARE",
        help="sensitivity that the threshold is to guarantee for new patients (default: the run's deploy.sensitivity)",
    )
    report.add_argument(
        "--guarantee",
        type=float,
        metavar="CONFIDENCE",
        help="confidence with which it is to guarantee it (default: the run's deploy.confidence)",
    )
    report.add_argument("--published", action="store_true", help="show the published study beside our results")
    report.add_argument("--thumbnails", action="store_true", help="show the worst mistakes; they leave with the page")
    report.add_argument(
        "--names", action="store_true", help="show file names, groups and folders; they may name patients"
    )
    report.set_defaults(act=_report)


def _report(chosen: argparse.Namespace) -> None:
    from pylorus.report.options import ReportOptions
    from pylorus.report.write import write_report

    options = ReportOptions(
        class_name=chosen.class_name,
        sensitivity=chosen.sensitivity,
        guarantee=chosen.guarantee,
        published=chosen.published,
        thumbnails=chosen.thumbnails,
        names=chosen.names,
    )
    print(f"report: {write_report(chosen.paths, chosen.output, options=options)}")


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser("doctor", help="what this machine has and lacks, and how to mend it")
    doctor.add_argument("--data", type=Path, metavar="DIR", help="look at this folder of class folders too")
    doctor.add_argument("--bundle", type=Path, metavar="DIR", help="look at this bundle too (model/ of a run)")
    doctor.add_argument(
        "--weights",
        type=Path,
        default=Path("weights"),
        metavar="DIR",
        help="where files of weights were carried to (default: ./weights)",
    )
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(act=_doctor)


def _doctor(chosen: argparse.Namespace) -> None:
    from pylorus.doctor.check import State
    from pylorus.doctor.examine import Question, examine
    from pylorus.doctor.printed import as_json, print_checks

    checks = examine(Question(weights=chosen.weights, data=chosen.data, bundle=chosen.bundle))
    if chosen.json:
        text, state = as_json(checks)
        print(text)
    else:
        state = print_checks(checks)
    sys.exit(1 if state is State.WRONG else 0)
