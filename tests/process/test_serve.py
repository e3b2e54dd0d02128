"""`dist-mnist serve`: the real server, asked by programs, by clients that mean harm, and by a real browser."""

import base64
import io
import json
import os
import signal
import socket
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
from PIL import Image

from dist_mnist.data.idx import open_idx
from dist_mnist.data.sources.synthetic import write_digits
from dist_mnist.evaluation.pictures import as_network_sees
from helpers import HANGS_AFTER_S
from helpers.browser import Page, browser, find_browser
from helpers.data import encoded, some_colours
from helpers.runs import dist_mnist, end, start, trained_here, wait_for
from helpers.web import BOUNDARY, FORM, PNG, Reply, exchange, form, request

pytestmark = pytest.mark.xdist_group("serve")  # what all of these need is made once

# Digits as people write them, in parts of the pad's sides.
THREE = [(0.3, 0.22), (0.42, 0.14), (0.58, 0.13), (0.68, 0.22), (0.66, 0.34), (0.55, 0.43), (0.45, 0.46), (0.58, 0.48)]
THREE += [(0.68, 0.58), (0.69, 0.71), (0.6, 0.82), (0.45, 0.86), (0.31, 0.79)]
SEVEN = [(0.28, 0.2), (0.5, 0.19), (0.72, 0.18), (0.62, 0.4), (0.54, 0.6), (0.46, 0.85)]
MOST_BYTES, MOST_PICTURES, MOST_REQUESTS = 16 << 20, 64, 64


class Served(NamedTuple):
    """A server at work: its process, its URL without the last slash, and the run whose network it serves."""

    pid: int
    url: str
    run: Path


@contextmanager
def serving(run: Path, ends_by: signal.Signals, *options: str) -> Iterator[Served]:
    """A server on a free port, which a signal ends in order after the `with` block."""
    process = start(sys.executable, "-m", "dist_mnist", "serve", "--ckpt", str(run), "--port=0", *options)
    try:
        assert process.stdout
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:") and url.endswith("/"), process.communicate()
        yield Served(process.pid, url[:-1], run)
        process.send_signal(ends_by)
        assert (*process.communicate(timeout=HANGS_AFTER_S), process.returncode) == ("", "", 0)
    finally:
        end(process)


@pytest.fixture(scope="module")
def digits_to_read(tmp_path_factory) -> Path:
    """Real digits where there are some, else generated ones."""
    if folder := os.environ.get("DIST_MNIST_TEST_DATA"):
        return Path(folder)
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, num_train=6000, num_test=100)
    return folder


@pytest.fixture(scope="module")
def served(digits_to_read, tmp_path_factory) -> Iterator[Served]:
    """A small network that reads digits."""
    run = trained_here(
        digits_to_read, tmp_path_factory.mktemp("runs") / "reader", "--steps=240", "--batch-size=100", "--lr=0.3",
        "--conv-channels=8,16", "--dense-units=64", "--batch-norm=all", "--validation-fraction=0",
    )  # fmt: skip
    with serving(run, signal.SIGTERM) as server:
        yield server


@pytest.fixture(scope="module")
def images(digits) -> np.ndarray:
    """Generated digits (200, 28, 28)."""
    return np.array(open_idx(digits / "t10k-images-idx3-ubyte"))


def test_serve_answer_has_the_bits_of_predict(served, images, tmp_path):
    large = np.asarray(Image.fromarray(255 - images[1]).resize((300, 200)))
    files = {"a ü.png": encoded(images[0]), "b.jpg": encoded(large, "JPEG"), "c.gif": encoded(images[2], "GIF")}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    done = dist_mnist("predict", *(tmp_path / name for name in files), "--ckpt", served.run, "--json")
    expected = [one | {"file": Path(one["file"]).name} for one in json.loads(done.stdout)]
    found = request(served.url, "POST", "/predict", form(list(files.items())), FORM)
    assert (found.status, found.json) == (200, {"predictions": expected})
    alone = request(served.url, "POST", "/predict", files["b.jpg"], PNG).json["predictions"]
    expected = json.loads(dist_mnist("predict", tmp_path / "b.jpg", "--ckpt", served.run, "--json").stdout)
    assert alone == [one | {"file": "request body"} for one in expected]


