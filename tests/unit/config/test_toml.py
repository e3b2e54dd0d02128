"""Settings from files: what wins over what, mistakes in a sentence, and what `--print-config` prints."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_mnist.config.overrides import Overrides
from dist_mnist.config.recipes import RECIPES
from dist_mnist.config.resolve import resolve
from dist_mnist.config.settings import FIELDS, Config
from dist_mnist.config.toml import read_settings, to_toml
from dist_mnist.utils.errors import UserError
from helpers import HANGS_AFTER_S


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "my settings.toml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("recipe", RECIPES)
def test_to_toml_can_be_read_back(recipe, file):
    given = {"recipe": recipe, "conv_channels": (8, 16), "run_dir": Path("runs/ü x")}
    config = resolve(given)
    assert resolve(read_settings(file(to_toml(config, given)))) == config


@pytest.mark.parametrize("ends", [b"\r\n", b"\n"])
@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""])
def test_read_settings_as_written_on_windows_gives_the_same(tmp_path, mark, ends):
    path = tmp_path / "settings.toml"
    path.write_bytes(mark + ends.join([b"# settings", b"lr = 0.05", b'run_dir = "a"', b""]))
    assert read_settings(path) == {"lr": 0.05, "run_dir": Path("a")}


def test_read_settings_gives_declared_types(file):
    text = 'batch-size = 64\nlr = 1\nconv_channels = [8]\ndense_units = []\ntensorboard = false\nrun-dir = "a b"\n'
    assert read_settings(file(text)) == {
        "batch_size": 64, "lr": 1.0, "conv_channels": (8,), "dense_units": (), "tensorboard": False,
        "run_dir": Path("a b"),
    }  # fmt: skip


@pytest.mark.parametrize(("from_file", "options", "expected"), [
    ({"lr": 0.1, "seed": 3}, {"lr": 0.2}, {"lr": 0.2, "seed": 3}),
    ({"epochs": 4.0}, {"steps": 5}, {"steps": 5}),
    ({"steps": 4}, {"epochs": 5.0}, {"epochs": 5.0}),
    ({"dataset": "kmnist"}, {"data_dir": Path("x")}, {"data_dir": Path("x")}),
    ({"epochs": 4.0}, {}, {"epochs": 4.0}),
])  # fmt: skip
def test_overrides_win_over_a_file_and_what_they_rule_out(from_file, options, expected):
    assert Overrides(options).over(from_file) == expected


def test_resolve_file_wins_over_the_recipe_that_it_names(file):
    config = resolve(read_settings(file('recipe = "notebook"\nlr = 0.5\nepochs = 2\n')))
    assert (config.lr, config.momentum, config.epochs, config.steps) == (0.5, 0.0, 2.0, None)


@pytest.mark.parametrize(("text", "sentence"), [
    ("lr = ", "the file is not valid TOML (Invalid value"),
    ("learning_rate = 0.1", "unknown setting 'learning_rate' (--print-config shows all)"),
    ("batchsize = 8", "unknown setting 'batchsize', did you mean 'batch_size'? (--print-config shows all)"),
    ('[model]\ndropout = 0.1', "[model] is a table; write settings as top-level keys"),
    ("lr = -1.0", "--lr must be at least 0, got -1.0"),
    ('lr = "fast"', "--lr expects a finite number, got fast"),
    ("lr = nan", "--lr expects a finite number, got nan"),
    ("batch_size = 8.5", "--batch-size expects an integer, got 8.5"),
    ("tensorboard = 1", "--tensorboard expects true or false, got 1"),
    ('conv_channels = "8,16"', "--conv-channels expects a list of integers, got 8,16"),
    ('conv_channels = [8, "x"]', "--conv-channels expects a list of integers"),
    ('batch_norm = "al"', "unknown value of --batch-norm: 'al', did you mean 'all'?"),
    ("run_dir = 3", "--run-dir expects a path, got 3"),
    ("elastic = 0.5", "elastic is 0.5, but this version no longer has --elastic"),
    ("seed = 2020-01-01", "--seed expects an integer, got 2020-01-01"),
])  # fmt: skip
def test_read_settings_mistake_is_a_sentence(file, text, sentence):
    path = file(text)
    with pytest.raises(UserError) as caught:
        read_settings(path)
    assert str(caught.value).startswith(f"--config {path}: {sentence}")


def test_read_settings_removed_setting_is_ignored_if_it_was_off(file):
    assert read_settings(file("elastic = 0.0\nlr = 0.5\n")) == {"lr": 0.5}


@pytest.mark.parametrize("content", [None, b"lr = 0.1 # \xff", b"\0\0\0"], ids=["missing", "not UTF-8", "binary"])
def test_read_settings_unreadable_file_is_a_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=r"file: (cannot be read \(No such file|the file is not valid TOML \()"):
        read_settings(tmp_path / "file")


def dist_mnist(*words: object, module: bool = False) -> subprocess.CompletedProcess[str]:
    command = ["-m", "dist_mnist.train"] if module else ["-m", "dist_mnist", "train"]
    return subprocess.run(
        [sys.executable, *command, *map(str, words)], capture_output=True, text=True, timeout=HANGS_AFTER_S
    )


@pytest.mark.parametrize("module", [False, True], ids=["dist-mnist train", "python -m dist_mnist.train"])
def test_train_option_wins_over_file_and_recipe(file, module):
    path = file('recipe = "notebook"\nlr = 0.5\nsteps = 7\nseed = 1\n')
    done = dist_mnist("--config", path, "--seed=2", "--epochs=3", "--print-config", module=module)
    assert done.returncode == 0 and not done.stderr, done.stderr
    found = tomllib.loads(done.stdout)
    assert (found["recipe"], found["lr"], found["seed"], found["epochs"]) == ("notebook", 0.5, 2, 3.0)
    assert found["momentum"] == 0.0 and "steps" not in found and "run_dir" not in found


def test_train_uses_and_resumes_with_the_settings_of_a_file(digits, tmp_path, file):
    text = f'data_dir = "{digits}"\nconv_channels = [2]\ndense_units = [4]\nbatch_size = 50\nsteps = 2\n'
    done = dist_mnist("--config", file(text + "tensorboard = false\n"), f"--run-dir={tmp_path / 'run'}", "--threads=1")
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "run/config.json").read_text())["settings"]
    assert (settings["conv_channels"], settings["steps"], settings["batch_size"]) == ([2], 2, 50)
    printed = dist_mnist(f"--run-dir={tmp_path / 'run'}", "--print-config")  # what that run was started with
    assert tomllib.loads(printed.stdout)["batch_size"] == 50
    wrong = dist_mnist("--config", file("lr = -1"))
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: --config ") and len(wrong.stderr.splitlines()) == 1


def test_recipes_command_lists_all_with_their_differences():
    command = [sys.executable, "-m", "dist_mnist", "recipes"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=HANGS_AFTER_S, check=True)
    found = {one["recipe"]: one for one in json.loads(done.stdout)}
    assert list(found) == list(RECIPES) and all(one["about"] for one in found.values())
    for name, one in found.items():
        assert resolve({"recipe": name}) == Config(recipe=name, **{
            key: tuple(value) if isinstance(value, list) else value for key, value in one["differences"].items()
        })  # fmt: skip
        assert set(one["differences"]) <= set(FIELDS)
    table = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S, check=True).stdout
    assert all(name in table for name in RECIPES) and "label-smoothing 0.1" in table


@pytest.mark.parametrize(("text", "expected"), [
    ('run_dir = "~/runs/a"', {"run_dir": Path("/home/me/runs/a")}),
    ('data_dir = "~"', {"data_dir": Path("/home/me")}),
    ('init = "~root/x"', {"init": Path("/root/x")}),
    ('model = "~/nets/mine.py:Net"', {"model": "/home/me/nets/mine.py:Net"}),
    ('run_dir = "a~/b"', {"run_dir": Path("a~/b")}),
    ('run_dir = "./~"', {"run_dir": Path("~")}),
    ('model_args = "~"', {"model_args": "~"}),
])  # fmt: skip
def test_read_settings_home_folders_are_as_in_a_shell(file, text, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("pwd.getpwnam", {"root": SimpleNamespace(pw_dir="/root")}.__getitem__)
    assert read_settings(file(text)) == expected


def test_read_settings_home_of_nobody_is_a_sentence(file):
    path = file('data_dir = "~no-such-user/data"')
    with pytest.raises(UserError) as raised:
        read_settings(path)
    assert str(raised.value) == (
        f"--config {path}: data_dir = '~no-such-user/data': there is no user 'no-such-user' on this machine; write "
        "the path in full"
    )


def test_to_toml_path_that_is_not_utf8_can_be_read_back(file):
    given = {"run_dir": Path(os.fsdecode(b"runs/caf\xe9 x")), "data_dir": Path("file:x")}
    text = to_toml(resolve(given), given)
    assert 'run_dir = "file:runs/caf%E9%20x"' in text and resolve(read_settings(file(text))) == resolve(given)
