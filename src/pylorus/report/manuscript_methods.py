"""The methods of a manuscript: how patients, networks and statistics were handled, and the references of what was used.

A method is cited where a sentence names it, a network where a run used it, software in the version that the run
recorded.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from pylorus.config.keys import list_loss_details
from pylorus.core.formatting import format_percent, join_names
from pylorus.report import checklist_answers
from pylorus.report.captions import (
    count_epochs_run,
    format_averaging,
    format_test_images_origin,
    format_validation_images,
    format_validation_images_origin,
    get_weights_source,
    is_validated_on_test,
)
from pylorus.report.evidence import Evidence, Winner
from pylorus.report.manuscript_blocks import (
    AUTHOR,
    Block,
    CellFinder,
    Citation,
    FigureReference,
    Gap,
    Heading,
    LinkedNumber,
    Paragraph,
    Span,
    Spans,
    TableReference,
    fill,
    join_clauses,
)
from pylorus.report.margins import format_margin_caveat
from pylorus.report.mistakes import Section, Sentences
from pylorus.report.results import CONFIDENCE, LEVEL
from pylorus.runs.folder import KEY, LAST
from pylorus.runs.reading import SavedRun, SavedStage

MAX_DESCRIBED_RUNS = 6
"""Training of more configurations than this is only described by its table."""

ABOUT_FILES = ("This report was computed", ".parquet", "pylorus predict")
"""Words of sentences of the report that are about its files and not for a paper."""

CITED_METHODS = {
    "wilson": (
        r"\bWilson\b",
        "Wilson EB. Probable inference, the law of succession, and statistical inference. "
        "J Am Stat Assoc 1927;22:209-212.",
    ),
    "mover": (
        r"\bMOVER\b",
        "Zou GY, Donner A. Construction of confidence limits about effect measures: a general "
        "approach. Stat Med 2008;27:1693-1702.",
    ),
    "delong": (
        r"\bDeLong",
        "DeLong ER, DeLong DM, Clarke-Pearson DL. Comparing the areas under two or more correlated "
        "receiver operating characteristic curves: a nonparametric approach. Biometrics 1988;44:837-845.",
    ),
    "obuchowski": (
        r"\bObuchowski\b(?! and Rockette)",
        "Obuchowski NA. Nonparametric analysis of clustered ROC curve data. Biometrics 1997;53:567-578.",
    ),
    "mcnemar": (
        r"\bMcNemar",
        "McNemar Q. Note on the sampling error of the difference between correlated proportions "
        "or percentages. Psychometrika 1947;12:153-157.",
    ),
    "holm": (
        r"\bHolm\b|\bHolm's\b",
        "Holm S. A simple sequentially rejective multiple test procedure. Scand J Stat 1979;6:65-70.",
    ),
    "rockette": (
        r"Obuchowski and Rockette",
        "Obuchowski NA, Rockette HE. Hypothesis testing of diagnostic accuracy for "
        "multiple readers and multiple tests: an ANOVA approach with dependent observations. "
        "Commun Stat Simul Comput 1995;24:285-308.",
    ),
    "hillis": (
        r"\bHillis\b",
        "Hillis SL. A marginal-mean ANOVA approach for analyzing multireader multicase "
        "radiological imaging data. Stat Med 2014;33:330-360.",
    ),
    "nadeau": (
        r"Nadeau and Bengio",
        "Nadeau C, Bengio Y. Inference for the generalization error. Mach Learn 2003;52:239-281.",
    ),
    "temperature": (
        r"temperature scaling|[Tt]emperature",
        "Guo C, Pleiss G, Sun Y, Weinberger KQ. On calibration of "
        "modern neural networks. Proc Mach Learn Res 2017;70:1321-1330.",
    ),
    "ema": (
        r"exponential moving average of the weights",
        "Polyak BT, Juditsky AB. Acceleration of stochastic approximation by averaging. "
        "SIAM J Control Optim 1992;30:838-855.",
    ),
    "swa": (
        r"mean of the weights",
        "Izmailov P, Podoprikhin D, Garipov T, Vetrov D, Wilson AG. Averaging weights leads to wider "
        "optima and better generalization. UAI 2018:876-885.",
    ),
    "kappa": (
        r"\bkappa\b|κ",
        "Cohen J. A coefficient of agreement for nominal scales. Educ Psychol Meas 1960;20:37-46.",
    ),
    "mcc": (
        r"\bMCC\b",
        "Matthews BW. Comparison of the predicted and observed secondary structure of T4 phage lysozyme. "
        "Biochim Biophys Acta 1975;405:442-451.",
    ),
    "brier": (
        r"\bBrier\b",
        "Brier GW. Verification of forecasts expressed in terms of probability. Mon Weather Rev 1950;78:1-3.",
    ),
    "net-benefit": (
        r"net benefit",
        "Vickers AJ, Elkin EB. Decision curve analysis: a novel method for evaluating "
        "prediction models. Med Decis Making 2006;26:565-574.",
    ),
}
"""Statistical methods: a pattern of the name in a sentence, and the reference."""

GUIDELINES = {
    "quaide": "Antonelli G, Libanio D, De Groof AJ, et al. QUAIDE - Quality assessment of AI preclinical studies in "
    "diagnostic endoscopy. Gut 2025;74:153-161.",
    "stard": "Sounderajah V, Guni A, Liu X, et al. The STARD-AI reporting guideline for diagnostic accuracy studies "
    "using artificial intelligence. Nat Med 2025;31:3283-3289. doi:10.1038/s41591-025-03953-8.",
    "claim": "Tejani AS, Klontzas ME, Gatti AA, et al. Checklist for Artificial Intelligence in Medical Imaging "
    "(CLAIM): 2024 update. Radiol Artif Intell 2024;6:e240300. doi:10.1148/ryai.240300.",
    "tripod": "Collins GS, Moons KGM, Dhiman P, et al. TRIPOD+AI statement: updated guidance for reporting clinical "
    "prediction models that use regression or machine learning methods. BMJ 2024;385:e078378. "
    "doi:10.1136/bmj-2023-078378.",
}

NETWORKS = (
    (
        r"^resnet\d+$",
        "He K, Zhang X, Ren S, Sun J. Deep residual learning for image recognition. CVPR 2016:770-778.",
    ),
    (
        r"^vgg\d+(_bn)?$",
        "Simonyan K, Zisserman A. Very deep convolutional networks for large-scale image recognition. ICLR 2015. "
        "arXiv:1409.1556.",
    ),
    (
        r"^inception_v3",
        "Szegedy C, Vanhoucke V, Ioffe S, Shlens J, Wojna Z. Rethinking the Inception architecture for "
        "computer vision. CVPR 2016:2818-2826.",
    ),
    (
        r"^densenet",
        "Huang G, Liu Z, van der Maaten L, Weinberger KQ. Densely connected convolutional networks. "
        "CVPR 2017:4700-4708.",
    ),
    (
        r"^mobilenetv2",
        "Sandler M, Howard A, Zhu M, Zhmoginov A, Chen LC. MobileNetV2: inverted residuals and linear "
        "bottlenecks. CVPR 2018:4510-4520.",
    ),
    (r"^mobilenetv3", "Howard A, Sandler M, Chu G, et al. Searching for MobileNetV3. ICCV 2019:1314-1324."),
    (
        r"^(tf_)?efficientnet_",
        "Tan M, Le QV. EfficientNet: rethinking model scaling for convolutional neural networks. "
        "Proc Mach Learn Res 2019;97:6105-6114.",
    ),
    (
        r"^(tf_)?efficientnetv2",
        "Tan M, Le QV. EfficientNetV2: smaller models and faster training. Proc Mach Learn Res 2021;139:10096-10106.",
    ),
    (
        r"^convnext_",
        "Liu Z, Mao H, Wu CY, Feichtenhofer C, Darrell T, Xie S. A ConvNet for the 2020s. CVPR 2022:11976-11986.",
    ),
    (
        r"^vit_",
        "Dosovitskiy A, Beyer L, Kolesnikov A, et al. An image is worth 16x16 words: transformers for image "
        "recognition at scale. ICLR 2021. arXiv:2010.11929.",
    ),
    (
        r"^swin_",
        "Liu Z, Lin Y, Cao Y, et al. Swin Transformer: hierarchical vision transformer using shifted windows. "
        "ICCV 2021:10012-10022.",
    ),
)
"""Networks: a pattern of the architecture's name in timm, and the reference."""

