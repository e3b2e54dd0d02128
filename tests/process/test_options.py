"""The command line: an option for every setting, and a user's mistake as one line and exit code 2."""

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer

from dist_mnist.cli.options import with_settings
from dist_mnist.config.choices import Optimizer
from dist_mnist.config.fields import option
from dist_mnist.config.overrides import Overrides
from dist_mnist.config.resolve import resolve
from dist_mnist.config.settings import FIELDS, Config
from dist_mnist.data.idx import write_idx
from helpers import HANGS_AFTER_S

COMMAND = [sys.executable, "-m", "dist_mnist", "train"]
MODULE = [sys.executable, "-m", "dist_mnist.train"]
SHARE = "--batch-size 3 is the global batch size, less than one sample for each of 4"


def call(command: list[str], folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"COLUMNS": "300", "TERM": "dumb", "NO_COLOR": "1"} | environment
    return subprocess.run(
        [*command, *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER_S,
        check=False,
    )


def parse(*arguments: str) -> Overrides:
    """The settings that arrive from a command line."""
    arrived: list[Overrides] = []
    app = typer.Typer()
    app.command()(with_settings(arrived.append))
    app(list(arguments), standalone_mode=False)
    return arrived[0]


def test_train_help_shows_every_setting(tmp_path):
    result = call(COMMAND, tmp_path, "--help")
    assert result.returncode == 0
    words = result.stdout.replace("/", " ").split()
    for name, declared in FIELDS.items():
        assert declared.option in words
        assert declared.group in words
        if declared.kind is bool:
            assert option("no_" + name) in words
        if declared.default is not None and isinstance(declared.default, int | float | str):
            assert f"default: {str(declared.default).lower()}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], {}),
        (["--conv-channels", "8,16, 32", "--dense-units", ""], {"conv_channels": (8, 16, 32), "dense_units": ()}),
        (["--dense-units=64"], {"dense_units": (64,)}),
        (
            ["--nesterov", "--no-tensorboard", "--drop-last"],
            {"nesterov": True, "tensorboard": False, "drop_last": True},
        ),
        (["--no-nesterov"], {"nesterov": False}),
        (["--lr", "1e-3", "--seed", "7", "--epochs", "2"], {"lr": 0.001, "seed": 7, "epochs": 2.0}),
        (["--run-dir", "a/b", "--optimizer", "adamw"], {"run_dir": Path("a/b"), "optimizer": Optimizer.ADAMW}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_given_arrive_in_their_types_and_no_others(arguments, given):
    found = parse(*arguments)
    assert found == given
    assert {name: type(value) for name, value in found.items() if name != "run_dir"} == {
        name: type(value) for name, value in given.items() if name != "run_dir"
    }
    assert resolve(found)


def test_options_exist_for_every_setting():
    """Each with its default, written as a user would."""
    for name, default in Config(run_dir=Path("r"), data_dir=Path("d")).to_json().items():
        if default is None or default == []:
            continue
        if isinstance(default, bool):
            arguments = [option(name) if default else option("no_" + name)]
        else:
            arguments = [option(name), ",".join(map(str, default)) if isinstance(default, list) else str(default)]
        assert parse(*arguments) == {name: getattr(Config(run_dir=Path("r"), data_dir=Path("d")), name)}


@pytest.fixture
def broken(small_set) -> Callable[..., Path]:
    """A function that spoils a file of the small set: by its name, and what to do to its bytes; gives the folder."""

    def spoil(name: str, change) -> Path:
        path = small_set / name
        path.write_bytes(change(path.read_bytes()))
        return small_set

    return spoil


MISTAKES = {
    "unknown recipe": (bytes, "train-images-idx3-ubyte", ["--recipe", "notbook"], "did you mean 'notebook'"),
    "missing folder": (bytes, "train-images-idx3-ubyte", ["--data-dir", "absent"], "absent: the folder of idx files"),
    "wrong magic": (lambda c: b"\x7fELF" + c[4:], "train-images-idx3-ubyte", [], "not an idx file"),
    "truncated body": (lambda c: c[:-1], "t10k-images-idx3-ubyte", [], "truncated"),
    "counts that differ": (lambda c: c[:7] + b"\x13" + c[8:-1], "train-labels-idx1-ubyte", [], "19 labels"),
    "label out of range": (lambda c: c[:-1] + b"\x07", "t10k-labels-idx1-ubyte", [], "label 7 at index 5"),
    "most classes empty": (
        lambda c: c[:-1] + b"\xc8",
        "train-labels-idx1-ubyte",
        [],
        "label 200 (index 19) has 1 of the images",
    ),
    "not a number": (bytes, "train-images-idx3-ubyte", ["--lr", "nan"], "--lr expects a finite number, got nan"),
    "bad setting": (bytes, "train-images-idx3-ubyte", ["--dropout", "1.5"], "--dropout must be at least 0 and at most"),
}


ABSURD = {
    "--batch-size 0": "--batch-size must be at least 1, got 0",
    "--batch-size 99999999999999999999": "--batch-size 99999999999999999999 is more than the 18 training images",
    "--epochs -1": "--epochs must be at least 0 and at most 1e+06, got -1",
    "--epochs 0": "--epochs must be positive, got 0",
    "--epochs 2 --steps 5": "exactly one of them",
    "--lr 1e400": "--lr expects a finite number, got inf",
    "--kernel-size 999999": "--kernel-size must be at least 1 and at most 101, got 999999",
    "--dense-units 99999999999": "--dense-units must be at least 1 and at most 65536, got 99999999999",
    "--conv-channels 4,4,4,4": "4 stages halve an image of 4x5 pixels to nothing; at most 2 fit",
    "--threads 99999999": "--threads must be at least 0 and at most 1024, got 99999999",
    "--run-dir file": "file: the run directory cannot be written (Not a directory); give another --run-dir",
    "--run-dir file/below": "file/below: the run directory cannot be written (Not a directory)",
    "--run-dir link": "link: the run directory cannot be written (File exists)",
    "--run-dir /proc/run": "/proc/run: the run directory cannot be written (No such file or directory)",
    f"--run-dir {'x' * 300}": "xxx...: File name too long; give another path, or make this one accessible",
    "--config link": "--config link: cannot be read (No such file or directory)",
    "--config /dev/zero": "--config /dev/zero: a settings file has at most 1048576 bytes",
    "--config digits.toml": "--config digits.toml: the file is not valid TOML (Exceeds the limit",
    "--config huge.toml": "--config huge.toml: --lr expects a finite number, got 1000",
    "--epochs 1e307": "--epochs must be at least 0 and at most 1e+06, got 1e+307",
    "--stall-timeout 1e300": "--stall-timeout must be at least 1 and at most 1e+06",
    "--config deep.toml": "--config deep.toml: the file is not valid TOML (maximum recursion depth exceeded",
    "--config other.toml": "--config other.toml: unknown setting 'learning_rate'",
}


@pytest.mark.parametrize("words", ABSURD)
def test_train_absurd_setting_is_one_sentence(tmp_path, small_set, words):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 10_000)
    (tmp_path / "digits.toml").write_text("seed = 1" + "0" * 10_000)
    (tmp_path / "huge.toml").write_text("lr = 1" + "0" * 400)
    (tmp_path / "other.toml").write_text("learning_rate = 0.1")
    given = words.split()
    batch = () if "--batch-size" in given else ("--batch-size", "5")
    check_mistake(call(COMMAND, tmp_path, "--data-dir", str(small_set), *batch, *given), ABSURD[words])
    assert not (tmp_path / "runs").exists()


def check_mistake(result: subprocess.CompletedProcess, message: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(("change", "name", "options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_train_mistake_in_the_input_is_one_sentence(tmp_path, broken, change, name, options, message):
    folder = broken(name, change)
    check_mistake(call(COMMAND, tmp_path, "--batch-size", "5", "--data-dir", str(folder), *options), message)
    assert not (tmp_path / "runs").exists()


def test_train_more_processes_than_images_in_a_batch_is_refused(tmp_path, small_set):
    result = call(COMMAND, tmp_path, "--data-dir", str(small_set), "--batch-size", "3", "--nproc", "4")
    check_mistake(result, SHARE)


def test_train_fewest_nodes_that_cannot_share_a_batch_are_refused(tmp_path, small_set):
    meeting = ("--nproc=1", "--nnodes=1:4", "--rdzv-endpoint=localhost:1", "--batch-size=16", "--invariant")
    check_mistake(
        call(COMMAND, tmp_path, f"--data-dir={small_set}", *meeting),
        "which cannot be divided equally among 3 processes",
    )


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["--batch-size", "3"], {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "localhost"}, SHARE),
        ([], {"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 but MASTER_ADDR is not set"),
        (["--data-dir", "absent"], {}, "absent: the folder of idx files does not exist"),
    ],
    ids=["batch smaller than the world", "no address", "missing folder"],
)
def test_rank_mistake_is_one_sentence(tmp_path, small_set, options, environment, message):
    check_mistake(call(MODULE, tmp_path, "--data-dir", str(small_set), *options, **environment), message)


@pytest.mark.parametrize("command", [COMMAND, MODULE], ids=["dist-mnist train", "module"])
def test_train_device_cuda_without_a_gpu_is_refused(tmp_path, small_set, command):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    result = call(command, tmp_path, "--data-dir", str(small_set), "--batch-size", "5", "--device", "cuda")
    check_mistake(result, "--device cuda: this machine has no usable GPU")


def test_train_damaged_gzip_file_is_one_sentence(tmp_path, small_set):
    path = small_set / "train-images-idx3-ubyte"
    Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes())[:-3])
    path.unlink()
    check_mistake(call(COMMAND, tmp_path, "--data-dir", str(small_set)), "gzip stream is damaged")


def test_train_list_of_no_numbers_is_refused(tmp_path, small_set):
    result = call(COMMAND, tmp_path, "--data-dir", str(small_set), "--conv-channels", "32,x")
    assert result.returncode == 2 and "comma-separated integers" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("option", "found"), [("--optimizer", "sdg"), ("--batch-norm", "ALL")])
def test_train_unknown_choice_is_refused_with_all_valid_ones(tmp_path, small_set, option, found):
    result = call(COMMAND, tmp_path, "--data-dir", str(small_set), option, found)
    valid = ", ".join(f"'{choice}'" for choice in FIELDS[option[2:].replace("-", "_")].choices)
    assert result.returncode == 2 and f"'{found}' is not one of {valid}" in result.stderr
    assert "Traceback" not in result.stderr


def test_train_folder_of_two_data_sets_is_refused(tmp_path, small_set):
    write_idx(small_set / "test-images-idx3-ubyte", np.zeros((6, 4, 5), np.uint8))
    check_mistake(call(COMMAND, tmp_path, "--data-dir", str(small_set)), "could be the test images")
