"""`pylorus serve` without a browser: results, limits, access, and that images are not stored."""

import base64
import contextlib
import http.client
import io
import os
import pickle
import re
import socket
import struct
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from pylorus.cli import main
from pylorus.core.errors import PylorusError
from pylorus.deploy.app import inference, security
from pylorus.deploy.app import server as pages_module
from pylorus.deploy.app.inference import InferenceService, ReaderPool, Upload
from pylorus.deploy.app.security import ServeOptions
from pylorus.deploy.app.server import (
    STATIC,
    build_server_config,
    create_application,
    open_listener,
    render_card_html,
)
from pylorus.deploy.model import load_bundle
from pylorus.model.inference import NetworkOutput

HERE = "http://127.0.0.1:7860"
PASSWORD = "correct horse battery"
SEEN: dict[str, list] = {}
"""While it has the key "now": what this process opens for writing, and whom it connects to."""


def watch(event: str, arguments: tuple) -> None:
    if "now" not in SEEN:
        return
    if event == "open" and arguments[2] is not None and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        SEEN["now"].append((event, arguments[0]))
    elif event in ("socket.connect", "os.mkdir", "os.rename", "subprocess.Popen", "os.system"):
        SEEN["now"].append((event, arguments))


sys.addaudithook(watch)


@pytest.fixture(scope="module")
def inference_service(bundle_folder):
    made = InferenceService(load_bundle(bundle_folder))
    yield made
    made.close()


@pytest.fixture
def client(inference_service):
    """Talks to a server; `client(max_mb=1)` sets an option, `password` its password."""

    def start(*, password: str | None = None, **options: object) -> TestClient:
        asked = TestClient(create_application(inference_service, ServeOptions(**options), password), base_url=HERE)
        asked.headers["host"] = "127.0.0.1:7860"
        return asked

    return start