SOFTWARE = {
    "torch": "Paszke A, Gross S, Massa F, et al. PyTorch: an imperative style, high-performance deep learning library. "
    "Adv Neural Inf Process Syst 2019;32:8024-8035.",
    "timm": "Wightman R. PyTorch Image Models. 2019. doi:10.5281/zenodo.4414861.",
    "pytorch-lightning": "Falcon W, The PyTorch Lightning team. PyTorch Lightning. 2019. doi:10.5281/zenodo.3828935.",
    "numpy": "Harris CR, Millman KJ, van der Walt SJ, et al. Array programming with NumPy. Nature 2020;585:357-362.",
    "opencv-python-headless": "Bradski G. The OpenCV library. Dr Dobb's J Softw Tools 2000.",
    "albumentations": "Buslaev A, Iglovikov VI, Khvedchenya E, Parinov A, Druzhinin M, Kalinin AA. Albumentations: "
    "fast and flexible image augmentations. Information 2020;11:125.",
    "torchmetrics": "Detlefsen NS, Borovec J, Schock J, et al. TorchMetrics - measuring reproducibility in PyTorch. "
    "J Open Source Softw 2022;7:4101.",
    "hydra-core": "Yadan O. Hydra - a framework for elegantly configuring complex applications. 2019.",
}


