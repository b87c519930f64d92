"""A value means what was typed: Hydra's grammar does not reach the user."""

import os
import re
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from pylorus.config.checks import load_config
from pylorus.core.errors import PylorusError
from pylorus.launch.main import run_overrides
from pylorus.launch.overrides import check_overrides, split_at_commas
from pylorus.runs.folder import RunFolder

TEXTS = [
    "/images/für uns",
    "/images/a=b (1)",
    "/images/胃癌",
    "/images/[old] {new}",
    "/images/it's here",
    '/images/"quoted" part',
    "/images/~backup",
    r"C:\images\(old)\new",
    r"\\server\share" + "\\",
    "/images/a&b#c!d^e;f<g>h",
    "1_000",
    "007",
    "1e3",
    "true",
    "/images/two  spaces ",
    "/images/line\nbreak",
]


def compose_word(compose_config, *words):
    return compose_config(*check_overrides(["data=folders", *words]))


@pytest.mark.parametrize("text", TEXTS)
def test_a_path_is_taken_as_it_was_typed(compose_config, text):
    config = compose_word(compose_config, f"data.root={text}")
    assert config.data.root == os.path.abspath(text)  # noqa: PTH100 as written: Path would normalize it


@pytest.mark.parametrize(
    "pattern",
    [r"(patient_\d+)", r"^.*?(P\d{1,3})[_-]", r"\(([^)]+)\)", "a,b", r"C\\(\d+)", "(?P<n>ü+)=", "'x'?(y)", "(a|b)$"],
)
def test_a_pattern_is_taken_as_it_was_typed(compose_config, pattern):
    assert compose_word(compose_config, "data.root=x", f"data.group={pattern}").data.group == pattern


def test_a_value_in_hydras_quotes_is_still_read(compose_config):
    config = compose_word(compose_config, "data.root='a,b (1)'", 'data.group="(x)"', "data.classes=['a,b',\"c\"]")
    assert (config.data.root, config.data.group) == (os.path.abspath("a,b (1)"), "(x)")  # noqa: PTH100
    assert config.data.classes == ["a,b", "c"]


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("data.classes=[胃癌,正常]", ["胃癌", "正常"]),
        (
            "data.classes=[gastrite à éosinophiles, Barrett's ,a (b, c)]",
            ["gastrite à éosinophiles", "Barrett's", "a (b, c)"],
        ),
        ("data.classes=[007,1e3,1_0,null,true]", ["007", "1e3", "1_0", "null", "true"]),
        (r"data.classes=[a\,b,c=d]", ["a,b", "c=d"]),
    ],
)
def test_names_in_a_list_are_taken_as_they_were_typed(compose_config, word, names):
    assert compose_word(compose_config, "data.root=x", word).data.classes == names


def test_values_of_other_types_are_read_as_before(compose_config):
    config = compose_word(
        compose_config, "data.root=null", "data=synthetic", "optimizer.lr=1e-4", "seed=1_0", "model.args={a: [1, 'ü']}"
    )
    assert (config.data.root, config.optimizer.lr, config.seed) == (None, 1e-4, 10)
    assert config.model.args == {"a": [1, "ü"]}


def test_free_arguments_take_any_text(compose_config):
    config = compose_word(
        compose_config, "data.root=x", "logger.args.uri=http://host:5000/a=b&c", "model.args.x=[1,ü,1e3]"
    )
    assert config.logger.args == {"uri": "http://host:5000/a=b&c"}
    assert config.model.args == {"x": [1, "ü", 1000.0]}


def test_references_to_keys_and_variables_still_work(compose_config, monkeypatch):
    monkeypatch.setenv("IMAGES", "/images")
    config = compose_word(compose_config, "data.root=${oc.env:IMAGES}/ü", "model.weights=w/${model.name}=1.pth")
    assert config.data.root == "/images/ü"
    assert config.model.weights.endswith("/w/resnet50.tv_in1k=1.pth")


@pytest.mark.parametrize("key", ["data.root", "data.manifest", "hydra.run.dir", "cache.folder", "model.weights"])
def test_the_home_folder_is_expanded_where_the_shell_leaves_it(monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/für")
    assert check_overrides([f"{key}=~/x"]) == [f"{key}='/home/für/x'"]


def test_a_home_folder_in_a_configuration_of_ones_own_is_expanded(compose_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compose_config("data=folders", "data.root='~/x'").data.root == str(tmp_path / "x")
    with pytest.raises(PylorusError, match="no user with such a home folder"):
        compose_config("data=folders", "data.root='~nobody_here/x'")


@pytest.mark.parametrize(
    "key",
    ["data.root", "data.manifest", "data.split_file", "data.group", "model.weights", "cache.folder", "hydra.run.dir"],
)
@pytest.mark.parametrize("value", ["", " ", "''", '""'])
def test_an_empty_value_is_never_a_path_or_pattern(key, value):
    with pytest.raises(PylorusError, match=re.escape(f"{key}: found an empty value. Is the variable set")):
        check_overrides([f"{key}={value}"])


@pytest.mark.parametrize("key", ["data.root", "data.group", "model.weights", "cache.folder"])
def test_an_empty_value_in_a_file_is_refused_too(compose_config, key):
    with pytest.raises(PylorusError, match=f"{key}: found an empty value"):
        compose_config("data=folders", "data.root=x", f"{key}=")


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("data.root=für,a=b", ["für", "a=b"]),
        (r"data.group=\d{1,3},(x)", [r"\d{1,3}", "(x)"]),
        ("data.group='a,b',c", ["a,b", "c"]),
        (r"data.root=a\,b,c", ["a,b", "c"]),
        ("data.root=/x (1,2),/y", ["/x (1,2)", "/y"]),
        ("data.fold=Köln,Bonn,1", ["Köln", "Bonn", "1"]),
        ("data.classes=[ü,b],[ü,c]", ["['ü',b]", "['ü',c]"]),
        ("model=small,resnet50", ["small", "resnet50"]),
        ("data.root=choice(a,b)", ["a", "b"]),
        ("data.fold=range(3)", ["0", "1", "2"]),
    ],
)
def test_a_comma_separates_the_values_of_a_sweep(word, values):
    override = OverridesParser.create().parse_override(check_overrides(["-m", word])[-1])
    found = [str(each) for each in override.sweep_string_iterator()]
    assert [text.strip("'") if not text.startswith("[") else text for text in found] == values


