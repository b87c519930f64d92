"""The commands that use trained models: `ensemble`, `predict`, `validate`, `stress`, `monitor` and others.

The command line imports this module, which therefore imports what computes only when it is needed.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pylorus.core.errors import PylorusError, check_table_name
from pylorus.deploy.signature import add_sign_command, add_trust_option


def add_model_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands of a trained model to the command line."""
    _add_ensemble(commands)
    _add_predict(commands)
    _add_validate(commands)
    _add_stress(commands)
    _add_monitor(commands)
    _add_recalibrate(commands)
    _add_explain(commands)
    _add_export(commands)
    _add_serve(commands)
    add_sign_command(commands)


def _add_inference_options(command: argparse.ArgumentParser, *, batch: int) -> None:
    """Add the options that commands for many images have in common."""
    command.add_argument(
        "--frames-every", type=float, metavar="SECONDS", help="also read videos: one frame every SECONDS seconds"
    )
    _add_computing_options(command, batch=batch)


def _add_computing_options(command: argparse.ArgumentParser, *, batch: int) -> None:
    command.add_argument("--batch", type=int, default=batch, metavar="N", help=f"images per batch (default: {batch})")
    _add_device_option(command)


def _add_device_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute (default: auto)"
    )


def _add_network_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--network",
        metavar="MODULE.NAME",
        help="your own class or function that builds the network, if it is not timm's; it is imported and called",
    )
    add_trust_option(command)


def _get_model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keys to trust, and the network: it is imported as the user typed it, the bundle has no say in it."""
    from pylorus.config.instantiation import TARGET, get_object

    network = None if arguments.network is None else get_object({TARGET: arguments.network}, key="--network")
    return {"network": network, "trust": tuple(arguments.trust)}


def _validate_batch_size(arguments: argparse.Namespace) -> int:
    if arguments.batch < 1:
        raise PylorusError(f"--batch: found {arguments.batch}, expected at least 1.")
    return int(arguments.batch)


def _add_ensemble(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "ensemble",
        help="put the networks of several runs into one bundle that averages them",
        description="Put the networks of several finished runs (seeds, folds or backbones) into one bundle whose "
        "probabilities are the mean of theirs. Thresholds, results and what averaging gains are measured only by "
        "networks that were not developed on the image.",
    )
    command.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="finished runs, or a sweep to use all its runs"
    )
    command.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="a new folder; the bundle is model/ in it"
    )
    _add_computing_options(command, batch=32)
    _add_network_option(command)
    command.set_defaults(act=_run_ensemble)


def _run_ensemble(arguments: argparse.Namespace) -> None:
    _use_passive_waiting()
    from pylorus.deploy.ensemble import EnsembleOptions, build_ensemble

    options = EnsembleOptions(
        output=arguments.output,
        batch=_validate_batch_size(arguments),
        device=arguments.device,
        **_get_model_options(arguments),
    )
    build_ensemble(arguments.runs, options)


def _add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "predict",
        help="classify images and videos with a trained model",
        description="Classify images, folders of images and videos with a trained model, and write one row per image.",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder model/ of a run, or an export of it")
    command.add_argument("inputs", nargs="+", metavar="INPUT", help="image, folder, glob pattern or video")
    command.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="table to write; its name ends in .csv, .parquet or .json",
    )
    command.add_argument(
        "--class", dest="class_name", metavar="NAME", help="class whose threshold decides (default: the bundle's)"
    )
    command.add_argument(
        "--evaluate",
        action="store_true",
        help="require an evaluation; the images must be in folders named after the classes",
    )
    command.add_argument(
        "--group", metavar="REGEX", help="regular expression that finds the patient in a path, for confidence intervals"
    )
    command.add_argument(
        "--prevalence",
        type=float,
        metavar="P",
        help="also evaluate PPV and NPV where this proportion of the images is of the deciding class, such as 0.05",
    )
    _add_tta_option(command, "average the probabilities of flipped and turned copies of each image")
    _add_inference_options(command, batch=32)
    _add_network_option(command)
    command.set_defaults(act=_run_predict)


TTA_KINDS = {"mirror": 2, "flips": 4, "turns": 8}
"""Kinds of test-time augmentation, and how many passes of the network each takes for an image."""


def _add_tta_option(command: argparse.ArgumentParser, purpose: str) -> None:
    passes = ", ".join(f"{kind}: {count} passes" for kind, count in TTA_KINDS.items())
    command.add_argument("--tta", choices=tuple(TTA_KINDS), help=f"{purpose} ({passes} of the network for each)")


def _use_passive_waiting() -> None:
    """Let threads of the network sleep while they wait for each other, as processes that read images need the cores.

    OpenMP reads the variable when torch is imported. By default a waiting thread keeps its core busy.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _run_predict(arguments: argparse.Namespace) -> None:
    check_table_name(arguments.output, argument="--output")  # before torch is imported
    _check_prevalence(arguments.prevalence)
    _use_passive_waiting()
    from pylorus.deploy.predict import PredictOptions, predict

    options = PredictOptions(
        class_name=arguments.class_name,
        frames_every=arguments.frames_every,
        evaluate=arguments.evaluate or arguments.prevalence is not None,
        group=arguments.group,
        prevalence=arguments.prevalence,
        batch=_validate_batch_size(arguments),
        device=arguments.device,
        tta=arguments.tta,
        **_get_model_options(arguments),
    )
    sys.exit(predict(arguments.bundle, arguments.inputs, arguments.output, options))


