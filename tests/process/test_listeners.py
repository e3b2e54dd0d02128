"""What listens to a run: it hears all in order, never changes or stops the run, and comes from the command alone."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from ssl import PROTOCOL_TLS_SERVER, SSLContext
from types import SimpleNamespace

import pytest

from dist_mnist.reporting import listener
from dist_mnist.reporting.listeners import kubeflow
from dist_mnist.run.directory import RunDirectory
from helpers import HANGS_AFTER_S
from helpers.runs import SMALL, digest, records, train_here

pytestmark = pytest.mark.xdist_group("listeners")  # with which several runs are shared
OPTIONS = (
    *SMALL,
    "--steps=12",
    "--log-every=4",
    "--validate-every=6",
    "--checkpoint-every=6",
    "--checkpoint-every-s=0",
)
NOTES = """
import asyncio, atexit, json, threading, time
from dist_mnist import Listener

class Notes(Listener):
    def on_start(self, start):
        self.file = open(start.run_dir / "notes.jsonl", "a")
        self.note("start", start.step, start.total_steps, start.config.settings["lr"], start.parameters > 100)
    def on_step(self, step):
        self.note("step", step)
    def on_log(self, record):
        self.note("log", record.step, record.loss)
    def on_validation(self, validation):
        self.note("validation", validation.record.step, int(validation.evaluation.confusion.sum()))
    def on_checkpoint(self, checkpoint):
        assert checkpoint.path.exists()
        self.note("checkpoint", checkpoint.info.step)
    def on_end(self, end):
        self.note("end", end.outcome, end.step, end.result and end.result.images, type(end.error).__name__)
        self.file.close()
    def note(self, *what):
        self.file.write(json.dumps(what) + "\\n")

class Raises(Listener):
    def on_start(self, start):
        if "start" in str(start.run_dir):
            raise ValueError("no start")
    def on_step(self, step):
        raise KeyError(step)
    def on_log(self, record):
        raise SystemExit("exit")
    def on_validation(self, validation):
        raise MemoryError
    on_checkpoint = on_end = on_step

def make():
    return 3

def breaks():
    1 / 0

class Speechless(Exception):
    def __str__(self):
        raise ValueError

class Odd(Listener):
    def __str__(self):
        raise Speechless
    def on_log(self, record):
        raise asyncio.CancelledError

class Mute(Listener):
    def on_log(self, record):
        raise Speechless

class Stays(Listener):
    def on_start(self, start):
        threading.Thread(target=threading.Event().wait, name="upload").start()

class Lingers(Listener):
    def on_end(self, end):
        atexit.register(threading.Event().wait)
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("code") / "own_listeners.py"
    path.write_text(NOTES)
    return path


@pytest.fixture(scope="module")
def told(digits, code, tmp_path_factory) -> Path:
    """A run to which `Notes` listened."""
    run_dir = tmp_path_factory.mktemp("runs") / "told"
    done = train_here(digits, run_dir, *OPTIONS, f"--log-to={code}:Notes")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return run_dir


def notes(run_dir: Path) -> list[list]:
    return [json.loads(line) for line in (run_dir / "notes.jsonl").read_text().splitlines()]


def test_listener_hears_of_the_run_in_its_order(told):
    heard = notes(told)
    assert heard[0] == ["start", 0, 12, 0.1, True] and heard[-1] == ["end", "finished", 12, 200, "NoneType"]
    assert [what[1] for what in heard if what[0] == "step"] == list(range(1, 13))
    logs = [[record["step"], record["loss"]] for record in records(told, "train")]
    assert [what[1:] for what in heard if what[0] == "log"] == logs
    assert [what[1:] for what in heard if what[0] == "validation"] == [[6, 60], [12, 60]]
    assert [what[1] for what in heard if what[0] == "checkpoint"] == [6, 12]
    places = [heard.index(what) for what in (["step", 6], ["validation", 6, 60], ["checkpoint", 6])]
    assert places == sorted(places) and heard.index(["step", 12]) > places[-1]


