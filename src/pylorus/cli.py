"""The `pylorus` command: what is done with images and runs beside training."""

import argparse
import sys
from pathlib import Path

from pylorus import __version__
from pylorus.errors import INTERRUPTED, PylorusError
from pylorus.pipe import ends_quietly


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and hands over; errors that a user can mend are printed without a traceback."""
    with ends_quietly():
        chosen = parser().parse_args(arguments)
        try:
            chosen.act(chosen)
        except BrokenPipeError:
            raise
        except (PylorusError, ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)


def parser() -> argparse.ArgumentParser:
    """The commands with their options: what is read here is also what the reference is made from."""
    parser = argparse.ArgumentParser(
        prog="pylorus", description="Image classifiers for gastroscopy: beside `python train.py`."
    )
    parser.add_argument("--version", action="version", version=f"pylorus {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    draw = commands.add_parser(
        "draw",
        help="write drawn gastroscopic images, in folders of three classes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    draw.add_argument("folder", type=Path, help="a folder that does not exist yet, or is empty")
    draw.add_argument("--images", type=int, default=60, help="images of each class")
    draw.add_argument("--size", type=int, default=256, help="side of the square frames, in pixels")
    draw.add_argument("--images-per-patient", type=int, default=2, help="images of each patient")
    draw.add_argument("--seed", type=int, default=0, help="the same seed draws the same images")
    draw.add_argument("--overlay", action="store_true", help="burn a console's text into the frames")
    draw.set_defaults(act=_draw)
    audited = commands.add_parser("audit", help="what is wrong with an image set: leaks, copies, damaged files, text")
    audited.add_argument("root", type=Path, metavar="ROOT", help="ROOT/CLASS/… or ROOT/{train,val,test}/CLASS/…")
    audited.add_argument("--manifest", type=Path, metavar="FILE", help="CSV or Parquet that lists files below ROOT")
    audited.add_argument("--group", metavar="REGEX", help="finds the patient in a path below ROOT")
    audited.add_argument("--output", type=Path, default=Path("audit"), metavar="DIR", help="default: ./audit")
    audited.add_argument("--no-names", action="store_true", help="neither names nor pictures: fit for passing on")
    audited.add_argument(
        "--cache", type=Path, default=Path("outputs/cache"), metavar="DIR", help="what is known of files, by content"
    )
    audited.set_defaults(act=_audit)
    packed = commands.add_parser("pack", help="write class folders, or what a manifest lists, as shards (tar files)")
    packed.add_argument("root", type=Path, metavar="ROOT", help="class folders, or a manifest beside its images")
    packed.add_argument("output", type=Path, metavar="OUT", help="a folder that does not exist yet, or is empty")
    packed.add_argument("--group", metavar="REGEX", help="finds the patient in a path below ROOT")
    packed.add_argument("--per-shard", type=int, default=1000, metavar="N", help="images of a shard (default: 1000)")
    packed.set_defaults(act=_pack)
    report = commands.add_parser("report", help="tables, figures and a page from a run, several runs or a sweep")
    report.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folder of a run, or of a sweep")
    report.add_argument(
        "--output", type=Path, metavar="DIR", help="default: report in the run or sweep; ./report for several PATHs"
    )
    report.add_argument(
        "--class", dest="class_name", metavar="NAME", help="class that a threshold is fixed for (default: the first)"
    )
    report.add_argument(
        "--sensitivity", type=float, default=0.95, help="share of that class to be found (default: 0.95)"
    )
    report.add_argument("--published", action="store_true", help="show the published study beside our results")
    report.add_argument("--thumbnails", action="store_true", help="show the worst mistakes; they leave with the page")
    report.add_argument(
        "--names", action="store_true", help="show file names, groups and folders; they may name patients"
    )
    report.set_defaults(act=_report)
    _add_doctor(commands)
    _add_predict(commands)
    _add_explain(commands)
    _add_serve(commands)
    _add_export(commands)
    return parser


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


def _add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    predicted = commands.add_parser("predict", help="what a trained model says of images, folders and videos")
    predicted.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="the folder `model` of a run, or an export of it"
    )
    predicted.add_argument("inputs", nargs="+", metavar="INPUT", help="image, folder, pattern or video")
    predicted.add_argument("--output", type=Path, required=True, metavar="FILE", help="ends in .csv, .parquet or .json")
    predicted.add_argument("--frames-every", type=float, metavar="SECONDS", help="take frames of videos this far apart")
    predicted.add_argument(
        "--class", dest="class_name", metavar="NAME", help="class that decides (default: the bundle's)"
    )
    predicted.add_argument(
        "--evaluate", action="store_true", help="insist on an evaluation; needs folders named as classes"
    )
    predicted.add_argument(
        "--group", metavar="REGEX", help="finds the patient in a path, for the evaluation's intervals"
    )
    predicted.add_argument("--batch", type=int, default=32, metavar="N", help="images at once (default: 32)")
    predicted.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: auto")
    predicted.set_defaults(act=_predict)


def _add_explain(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    explained = commands.add_parser("explain", help="heat maps: which part of an image speaks for a class")
    explained.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder `model` of a run")
    explained.add_argument("inputs", nargs="*", metavar="INPUT", help="image, folder, pattern or video")
    explained.add_argument("--output", type=Path, metavar="DIR", help="default with --mistakes alone: maps in the run")
    explained.add_argument(
        "--class", dest="class_name", metavar="NAME", help="class of the maps (default: each image's likeliest)"
    )
    explained.add_argument(
        "--mistakes", action="store_true", help="the worst mistakes of the bundle's run, for `report --thumbnails`"
    )
    explained.add_argument("--no-sanity", action="store_true", help="no comparison with maps of other weights")
    explained.add_argument("--frames-every", type=float, metavar="SECONDS", help="take frames of videos this far apart")
    explained.add_argument("--batch", type=int, default=8, metavar="N", help="images at once (default: 8)")
    explained.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: auto")
    explained.set_defaults(act=_explain)


def _add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    served = commands.add_parser("serve", help="a web page of a trained model, on this machine")
    served.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder `model` of a run")
    served.add_argument("--host", default="127.0.0.1", help="where it listens (default: 127.0.0.1, this machine alone)")
    served.add_argument("--port", type=int, default=7860, help="default: 7860; 0: any free one")
    served.add_argument("--password-file", type=Path, metavar="FILE", help="holds the password, on one line")
    served.add_argument("--without-password", action="store_true", help="let the whole network use it")
    served.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a further name of it, such as a proxy's"
    )
    served.add_argument("--max-mb", type=float, default=20.0, metavar="MB", help="largest file (default: 20)")
    served.add_argument("--max-images", type=int, default=32, metavar="N", help="files at a time (default: 32)")
    served.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: auto")
    served.set_defaults(act=_serve)


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    exported = commands.add_parser("export", help="a trained model for other programs, tried on real images")
    exported.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder `model` of a run")
    exported.add_argument("--format", default="onnx", choices=("onnx",), help="default: onnx")
    exported.add_argument(
        "--output", type=Path, metavar="DIR", help="a new or empty folder (default: beside BUNDLE, as BUNDLE-onnx)"
    )
    exported.add_argument(
        "--images", type=Path, metavar="DIR", help="try the export on these (default: the images of BUNDLE's run)"
    )
    exported.add_argument("--group", metavar="REGEX", help="finds the patient in a path of --images, for intervals")
    exported.add_argument("--int8", action="store_true", help="8-bit whole numbers; what that costs is measured")
    exported.add_argument("--speed", action="store_true", help="measure the speed beside PyTorch")
    exported.set_defaults(act=_export)


def _draw(chosen: argparse.Namespace) -> None:
    from pylorus.data.synthetic import draw_image_set

    count = draw_image_set(
        chosen.folder,
        images=chosen.images,
        size=chosen.size,
        seed=chosen.seed,
        images_per_patient=chosen.images_per_patient,
        overlay=chosen.overlay,
    )
    print(f"{count} images in {chosen.folder}; to train on them:")
    print(f"  python train.py data=folders data.root={chosen.folder} data.group='patient_\\d+'")


def _audit(chosen: argparse.Namespace) -> None:
    from pylorus.audit import audit_folder

    try:
        code = audit_folder(
            chosen.root,
            chosen.output,
            manifest=chosen.manifest,
            group=chosen.group,
            names=not chosen.no_names,
            cache=chosen.cache,
        )
    except BrokenPipeError:
        raise
    except (PylorusError, ValueError, OSError) as error:
        # 1 says that the images have faults: a script must not take a mistyped folder for them.
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _pack(chosen: argparse.Namespace) -> None:
    from pylorus.data.shards_pack import pack

    shards = pack(chosen.root, chosen.output, group=chosen.group, per_shard=chosen.per_shard)
    print(f"{len(shards)} shards in {chosen.output}; to train on them:")
    print(f"  python train.py data=shards data.root={chosen.output}")


def _predict(chosen: argparse.Namespace) -> None:
    from pylorus.deploy.predict import PredictOptions, predict

    if chosen.batch < 1:
        raise PylorusError(f"--batch: found {chosen.batch}, expected at least 1.")
    options = PredictOptions(
        class_name=chosen.class_name,
        frames_every=chosen.frames_every,
        evaluate=chosen.evaluate,
        group=chosen.group,
        batch=chosen.batch,
        device=chosen.device,
    )
    sys.exit(predict(chosen.bundle, chosen.inputs, chosen.output, options))


def _explain(chosen: argparse.Namespace) -> None:
    from pylorus.deploy.explain_images import ExplainOptions, explain

    if chosen.batch < 1:
        raise PylorusError(f"--batch: found {chosen.batch}, expected at least 1.")
    options = ExplainOptions(
        class_name=chosen.class_name,
        mistakes=chosen.mistakes,
        sanity=not chosen.no_sanity,
        frames_every=chosen.frames_every,
        batch=chosen.batch,
        device=chosen.device,
    )
    sys.exit(explain(chosen.bundle, chosen.inputs, chosen.output, options))


def _serve(chosen: argparse.Namespace) -> None:
    try:
        from pylorus.deploy.app.server import serve
    except ModuleNotFoundError as error:
        raise PylorusError(f"the page needs {error.name}: pip install 'pylorus[serve]'") from error
    from pylorus.deploy.app.options import ServeOptions

    options = ServeOptions(
        host=chosen.host,
        port=chosen.port,
        password_file=chosen.password_file,
        without_password=chosen.without_password,
        allowed_hosts=tuple(chosen.allow_host),
        max_mb=chosen.max_mb,
        max_images=chosen.max_images,
        device=chosen.device,
    )
    serve(chosen.bundle, options)


def _export(chosen: argparse.Namespace) -> None:
    from pylorus.deploy.export import ExportOptions, export

    options = ExportOptions(
        output=chosen.output, images=chosen.images, group=chosen.group, int8=chosen.int8, speed=chosen.speed
    )
    export(chosen.bundle, options)


def _report(chosen: argparse.Namespace) -> None:
    from pylorus.report.options import ReportOptions
    from pylorus.report.write import write_report

    options = ReportOptions(
        class_name=chosen.class_name,
        sensitivity=chosen.sensitivity,
        published=chosen.published,
        thumbnails=chosen.thumbnails,
        names=chosen.names,
    )
    print(f"report: {write_report(chosen.paths, chosen.output, options=options)}")


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