def find_method_citations(sentence: str) -> list[str]:
    """Return the keys of the methods that a sentence names, in the order of `CITED_METHODS`.

    Example:
        >>> find_method_citations("Wilson intervals; p by Holm's method.")
        ['wilson', 'holm']
    """
    return [key for key, (pattern, _) in CITED_METHODS.items() if re.search(pattern, sentence)]


def collect_versions(run: SavedRun) -> dict[str, str]:
    """Return the versions of the software that a run recorded, Pylorus and Python first."""
    recorded: Mapping[str, object] = {**run.bundle.get("versions", {}), **run.environment.get("packages", {})}
    first = {name: recorded[name] for name in ("pylorus",) if name in recorded}
    python = run.environment.get("python")
    first |= {"python": python} if python else {}
    return {name: str(version) for name, version in {**first, **recorded}.items()}


def collect_references(runs: Sequence[SavedRun]) -> dict[str, str]:
    """Return all references that may be cited, by key."""
    references = {key: text for key, (_, text) in CITED_METHODS.items()} | {
        f"guideline-{key}": text for key, text in GUIDELINES.items()
    }
    for run in runs:
        references[get_network_key(run)] = _format_network_reference(run)
        references[get_weights_key(run)] = _format_weights_reference(run)
    versions: dict[str, list[str]] = {}
    for run in runs:
        for name, version in collect_versions(run).items():
            if version not in versions.setdefault(name, []):
                versions[name].append(version)
    for name, numbers in versions.items():
        paper = f" {SOFTWARE[name]}" if name in SOFTWARE else ""
        word = "version" if len(numbers) == 1 else "versions"
        references[f"software-{name}"] = f"{name} [software], {word} {', '.join(numbers)}.{paper}"
    return references


def get_network_key(run: SavedRun) -> str:
    """Return the key of the reference of a run's network."""
    return f"network-{run.model.partition('.')[0]}"


def get_weights_key(run: SavedRun) -> str:
    """Return the key of the reference of a run's initial weights."""
    return f"weights-{run.model}-{get_weights_source(run)}"


def _format_network_reference(run: SavedRun) -> str:
    name = run.model.partition(".")[0]
    target = run.get_setting("model._target_")
    for pattern, text in NETWORKS:
        if not target and re.match(pattern, name):
            return f"{name}: {text}"
    return f"{name}: {AUTHOR}reference of this network]"


def _format_weights_reference(run: SavedRun) -> str:
    source = get_weights_source(run)
    if source == "none" or not source:
        return f"{run.model}: no pretrained weights."
    recorded = run.bundle.get("weights", {})
    sha256 = recorded.get("sha256") or run.environment.get("weights_sha256")
    digest = f", SHA-256 {sha256}" if sha256 else ""
    where = "timm hub" if source == "hub" else f"file {source}"
    licence = recorded.get("licence")
    terms = f"Licence: {licence}." if licence else f"{AUTHOR}origin and licence of these weights]"
    return f"{run.model}: pretrained weights [data], {where}{digest}. {terms}"