def png(seed: int = 0, size: int = 40) -> bytes:
    """Noise that its seed tells."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


def files(*contents: bytes, name: str = "image{}.png"):
    return [("files", (name.format(place), content)) for place, content in enumerate(contents)]


def rows(response):
    assert response.status_code == 200, response.text
    return response.json()["results"]


def body(*parts: str, end: str = "--x--\r\n") -> bytes:
    return "".join(f"--x\r\n{part}\r\n" for part in parts).encode() + end.encode()


FORM = {"content-type": "multipart/form-data; boundary=x"}


def test_the_page_returns_the_results_of_predict(client, inference_service, synthetic_root):
    paths = sorted(synthetic_root.glob("*/*"))[::5]
    sent = [("files", (path.name, path.read_bytes())) for path in paths]
    found = rows(client().post("/api/predict", files=sent))
    expected = inference_service.bundle.predict_images(inference_service.bundle.input.load_images(paths))
    names = inference_service.bundle.description.short_names
    assert [row["file"] for row in found] == [path.name for path in paths]
    for place, row in enumerate(found):
        assert np.allclose([row["probability"][name] for name in names], expected.probabilities[place], atol=1e-6)
        assert row["predicted"] == names[expected.predicted[place]]
        assert row["decision"] == ("GC" if expected.positive[place] else "not GC")
        assert (row["why"], row["abstain"]) == (expected.why[place], bool(expected.why[place]))
        assert row["unlikeness"] == pytest.approx(expected.unlikeness[place], abs=1e-5)
        assert row["error"] == ""
        assert "image" not in row
        assert "heat_map" not in row


def test_more_images_than_the_network_takes_at_once_come_back_in_order(client, inference_service):
    contents = [png(seed) for seed in range(19)]
    found = rows(client().post("/api/predict", files=files(*contents)))
    assert [row["file"] for row in found] == [f"image{place}.png" for place in range(19)]
    alone = rows(client().post("/api/predict", files=files(contents[17])))[0]
    assert found[17]["probability"] == pytest.approx(alone["probability"], abs=1e-5)


def test_a_picture_is_a_new_jpeg_without_metadata(client, inference_service):
    image, tagged = Image.open(io.BytesIO(png(size=60))), io.BytesIO()
    tags = Image.Exif()
    tags[0x010E] = "Mrs Example, born 1950"
    image.save(tagged, "JPEG", exif=tags)
    assert b"Mrs Example" in tagged.getvalue()
    row = rows(client().post("/api/predict?image=1", files=files(tagged.getvalue())))[0]
    picture = base64.b64decode(row["image"].removeprefix("data:image/jpeg;base64,"))
    assert b"Mrs Example" not in picture
    assert Image.open(io.BytesIO(picture)).size == (448, 448)


def test_heat_maps_are_returned_or_the_reason_is_stated(client, inference_service):
    asked = client()
    why = asked.get("/api/model").json()["no_heat_maps"]
    row = rows(asked.post("/api/predict?heat_map=1&image=1", files=files(png())))[0]
    assert ("heat_map" in row) == (why == "")
    if not why:
        assert row["heat_map"].startswith("data:image/jpeg;base64,")


def test_an_abstention_has_its_reason(client, inference_service):
    found = rows(client().post("/api/predict", files=files(*(png(seed) for seed in range(6)))))
    said = inference_service.bundle.description.abstention
    assert any(row["why"] == "unlike" for row in found)
    for row in found:
        far, likeliest = row["unlikeness"] > said.unlike_above, max(row["probability"].values())
        assert row["why"] == ("unlike" if far else "unsure" if likeliest < said.unsure_below else "")


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def bomb() -> bytes:
    """A PNG that claims 60,000 × 60,000 pixels."""
    chunks = [
        b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(bytes(100)),
        b"IEND",
    ]
    written = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"no image at all", "no readable JPEG"),
        (b"<html><script>alert(1)</script></html>", "no readable JPEG"),
        (pickle.dumps(Payload()), "no readable JPEG"),
        (b"PK\x03\x04" + bytes(100), "no readable JPEG"),
        (b"GIF89a" + bytes(100), "no readable JPEG"),
        (png(size=200)[:-2000], "damaged|truncated|cut"),
        (bomb(), "over the limit"),
        (bytes(128) + b"DICM" + b"\xff" * 64, "damaged|DICOM|pydicom|dicom"),
    ],
    ids=["empty", "text", "html", "pickle", "zip", "gif", "cut", "bomb", "dicom"],
)
def test_an_unreadable_file_is_a_row_with_an_error_beside_the_others(client, tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    good, bad, last = rows(client().post("/api/predict", files=files(png(1), content, png(2))))
    assert re.search(said, bad["error"])
    assert set(bad) == {"file", "error"}
    assert good["error"] == last["error"] == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../../etc/passwd", "passwd"),
        ("..\\..\\windows\\a.png", "a.png"),
        ("/srv/../x.png", "x.png"),
        ("..", "unnamed"),
        ("", "unnamed"),
        ("<img src=x onerror=alert(1)>.png", "<img src=x onerror=alert(1)>.png"),
        ("ü" * 300 + ".png", "ü" * 196 + ".png"),
        ("a\x1b[31m.png", "a\\x1b[31m.png"),
    ],
)
def test_a_file_name_is_only_displayed_never_opened(client, name, shown):
    part = f'Content-Disposition: form-data; name="files"; filename="{name}"\r\n\r\nno image'
    row = rows(client().post("/api/predict", content=body(part), headers=FORM))[0]
    assert row["file"] == shown


def test_a_file_over_the_limit_does_not_affect_the_others(client):
    whole = png(3)
    whole += bytes(100_000 - len(whole))  # a PNG may have anything behind its end
    found = rows(client(max_mb=0.1).post("/api/predict", files=files(whole, whole + b"0", png(4))))
    assert "over the limit of 100,000 bytes" in found[1]["error"]
    assert found[0]["error"] == found[2]["error"] == ""


def test_a_file_of_20_mb_is_taken_and_a_larger_one_is_not(client):
    asked = client()
    found = rows(asked.post("/api/predict", files=files(png(5) + bytes(20_000_000 - len(png(5))), bytes(20_000_001))))
    assert found[0]["error"] == ""
    assert "over the limit of 20,000,000 bytes" in found[1]["error"]


def test_a_request_over_the_limits_is_refused(client):
    asked = client(max_images=3, max_mb=0.01)
    refused = asked.post("/api/predict", files=files(*[png()] * 4))
    assert (refused.status_code, refused.json()["error"]) == (413, "more than 3 files in one request")
    assert asked.post("/api/predict", files=files(bytes(60_000))).status_code == 413

    def endless():
        yield body('Content-Disposition: form-data; name="files"; filename="a"\r\n\r\n', end="")
        for _ in range(1000):
            yield bytes(10_000)

    assert asked.post("/api/predict", content=endless(), headers=FORM).status_code == 413


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"x", {"content-type": "application/json"}, 415),
        (b"x", {"content-type": "multipart/form-data"}, 415),
        (b"x", {"content-type": "multipart/form-data; boundary=" + "b" * 300}, 400),
        (b"rubbish", FORM, 400),
        (body('Content-Disposition: form-data; name="files"; filename="a"\r\n\r\nabc', end=""), FORM, 400),
        (body('Content-Disposition: form-data; name="path"\r\n\r\n/etc/passwd'), FORM, 400),
        (body('Content-Disposition: form-data; name="files"\r\n\r\n/etc/passwd'), FORM, 400),
        (body("\r\nabc"), FORM, 400),
        (body("A: b\r\n" * 50 + "\r\nabc"), FORM, 400),
        (body(), FORM, 400),
        (b"", FORM, 400),
    ],
)
def test_a_malformed_form_is_refused_with_a_message(client, content, headers, status):
    refused = client().post("/api/predict", content=content, headers=headers)
    assert refused.status_code == status
    assert refused.json()["error"]


@pytest.mark.parametrize("path", ["/static/../pages.py", "/static/%2e%2e/pages.py", "/static/..%2fpages.py", "/static/page.html.j2", "/etc/passwd", "/static/"])  # fmt: skip
def test_only_the_pages_own_files_are_served(client, path):
    found = client().get(path)
    assert found.status_code == 404
    assert "def " not in found.text


def test_only_known_host_names_are_answered(client):
    asked = client(allowed_hosts=("Lab.example",))
    for good in ("127.0.0.1:7860", "localhost:9999", "localhost", "[::1]:7860", "lab.example", "LAB.example:80"):
        assert asked.get("/health", headers={"host": good}).status_code == 200, good
    for bad in ("evil.example:7860", "127.0.0.1.evil.example", "192.168.0.5:7860", "", "localhost@evil.example"):
        assert asked.get("/api/model", headers={"host": bad}).status_code == 421, bad
    open_to_all = client(host="0.0.0.0", without_password=True)
    assert open_to_all.get("/health", headers={"host": "192.168.0.5:7860"}).status_code == 200
    assert open_to_all.get("/health", headers={"host": "evil.example:7860"}).status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:7861"},
        {"origin": "http://127.0.0.1:7860.evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_cross_site_requests_are_refused(client, headers):
    assert client().post("/api/predict", files=files(png()), headers=headers).status_code == 403


def test_the_servers_page_and_programs_may_send_requests(client):
    for headers in ({}, {"origin": HERE, "sec-fetch-site": "same-origin"}):
        assert client().post("/api/predict", files=files(png()), headers=headers).status_code == 200


def test_a_password_guards_all_but_health(client):
    asked = client(password=PASSWORD)
    assert asked.get("/health").status_code == 200
    for path in ("/", "/api", "/api/model", "/static/page.js", "/nowhere"):
        refused = asked.get(path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic ")
        assert asked.get(path, auth=("anyone", PASSWORD)).status_code in (200, 404)
    for wrong in ("", PASSWORD[:-1], PASSWORD + "x", PASSWORD.upper()):
        assert asked.get("/", auth=("anyone", wrong)).status_code == 401
    for header in ("Basic", "Basic !!!", "Bearer " + PASSWORD, "Basic " + "A" * 5000):
        assert asked.get("/", headers={"authorization": header}).status_code == 401
    assert asked.post("/api/predict", files=files(png())).status_code == 401
    rows(asked.post("/api/predict", files=files(png()), auth=("", PASSWORD)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": "0.0.0.0"}, "others in the network could use the page. Add --password-file FILE"),
        ({"host": "192.168.0.5"}, "others in the network"),
        ({"host": "::"}, "others in the network"),
        ({"host": "ward-3"}, "others in the network"),
        ({"port": 70000}, "--port: found 70000"),
        ({"max_mb": 0}, "--max-mb: found 0"),
        ({"max_mb": float("nan")}, "--max-mb: found nan"),
        ({"max_images": 0}, "--max-images: found 0"),
        ({"password_file": Path("p"), "without_password": True}, "can't be combined"),
    ],
)
def test_unsafe_or_invalid_options_are_refused(options, said):
    with pytest.raises(PylorusError, match=re.escape(said)):
        ServeOptions(**options).check()


def test_the_default_address_is_loopback():
    ServeOptions().check()
    assert ServeOptions().is_loopback
    assert ServeOptions(host="::1").is_loopback
    ServeOptions(host="0.0.0.0", without_password=True).check()


@pytest.mark.parametrize(("content", "said"), [(b"short\n", "found 5 characters"), (b"", "found 0"), (b"\xff" * 20, "not UTF-8 text"), (b"a" * 9000, "1025 characters"), (None, "No such file")])  # fmt: skip
def test_an_invalid_password_file_is_named(tmp_path, content, said):
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PylorusError, match=said):
        ServeOptions(password_file=path).read_password()


def test_the_password_is_the_line_of_the_file(tmp_path):
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    assert ServeOptions(password_file=tmp_path / "password").read_password() == PASSWORD
    assert ServeOptions().read_password() is None


def test_every_response_forbids_loading_from_other_hosts(client):
    asked = client()
    for found in (
        asked.get("/"),
        asked.get("/static/page.js"),
        asked.get("/nowhere"),
        asked.get("/", headers={"host": "evil.example"}),
        asked.post("/api/predict", files=files(png())),
        asked.post("/api/predict", files=files(png()), headers={"origin": "null"}),
    ):
        assert found.headers["content-security-policy"].startswith(
            "default-src 'none'; script-src 'self'; style-src 'self'"
        )
        assert found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in found.headers


def test_the_page_refers_to_no_other_host(client):
    asked = client()
    for path in ("/", *(f"/static/{name}" for name in STATIC)):
        text = asked.get(path).text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"""https?:|["'(]//|@import|@font-face|style="|<script>|\son\w+=""", text), path


def test_the_page_states_the_intended_use(client, inference_service):
    page = client().get("/").text
    assert '<p class="notice" role="note"><strong>Research use only. Not a medical device.</strong>' in page
    assert "gastric_cancer, gastric_ulcer, chronic_gastritis" in page
    assert "Performance" in page


@pytest.mark.parametrize(
    ("validated_on", "said"),
    [
        ("test", ("optimistic: also validated on these", "set on test images (data.validation=test)")),
        (
            "out-of-fold",
            ("out-of-fold images correctly", "set on out-of-fold images"),
        ),
    ],
)
def test_the_page_says_on_which_images_a_model_was_measured_and_its_threshold_set(
    bundle_folder, client, validated_on, said
):
    bundle = load_bundle(bundle_folder)
    training = replace(bundle.description.training, validated_on=validated_on)
    made = InferenceService(replace(bundle, description=replace(bundle.description, training=training)))
    try:
        page = TestClient(create_application(made, ServeOptions(), None), base_url=HERE).get("/").text
    finally:
        made.close()
    page, usual = (" ".join(text.split()) for text in (page, client().get("/").text))
    for words in said:
        assert words in page
        assert words not in usual
    assert "set on validation images" in usual


def test_a_model_card_cannot_inject_html(tmp_path):
    path = tmp_path / "MODEL_CARD.md"
    path.write_text(
        "# T\n\n<script>alert(1)</script>\n\n[a](javascript:alert(1)) ![b](http://evil.example/x.png) <http://evil.example>\n\n"
        "<img src=x onerror=alert(1)>\n\n| a |\n| --- |\n| <b>c</b> |\n\n`<i>`"
    )
    found = str(render_card_html(path.read_bytes()))
    assert set(re.findall(r"<(\w+)", found)) == {"h3", "p", "div", "table", "thead", "tr", "th", "tbody", "td", "code"}
    assert "href" not in found


def test_tables_of_a_model_card_have_different_names():
    table = "| a | b |\n| --- | --- |\n| 1 | 2 |\n\n"
    html = render_card_html((table + "text\n\n" + table).encode())
    assert [html.count(f'aria-label="Table {number}"') for number in (1, 2, 3)] == [1, 1, 0]


def test_health_says_which_bundle_and_answers_while_the_network_is_busy(client, inference_service, monkeypatch):
    computing, release = threading.Event(), threading.Event()
    original = type(inference_service.bundle).run_network

    def slow(bundle, images):
        computing.set()
        assert release.wait(30)
        return original(bundle, images)

    monkeypatch.setattr(type(inference_service.bundle), "run_network", slow)
    with client() as asked, ThreadPoolExecutor(1) as pool:  # one loop serves both
        answer = pool.submit(asked.post, "/api/predict", files=files(png()))
        assert computing.wait(30)
        began = time.monotonic()
        found = asked.get("/health").json()
        assert time.monotonic() - began < 5
        release.set()
        assert rows(answer.result(30))[0]["error"] == ""
    assert found["status"] == "ok"
    assert re.fullmatch("[0-9a-f]{64}", found["bundle"])
    assert found["bundle"] == asked.get("/api/model").json()["bundle"]


def test_concurrent_users_get_their_own_results(client, inference_service):
    asked = client()
    alone = [rows(asked.post("/api/predict", files=files(png(seed))))[0]["probability"] for seed in range(6)]

    def user(seed: int) -> bool:
        for _ in range(4):
            name = f"user {seed} {{}}.png"
            sent = files(png(seed), png((seed + 1) % 6), name=name)
            one, other = rows(client().post("/api/predict?image=1", files=sent))
            assert (one["file"], other["file"]) == (name.format(0), name.format(1))
            assert one["probability"] == pytest.approx(alone[seed], abs=1e-5)
            assert other["probability"] == pytest.approx(alone[(seed + 1) % 6], abs=1e-5)
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(user, range(6)))


def test_a_request_over_the_concurrency_limit_gets_503_and_retry_after(client, monkeypatch):
    monkeypatch.setattr(pages_module, "MAX_REQUESTS", 0)
    refused = client().post("/api/predict", files=files(png()))
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0


def test_an_address_may_not_take_all_places(client, monkeypatch):
    monkeypatch.setattr(pages_module, "MAX_REQUESTS_PER_ADDRESS", 0)
    elsewhere = client()
    elsewhere._transport.client = ("192.0.2.7", 4000)
    refused = elsewhere.post("/api/predict", files=files(png()))
    assert (refused.status_code, refused.json()["error"]) == (503, "the server is busy with 0 requests of this address")
    here = client()
    here._transport.client = ("127.0.0.1", 4000)  # perhaps a reverse proxy
    rows(here.post("/api/predict", files=files(png())))


def test_wrong_passwords_of_an_address_are_slowed_down(client, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(security.time, "monotonic", lambda: now)
    asked = client(password=PASSWORD)

    def get(host: str, password: str | None) -> tuple[int, str | None]:
        asked._transport.client = (host, 4000)
        found = asked.get("/", auth=None if password is None else ("", password))
        return found.status_code, found.headers.get("retry-after")

    for _ in range(20):
        assert get("192.0.2.7", None) == (401, None)  # a browser asks without one first
    assert [get("192.0.2.7", "wrong wrong wrong")[0] for _ in range(6)] == [401] * 5 + [429]
    assert get("192.0.2.7", PASSWORD) == (429, "1")
    assert get("192.0.2.8", PASSWORD)[0] == get("127.0.0.1", PASSWORD)[0] == 200
    now += 1.1
    assert get("192.0.2.7", "wrong wrong wrong")[0] == 401
    assert get("192.0.2.7", "wrong wrong wrong") == (429, "2")
    now += 2.1
    assert get("192.0.2.7", PASSWORD)[0] == get("192.0.2.7", "wrong wrong wrong")[0] - 201 == 200
    assert get("192.0.2.7", PASSWORD)[0] == 200  # the right one was in between
    assert [get("127.0.0.1", "wrong wrong wrong")[0] for _ in range(9)] == [401] * 9


@pytest.fixture
def address(inference_service):
    """The address of a real server."""
    options = ServeOptions(port=0)
    with open_listener(options) as listener:
        server = uvicorn.Server(build_server_config(inference_service, options, None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()
        server.should_exit = True
        thread.join()


def receive_all(connection: socket.socket) -> bytes:
    connection.settimeout(30)
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(4096):
            received += piece
    return received


def get_health(address) -> int:
    connection = http.client.HTTPConnection(*address, timeout=10)
    connection.request("GET", "/health")
    return connection.getresponse().status


@pytest.mark.slow
def test_slow_clients_are_disconnected_and_health_always_answers(address, monkeypatch):
    monkeypatch.setattr(security, "REQUEST_SECONDS", 2.0)
    monkeypatch.setattr(security, "MAX_CONNECTIONS", 20)
    start = time.monotonic()
    half = b"POST /api/predict HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    body = b"Content-Length: 100000\r\nContent-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    connections = [socket.create_connection(address) for _ in range(60)]
    for number, connection in enumerate(connections):
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall((b"", half, half + body)[number % 3])
        if number % 10 == 0:
            assert get_health(address) == 200
    for connection in connections:
        assert b"200 OK" not in receive_all(connection)
        connection.close()
    assert time.monotonic() - start < 30
    assert get_health(address) == 200


@pytest.mark.slow
def test_an_upload_that_is_fast_enough_is_not_closed_for_newer_connections(address, monkeypatch):
    monkeypatch.setattr(security, "MAX_CONNECTIONS", 6)
    content = form_part(bytes(600_000)) + b"--x--\r\n"
    upload = socket.create_connection(address)
    upload.sendall(post_head(content))
    newer = []
    for start in range(0, len(content), 60_000):
        upload.sendall(content[start : start + 60_000])
        newer.append(socket.create_connection(address))
        time.sleep(0.2)
    assert receive_all(upload).startswith(b"HTTP/1.1 200 OK")
    for connection in newer:
        connection.close()


def form_part(content: bytes) -> bytes:
    return b"--x\r\nContent-Disposition: form-data; name=files; filename=a\r\n\r\n" + content + b"\r\n"


def post_head(content: bytes, query: str = "") -> bytes:
    return (
        f"POST /api/predict{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\nConnection: close\r\n\r\n"
    ).encode()


def png_of_zeros(side: int) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (side, side)).save(written, "PNG")
    return written.getvalue()


@pytest.fixture(scope="module")
def slow_jpeg() -> bytes:
    """An image that takes a decoder a while: 24 megapixels in progressive scans."""
    written = io.BytesIO()
    pixels = np.add.outer(np.arange(4900) % 251, np.arange(4900) % 13).astype(np.uint8)
    Image.fromarray(pixels).convert("RGB").save(written, "JPEG", progressive=True, quality=90, subsampling=0)
    return written.getvalue()


@pytest.mark.slow
def test_a_file_that_takes_too_long_is_given_up_and_other_users_do_not_wait(bundle_folder, monkeypatch, slow_jpeg):
    monkeypatch.setattr(inference, "MAX_CPU_SECONDS", 0.25)
    service = InferenceService(load_bundle(bundle_folder))
    try:
        asked = TestClient(create_application(service, ServeOptions()), base_url=HERE)
        asked.headers["host"] = "127.0.0.1:7860"
        for _ in range(2):  # imports what decoding needs
            asked.post("/api/predict", files=files(png()))
        found = rows(asked.post("/api/predict", files=files(png(), slow_jpeg, slow_jpeg, png())))
        again = rows(asked.post("/api/predict", files=files(png(), png(1))))
    finally:
        service.close()
    assert found[0]["error"] == ""
    assert found[1]["error"].startswith("decoding it takes over 0.25 s of CPU time, the limit")
    assert [row["error"] for row in found[2:]] == [pages_module.NOT_DECODED] * 2
    assert [row["error"] for row in again] == ["", ""]


def test_readers_run_for_each_client_in_turn(bundle_folder):
    import asyncio

    pool, form = ReaderPool(), load_bundle(bundle_folder).input
    order: list[str] = []

    async def decode(client: str) -> None:
        await pool.decode(Upload("a.png", png()), form, None, client=client)
        order.append(client)

    async def decode_all() -> None:
        await asyncio.gather(*(decode(client) for client in "a" * 12 + "b"))

    try:
        asyncio.run(decode_all())
    finally:
        pool.close()
    assert order.index("b") <= 5  # those in work, one of a, and b


@pytest.mark.slow
def test_decoding_ends_when_the_client_goes(address, inference_service):
    content = b"".join([form_part(png_of_zeros(4900))] * 3) + b"--x--\r\n"
    before = set(inference_service.get_reader_ids())
    for _ in range(20):  # until one goes while its images are being decoded
        with socket.create_connection(address) as connection:
            connection.sendall(post_head(content) + content)
            time.sleep(0.2)
        time.sleep(0.5)
        if set(inference_service.get_reader_ids()) != before:
            break
    else:
        pytest.fail("no process was ended")
    assert get_health(address) == 200


def test_a_slow_upload_loses_its_place_to_another_one(address, monkeypatch):
    monkeypatch.setattr(pages_module, "MAX_REQUESTS", 1)
    monkeypatch.setattr(pages_module, "MAX_LAG", 0.2)
    half = b"POST /api/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n"
    with socket.create_connection(address) as slow:
        slow.sendall(half + b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n")
        time.sleep(1)
        connection = http.client.HTTPConnection(*address, timeout=20)
        content = form_part(png()) + b"--x--\r\n"
        connection.request("POST", "/api/predict", content, {"Content-Type": "multipart/form-data; boundary=x"})
        assert connection.getresponse().status == 200
        assert b" 408 " in receive_all(slow)


@pytest.mark.slow
def test_a_client_that_reads_slowly_gets_its_whole_answer(address, monkeypatch):
    monkeypatch.setattr(security, "REQUEST_SECONDS", 3.0)
    content = b"".join(form_part(png(seed, 300)) for seed in range(32)) + b"--x--\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        connection.sendall(post_head(content, "?image=1") + content)
        received = connection.recv(1000)
        time.sleep(6)
        received += receive_all(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    assert len(body) == int(re.search(rb"content-length: (\d+)", head.lower()).group(1)) > 1_000_000


@pytest.mark.parametrize("content", [b"GET / HTTP/1.1\r\nHost 127.0.0.1\r\n\r\n", b"\0\1\2\r\n\r\n"])
def test_what_is_not_http_is_refused_with_the_headers_of_every_response(address, content):
    with socket.create_connection(address) as connection:
        connection.sendall(content)
        head, _, body = receive_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert body == b'{"error": "the request is not valid HTTP"}'
    for name, value in security.HEADERS.items():
        assert f"{name.lower()}: {value}".encode() in head


def test_a_request_with_two_lengths_is_refused_and_the_connection_closed(address):
    with socket.create_connection(address) as connection:
        connection.sendall(
            b"POST /api/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        )
        received = receive_all(connection)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.count(b"HTTP/1.1 ") == 1


def test_a_server_error_says_nothing_of_the_program(inference_service, monkeypatch):
    application = create_application(inference_service, ServeOptions())
    asked = TestClient(application, base_url=HERE, raise_server_exceptions=False)
    asked.headers["host"] = "127.0.0.1:7860"

    async def fail(*_: object, **__: object):
        raise RuntimeError("/home/erika/model")

    monkeypatch.setattr(inference_service, "classify_uploads", fail)
    answer = asked.post("/api/predict", files=files(png()))
    assert answer.status_code == 500
    assert not re.search("Runtime|Error|erika|Traceback", answer.text)


def test_only_a_trusted_proxy_says_who_its_clients_are(inference_service):
    def count_attempts(options: ServeOptions, peer: str) -> list[int]:
        config = build_server_config(inference_service, options, PASSWORD)
        config.load()
        asked = TestClient(config.loaded_app, base_url=HERE, client=(peer, 4000))
        return [
            asked.get(
                "/",
                auth=("", "wrong wrong wrong"),
                headers={"host": "127.0.0.1", "x-forwarded-for": f"{made_up}, 192.0.2.7"},
            ).status_code
            for made_up in ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6")
        ]

    assert count_attempts(ServeOptions(), "192.0.2.9") == [401] * 5 + [429]  # the header is ignored
    assert count_attempts(ServeOptions(), "127.0.0.1") == [401] * 6  # a proxy that nobody named
    trusting = ServeOptions(trusted_proxies=("127.0.0.1",))
    assert count_attempts(trusting, "127.0.0.1") == [401] * 5 + [429]
    assert count_attempts(trusting, "192.0.2.9") == [401] * 5 + [429]


def test_addresses_of_one_ipv6_network_share_their_limits(client):
    asked = client(password=PASSWORD)
    found = []
    for number in range(6):
        asked._transport.client = (f"2001:db8::{number:x}", 4000)
        found.append(asked.get("/", auth=("", "wrong wrong wrong")).status_code)
    assert found == [401] * 5 + [429]


def test_an_upload_that_never_completes_times_out(client, monkeypatch):
    monkeypatch.setattr(pages_module, "UPLOAD_TIMEOUT", 0.0)
    assert client().post("/api/predict", files=files(png())).status_code == 408


def test_nan_output_is_an_error_of_that_image_only(client, inference_service, monkeypatch):
    original = type(inference_service.bundle).run_network

    def broken(bundle, images):
        output = original(bundle, images)
        logits = output.logits.clone()
        logits[0] = torch.nan
        return NetworkOutput(logits, output.unlikeness)

    monkeypatch.setattr(type(inference_service.bundle), "run_network", broken)
    first, second = rows(client().post("/api/predict?image=1", files=files(png(1), png(2))))
    assert first["error"] == "the network's output is NaN or infinite for this image"
    assert second["error"] == ""


def test_nothing_of_an_image_reaches_a_disk_or_another_machine(client, tmp_path, monkeypatch):
    asked = client()
    large = png(size=1000)  # over the size at which web servers begin a temporary file
    assert len(large) > 2_000_000
    rows(asked.post("/api/predict?image=1&heat_map=1", files=files(png())))  # loads what is loaded once
    monkeypatch.chdir(tmp_path)
    SEEN["now"] = []
    try:
        found = rows(asked.post("/api/predict?image=1&heat_map=1", files=files(large, b"wrong", bytes(20_000_001))))
        seen = list(SEEN["now"])
    finally:
        del SEEN["now"]
    assert [bool(row["error"]) for row in found] == [False, True, True]
    assert seen == []


def test_the_openapi_description_matches_the_responses(client, inference_service):
    asked = client()
    said = asked.get("/api").json()
    assert said["openapi"].startswith("3.1")
    for path, methods in said["paths"].items():
        for method in methods:
            assert asked.request(method, path).status_code != 404
            assert asked.request("patch", path).status_code == 405
    schemas = said["components"]["schemas"]
    for path, schema in (("/api/model", "Model"), ("/health", "Health")):
        assert set(asked.get(path).json()) == set(schemas[schema]["properties"])
    answer = asked.post("/api/predict?image=1&heat_map=1", files=files(png()))
    assert set(answer.json()) == set(schemas["Answer"]["properties"])
    row = rows(answer)[0]
    described = schemas["Row"]["properties"]
    assert set(row) <= set(described)
    assert set(described) - set(row) <= {"heat_map"}


@pytest.mark.parametrize("query", ["image=AAA", "heat_map=", "image=1&image=2"])
def test_a_parameter_that_is_neither_0_nor_1_is_refused(client, query):
    refused = client().post(f"/api/predict?{query}", files=files(png()))
    assert refused.status_code == 400
    assert "expected 0 or 1" in refused.json()["error"]
    assert client().post("/api/predict?image=1&other=x", files=files(png())).status_code == 200


def test_a_used_port_and_a_run_instead_of_a_bundle_are_named(bundle_folder, trained_run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=f"--port {port}: Address already in use. Try another"):
            main(["serve", str(bundle_folder), "--port", port])
    with pytest.raises(SystemExit, match="is a run; its bundle is"):
        main(["serve", str(trained_run.path), "--port", "0"])
    with pytest.raises(SystemExit, match="others in the network could use the page"):
        main(["serve", str(bundle_folder), "--host", "0.0.0.0"])
