"""Commands for runs and for this machine: report, doctor."""

import argparse
import sys
from pathlib import Path


def add_evidence_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `report` and `doctor` to the command line."""
    _add_report(commands)
    _add_doctor(commands)


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
        "--thumbnails",
        action="store_true",
        help="show the most confident mistakes as images; whoever gets the page gets these images",
    )
    report.add_argument(
        "--names", action="store_true", help="show file names, groups and folders, which may identify patients"
    )
    report.set_defaults(act=_run_report)


def _run_report(arguments: argparse.Namespace) -> None:
    from pylorus.report.options import ReportOptions
    from pylorus.report.write import write_report

    options = ReportOptions(
        class_name=arguments.class_name,
        sensitivity=arguments.sensitivity,
        guarantee=arguments.guarantee,
        published=arguments.published,
        thumbnails=arguments.thumbnails,
        names=arguments.names,
    )
    print(f"report: {write_report(arguments.paths, arguments.output, options=options)}")


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check this machine and say how to fix what is missing",
        description="Check Python, packages, GPU, memory, disks and weights on this machine, and say how to fix what "
        "is missing or wrong. Makes no network connection. Exit code 1 if something is wrong, else 0.",
    )
    doctor.add_argument("--data", type=Path, metavar="DIR", help="also check this folder of class folders")
    doctor.add_argument(
        "--bundle", type=Path, metavar="DIR", help="also check this bundle (the folder model/ of a run)"
    )
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
    from pylorus.doctor.check import State
    from pylorus.doctor.examine import DoctorOptions, run_checks
    from pylorus.doctor.printed import format_json, print_checks

    checks = run_checks(DoctorOptions(weights=arguments.weights, data=arguments.data, bundle=arguments.bundle))
    if arguments.json:
        text, state = format_json(checks)
        print(text)
    else:
        state = print_checks(checks)
    sys.exit(1 if state is State.WRONG else 0)