def test_serve_unreadable_picture_is_named_and_the_others_are_answered(served, images):
    files = [("cut.png", encoded(images[0])[:60]), ("good.png", encoded(images[0])), ("blank.png", blank(9, 9))]
    found = request(served.url, "POST", "/predict", form(files), FORM)
    assert found.status == 200 and [one.get("class") is None for one in found.json["predictions"]] == [
        True,
        False,
        True,
    ]
    assert [one["file"] for one in found.json["predictions"]] == ["cut.png", "good.png", "blank.png"]
    assert found.json["predictions"][2]["error"].startswith("nothing stands out")
    found = request(served.url, "POST", "/predict", form([files[0]]), FORM)
    assert found.status == 422 and "the picture is damaged" in found.json["predictions"][0]["error"]


@pytest.mark.parametrize("fit", ["digit", "whole"])
def test_serve_fit_and_seen_show_the_image_that_the_network_gets(served, images, fit):
    picture = np.asarray(Image.fromarray(images[3]).resize((90, 70)))
    found = request(served.url, "POST", f"/predict?fit={fit}&seen=1", encoded(picture), PNG)
    kind, _, content = found.json["predictions"][0]["seen"].partition(",")
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    assert kind == "data:image/png;base64"
    assert np.array_equal(seen, as_network_sees(picture, (1, 28, 28), fit, "it")[:, :, 0])


def test_serve_model_and_health(served):
    assert request(served.url, "GET", "/healthz").json == {"status": "ok"}
    facts = request(served.url, "GET", "/model").json
    assert facts["name"] == "reader" and facts["image_shape"] == [1, 28, 28] and not facts["light_ground"]
    assert facts["class_names"] == list("0123456789") and facts["views"] == [1] and facts["fit"] == "auto"
    assert facts["limits"] == {"pictures": MOST_PICTURES, "bytes": MOST_BYTES, "pixels": 25_000_000}
    sha256 = json.loads((served.run / "result.json").read_text())["checkpoint_sha256"]
    assert facts["checkpoint_sha256"] == sha256


def test_serve_answers_let_browsers_load_nothing_from_elsewhere(served):
    for path in ("/", "/page.css", "/page.js", "/model", "/nothing"):
        headers = request(served.url, "GET", path).headers
        assert "default-src 'none'; script-src 'self'; style-src 'self';" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers
        assert not any(name.startswith("access-control") for name in headers)