def test_a_comma_in_a_single_run_is_part_of_an_existing_path(compose_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    assert compose_word(compose_config, "data.root=a,b").data.root == str(tmp_path / "a,b")
    assert check_overrides(["hydra.run.dir=x,y", "cache.folder=c,d"]) == ["hydra.run.dir='x,y'", "cache.folder='c,d'"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.root=no,such"], "data.root: found several values, no,such. To sweep over them"),
        (
            ["data.root=x", "data.classes=胃癌,正常"],
            "If they are a list:\n  python train.py data=folders data.root=x 'data.classes=[胃癌,正常]'",
        ),
    ],
)
def test_several_values_in_a_single_run_say_how_to_sweep(words, message, tmp_path):
    with pytest.raises(PylorusError, match=re.escape(message)):
        run_overrides(["data=folders", *words], tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.args.x={a: ü}"], 'unexpected "ü" after model.args.x={a: '),
        (["data.röot=x"], 'has no key "röot". Did you mean "root"'),
        (["data.root=a", "b"], 'write both in quotes: "data.root=a b"'),
        (["optimizer.lr=", "1e-3"], "leave out the space: optimizer.lr=1e-3"),
        (["resnet50"], "Did you mean model=resnet50"),
        (["-m", "data.root=choice(ü,b)"], 'unexpected "ü"'),
        (["data.root=~nobody_here/x"], "there is no user nobody_here"),
        (["data.root=/x/f\udcfcr"], r"f\\udcfcr: the name is not UTF-8"),
        (["model=für"], "model=für: there is no model/für.yaml"),
    ],
)
def test_a_word_that_can_not_be_read_is_shown_with_what_to_write(words, message):
    with pytest.raises(PylorusError, match=re.escape(message) if "\\" not in message else message):
        check_overrides(words)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a(b,c", ["a(b", "c"]),
        ("'a,b", ["'a", "b"]),
        (r"a\(b,c", [r"a\(b", "c"]),
        ("", [""]),
        ("it's,they're", ["it's", "they're"]),
        ("['a,b',c],d", ["['a,b',c]", "d"]),
    ],
)
def test_brackets_and_quotes_in_names_do_not_hide_commas(text, parts):
    assert split_at_commas(text) == parts


def test_options_may_stand_between_overrides(tmp_path):
    words = ["seed=1,2", "-m", "model=small", "--config-dir", str(tmp_path / "a=b"), "stage=both"]
    (tmp_path / "a=b").mkdir()
    assert check_overrides(words) == [
        "-m",
        "--config-dir",
        str(tmp_path / "a=b"),
        "seed=1,2",
        "model=small",
        "stage=both",
    ]
    assert check_overrides(["seed=1", "--cfg", "job"]) == ["--cfg", "job", "seed=1"]


def run_with(monkeypatch, folder, train, *words):
    """Starts a run in a folder; `train` stands for all that needs torch."""
    monkeypatch.setattr("pylorus.launch.main.import_training", lambda: SimpleNamespace(run=train))
    monkeypatch.setattr("pylorus.launch.main.start_reading", lambda folder: None)
    run_overrides(["data=synthetic", *words], folder)
    return load_config(folder / "config.yaml")


def fail_for_lack_of_memory(*_):
    raise MemoryError


@pytest.mark.parametrize("has_trained", [False, True])
def test_a_run_that_failed_before_it_trained_does_not_block_its_folder(tmp_path, monkeypatch, has_trained):
    with pytest.raises(MemoryError):
        run_with(monkeypatch, tmp_path, fail_for_lack_of_memory, "optimizer.lr=0.5")
    status = RunFolder(tmp_path).read_status()
    assert status["state"] == "failed"
    assert status["error"].startswith("the memory is used up")
    (tmp_path / "split.csv").write_text("of that run")
    if has_trained:
        (tmp_path / "pretrain" / "checkpoints").mkdir(parents=True)
        (tmp_path / "pretrain" / "checkpoints" / "last.ckpt").write_bytes(b"of that run")
        with pytest.raises(PylorusError, match=r"optimizer.lr: the run has 0.5, found 0.25"):
            run_with(monkeypatch, tmp_path, lambda *_: None, "optimizer.lr=0.25")
    else:
        config = run_with(monkeypatch, tmp_path, lambda *_: None, "optimizer.lr=0.25")
        assert config.optimizer.lr == 0.25
        assert not (tmp_path / "split.csv").exists()


def test_a_run_that_is_interrupted_before_it_trains_is_not_starting_forever(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt("SIGTERM")

    with pytest.raises(KeyboardInterrupt):
        run_with(monkeypatch, tmp_path, stop)
    assert RunFolder(tmp_path).read_status()["state"] == "interrupted"


def test_a_deciding_class_that_is_not_configured_is_refused_before_anything_is_read(tmp_path):
    words = ["data.classes=[a,b]", "data.root=/nowhere", "deploy.class_name=c"]
    with pytest.raises(PylorusError, match=r'deploy.class_name: found "c", expected one of a, b'):
        run_overrides(["data=folders", *words], tmp_path)