def _add_stress(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "stress",
        help="measure what degraded images cost, and look for shortcuts outside the tissue",
        description="Run a model on blurred, dark, discoloured, compressed and overwritten versions of labelled "
        "images, and on what surrounds the tissue alone: if that tells it the class, the model may use a shortcut. "
        "Writes one HTML page, tables and figures.",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder model/ of a run, or an export of it")
    command.add_argument(
        "images",
        nargs="?",
        type=Path,
        metavar="IMAGES",
        help="class folders, or a manifest (.csv or .parquet) (default: the test images of BUNDLE's run)",
    )
    command.add_argument(
        "--output", type=Path, metavar="DIR", help="folder to write to (without IMAGES, default: stress/ in the run)"
    )
    _add_labelled_image_options(command)
    command.add_argument("--class", dest="class_name", metavar="NAME", help="class of interest (default: the bundle's)")
    command.add_argument(
        "--margin", type=float, default=0.05, metavar="P", help="loss of accuracy that counts (default: 0.05)"
    )
    command.add_argument("--limit", type=int, default=500, metavar="N", help="use at most N images (default: 500)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed degrades in the same way")
    _add_computing_options(command, batch=32)
    _add_network_option(command)
    command.set_defaults(act=_run_stress)


def _run_stress(arguments: argparse.Namespace) -> None:
    _use_passive_waiting()
    from pylorus.deploy.stress import StressOptions, stress

    options = StressOptions(
        class_name=arguments.class_name,
        group=arguments.group,
        names=_parse_names(arguments.names),
        root=arguments.root,
        limit=arguments.limit,
        margin=arguments.margin,
        seed=arguments.seed,
        batch=_validate_batch_size(arguments),
        device=arguments.device,
        **_get_model_options(arguments),
    )
    stress(arguments.bundle, arguments.images, arguments.output, options)


def _add_monitor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "monitor",
        help="follow a model in use: has what it sees or answers changed?",
        description="Compare what a model answered in use, in the files that `pylorus predict` wrote, with its answers "
        "on the run's test images: proportions of classes, abstentions, unlikeness and the look of the images, by "
        "period, with control limits. The exit code is 3 if something is beyond a limit, otherwise 0.",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle or export that made the predictions")
    command.add_argument(
        "predictions", nargs="+", type=Path, metavar="PREDICTIONS", help="files that predict wrote, in order of time"
    )
    command.add_argument(
        "--output", type=Path, default=Path("monitor"), metavar="DIR", help="folder to write to (default: monitor)"
    )
    command.add_argument(
        "--by",
        metavar="PERIOD",
        help="day, week, month or a number of images (default: week if the time is known, otherwise each file)",
    )
    command.add_argument("--time", metavar="COLUMN", help="column of the predictions with the time of each image")
    command.add_argument("--date", metavar="REGEX", help="regular expression that finds the date in a path")
    command.add_argument("--group", metavar="REGEX", help="regular expression that finds the patient in a path")
    command.add_argument(
        "--baseline",
        nargs="+",
        type=Path,
        default=[],
        metavar="PREDICTIONS",
        help="predictions of a period in which the model was accepted, to compare with instead of the test images",
    )
    command.add_argument(
        "--false-alarms",
        type=float,
        default=0.01,
        metavar="P",
        help="probability that a period without drift is beyond any limit (default: 0.01)",
    )
    command.set_defaults(act=_run_monitor)


def _run_monitor(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.false_alarms <= 0.5:
        raise PylorusError(
            f"--false-alarms: found {arguments.false_alarms:g}, expected a probability above 0 and at most 0.5."
        )
    from pylorus.deploy.monitor import MonitorOptions, monitor

    options = MonitorOptions(
        output=arguments.output,
        by=arguments.by,
        time=arguments.time,
        date=arguments.date,
        group=arguments.group,
        baseline=tuple(arguments.baseline),
        false_alarms=arguments.false_alarms,
    )
    sys.exit(monitor(arguments.bundle, arguments.predictions, options))


def _add_recalibrate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "recalibrate",
        help="adapt a model's probabilities to a few labelled images of another clinic",
        description="Fit one scale and one bias per class on a few labelled images of another clinic, and write a new "
        "bundle with these probabilities. The network does not change, and BUNDLE stays as it is.",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder model/ of a run")
    command.add_argument("source", type=Path, metavar="IMAGES", help="folder with class folders, or a manifest")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="the new bundle: a new folder")
    _add_labelled_image_options(command)
    _add_computing_options(command, batch=32)
    _add_network_option(command)
    command.set_defaults(act=_run_recalibrate)


def _run_recalibrate(arguments: argparse.Namespace) -> None:
    names = _parse_names(arguments.names)
    _use_passive_waiting()
    from pylorus.deploy.recalibrate import RecalibrateOptions, recalibrate

    options = RecalibrateOptions(
        output=arguments.output,
        group=arguments.group,
        names=names,
        root=arguments.root,
        batch=_validate_batch_size(arguments),
        device=arguments.device,
        **_get_model_options(arguments),
    )
    recalibrate(arguments.bundle, arguments.source, options)


def _add_labelled_image_options(command: argparse.ArgumentParser) -> None:
    """Add the options that say how labelled images are read."""
    command.add_argument("--group", metavar="REGEX", help="regular expression that finds the patient in a path")
    command.add_argument(
        "--root", type=Path, metavar="DIR", help="folder that a manifest's paths are relative to (default: its own)"
    )
    command.add_argument(
        "--map",
        dest="names",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=CLASS",
        help="class of the model for a class of the images that has another name; NAME= leaves its images out",
    )


def _parse_names(words: list[str]) -> dict[str, str]:
    """Return the class of the model for each class of the images that has another name."""
    unequal = [word for word in words if not word.rpartition("=")[0]]
    if unequal:
        raise PylorusError(
            f'--map: found "{unequal[0]}", expected NAME=CLASS, or NAME= to leave the images of NAME out.'
        )
    pairs = [(name, new) for name, _, new in (word.rpartition("=") for word in words)]
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise PylorusError(f'--map: "{repeated[0]}" is given twice. Name one class for it.')
    return dict(pairs)


def _add_validate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "validate",
        help="evaluate a trained model on labelled images from elsewhere",
        description="Evaluate a trained model on labelled images from elsewhere, such as those of another hospital, "
        "and write a report that shows its figures beside those of the development. Nothing is fitted on the images.",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder model/ of a run, or an export of it")
    command.add_argument("images", type=Path, metavar="IMAGES", help="class folders, or a manifest (.csv or .parquet)")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    _add_labelled_image_options(command)
    command.add_argument("--class", dest="class_name", metavar="NAME", help="class of interest (default: the bundle's)")
    command.add_argument(
        "--prevalence", type=float, metavar="P", help="also give PPV and NPV where this proportion is of the class"
    )
    command.add_argument(
        "--names",
        dest="show_names",
        action="store_true",
        help="show file names and groups, which may identify patients",
    )
    _add_tta_option(command, "also measure what averaging flipped and turned copies of each image would gain")
    _add_computing_options(command, batch=32)
    _add_network_option(command)
    command.set_defaults(act=_run_validate)


def _run_validate(arguments: argparse.Namespace) -> None:
    _check_prevalence(arguments.prevalence)
    names = _parse_names(arguments.names)
    _use_passive_waiting()
    from pylorus.deploy.external import ValidateOptions, validate_bundle
    from pylorus.deploy.predict import PredictOptions

    batch = _validate_batch_size(arguments)
    options = ValidateOptions(
        root=arguments.root,
        group=arguments.group,
        names=names,
        class_name=arguments.class_name,
        prevalence=arguments.prevalence,
        show_names=arguments.show_names,
        tta=arguments.tta,
        inference=PredictOptions(batch=batch, device=arguments.device, **_get_model_options(arguments)),
    )
    print(f"report: {validate_bundle(arguments.bundle, arguments.images, arguments.output, options)}")


def _check_prevalence(prevalence: float | None) -> None:
    if prevalence is not None and not 0 < prevalence < 1:
        raise PylorusError(
            f"--prevalence: found {prevalence:g}, expected a proportion above 0 and below 1, such as 0.05."
            f"{f' Did you mean {prevalence / 100:g}?' if 1 < prevalence < 100 else ''}"
        )


def _add_explain(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "explain",
        help="draw heat maps that show which part of an image supports a class",
        description="Draw heat maps (Grad-CAM) that show which part of an image supports a class, and check that they "
        "depend on what the network learned.",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder model/ of a run")
    command.add_argument("inputs", nargs="*", metavar="INPUT", help="image, folder, glob pattern or video")
    command.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder to write to (with --mistakes alone, default: maps/ in the run)",
    )
    command.add_argument(
        "--class",
        dest="class_name",
        metavar="NAME",
        help="class to explain (default: the most probable one of each image)",
    )
    command.add_argument(
        "--mistakes",
        action="store_true",
        help="explain the most confident mistakes on the test images of the bundle's run, for `report --thumbnails`",
    )
    command.add_argument(
        "--no-sanity", action="store_true", help="skip the comparison with maps of randomized networks"
    )
    _add_inference_options(command, batch=8)
    _add_network_option(command)
    command.set_defaults(act=_run_explain)


def _run_explain(arguments: argparse.Namespace) -> None:
    _use_passive_waiting()
    from pylorus.deploy.explain_command import ExplainOptions, explain

    options = ExplainOptions(
        class_name=arguments.class_name,
        mistakes=arguments.mistakes,
        sanity=not arguments.no_sanity,
        frames_every=arguments.frames_every,
        batch=_validate_batch_size(arguments),
        device=arguments.device,
        **_get_model_options(arguments),
    )
    sys.exit(explain(arguments.bundle, arguments.inputs, arguments.output, options))


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "export",
        help="export a trained model to ONNX and verify it on real images",
        description="Export a trained model to ONNX. The export is compared with PyTorch on real images and written "
        "only if both agree.",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder model/ of a run")
    command.add_argument("--format", default="onnx", choices=("onnx",), help="file format (default: onnx)")
    command.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="a new or empty folder (default: next to BUNDLE: BUNDLE-onnx, with --int8 BUNDLE-onnx-int8)",
    )
    command.add_argument(
        "--images", type=Path, metavar="DIR", help="images to verify the export on (default: those of BUNDLE's run)"
    )
    command.add_argument(
        "--group", metavar="REGEX", help="regular expression that finds the patient in a path of --images"
    )
    command.add_argument(
        "--int8", action="store_true", help="quantize to 8-bit integers and measure the loss of accuracy"
    )
    command.add_argument("--speed", action="store_true", help="measure the speed compared with PyTorch")
    command.add_argument(
        "--accept-licence",
        action="append",
        default=[],
        metavar="LICENCE",
        help="licence of the weights that limits passing on, such as cc-by-nc-4.0, if you may pass this model on; may "
        "be given several times, for an ensemble",
    )
    _add_network_option(command)
    command.set_defaults(act=_run_export)


