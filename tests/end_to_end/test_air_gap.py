"""No command uses a network: they run in processes in which every attempt to leave the machine is refused and recorded."""

import json
import re
import sys

import pytest

from .conftest import AirGap
from .test_runs import QUICK

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def air_gap(tmp_path, fork_server):
    return AirGap(tmp_path, fork_server)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, fork_server):
    """A run without a report, and the air gap that it was made behind; test_runs.py has one that a user starts."""
    gap = AirGap(tmp_path_factory.mktemp("air"), fork_server)
    words = [
        "model.weights=none",
        "data.workers=1",
        "data.image_size=64",
        "logger=wandb",
    ]  # 64: room for a heat map
    found = gap.pylorus("train", *QUICK, *words)
    assert found.returncode == 0, found.stderr
    return gap, next(gap.work.glob("outputs/20*/*"))


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.create_connection(('192.0.2.1', 443), timeout=1)",
        "socket.create_connection(('example.org', 443), timeout=1)",
        "socket.getaddrinfo('example.org', 80)",
        "socket.gethostbyname('example.org')",
        "socket.socket().connect_ex(('192.0.2.1', 443))",
        "socket.socket(socket.AF_INET6).connect(('2001:db8::1', 443))",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 53))",
        "socket.create_server(('', 0))",
        "__import__('_socket').socket().connect(('192.0.2.1', 443))",
        "urllib.request.urlopen('https://example.org')",
        "subprocess.run([sys.executable, '-c', 'import socket; socket.create_connection((\"192.0.2.1\", 443))'], check=True)",
    ],
)
def test_the_air_gap_refuses_and_records_a_deliberate_attempt(air_gap, attempt):
    found = air_gap.python("-c", f"import socket, subprocess, sys, urllib.request\n{attempt}")
    assert found.returncode != 0
    assert "the air-gap test forbids" in found.stderr
    assert air_gap.attempts()
    assert re.search(r"192\.0\.2\.1|2001:db8::1|example\.org|''", air_gap.attempts()[0])


def test_the_air_gap_lets_a_process_talk_to_its_own_machine(air_gap):
    code = (
        "import socket\nserver = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(('localhost', server.getsockname()[1]))\n"
        "one, two = socket.socketpair()\none.sendall(b'x')\nprint(two.recv(1))"
    )
    assert air_gap.python("-c", code).stdout == "b'x'\n"
    assert air_gap.attempts() == []
    assert len(air_gap.watched()) == 1


def test_requesting_hub_weights_is_recorded_as_an_attempt(air_gap):
    """The very libraries of a run are caught: what follows shows more than a wall that nobody came to."""
    code = (
        "from pylorus.config.schema import ModelConfig\nfrom pylorus.model.backbone import build_backbone\n"
        "build_backbone(ModelConfig('test_vit.r160_in1k'), classes=3)"
    )
    found = air_gap.fork(sys.executable, "-c", code)
    assert found.returncode == 1
    assert "the hub is unreachable" in found.stderr
    assert any("huggingface.co" in attempt for attempt in air_gap.attempts())


def test_wandb_in_offline_mode_needs_no_network(finished_run):
    gap, run = finished_run
    assert list(run.glob("wandb/offline-run-*"))
    assert gap.attempts() == []


def test_the_doctor_needs_no_network(finished_run):
    gap, _ = finished_run
    found = gap.pylorus("doctor", "--json")
    lines = {check["name"]: check for check in json.loads(found.stdout)["checks"]}
    assert found.returncode == 0, found.stdout
    assert lines["network"]["state"] == "good"
    assert lines["resnet50"]["state"] == "warning"
    assert any("pylorus.doctor.examine" in process for process in gap.watched())
    assert gap.attempts() == []


@pytest.mark.parametrize(
    "words",
    [
        ("report", "{run}", "--output", "again"),
        ("audit", "images", "--output", "audited"),
        ("pack", "images", "shards"),
        ("predict", "{run}/model", "images", "--output", "predicted.csv"),
        ("explain", "{run}/model", "images", "--output", "explained"),
        ("export", "{run}/model", "--format", "onnx"),
    ],
    ids=lambda words: words[0],
)
def test_commands_on_a_finished_run_need_no_network(finished_run, words):
    gap, run = finished_run
    if words[0] == "export":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="needs the extra onnx")
    if not (gap.work / "images").exists():
        assert gap.pylorus("draw", "images", "--images", "4", "--size", "32").returncode == 0
    found = gap.pylorus(*(word.format(run=run) for word in words))
    assert found.returncode == 0, found.stderr
    assert gap.attempts() == []
