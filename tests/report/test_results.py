from pylorus.report.captions import set_run_labels
from pylorus.report.evidence import collect_evidence
from pylorus.report.results import ReportOptions
from pylorus.runs.reading import read_run


def labels(*folders):
    runs = set_run_labels([read_run(folder) for folder in folders])
    return [run.label for run in runs], [run.stem for run in runs]


def test_runs_of_different_models_are_labelled_by_model(make_run):
    paths = [make_run("a"), make_run("b", model="inception_v3.tv_in1k")]
    assert labels(*paths) == (["resnet50", "inception_v3"], ["resnet50", "inception-v3"])


def test_runs_of_one_model_are_labelled_by_what_differs(make_run):
    paths = [make_run("a", config={"optimizer.lr": 0.01}), make_run("b", config={"optimizer.lr": 0.001})]
    assert labels(*paths) == (["resnet50 (lr=0.01)", "resnet50 (lr=0.001)"], ["resnet50-lr-0-01", "resnet50-lr-0-001"])


def test_runs_with_and_without_averaged_weights_are_labelled_by_their_group(make_run):
    paths = [make_run("a", config={"averaging.name": "ema"}), make_run("b")]
    assert labels(*paths)[0] == ["resnet50 (averaging=ema)", "resnet50 (averaging=none)"]


def test_runs_of_other_stages_are_labelled_by_stage(make_run):
    paths = [make_run("a", stages=("pretrain",)), make_run("b")]
    assert labels(*paths)[0] == ["resnet50 (pretrain only)", "resnet50 (pretrain + finetune)"]


def test_a_stage_is_not_named_twice(make_run):
    paths = [make_run("a", stages=("pretrain",)), make_run("b", stages=("pretrain", "finetune"))]
    results = collect_evidence(paths, ReportOptions(resamples=20)).results
    assert [result.label for result in results] == [
        "resnet50 (pretrain only)",
        "resnet50 (pretrain + finetune) pretrain",
        "resnet50 (pretrain + finetune) finetune",
    ]


def test_identical_runs_are_labelled_by_folder(make_run):
    assert labels(make_run("a"), make_run("b"))[0] == ["resnet50 [a]", "resnet50 [b]"]


def test_a_label_never_contains_an_image_folder(make_run):
    paths = [
        make_run("a", config={"data.root": "/x/Li_Wei"}),
        make_run("b", config={"model.weights": "/y/Li_Wei/w.pth"}),
    ]
    assert labels(*paths)[0] == ["resnet50 (weights=hub)", "resnet50 (weights=w.pth)"]


def test_names_of_files_are_each_used_once(make_run):
    paths = [make_run("a", model="net_a"), make_run("b", model="net-a")]
    assert labels(*paths)[1] == ["net-a", "net-a--2"]
