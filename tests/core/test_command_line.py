"""The command `pylorus` says what was meant: misspelt commands and options, paths in the wrong order."""

from pathlib import Path

import pytest

from pylorus.cli import build_parser, main

PREDICT = ["predict", "run/model", "D", "--output", "p.csv"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a run, its bundle, class folders and a table."""
    monkeypatch.chdir(tmp_path)
    Path("run/model").mkdir(parents=True)
    for name in ("run/status.json", "run/model/model.json", "run/model/SHA256SUMS", "run/model/model.safetensors"):
        Path(name).write_text("{}")
    for name in ("D/a/1.jpg", "D/b/2.jpg", "shards/a-000.tar"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("labels.csv").write_text("path,label\n")


@pytest.mark.parametrize(
    ("words", "corrected"),
    [
        ("predcit run/model D --output p.csv", PREDICT),
        ("evaluate run/model D --output p.csv", PREDICT),
        ("Predict run/model D --output p.csv", PREDICT),
        ("app run/model", ["serve", "run/model"]),
        ("gradcam run/model D", ["explain", "run/model", "D"]),
        ("check D", ["audit", "D"]),
        ("power --sensitivity 0.9", ["plan", "--sensitivity", "0.9"]),
        ("plan --sensitivity 0,9", ["plan", "--sensitivity", "0.9"]),
        ("plan --sensitivity 90%", ["plan", "--sensitivity", "0.9"]),
        ("report RUN sensitivity=0.9", ["report", "RUN", "--sensitivity", "0.9"]),
        ("trian data.root=D", ["train", "data.root=D"]),
        ("data.root=D seed=1", ["train", "data.root=D", "seed=1"]),
        ("predict run/model D --ouput p.csv", PREDICT),
        ("predict run/model D -o p.csv", PREDICT),
        ("predict run/model D output=p.csv", PREDICT),
        ("predict run/model D p.csv", PREDICT),
        ("predict run/model D", [*PREDICT[:-1], "predictions.csv"]),
        ("predict run/model D --output p.csv --batch-size 4", [*PREDICT, "--batch", "4"]),
        ("predict run/model D --output p.csv --device gpu", [*PREDICT, "--device", "cuda"]),
        ("predict run/model D --output p.csv --batch 8px", [*PREDICT, "--batch", "8"]),
        ("predict D run/model --output p.csv", PREDICT),
        ("predict run D --output p.csv", PREDICT),
        ("predict run/ D --output p.csv", PREDICT),
        ("predict run/model/model.safetensors D --output p.csv", PREDICT),
        ("serve run", ["serve", "run/model"]),
        ("serve run/model --prot 80", ["serve", "run/model", "--port", "80"]),
        ("explain D run/model --output m", ["explain", "run/model", "D", "--output", "m"]),
        ("export run", ["export", "run/model"]),
        ("audit labels.csv", ["audit", ".", "--manifest", "labels.csv"]),
        ("audit D --groups x", ["audit", "D", "--group", "x"]),
        ("audit D data.group=x", ["audit", "D", "--group", "x"]),
        ("audit data.root=D", ["audit", "D"]),
        ("report run/model", ["report", "run"]),
        ("pack new shards", ["pack", "shards", "new"]),
        ("--verison", ["--version"]),
        ("audit", ["audit", "ROOT"]),
    ],
)
def test_a_mistyped_command_is_answered_with_the_one_that_was_meant(words, corrected, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    message = f"{capsys.readouterr().err}{ended.value.code if isinstance(ended.value.code, str) else ''}"
    assert message.startswith("error: ")
    assert message.rstrip().endswith(f"Type:\n  pylorus {' '.join(corrected)}"), message
    assert ended.value.code != 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("export run/model --group x", "--group: finds the patients among --images, which is not given"),
        ("explain run/model --mistakes --frames-every 1", "--frames-every: reads videos among INPUT"),
        ("doctor D", "doctor: can't use D. Options: --help, --data"),
        ("serve run/model --port web", '--port: found "web", expected a whole number'),
        ("export run/model --format tflite", '--format: found "tflite", expected one of onnx.'),
        ("", "no command given."),
        ("serve", "serve: no value given for BUNDLE, the folder model/ of a run."),
    ],
)
def test_what_a_command_can_not_use_is_named(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert message in f"{capsys.readouterr().err}{ended.value.code}"


@pytest.mark.parametrize("words", ["help", "help predict", "-help", "predict --help"])
def test_help_is_shown_for_every_way_to_ask(words, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(words.split())
    assert capsys.readouterr().out.startswith("usage: pylorus")


def test_the_last_bundle_is_named_where_none_is_given(capsys):
    bundle = Path("outputs/2026-01-31/12-00-00-k3f9/model")
    bundle.mkdir(parents=True)
    (bundle / "model.json").touch()
    with pytest.raises(SystemExit):
        main(["serve"])
    assert f"pylorus serve {bundle}" in capsys.readouterr().err


def test_right_words_are_parsed_as_before():
    options = build_parser().parse_command([*PREDICT, "--group", "a=b", "--batch=4"])
    assert (options.group, options.batch, options.output) == ("a=b", 4, Path("p.csv"))
