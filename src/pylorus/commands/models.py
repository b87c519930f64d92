"""Commands on a trained model: predict, explain, export, serve."""

import argparse
import sys
from pathlib import Path

from pylorus.errors import PylorusError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds them to the command line."""
    _add_predict(commands)
    _add_explain(commands)
    _add_export(commands)
    _add_serve(commands)


def _add_reading(command: argparse.ArgumentParser, *, batch: int) -> None:
    """How images are read and computed: what the commands that go through many have in common."""
    command.add_argument("--frames-every", type=float, metavar="SECONDS", help="take frames of videos this far apart")
    command.add_argument("--batch", type=int, default=batch, metavar="N", help=f"images at once (default: {batch})")
    _add_device(command)


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: auto")


def _batch(chosen: argparse.Namespace) -> int:
    if chosen.batch < 1:
        raise PylorusError(f"--batch: found {chosen.batch}, expected at least 1.")
    return int(chosen.batch)


def _add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    predicted = commands.add_parser("predict", help="what a trained model says of images, folders and videos")
    predicted.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="the folder `model` of a run, or an export of it"
    )
    predicted.add_argument("inputs", nargs="+", metavar="INPUT", help="image, folder, pattern or video")
    predicted.add_argument("--output", type=Path, required=True, metavar="FILE", help="ends in .csv, .parquet or .json")
    predicted.add_argument(
        "--class", dest="class_name", metavar="NAME", help="class that decides (default: the bundle's)"
    )
    predicted.add_argument(
        "--evaluate", action="store_true", help="insist on an evaluation; needs folders named as classes"
    )
    predicted.add_argument(
        "--group", metavar="REGEX", help="finds the patient in a path, for the evaluation's intervals"
    )
    _add_reading(predicted, batch=32)
    predicted.set_defaults(act=_predict)


def _predict(chosen: argparse.Namespace) -> None:
    from pylorus.deploy.predict import PredictOptions, predict

    options = PredictOptions(
        class_name=chosen.class_name,
        frames_every=chosen.frames_every,
        evaluate=chosen.evaluate,
        group=chosen.group,
        batch=_batch(chosen),
        device=chosen.device,
    )
    sys.exit(predict(chosen.bundle, chosen.inputs, chosen.output, options))


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
    _add_reading(explained, batch=8)
    explained.set_defaults(act=_explain)


def _explain(chosen: argparse.Namespace) -> None:
    from pylorus.deploy.explain_images import ExplainOptions, explain

    options = ExplainOptions(
        class_name=chosen.class_name,
        mistakes=chosen.mistakes,
        sanity=not chosen.no_sanity,
        frames_every=chosen.frames_every,
        batch=_batch(chosen),
        device=chosen.device,
    )
    sys.exit(explain(chosen.bundle, chosen.inputs, chosen.output, options))


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


def _export(chosen: argparse.Namespace) -> None:
    from pylorus.deploy.export import ExportOptions, export

    options = ExportOptions(
        output=chosen.output, images=chosen.images, group=chosen.group, int8=chosen.int8, speed=chosen.speed
    )
    export(chosen.bundle, options)


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
    _add_device(served)
    served.set_defaults(act=_serve)


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