def test_listener_that_raises_is_a_warning_for_each_method_and_changes_nothing(digits, code, told, tmp_path):
    done = train_here(digits, tmp_path / "run", *OPTIONS, f"--log-to={code}:Raises")
    assert done.returncode == 0, done.stderr
    expected = {"on_step": "KeyError: 1", "on_log": "SystemExit: exit", "on_validation": "MemoryError: "}
    expected |= {"on_checkpoint": "KeyError: ", "on_end": "KeyError: "}
    lines = done.stderr.splitlines()
    assert len(lines) == len(expected)
    for method, why in expected.items():
        [line] = [line for line in lines if f"Raises.{method} failed ({why}" in line]
        assert line.startswith("warning: ") and line.endswith("training goes on without it")
    assert digest(RunDirectory(tmp_path / "run")) == digest(RunDirectory(told))


def test_listener_whose_own_words_fail_changes_nothing(digits, code, told, tmp_path):
    done = train_here(digits, tmp_path / "run", *OPTIONS, f"--log-to={code}:Odd", f"--log-to={code}:Mute")
    assert done.returncode == 0, done.stderr
    expected = ["Odd (CancelledError: )", "Mute.on_log failed (Speechless: Speechless)"]
    assert done.stderr.splitlines() == [
        f"warning: {tmp_path / 'run'}: {one}; training goes on without it" for one in expected
    ]
    assert digest(RunDirectory(tmp_path / "run")) == digest(RunDirectory(told))


@pytest.mark.parametrize(("name", "what"), [("Stays", "upload"), ("Lingers", "an exit handler")])
def test_listener_that_leaves_what_never_ends_does_not_keep_the_process(digits, code, tmp_path, name, what):
    options = [f"--data-dir={digits}", f"--run-dir={tmp_path / 'run'}", *OPTIONS, f"--log-to={code}:{name}"]
    program = "from dist_mnist.cli import errors; import runpy; errors.EXIT_S = 0.2; "
    program += "runpy.run_module('dist_mnist.train', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", program, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S)
    assert done.returncode == 0 and (tmp_path / "run/result.json").exists(), done.stderr
    assert "dist-mnist predict" in done.stdout, "the last lines"
    assert done.stderr == f"warning: {what} did not end within 0.2 s; this process ends without\n"


def test_listener_that_cannot_start_hears_no_more(digits, code, tmp_path):
    done = train_here(digits, tmp_path / "start", *SMALL, "--steps=2", f"--log-to={code}:Raises")
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "Raises.on_start failed (ValueError: no start); training goes on without it" in done.stderr


def test_listener_hears_of_a_failure(digits, code, tmp_path):
    options = (*SMALL, "--steps=9", "--log-every=3", "--lr=1e30", "--clip-norm=0", f"--log-to={code}:Notes")
    assert train_here(digits, tmp_path / "run", *options).returncode == 2
    assert notes(tmp_path / "run")[-1][:2] == ["end", "failed"]
    assert notes(tmp_path / "run")[-1][3:] == [None, "NotFinite"]


def test_listener_of_a_run_that_resumes_is_asked_for_and_not_taken_from_it(digits, code, told):
    heard = notes(told)
    done = train_here(digits, told, "--device=cpu")
    assert done.returncode == 0 and notes(told) == heard, "it is only evaluated again, and nobody listens"
    assert f"was logged to {code}:Notes before, but is not now: give --log-to" in done.stderr


