"""Overrides: what a user gave, checked once, and as command-line options again."""

from pathlib import Path

import pytest

from dist_mnist.config.choices import Optimizer
from dist_mnist.config.overrides import Overrides, as_options
from dist_mnist.utils.errors import UserError

GIVEN = {"optimizer": "adam", "lr": 1, "run_dir": "runs/x", "conv_channels": [8, 16], "steps": None, "flip": False}


def test_overrides_hold_declared_types_and_nothing_that_was_not_given():
    overrides = Overrides(GIVEN)
    assert dict(overrides) == {
        "optimizer": Optimizer.ADAM, "lr": 1.0, "run_dir": Path("runs/x"), "conv_channels": (8, 16), "flip": False
    }  # fmt: skip
    assert overrides["optimizer"] is Optimizer.ADAM and type(overrides["lr"]) is float
    assert overrides.run_dir == overrides.get("run_dir") == Path("runs/x") and overrides.get("seed") is None
    assert Overrides().run_dir is None and Overrides(overrides) == overrides


def test_overrides_cannot_be_changed():
    overrides = Overrides(GIVEN)
    with pytest.raises(TypeError):
        overrides["lr"] = 2.0  # type: ignore[index]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batchsize": 8}, "unknown setting 'batchsize', did you mean 'batch_size'"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"device": "gpu"}, "unknown value of --device: 'gpu', did you mean 'cpu'. .there are: auto, cuda, cpu"),
    ],
    ids=str,
)
def test_overrides_unsound_value_is_refused(values, message):
    with pytest.raises(UserError, match=f"^{message}"):
        Overrides(values)


def test_as_options_writes_what_the_command_line_takes():
    assert as_options(Overrides(GIVEN | {"nesterov": True, "dense_units": ()})) == [
        "--optimizer=adam", "--lr=1.0", "--run-dir=runs/x", "--conv-channels=8,16", "--no-flip", "--nesterov",
        "--dense-units=",
    ]  # fmt: skip


@pytest.mark.parametrize("seconds", [1e-6, 0.1, 90.0, 5400.25, 1e22])
def test_as_options_writes_durations_that_are_read_again(seconds):
    [word] = as_options(Overrides({"max_time": seconds}))
    assert Overrides({"max_time": word.removeprefix("--max-time=")}) == {"max_time": seconds}
