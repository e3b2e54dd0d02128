"""Run directories whose files are not what a run writes: training goes on from the checkpoints, or says what to do."""

import html
import io
import json
import os
import shutil
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from dist_mnist.config.overrides import Overrides
from dist_mnist.elastic.preemption import StopSignal
from dist_mnist.run.checkpoints.file import arrays_digest, load_checkpoint
from dist_mnist.run.directory import RunDirectory
from dist_mnist.train import run as train_as_rank
from dist_mnist.utils.errors import UserError
from helpers.runs import dist_mnist

FILES = (
    "config.json",
    "metrics.jsonl",
    "chain.jsonl",
    "result.json",
    "stopped.json",
    ".progress",
    ".failures",
    ".owner",
    ".lock",
)
DAMAGES = {
    "nothing": b"",
    "bytes": bytes(range(256)) * 10,
    "a list": b"[1, 2]\n",
    "null": b"null\n",
    "deep": b"[" * 100_000,
    "strange": b'{"step": "x", "times": null, "token": 5, "kind": 3, "settings": 7, "process": "1; rm -rf /"}\n',
    "names twice": b'{"step": 1, "step": 2}\n',
    "a half line": b'{"kind": "train", "st',
}


def train(settings: dict) -> None:
    train_as_rank(Overrides(settings), StopSignal())


@pytest.fixture(scope="module")
def settings(digits) -> dict:
    return {
        "data_dir": digits, "batch_size": 100, "steps": 6, "checkpoint_every": 2, "log_every": 2, "device": "cpu",
        "conv_channels": (2,), "dense_units": (4,), "threads": 1, "tensorboard": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """A run that is finished."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(settings | {"run_dir": folder})
    return folder


@pytest.fixture
def half(whole, tmp_path) -> RunDirectory:
    """A copy of it that has come to step 2."""
    run = RunDirectory(Path(shutil.copytree(whole, tmp_path / "half")))
    for path in run.checkpoints.paths()[1:]:
        path.unlink()
    run.result_path.unlink()
    return run


def end_of(run: RunDirectory) -> str:
    last = load_checkpoint(run.checkpoints.paths()[-1])
    assert last.info.step == 6
    return arrays_digest(last.arrays)


@pytest.mark.parametrize("restarts", ["0", "1"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_train_among_damaged_files_resumes_with_same_bits(half, whole, settings, damage, restarts, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    for name in FILES:
        (half.path / name).write_bytes(DAMAGES[damage])
    train(settings | {"run_dir": half.path})
    assert end_of(half) == end_of(RunDirectory(whole))
    assert dist_mnist("compare", half.path, "--json").returncode == 0, "its files are whole again"


@pytest.mark.parametrize("kind", ["folder", "link to nothing", "link to itself", "pipe"])
@pytest.mark.parametrize("name", FILES)
def test_train_file_that_is_none_is_named(half, settings, name, kind):
    path = half.path / name
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if kind == "link to nothing" else name)
    with pytest.raises(UserError, match=rf"{path} is not a regular file: remove it, or give another --run-dir"):
        train(settings | {"run_dir": half.path})
    assert len(half.checkpoints.paths()) == 1


@pytest.mark.parametrize("kind", ["folder", "pipe", "bytes"])
def test_train_checkpoint_that_is_none_is_set_aside(half, whole, settings, kind):
    path = half.checkpoints.path(5)
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "bytes": lambda: path.write_bytes(b"x" * 1000)}[kind]()
    with redirect_stderr(err := io.StringIO()):
        train(settings | {"run_dir": half.path})
    assert end_of(half) == end_of(RunDirectory(whole))
    assert f"warning: {path} is " in err.getvalue() and "set aside as step-00000005.damaged" in err.getvalue()


def test_run_directory_of_any_name_works(settings, tmp_path):
    run = tmp_path / "a 'b' \"c\" $HOME `d` ü 😀 * -x #; &"
    train(settings | {"run_dir": run})
    evaluated = json.loads(dist_mnist("eval", "--ckpt", run, "--json").stdout)
    assert evaluated["confusion_matrix"] == json.loads((run / "result.json").read_text())["confusion_matrix"]
    for command in ("compare", "report"):
        done = dist_mnist(command, run)
        assert done.returncode == 0, done.stderr
    assert run.name in html.unescape((run / "report.html").read_text())


def test_train_network_beyond_all_memory_is_a_sentence(settings, tmp_path):
    with pytest.raises(UserError, match=r"out of memory \(.*\): check which other processes use it, or start a new"):
        train(settings | {"run_dir": tmp_path / "run", "conv_channels": (65_536, 65_536)})


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name not in ("nothing", "a half line")])
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "result.json"])
def test_compare_and_report_damaged_file_is_a_sentence(whole, tmp_path, name, damage):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / name).write_bytes(DAMAGES[damage] + b"\n")
    for command in ("compare", "report"):
        done = dist_mnist(command, run)
        assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.glob("*.html"))
        assert done.stderr.startswith(f"error: {run / name} cannot be read") and len(done.stderr) < 500


@pytest.mark.parametrize(("old", "new"), [
    (b'"accuracy": ', b'"accuracy": true, "was": '), (b'"images": ', b'"images": 0, "was": '),
    (b"      0,", b"      1,"),
    (b'"correct": ', b'"correct": 201, "was": '), (b'"parameters": ', b'"parameters": "x", "was": '),
    (b'"confusion_matrix": [', b'"confusion_matrix": [[1], '), (b'"loss": ', b'"loss": 1e999, "was": '),
])  # fmt: skip
def test_compare_inconsistent_result_is_a_sentence(whole, tmp_path, old, new):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    result = (run / "result.json").read_bytes()
    assert old in result
    (run / "result.json").write_bytes(result.replace(old, new, 1))
    done = dist_mnist("compare", run)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {run / 'result.json'} cannot be read")


def test_compare_and_report_unknown_figures_are_dashes(whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"loss": None, "parameters": None}))
    config = json.loads((run / "config.json").read_text())
    config["settings"]["recipe"] = "\x1b[2J[/x]"
    (run / "config.json").write_text(json.dumps(config | {"machine": None}))
    for words in (["compare", run], ["compare", run, whole], ["compare", run, whole, "--mean"], ["report", run]):
        done = dist_mnist(*words)
        assert done.returncode == 0, done.stderr
        assert "\x1b[2J" not in done.stdout


def test_report_settings_of_no_run_still_makes_a_page(whole, tmp_path):
    """Its command then names them, and they are refused when it is given."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    config = (run / "config.json").read_bytes()
    for old, new in ((b'"lr": 0.1', b'"lr": [[]]'), (b'"seed": 0', b'"seed": "<script>alert(1)</script>"')):
        assert old in config
        config = config.replace(old, new)
    (run / "config.json").write_bytes(config)
    done = dist_mnist("report", run, "--output", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert b"<script" not in (tmp_path / "page.html").read_bytes()
