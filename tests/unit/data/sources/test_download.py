"""Downloads from servers that behave in every way a server may: real HTTP on the loopback, tiny files.

What a mirror does                        What must happen
404, 403                                  next mirror, not asked twice
500, 503, 429, short body                 asked once more, then next mirror
a web page, wrong content of right size   the same
too long, redirect to file:, in a circle  next mirror
silence, stall, slow drip                 next mirror, within a bound
nobody there                              the user is told in seconds what to do
a .gz declared as content encoding        stored as published
another name for the file, with ../       stored under ours
two processes at once                     each file requested once
killed in the middle                      the next call cleans up and succeeds
a file system without locks               a warning; another's unfinished files are left
"""

import errno
import fcntl
import gzip
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dist_mnist.data.sources import download
from dist_mnist.data.sources.download import LOCK_NAME, fetch
from dist_mnist.data.sources.known.records import KnownDataset, KnownFile
from dist_mnist.utils.errors import UserError
from helpers import HANGS_AFTER_S

CONTENT = {
    "train-images-idx3-ubyte.gz": gzip.compress(os.urandom(50_000), mtime=0),
    "t10k-labels-idx1-ubyte.gz": gzip.compress(b"labels", mtime=0),
}
FIRST, SECOND = CONTENT
BOUND_S = 60  # for what is to take seconds: far from them, and from the hang that it tells, on any machine
FILES = tuple(
    KnownFile(name=name, num_bytes=len(body), checksum=f"sha256:{hashlib.sha256(body).hexdigest()}")
    for name, body in CONTENT.items()
)
Behaviour = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    """Answers a GET as the server's script says."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/")
        with self.server.mirror.lock:
            self.server.mirror.requests[name] += 1
            script = self.server.mirror.script.get(name) or self.server.mirror.script.get("*", [serve])
            behave = script.pop(0) if len(script) > 1 else script[0]
        behave(self, CONTENT.get(name, b""))

    def head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Mirror:
    """A server; `script` says by file name (or *) how to behave at each request in turn; the last entry holds on."""

    def __init__(self) -> None:
        self.script: dict[str, list[Behaviour]] = {}
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.mirror = self
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def always(self, *behaviours: Behaviour) -> "Mirror":
        self.script = {name: list(behaviours) for name in CONTENT}
        return self

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


def serve(handler: Handler, body: bytes) -> None:
    handler.head(200, len(body))
    handler.wfile.write(body)


def status(code: int) -> Behaviour:
    return lambda handler, body: handler.head(code, 0)


def wrong_content(handler: Handler, body: bytes) -> None:
    serve(handler, bytes(len(body)))


def web_page(handler: Handler, body: bytes) -> None:
    serve(handler, b"<html>Please log in</html>")


def short_body(handler: Handler, body: bytes) -> None:
    handler.head(200, len(body))
    handler.wfile.write(body[:-1])
    handler.close_connection = True


def endless(handler: Handler, body: bytes) -> None:
    handler.head(200, None)
    with suppress(OSError):  # the client has gone, as it should
        while not handler.server.mirror.closing.is_set():
            handler.wfile.write(bytes(1 << 16))


def silence(handler: Handler, body: bytes) -> None:
    handler.server.mirror.closing.wait(HANGS_AFTER_S)


def stall(handler: Handler, body: bytes) -> None:
    handler.head(200, len(body))
    handler.wfile.write(body[: len(body) // 2])
    handler.server.mirror.closing.wait(HANGS_AFTER_S)


def drip(handler: Handler, body: bytes) -> None:
    """A byte now and then: never silent for long enough to time out, never done."""
    handler.head(200, len(body))
    with suppress(OSError):  # the client has gone, as it should
        while not handler.server.mirror.closing.wait(0.1):
            handler.wfile.write(b"x")


def dripping_headers(handler: Handler, body: bytes) -> None:
    """Headers without end, a byte now and then."""
    handler.send_response(200)
    handler.flush_headers()
    with suppress(OSError):  # the client has gone, as it should
        while not handler.server.mirror.closing.wait(0.1):
            handler.wfile.write(b"x")


def redirect(target: str) -> Behaviour:
    return lambda handler, body: handler.head(302, 0, Location=target)


def as_content_encoding(handler: Handler, body: bytes) -> None:
    handler.head(200, len(body), Content_Encoding="x-gzip")
    handler.wfile.write(body)


def with_another_name(handler: Handler, body: bytes) -> None:
    """It would like the file to be stored elsewhere."""
    names = {"Content_Disposition": 'attachment; filename="../../evil"', "Content_Location": "/../../evil"}
    handler.head(200, len(body), **names)
    handler.wfile.write(body)


def redirect_with_another_name(handler: Handler, body: bytes) -> None:
    if handler.path.endswith("/evil"):
        serve(handler, CONTENT[FIRST])
    else:
        handler.head(302, 0, Location="/..%2f..%2f../../evil")


@pytest.fixture(autouse=True)
def short_pause(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF_S", 0.05)


@pytest.fixture
def mirrors() -> Iterator[list[Mirror]]:
    servers = [Mirror(), Mirror()]
    yield servers
    for server in servers:
        server.close()


def dataset(*mirrors: Mirror) -> KnownDataset:
    return KnownDataset(
        name="tiny",
        class_names=("a", "b"),
        mirrors=tuple(mirror.url for mirror in mirrors),
        files=FILES,
    )


def assert_holds_the_files_and_nothing_else(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {*CONTENT, LOCK_NAME}
    assert all((folder / name).read_bytes() == body for name, body in CONTENT.items())


def test_fetch_new_folder_is_made_and_filled(mirrors, tmp_path, capfd):
    folder = tmp_path / "new" / "data"
    assert fetch(dataset(*mirrors), folder) == folder
    assert_holds_the_files_and_nothing_else(folder)
    assert mirrors[0].requests == {FIRST: 1, SECOND: 1} and not mirrors[1].requests
    assert capfd.readouterr() == ("", "")  # no bar off a terminal


def test_fetch_progress_requested_draws_a_bar_per_file(mirrors, tmp_path, capfd):
    fetch(dataset(*mirrors), tmp_path, progress=True)
    drawn = capfd.readouterr().err
    assert FIRST in drawn and SECOND in drawn and "100%" in drawn


def test_fetch_stored_files_have_the_mode_of_the_umask(mirrors, tmp_path):
    before = os.umask(0o022)
    try:
        fetch(dataset(*mirrors), tmp_path)
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in CONTENT} == {0o644}


@pytest.mark.parametrize("ending", ["-idx3-ubyte.gz", "-idx3-ubyte", ".idx3-ubyte.gz", ".idx3-ubyte"])
def test_fetch_file_that_exists_is_not_requested(mirrors, tmp_path, ending):
    (tmp_path / f"train-images{ending}").write_bytes(b"my own")
    fetch(dataset(*mirrors), tmp_path)
    assert mirrors[0].requests == {SECOND: 1}
    assert (tmp_path / f"train-images{ending}").read_bytes() == b"my own"


def test_fetch_complete_folder_is_not_touched(mirrors, tmp_path):
    for name in CONTENT:
        (tmp_path / name).write_bytes(b"my own")
    fetch(dataset(*mirrors), tmp_path)
    assert not mirrors[0].requests and not mirrors[1].requests
    assert {path.name for path in tmp_path.iterdir()} == set(CONTENT)  # no lock file either


@pytest.mark.parametrize("fault", [status(503), status(500), status(429), wrong_content, short_body, web_page])
def test_fetch_transient_fault_is_retried_on_the_same_mirror(mirrors, tmp_path, fault):
    mirrors[0].script[FIRST] = [fault, serve]
    fetch(dataset(*mirrors), tmp_path)
    assert_holds_the_files_and_nothing_else(tmp_path)
    assert mirrors[0].requests == {FIRST: 2, SECOND: 1} and not mirrors[1].requests


BAD = {
    "404": (status(404), "404", 1),
    "403": (status(403), "403", 1),
    "503": (status(503), "503", 2),
    "wrong content": (wrong_content, "wrong checksum", 2),
    "short body": (short_body, "connection lost", 2),
    "a web page": (web_page, "wrong checksum", 2),
    "too long": (endless, f"more than the file's {FILES[0].num_bytes} bytes", 1),
    "redirect to a file": (redirect("file:///etc/hostname"), "redirected to an address that is not http", 1),
    "redirect loop": (redirect(f"/{FIRST}"), "too many redirects", 31),
    "silence": (silence, "no answer within 1 s", 1),
    "stall": (stall, "connection lost", 2),
    "drip": (drip, "too slow", 1),
}


@pytest.mark.parametrize(("behaviour", "answer", "num_requests"), BAD.values(), ids=BAD)
def test_fetch_bad_mirror_is_left_with_a_short_reason(mirrors, tmp_path, behaviour, answer, num_requests):
    bad = mirrors[0].always(behaviour)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        fetch(dataset(bad), tmp_path, timeout_s=1)
    assert time.monotonic() - start < BOUND_S
    assert f"tiny: {FIRST} could not be downloaded ({bad.url}: {answer})" in str(caught.value)
    assert bad.requests == {FIRST: num_requests}
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
    wait_until(lambda: not any(thread.name.startswith(bad.url) for thread in threading.enumerate()))


def test_fetch_headers_drip_without_end_next_takes_over(mirrors, tmp_path):
    fetch(dataset(mirrors[0].always(dripping_headers), mirrors[1]), tmp_path, timeout_s=1)
    assert_holds_the_files_and_nothing_else(tmp_path)
    assert mirrors[0].requests == {FIRST: 1}


@pytest.mark.parametrize("fault", ["404", "wrong content", "stall", "silence"])
def test_fetch_first_mirror_fails_next_takes_over(mirrors, tmp_path, fault):
    behaviour, _, num_requests = BAD[fault]
    mirrors[0].always(behaviour)
    start = time.monotonic()
    fetch(dataset(*mirrors), tmp_path, timeout_s=1)
    assert time.monotonic() - start < BOUND_S
    assert_holds_the_files_and_nothing_else(tmp_path)
    assert mirrors[0].requests == {FIRST: num_requests}  # the one that works is asked first for the second file
    assert mirrors[1].requests == {FIRST: 1, SECOND: 1}


def test_fetch_all_mirrors_fail_error_names_each_answer_and_what_to_do(mirrors, tmp_path):
    mirrors[0].always(status(404))
    mirrors[1].script[FIRST] = [wrong_content]
    with pytest.raises(UserError) as caught:
        fetch(dataset(*mirrors), tmp_path)
    assert str(caught.value) == (
        f"tiny: {FIRST} could not be downloaded ({mirrors[0].url}: 404; {mirrors[1].url}: wrong checksum). Copy the "
        f"four files into {tmp_path}, or train on generated digits with --dataset synthetic."
    )
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]


def test_fetch_second_file_fails_first_is_kept(mirrors, tmp_path):
    mirrors[0].script[SECOND] = [status(404)]
    with pytest.raises(UserError, match=SECOND):
        fetch(dataset(mirrors[0]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {FIRST, LOCK_NAME}
    mirrors[0].script.clear()
    fetch(dataset(mirrors[0]), tmp_path)
    assert mirrors[0].requests == {FIRST: 1, SECOND: 2}


def test_fetch_no_network_fails_within_seconds(tmp_path):
    with socket.socket() as unused:  # bound and not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        nowhere = replace(dataset(), mirrors=(refused, "http://no-such-host.invalid/"))
        start = time.monotonic()
        with pytest.raises(UserError, match=rf"{refused}: no connection; http://no-such-host.invalid/: no "):
            fetch(nowhere, tmp_path)
    assert time.monotonic() - start < BOUND_S


def test_fetch_all_mirrors_silent_costs_two_timeouts(tmp_path):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]  # accept, and never answer
    urls = tuple(f"http://127.0.0.1:{server.getsockname()[1]}/" for server in sockets)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"within 1 s; .* within 0\.5 s; .* within 0\.25 s; .* within 0\.25 s"):
        fetch(replace(dataset(), mirrors=urls), tmp_path, timeout_s=1)
    assert time.monotonic() - start < BOUND_S
    for server in sockets:
        server.close()


def test_fetch_gzip_declared_as_content_encoding_is_stored_as_published(mirrors, tmp_path):
    mirrors[0].always(as_content_encoding)
    fetch(dataset(*mirrors), tmp_path)
    assert_holds_the_files_and_nothing_else(tmp_path)
    assert not mirrors[1].requests


@pytest.mark.parametrize("behaviour", [with_another_name, redirect_with_another_name])
def test_fetch_server_suggests_a_name_ours_is_used(mirrors, tmp_path, behaviour):
    mirrors[0].script = {"*": [behaviour], SECOND: [serve]}
    fetch(dataset(mirrors[0]), tmp_path / "in" / "data")
    assert_holds_the_files_and_nothing_else(tmp_path / "in" / "data")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()].count("evil") == 0
    assert {path.name for path in (*tmp_path.iterdir(), *(tmp_path / "in").iterdir())} == {"in", "data"}


def test_fetch_folder_is_a_file_error_is_a_sentence(mirrors, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file.*cannot be stored.*choose a folder"):
        fetch(dataset(*mirrors), tmp_path / "file")
    assert not mirrors[0].requests


CHILD = """
import json, sys
from pathlib import Path
from dist_mnist.data.sources.known.records import KnownDataset, KnownFile
from dist_mnist.data.sources.download import fetch
fields = json.loads(sys.argv[1])
files = tuple(KnownFile(**file) for file in fields.pop("files"))
print("ready", flush=True)
fetch(KnownDataset(files=files, **fields), Path(sys.argv[2]))
"""


def start_child(known: KnownDataset, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, json.dumps(asdict(known)), str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child


def end(*children: subprocess.Popen) -> None:
    for child in children:
        child.kill()
        child.wait(HANGS_AFTER_S)
        child.stdout.close()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + HANGS_AFTER_S
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.02)


def test_fetch_two_processes_at_once_request_each_file_once(mirrors, tmp_path):
    gate = threading.Event()

    def gated(handler: Handler, body: bytes) -> None:
        gate.wait(HANGS_AFTER_S)
        serve(handler, body)

    mirrors[0].always(gated)
    children = []
    try:
        for _ in range(2):
            children.append(start_child(dataset(mirrors[0]), tmp_path))
        wait_until(lambda: mirrors[0].requests[FIRST])
        time.sleep(1)  # time for the other to make a request as well, if it were let
        gate.set()
        assert [child.wait(HANGS_AFTER_S) for child in children] == [0, 0]
    finally:
        end(*children)
    assert mirrors[0].requests == {FIRST: 1, SECOND: 1}
    assert_holds_the_files_and_nothing_else(tmp_path)


def test_fetch_after_a_killed_download_removes_its_leftovers(mirrors, tmp_path):
    mirrors[0].script[FIRST] = [stall, serve]
    child = start_child(dataset(mirrors[0]), tmp_path)
    try:
        wait_until(lambda: any(path.stat().st_size for path in tmp_path.glob(f".{FIRST}.*.tmp")))
    finally:
        end(child)
    assert child.returncode == -9
    left = {path.name for path in tmp_path.iterdir()}
    assert FIRST not in left and len(left) == 2  # the lock file and the unfinished file

    fetch(dataset(mirrors[0]), tmp_path)
    assert_holds_the_files_and_nothing_else(tmp_path)
    assert mirrors[0].requests == {FIRST: 2, SECOND: 1}


def test_fetch_without_locks_warns_and_leaves_what_another_process_downloads(mirrors, tmp_path, monkeypatch, capfd):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr("dist_mnist.utils.errors._warned", set())
    unfinished = tmp_path / f".{FIRST}.0123abcd.tmp"
    unfinished.write_bytes(b"begun")
    fetch(dataset(mirrors[0]), tmp_path)
    assert unfinished.read_bytes() == b"begun" and all(
        (tmp_path / name).read_bytes() == CONTENT[name] for name in CONTENT
    )
    said = capfd.readouterr().err
    assert said.startswith(
        f"warning: {tmp_path}: this file system has no locks (No locks available), so concurrent downloads "
    )
    assert said.count("\n") == 1