def blank(width: int, height: int, rows: int | None = None) -> bytes:
    """A PNG file of a black picture, made without holding its pixels; of all its rows, or only so many."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer, row = zlib.compressobj(), bytes(1 + (width + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(rows or height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def part(head: str, content: bytes = b"x") -> bytes:
    """A form of one part with this header."""
    return f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode("latin-1") + content + f"\r\n--{BOUNDARY}--\r\n".encode()


FILE = 'Content-Disposition: form-data; name="a"; filename="a.png"'
CHUNKED = {"Content-Length": None, "Transfer-Encoding": "chunked"}
POST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nConnection: close\r\n"

# Requests, each as the arguments of `request` after the URL, or raw bytes; and the status of the answer.
HOSTILE = {
    "get": (("GET", "/predict"), 405),
    "delete": (("DELETE", "/predict"), 405),
    "options of another origin": (("OPTIONS", "/predict", b"", {"Origin": "http://evil.example"}), 405),
    "post to the page": (("POST", "/", b"x"), 405),
    "unknown method": (("BREW", "/predict"), 405),
    "method in lower case": (("post", "/predict", b"x", PNG), 405),
    "unknown path": (("GET", "/admin"), 404),
    "slash at the end": (("POST", "/predict/", b"x", PNG), 404),
    "path traversal": (("GET", "/../../../../etc/passwd"), 404),
    "encoded path traversal": (("GET", "/page.js/%2e%2e/%2e%2e/%2e%2e/etc/passwd"), 404),
    "backslashes": (("GET", "/..\\..\\app.py"), 404),
    "zero byte in a path": (("GET", "/page.js%00.html"), 404),
    "path that is no UTF-8": (("GET", "/%ff%fe"), 404),
    "long path": (("GET", "/" + "a" * 60_000), 404),
    "longer path": (("GET", "/" + "a" * 2_000_000), 400),
    "foreign host": (("GET", "/", b"", {"Host": "evil.example"}), 400),
    "foreign host that begins as ours": (("GET", "/", b"", {"Host": "localhost.evil.example"}), 400),
    "host of no form": (("GET", "/", b"", {"Host": "[::1"}), 400),
    "no host": (("GET", "/", b"", {"Host": None}), 400),
    "huge header": (("GET", "/", b"", {"Cookie": "a" * 2_000_000}), 400),
    "many headers": (("GET", "/", b"", {f"X-{n}": "y" * 60 for n in range(30_000)}), 400),
    "header that is no ASCII": (("GET", "/", b"", {"X-\xff": "y"}), 400),
    "websocket": (("GET", "/ws", b"", {"Connection": "close, Upgrade", "Upgrade": "websocket"}), 404),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", 400),
    "HTTP of no version": (b"GET / HTTP/one\r\nHost: localhost\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", 400),
    "negative length": (POST + b"Content-Length: -5\r\n\r\nabcde", 400),
    "length that is no number": (POST + b"Content-Length: 1e3\r\n\r\nabcde", 400),
    "length and chunks": (
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n", 422),
    "unknown encoding": (POST + b"Transfer-Encoding: gzip\r\n\r\nabc", 400),
    "chunk of a false length": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n", 400),
    "no body": (("POST", "/predict"), 415),
    "picture from another site's page": (("POST", "/predict", b"x", PNG | {"Sec-Fetch-Site": "cross-site"}), 403),
    "empty picture": (("POST", "/predict", b"", PNG), 422),
    "JSON": (("POST", "/predict", b"{}", {"Content-Type": "application/json"}), 415),
    "form of a web page": (("POST", "/predict", b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}), 415),
    "content type that is none": (("POST", "/predict", b"x", {"Content-Type": "\xff\xfe;;;=/"}), 415),
    "unknown fit": (("POST", "/predict?fit=tight", b"x", PNG), 400),
    "form without a boundary": (("POST", "/predict", b"x", {"Content-Type": "multipart/form-data"}), 400),
    "form of another boundary": (
        ("POST", "/predict", form([("a", b"x")]), {"Content-Type": FORM["Content-Type"] + "s"}), 400),
    "form that is none": (("POST", "/predict", b"\x00" * 1000, FORM), 400),
    "form that ends early": (("POST", "/predict", form([("a", b"x" * 100)])[:-60], FORM), 400),
    "form without parts": (("POST", "/predict", f"--{BOUNDARY}--\r\n".encode(), FORM), 400),
    "part without a name": (("POST", "/predict", part("Content-Disposition: form-data"), FORM), 400),
    "part without a disposition": (("POST", "/predict", part("X: y"), FORM), 400),
    "part that is no file": (("POST", "/predict", part('Content-Disposition: form-data; name="a"'), FORM), 400),
    "part of huge headers": (("POST", "/predict", part("X: " + "y" * 200_000 + "\r\n" + FILE), FORM), 400),
    "large part that is no file": (
        ("POST", "/predict", part('Content-Disposition: form-data; name="a"', b"x" * 100_000), FORM), 400),
    "file name that is no UTF-8": (("POST", "/predict", part(FILE.replace("a.png", "\xff\xfe.png")), FORM), 422),
    "file name with a path": (("POST", "/predict", part(FILE.replace("a.png", "../../etc/passwd")), FORM), 422),
    "too many files": (("POST", "/predict", form([("a", b"x")] * (MOST_PICTURES + 1)), FORM), 400),
    "too many bytes announced": (("POST", "/predict", b"", PNG | {"Content-Length": MOST_BYTES + 1}), 413),
    "too many bytes": (("POST", "/predict", bytes(MOST_BYTES + 1), PNG), 413),
    "too many bytes in chunks": (
        ("POST", "/predict", (b"100000\r\n" + bytes(1 << 20) + b"\r\n") * 17 + b"0\r\n\r\n", PNG | CHUNKED), 413),
    "bomb of 100 megapixels": (("POST", "/predict", blank(10_000, 10_000), PNG), 422),
    "bomb of 4 gigapixels": (("POST", "/predict", blank(2_000_000, 2000, rows=1), PNG), 422),
    "bomb in a form": (("POST", "/predict", form([("a", blank(20_000, 20_000, rows=1))] * 3), FORM), 422),
    "program": (("POST", "/predict", Path(sys.executable).read_bytes()[:100_000], PNG), 422),
    "vector graphic that loads a file": (
        ("POST", "/predict", b'<svg><image href="file:///etc/passwd"/></svg>', {"Content-Type": "image/svg+xml"}), 422),
}  # fmt: skip


def ask(url: str, what: tuple | bytes) -> Reply:
    return exchange(url, what, close=True) if isinstance(what, bytes) else request(url, *what)


@pytest.mark.parametrize("name", HOSTILE)
def test_serve_hostile_request_is_refused_in_a_sentence(served, name):
    what, status = HOSTILE[name]
    found = ask(served.url, what)
    assert found.status == status, found
    if "host" in name and found.headers["content-type"].startswith("text/plain"):
        return
    said = found.json
    assert all(one["error"] for one in ([said] if "error" in said else said["predictions"]))
    assert "Traceback" not in found.body.decode() and "root:" not in found.body.decode()


def test_serve_truncated_body_is_refused(served, images):
    picture = encoded(images[0])
    length = {"Content-Length": len(picture)}
    found = request(served.url, "POST", "/predict", picture[:-5], PNG | length, close=True)
    assert (found.status, found.json) == (400, {"error": "the request ended before it was complete"})
    request(served.url, "POST", "/predict", form([("a", picture)])[:50], FORM | {"Content-Length": 5000}, close=True)


def test_serve_hostile_requests_take_no_memory_for_good(served):
    def memory() -> int:
        return psutil.Process(served.pid).memory_info().rss

    sizes = []
    for _ in range(4):
        for what, _ in HOSTILE.values():
            ask(served.url, what)
        sizes.append(memory())
    assert sizes[-1] - sizes[0] < 20 << 20 and psutil.Process(served.pid).num_fds() < 40, sizes
    assert request(served.url, "GET", "/healthz").status == 200


def test_serve_too_many_requests_are_put_off(served, images):
    head = POST + b"Content-Length: 100\r\n\r\n"
    address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
    with ExitStack() as stack:
        for _ in range(MOST_REQUESTS):
            connection = stack.enter_context(socket.create_connection(address))
            connection.sendall(head)
        replies: list[Reply] = []

        def is_full() -> bool:
            replies.append(request(served.url, "POST", "/predict", encoded(images[0]), PNG))
            return replies[-1].status == 503

        wait_for(is_full)
        assert replies[-1].headers["retry-after"] == "1" and request(served.url, "GET", "/healthz").status == 200
    wait_for(lambda: request(served.url, "POST", "/predict", encoded(images[0]), PNG).status == 200)


def test_serve_requests_by_any_name_of_this_machine_are_answered(served):
    port = served.url.rpartition(":")[2]
    assert request(served.url, "GET", "/", headers={"Sec-Fetch-Site": "cross-site"}).status == 200, "by a link"
    for host in ("localhost", f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", f"LOCALHOST:{port}"):
        assert request(served.url, "GET", "/", headers={"Host": host}).status == 200, host


def test_serve_mistake_is_a_sentence(served, tmp_path, write_set):
    port = served.url.rpartition(":")[2]
    done = dist_mnist("serve", "--ckpt", served.run, "--port", port)
    expected = f"error: port {port} of 127.0.0.1 is in use: give another --port, or 0 for any free port\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)
    done = dist_mnist("serve", "--ckpt", served.run, "--host=198.51.100.1", "--port=0")
    assert done.returncode == 2 and "cannot listen on 198.51.100.1:0 (Cannot assign" in done.stderr
    done = dist_mnist("serve", "--ckpt", tmp_path, "--port=0")
    assert done.returncode == 2 and str(tmp_path) in done.stderr and "Traceback" not in done.stderr
    rng = np.random.default_rng(0)
    data = write_set(rng.integers(0, 256, (30, 12, 12, 2), np.uint8), np.arange(30, dtype=np.uint8) % 3)
    run = trained_here(data, tmp_path / "two", "--steps=1", "--batch-size=9")
    done = dist_mnist("serve", "--ckpt", run, "--port=0")
    assert done.returncode == 2 and f"pictures have 1 or 3 channels; the images of {run} have 2" in done.stderr


def test_serve_without_its_packages_says_how_to_install_them(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "dist_mnist.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = dist_mnist("serve", "--ckpt", tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "error: dist-mnist serve needs the package uvicorn: pip install 'dist-mnist[serve]'\n",
    )


def test_serve_help_has_the_answers_form():
    done = dist_mnist("serve", "--help")
    for word in ("predictions", "probabilities", "seen", "Retry-After", "/healthz", "multipart/form-data"):
        assert word in done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    """A tab of a browser."""
    if not (path := find_browser()):
        pytest.skip("needs Chromium (Debian: apt-get install chromium-headless-shell) or Chrome")
    with browser(path, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def drawing(page, served) -> Page:
    """The page of the server, just opened."""
    page.open(f"{served.url}/")
    page.wait_for("document.getElementById('facts').textContent")
    return page


def on_pad(page: Page, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    left, top, width, height = page.run(
        "Object.values(document.getElementById('pad').getBoundingClientRect().toJSON()).slice(0, 4)"
    )
    return [(left + x * width, top + y * height) for x, y in points]


def shows(name: str, count: int = 10) -> str:
    """Whether a class is shown as the answer, with the bars of all."""
    bars = (
        f"[...document.querySelectorAll('#bars data')].filter(one => one.textContent.endsWith('%')).length === {count}"
    )
    return f"document.getElementById('class').textContent === {name!r} && {bars}"


def test_serve_page_three_drawn_with_the_mouse_is_read(drawing):
    drawing.mouse(on_pad(drawing, THREE))
    drawing.wait_for(shows("3"))
    width, height = drawing.run(
        "[document.getElementById('seen').naturalWidth, document.getElementById('seen').naturalHeight]"
    )
    assert (width, height) == (28, 28)
    assert drawing.run("document.querySelector('#bars .best th').textContent") == "3"
    drawing.run("document.getElementById('clear').click()")
    drawing.wait_for("document.getElementById('class').textContent === '' && document.getElementById('seen').hidden")


def test_serve_page_seven_drawn_with_a_finger_is_read(drawing):
    drawing.touch(on_pad(drawing, SEVEN))
    drawing.wait_for(shows("7"))


def test_serve_page_one_drawn_on_the_keyboard_is_read(drawing):
    drawing.run("document.getElementById('pad').focus()")
    drawing.press("ArrowUp", 9)
    drawing.press(" ")
    drawing.press("ArrowDown", 18)
    drawing.press("Escape")
    drawing.wait_for(shows("1"))
    drawing.press("z", modifiers=2)
    drawing.wait_for("document.getElementById('class').textContent === ''")


def test_serve_page_chosen_pictures_are_read_and_bad_ones_named(drawing, digits, tmp_path, served, images):
    for number in range(20):
        Image.fromarray(255 - images[number]).resize((64, 64)).save(tmp_path / f"{number:02}.png")
    (tmp_path / "bad.png").write_text("no picture")
    files = sorted(tmp_path.iterdir())
    drawing.choose("#files", files)
    cards = "[...document.querySelectorAll('#gallery strong')].map(one => one.textContent)"
    drawing.wait_for(f"(cards => cards.length === 21 && !cards.includes('…'))({cards})")
    found = drawing.run(cards)
    expected = json.loads(dist_mnist("predict", *files[:-1], "--ckpt", served.run, "--json").stdout)
    assert [one.split()[0] for one in found[:-1]] == [one["name"] for one in expected] and found[-1] == "Unreadable"
    assert "not a picture in a known format" in drawing.run("document.querySelector('#gallery .failed').textContent")
    drawing.run("document.querySelectorAll('#gallery button')[7].click()")
    assert (
        drawing.run(shows(expected[7]["name"]))
        and drawing.run("document.getElementById('seen-caption').textContent") == "07.png"
    )


def test_serve_page_loads_nothing_from_elsewhere_and_breaks_no_policy(drawing, served):
    """In all that was done before."""
    urls = {
        event["params"]["request"]["url"] for event in drawing.events if event["method"] == "Network.requestWillBeSent"
    }
    assert f"{served.url}/page.js" in urls and f"{served.url}/page.css" in urls
    assert all(url.startswith((served.url, "data:", "blob:")) for url in urls), urls
    complaints = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert [event for event in drawing.events if event["method"] in complaints] == []


def test_serve_page_of_a_colour_network_has_colours_and_names(page, tmp_path, write_set):
    data = some_colours(classes=15)
    folder = write_set(*data)
    names = [f"kind <b>{number}</b>" for number in range(15)]
    (folder / "classes.json").write_text(json.dumps(names))
    run = trained_here(folder, tmp_path / "colours", "--steps=60", "--batch-size=20", "--lr=0.05")
    with serving(run, signal.SIGINT) as server:
        page.open(f"{server.url}/")
        page.wait_for("document.getElementById('facts').textContent.includes('in colour')")
        red, green, blue = data.test_images[0].mean((0, 1)).astype(int)
        page.run(f"document.getElementById('ground').value = '#{red:02x}{green:02x}{blue:02x}'")
        page.mouse(on_pad(page, [(0.5, 0.5), (0.52, 0.5)]))
        page.wait_for("document.getElementById('class').textContent.startsWith('kind <b>')")
        shown = page.run("[...document.querySelectorAll('#bars th[scope=row]')].map(one => one.textContent)")
        assert len(shown) == 10 and set(shown) <= set(names)
        assert not page.run("document.getElementById('ink').closest('label').hidden")