def iter_method_blocks(
    evidence: Evidence, sections: Sequence[Section], runs: Sequence[SavedRun], finder: CellFinder
) -> Iterator[Block]:
    """Yield the blocks of the methods: patients, networks and training, selection, statistics and software.

    Args:
        evidence: The results.
        sections: The sections of the report, of which that on methods is used.
        runs: One run per configuration.
        finder: Finds numbers in the tables.
    """
    yield Heading("Patients and images", 2)
    yield Paragraph((Gap("design, setting, dates, eligibility, endoscopes"),))
    splits = select_splits(runs)
    for run in splits:
        start = describe_scope(evidence, run) or (f"{run.label}: " if len(splits) > 1 else "")
        several = _describe_cross_validation(evidence, run)
        yield Paragraph((*several, *_describe_split(run, finder, names=evidence.options.names, start=start)))
    yield Paragraph((Gap("reference standard, and who established it"),))
    yield Heading("Networks and training", 2)
    if not runs:
        return
    preprocessing = checklist_answers.report_preprocessing(evidence)
    yield Paragraph((f"Preprocessing. {preprocessing}",)) if preprocessing else Paragraph((Gap("preprocessing"),))
    if len(runs) <= MAX_DESCRIBED_RUNS:
        for run in runs:
            name, repeats = find_replicates(evidence, run)
            label = (f"{name}: ",) if len(runs) > 1 else ()
            yield Paragraph((*label, *_describe_training(run, finder, repeats)))
    elif "training-settings" in finder.tables:
        yield Paragraph(("How each network was trained is given in ", TableReference("training-settings"), "."))
    left_out = [run.label for run in evidence.runs if not run.complete_stages]
    if left_out and evidence.results:
        yield Paragraph((f"Runs without test predictions, of which no result is reported: {join_names(left_out)}.",))
    yield Heading("Selection, calibration and threshold", 2)
    yield Paragraph(_describe_selection(evidence))
    yield Heading("Statistical analysis", 2)
    yield from map(Paragraph, _describe_statistics(sections))
    if "margins" in finder.tables and evidence.margin is not None:
        caveat = format_margin_caveat(evidence, evidence.margin)
        yield Paragraph((f"Non-inferiority and equivalence. {caveat} ", Gap("why this margin")))
    yield Heading("Software", 2)
    yield Paragraph(_describe_software(evidence.runs))


def find_replicates(evidence: Evidence, run: SavedRun) -> tuple[str, tuple[SavedRun, ...]]:
    """Return the label of the configuration of a run, and all of its runs."""
    for label, runs in evidence.replicates.items():
        if any(each is run for each in runs):
            return (label if len(runs) > 1 else run.label), runs
    return run.label, (run,)


def describe_scope(evidence: Evidence, run: SavedRun) -> str:
    """Begin a sentence about one of several divisions of the images; empty if the configuration has a single one."""
    if len(select_splits(find_replicates(evidence, run)[1])) < 2:
        return ""
    return f"In the run {run.label}, " if run.fold is None else f"In the run of fold {run.fold}, "


def _describe_cross_validation(evidence: Evidence, run: SavedRun) -> Spans:
    """State over how many folds or divisions a configuration was trained, if there are several."""
    splits = select_splits(find_replicates(evidence, run)[1])
    if len(splits) < 2:
        return ()
    if run.fold is None:
        return (f"The images were divided {len(splits)} times, and each division had runs of its own. ",)
    folds = int(run.get_setting("data.folds", len(splits)))
    tested = "each" if folds == len(splits) and run.get_setting("data.fold_column") is None else f"{len(splits)}"
    return (
        f"The images were divided into {folds} folds, and {tested} of them {'was' if tested == 'each' else 'were'} the "
        "test images of one run, which was trained and validated on the images of the others. ",
    )