@pytest.mark.parametrize(
    ("name", "why"),
    {
        "mlflw": "unknown tracker 'mlflw', did you mean 'mlflow'",
        "missing.py:Notes": "--log-to missing.py:Notes: there is no file ",
        "{code}:Note": "--log-to: unknown name in .*own_listeners.py: 'Note', did you mean 'Notes'",
        "{code}:NOTES": "unknown name in",
        "{code}:make": "own_listeners.py:make gives an int, not a dist_mnist.Listener",
        "{code}:breaks": r"own_listeners.py:breaks raised ZeroDivisionError: division by zero \(.*, line 40\)",
        "{code}:json": "own_listeners.py:json is a module: name a class",
    }.items(),
    ids=str,
)
def test_log_to_what_is_no_listener_is_a_sentence_and_makes_no_checkpoint(digits, code, tmp_path, name, why):
    done = train_here(digits, tmp_path / "run", *SMALL, "--steps=2", f"--log-to={name.format(code=code)}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    [line] = done.stderr.splitlines()
    assert re.search(why, line), line
    assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_log_to_without_its_package_is_a_sentence(digits, tmp_path, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None)
    done = train_here(digits, tmp_path / "run", *SMALL, "--steps=2", f"--log-to={name}")
    assert (
        done.returncode == 2
        and f"needs a package that is not installed: pip install 'dist-mnist[{name}]'" in done.stderr
    )
    assert not (tmp_path / "run").exists()


class Status(BaseHTTPRequestHandler):
    """Takes posts of progress, and answers as its server's `answer` says."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append((self.headers["Authorization"], json.loads(body)["trainerStatus"]))
        self.send_response(self.server.answer)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def status_server(folder: Path, answer: int = 200) -> Iterator[tuple[ThreadingHTTPServer, dict[str, str]]]:
    """An HTTPS server with a certificate of its own making, and the variables that name both to a pod."""
    files = {name: folder / name for name in ("ca.crt", "key.pem", "token")}
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", files["key.pem"], "-out", files["ca.crt"]]
    subprocess.run(["openssl", *map(str, made)], check=True, capture_output=True, timeout=60)
    files["token"].write_text("first\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Status)
    server.posts, server.answer = [], answer
    context = SSLContext(PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["ca.crt"], files["key.pem"])
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    url = f"https://127.0.0.1:{server.server_port}/status"
    try:
        yield server, {kubeflow.URL: url, kubeflow.CA_CERT: str(files["ca.crt"]), kubeflow.TOKEN: str(files["token"])}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_kubeflow_gets_the_progress_of_a_run(digits, tmp_path, monkeypatch):
    with status_server(tmp_path) as (server, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        done = train_here(digits, tmp_path / "run", *OPTIONS)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    first, *_, last = [status for _, status in server.posts]
    assert {token for token, _ in server.posts} == {"Bearer first"}
    assert first["progressPercentage"] == 0 and first["metrics"] == [] and "estimatedRemainingSeconds" not in first
    assert last["progressPercentage"] == 100 and last["estimatedRemainingSeconds"] == 0
    metrics = {metric["name"]: metric["value"] for metric in last["metrics"]}
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert float(metrics["test_accuracy"]) == pytest.approx(result["accuracy"], rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(records(tmp_path / "run", "train")[-1]["loss"], rel=1e-5)
    assert last["lastUpdatedTime"].endswith("Z") and "validation_accuracy" in metrics


def test_kubeflow_posts_are_five_seconds_apart_and_the_token_is_read_for_each(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(kubeflow, "time", clock)
    with status_server(tmp_path) as (server, variables):
        progress = kubeflow.Progress(*variables.values())
        progress.on_start(
            listener.RunStart(run_dir=tmp_path, config=None, parameters=1, step=0, total_steps=1000, notes=())
        )
        progress.posting.result()
        Path(variables[kubeflow.TOKEN]).write_text("second")
        for step in range(1, 500):  # a tenth of a second each
            clock.now += 0.1
            progress.on_step(step)
            progress.posting.result()
        progress.on_end(listener.RunEnd(outcome="stopped", step=500))
    assert len(server.posts) == 1 + 9 + 1
    assert [token for token, _ in server.posts[1:]] == ["Bearer second"] * 10
    third, last = server.posts[2][1], server.posts[-1][1]
    assert (third["progressPercentage"], last["progressPercentage"]) == (10, 50)
    assert abs(third["estimatedRemainingSeconds"] - 90) <= 1


TOKENS = {"a token of two lines": b"s3cret\nmore", "a token that is no text": b"s3cret\xff"}


@pytest.mark.parametrize("fault", ["an error", "another certificate", "nobody", *TOKENS])
def test_kubeflow_server_that_does_not_take_posts_is_one_warning(digits, tmp_path, monkeypatch, fault):
    with status_server(tmp_path, answer=500) as (server, variables):
        if fault == "another certificate":
            variables.pop(kubeflow.CA_CERT)
        if fault == "nobody":
            variables[kubeflow.URL] = "https://127.0.0.1:9/status"
        if fault in TOKENS:
            Path(variables[kubeflow.TOKEN]).write_bytes(TOKENS[fault])
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        done = train_here(digits, tmp_path / "run", *SMALL, "--steps=4")
    assert done.returncode == 0 and (tmp_path / "run/result.json").exists() and "s3cret" not in done.stderr
    [warning] = done.stderr.splitlines()
    assert warning.startswith(f"warning: {kubeflow.URL}: progress cannot be posted (")
    assert bool(server.posts) == (fault == "an error")