def _run_export(arguments: argparse.Namespace) -> None:
    from pylorus.deploy.export import ExportOptions, export

    options = ExportOptions(
        output=arguments.output,
        images=arguments.images,
        group=arguments.group,
        int8=arguments.int8,
        speed=arguments.speed,
        accept_licences=tuple(arguments.accept_licence),
        **_get_model_options(arguments),
    )
    export(arguments.bundle, options)


def _add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "serve",
        help="serve a trained model as a web page on this machine",
        description="Serve a trained model as a web page and a JSON interface on this machine. Uploaded images are not "
        "stored.",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder model/ of a run")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    command.add_argument("--port", type=int, default=7860, help="TCP port; 0 for any free one (default: 7860)")
    command.add_argument("--password-file", type=Path, metavar="FILE", help="file with the password, on one line")
    command.add_argument("--without-password", action="store_true", help="let everybody in the network use it")
    command.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="another name of this server or of its proxy"
    )
    command.add_argument(
        "--trust-proxy", action="append", default=[], metavar="ADDRESS", help="proxy whose X-Forwarded-For is believed"
    )
    command.add_argument("--max-mb", type=float, default=20.0, metavar="MB", help="largest file in MB (default: 20)")
    command.add_argument("--max-images", type=int, default=32, metavar="N", help="most files per request (default: 32)")
    command.add_argument("--tta", help=argparse.SUPPRESS)
    _add_device_option(command)
    _add_network_option(command)
    command.set_defaults(act=_run_serve)


def _run_serve(arguments: argparse.Namespace) -> None:
    if arguments.tta is not None:
        raise PylorusError(
            f"--tta: found {arguments.tta}, but the page decides by thresholds that were measured without test-time "
            "augmentation. Leave it out; pylorus predict has the option."
        )
    try:
        from pylorus.deploy.app.server import serve
    except ModuleNotFoundError as error:
        raise PylorusError(f"the web page needs {error.name}: pip install 'pylorus[serve]'") from error
    from pylorus.deploy.app.security import ServeOptions

    options = ServeOptions(
        host=arguments.host,
        port=arguments.port,
        password_file=arguments.password_file,
        without_password=arguments.without_password,
        allowed_hosts=tuple(arguments.allow_host),
        trusted_proxies=tuple(arguments.trust_proxy),
        max_mb=arguments.max_mb,
        max_images=arguments.max_images,
        device=arguments.device,
        **_get_model_options(arguments),
    )
    serve(arguments.bundle, options)