def _describe_split(run: SavedRun, finder: CellFinder, *, names: bool, start: str) -> Spans:
    assert run.split is not None
    key = f"flow-{run.stem}"
    kind = ", generated by a program," if run.get_setting("data.kind") == "synthetic" else ""
    images, patients = finder.find(key, ["included"], "images"), finder.find(key, ["included"], "patients")
    spans = fill(start, images, " images of ", patients, f" patients{kind} were included. ") or fill(
        start, images, f" images{kind} were included; their patients are not known. "
    )
    unit = "Patients" if run.has_groups else "Images"
    parts = ["training", "test"] if is_validated_on_test(run) else ["training", "validation", "test"]
    counts = join_clauses([fill(finder.find(key, [part], "images"), f" {part}") for part in parts])
    spans += (f"{unit} were divided into parts: ", *counts, " images. ") if counts else ()
    spans += (f"Test images: {format_test_images_origin(run, names=names)}. ",)
    spans += (
        ("Every epoch was validated on the test images (data.validation=test), so all results are optimistic. ",)
        if is_validated_on_test(run)
        else (f"Validation images: {format_validation_images_origin(run)}. ",)
    )
    shared = run.split.groups_in_several_splits
    if run.has_groups and not shared:
        spans += ("No patient is in more than one part. ",)
    spans += ("The flow is shown in ", FigureReference(key), " and ", TableReference(key), ".")
    return spans


def _describe_training(run: SavedRun, finder: CellFinder, repeats: Sequence[SavedRun]) -> Spans:
    source = get_weights_source(run)
    start: Spans = (f"The network {run.model}", Citation((get_network_key(run),)))
    start += (
        (" began with random weights. ",)
        if source == "none"
        else (" began with pretrained weights", Citation((get_weights_key(run),)), ". ")
    )
    spans: Spans = start
    for stage in run.stages:
        if stage.test is None:
            spans += (f"The stage {stage.name} was not completed. ",)
        else:
            spans += _describe_stage(run, stage, finder, repeats)
    loss = list_loss_details(run.get_setting("loss", {}))
    spans += (f"The loss was {', '.join(loss)} ", "(", TableReference("training-settings"), ").") if run.stages else ()
    if run.stages and len(repeats) > 1:
        spans += (f" There were {len(repeats)} runs of this training{_list_repeats(repeats)}.",)
    return spans


def _list_repeats(repeats: Sequence[SavedRun]) -> str:
    """List the seeds, folds and divisions in which the runs of a configuration differ."""
    texts = []
    for words, values in (
        ("with seeds", [run.get_setting("seed") for run in repeats]),
        ("of folds", [run.fold for run in repeats]),
        ("with data.split_seed", [run.get_setting("data.split_seed") for run in repeats]),
    ):
        distinct = [str(value) for value in dict.fromkeys(values) if value is not None]
        if len(distinct) > 1:
            texts.append(f"{words} {join_names(distinct)}")
    return f", {' and '.join(texts)}" if texts else ""


def _describe_stage(run: SavedRun, stage: SavedStage, finder: CellFinder, repeats: Sequence[SavedRun]) -> Spans:
    def find(title: str, heading: str | None = None) -> LinkedNumber | None:
        return finder.find("training-settings", [run.label, stage.name], title, heading=heading)

    learn = str(run.get_setting(f"stages.{stage.name}.learn", ""))
    layers = {"head": "the classification head was", "all": "all layers were", "": "layers were"}.get(
        learn, f"{_name_layers(learn)} were"
    )
    schedule = run.get_setting(f"stages.{stage.name}.schedule")
    clauses = join_clauses(
        [
            fill("optimizer ", find("optimizer")),
            fill(
                "a peak learning rate of ",
                find("peak learning rate"),
                f" ({schedule} schedule)" if schedule else "",
            ),
            fill("weight decay ", find("weight decay")),
            fill("batch size ", find("batch size")),
            fill("augmentation ", find("augmentation")),
            fill("seed ", find("seed")) if len({each.get_setting("seed") for each in repeats}) == 1 else (),
        ]
    )
    patience = run.get_setting(f"stages.{stage.name}.patience")
    is_early = patience is not None and count_epochs_run(stage) < int(run.get_setting(f"stages.{stage.name}.epochs", 0))
    early = f" (stopped after {patience} epochs without improvement)" if is_early else ""
    spans = fill(
        f"In the stage {stage.name}, {layers} trained for ",
        find("run", "epochs"),
        " of ",
        find("planned", "epochs"),
        f" planned epochs{early}",
    )
    spans = (*spans, *((" with ", *clauses) if clauses else ()), ". ") if spans else ()
    averaging = format_averaging(run, stage)
    if not averaging:
        return spans
    citation = Citation(tuple(find_method_citations(averaging)))
    return (*spans, f"The weights that the stage {stage.name} kept are the {averaging}", citation, ". ")


def _name_layers(learn: str) -> str:
    """Return which layers a stage trained besides the head, by a block's name or by their number from the end."""
    if not learn.startswith("last:"):
        return f"the layers from {learn} on"
    number = learn.removeprefix("last:")
    if number.endswith("%"):
        return f"the last {number[:-1]} % of the blocks and the head"
    return f"the last {'block' if number == '1' else f'{number} blocks'} and the head"


def _describe_selection(evidence: Evidence) -> Spans:
    if not evidence.results:
        return (Gap("selection of the model; no stage has test predictions yet"),)
    runs = list(dict.fromkeys(result.run for result in evidence.results))
    monitors = list(dict.fromkeys(result.stage.monitor for result in evidence.results))
    images = format_validation_images(runs)
    of = "Of each stage" if any(len(run.complete_stages) > 1 for run in runs) else "Of all epochs"
    texts = [
        f"{of}, the {'epoch' if of == 'Of each stage' else 'one'} with the best {join_names(monitors, last='or')} "
        f"on {images} was kept."
    ]
    for winner in evidence.winners:
        texts.append(_describe_winner_choice(winner))
    spans: Spans = (" ".join(dict.fromkeys(text for text in texts if text)) + " ",)
    if any(result.calibration is not None for result in evidence.results):
        spans += (
            f"Probabilities were calibrated by temperature scaling, fitted on {images}",
            Citation(("temperature",)),
            ". ",
        )
    return (*spans, checklist_answers.report_thresholds(evidence), " ", Gap("rationale for this sensitivity"))


def _describe_winner_choice(winner: Winner) -> str:
    """State how the reported model was selected, without its figures."""
    if winner.preferred is None:
        return (
            "There are no validation predictions: the reported model is the one with the highest accuracy on the test "
            "images themselves, which is optimistic."
        )
    shipped = winner.preferred.representative.run.bundle_stage
    if len(winner.pool.configurations) == 1 and shipped is not None and shipped.chosen_by in (KEY, LAST):
        return f"The reported stage, {winner.preferred.label}, was " + (
            "named in the configuration (deploy.stage)." if shipped.chosen_by == KEY else "the last one."
        )
    if is_validated_on_test(winner.preferred.representative.run):
        return f"The reported model, {winner.preferred.label}, was selected on the test images themselves."
    if len(winner.preferred.representative.run.complete_stages) == len(winner.pool.configurations) == 1:
        return f"The reported model is {winner.preferred.label}; there was no other to select from."
    mean = "mean " if winner.preferred.replicates > 1 else ""
    ties = f"; others had the same accuracy, and {winner.tie_rule}" if winner.tie_rule else ""
    basis = f"its {mean}accuracy on the validation images"
    return f"The reported model, {winner.preferred.label}, was selected by {basis}{ties}."


def _describe_statistics(sections: Sequence[Section]) -> Iterator[Spans]:
    """Yield the report's sentences on statistical methods, each with citations of the methods that it names."""
    yield (
        f"Intervals are {format_percent(CONFIDENCE, digits=None)} % confidence intervals; a difference counts as shown "
        f"if its p-value, corrected where several tests answer one question, is below {LEVEL:g}.",
    )
    items = [item for section in sections if section.key == "methods" for item in section.items]
    for text in (text for item in items if isinstance(item, Sentences) for text in item.texts):
        if not any(words in text for words in ABOUT_FILES):
            keys = tuple(find_method_citations(text))
            yield (text.removesuffix("."), Citation(keys), ".") if keys else (text,)


def _describe_software(runs: Sequence[SavedRun]) -> Spans:
    versions: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in collect_versions(run).items():
            versions.setdefault(name, {})[version] = None
    spans: list[Span] = []
    for name, numbers in versions.items():
        spans += [f"{', ' if spans else ''}{name} {' and '.join(numbers)}", Citation((f"software-{name}",))]
    return ("Software as recorded by the runs: ", *spans, ".") if spans else (Gap("software with versions"),)


def select_splits(runs: Sequence[SavedRun]) -> list[SavedRun]:
    """Return the first run of each split."""
    first: dict[str, SavedRun] = {}
    for run in runs:
        if run.split is not None:
            first.setdefault(run.split.sha256, run)
    return list(first.values())
