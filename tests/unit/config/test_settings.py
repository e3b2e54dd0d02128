"""Settings: every limit is held, recipes are overridden, and a run is continued with what it was started with."""

import json
import math
from pathlib import Path

import pytest

from dist_mnist.config.choices import Device, Optimizer, Precision
from dist_mnist.config.fields import Duration, Ints, Names
from dist_mnist.config.recipes import RECIPES
from dist_mnist.config.resolve import from_json, resolve
from dist_mnist.config.settings import FIELDS, Config
from dist_mnist.utils.errors import UserError

LENGTH = {"epochs": None, "steps": 10}
CHOICES = [name for name, field in FIELDS.items() if field.choices]
NUMBERS = [name for name, field in FIELDS.items() if field.kind in (int, float, Ints)]
LIMITS = [
    (name, side)
    for name in NUMBERS
    for side, step in (("minimum", -1), ("maximum", 1))
    if math.isfinite(getattr(FIELDS[name], side))
]
CHANGEABLE = {
    "run_dir": Path("elsewhere"), "dataset": "kmnist", "data_dir": Path("data"), "workers": 3, "data_on_device": "no",
    "stage_data": True, "layout": "nchw",
    "device": "cpu", "cuda_graph": False, "threads": 2,
    "stall_timeout": 5.0, "save_errors": "stop", "validate_every": 7, "log_every": 9, "check_ranks_every": 7,
    "audit_spikes": True,
    "checkpoint_every_s": 1.0, "checkpoint_every": 3, "keep": 1, "tensorboard": False, "profile": True,
    "log_to": ("mlflow",), "patience": 2, "max_time": 1800.0,
}  # fmt: skip
FIXED = {
    "seed": 5, "epochs": 4.0, "validation_fraction": 0.2, "drop_last": True, "conv_channels": (8, 8), "conv_layers": 2,
    "strided_stages": 1,
    "kernel_size": 3, "padding": "valid", "dense_units": (), "dropout": 0.1, "batch_norm": "all", "pixels": "raw",
    "pool_first": True, "weight_init": "fan_in",
    "rotate": 90.0,
    "scale": 0.5, "shear": 5.0, "shift": 1.5, "batch_size": 64, "accumulate": 2, "optimizer": "adam", "lr": 0.02,
    "momentum": 0.5, "nesterov": False, "beta1": 0.5, "beta2": 0.9, "weight_decay": 0.1, "schedule": "cosine",
    "warmup_fraction": 0.1, "final_lr_fraction": 0.1, "label_smoothing": 0.1, "clip_norm": 1.0, "ema_decay": 0.9,
    "precision": "bf16", "all_reduce": "bf16", "channels_last": False, "invariant": False, "microbatches": 4,
    "non_finite": "skip", "crop": 4, "crop_fraction": 0.5, "flip": True, "views": 3,
    "adversarial": 0.1, "validation_split": "last", "validation_fold": "1/5", "test_fraction": 0.2, "model": "resnet",
    "init": Path("runs/other"), "freeze": "head.*", "erasing": 0.25, "mixup": 0.2, "cutmix": 1.0, "mixup_prob": 0.5,
}  # fmt: skip


def build(name: str, value) -> Config:
    return Config(**(LENGTH if name == "steps" else {}) | {name: value})


def as_value(name: str, number: float):
    """A number in the type of a setting."""
    kind = FIELDS[name].kind
    return (int(number),) if kind == Ints else kind(number)


@pytest.mark.parametrize(("name", "side"), LIMITS)
def test_config_number_beyond_its_limit_is_refused(name, side):
    limit, beyond = getattr(FIELDS[name], side), -1 if side == "minimum" else 1
    for step in (1, 0.001) if FIELDS[name].kind is float else (1,):
        with pytest.raises(UserError, match=rf"^{FIELDS[name].option} must be at least .*, got -?[\d.]+$"):
            build(name, as_value(name, limit + step * beyond))
    # Just inside, it is accepted.
    inside = limit - beyond * (0.001 if FIELDS[name].kind is float else 2)
    assert getattr(build(name, as_value(name, inside)), name) == as_value(name, inside)


@pytest.mark.parametrize("name", [name for name in NUMBERS if FIELDS[name].kind is float])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_config_number_that_is_not_finite_is_refused(name, value):
    with pytest.raises(UserError, match=f"^{FIELDS[name].option} .*got {value}"):
        build(name, value)


WRONG = {int: [1.5, "1", True, (1,)], float: ["1.0", True, (1.0,)], bool: [1, 0.0, "yes"], str: [1, None, True]} | {
    Path: [1, ("runs",)], Ints: [1, "1,2", (1.5,), (True,), ["1"], None], Names: [1, (1,), [None], None],
    Duration: ["1h30", "30 m", "m", "", "1d", "-5s", True, (1.0,), None],
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_config_value_of_another_type_is_refused(name):
    for value in WRONG[str if FIELDS[name].choices else FIELDS[name].kind]:
        if value is None and FIELDS[name].optional:
            continue  # not given
        with pytest.raises(UserError, match=f"^{FIELDS[name].option} expects "):
            build(name, value)


@pytest.mark.parametrize("name", CHOICES)
def test_config_choice_is_coerced_and_an_unknown_one_suggests_the_nearest(name):
    for value in FIELDS[name].choices:
        assert getattr(build(name, str(value)), name) is value
    with pytest.raises(UserError, match=f"unknown value of {FIELDS[name].option}: .*there are: "):
        build(name, "nonsense")
    with pytest.raises(UserError, match=f"did you mean '{FIELDS[name].choices[0]}'"):
        build(name, FIELDS[name].choices[0] + "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5}, "exactly one of them"),
        ({"epochs": None}, "exactly one of them"),
        ({"epochs": 0}, "--epochs must be positive, got 0"),
        ({"kernel_size": 4}, "--kernel-size must be odd.* got 4"),
        ({"views": 2}, "--views must be odd.* got 2"),
        ({"views": 3, "rotate": 0, "scale": 0, "shift": 0}, "--rotate, .* are all off"),
        ({"conv_channels": (), "dense_units": ()}, "cannot both be empty"),
        ({"invariant": True, "microbatches": 6}, "--microbatches must be a power of two, got 6"),
        ({"invariant": True, "accumulate": 2}, "omit --accumulate"),
        ({"data_dir": Path("d"), "dataset": "mnist"}, "give one of them"),
        ({"batch_size": 10, "accumulate": 6}, "--accumulate 6 leaves fewer than two of 10 images per microbatch"),
        ({"batch_size": 10, "invariant": True}, "--microbatches 8 leaves fewer than two of 10 images per microbatch"),
        ({"validation_fold": "0/5"}, "--validation-fold expects FOLD/FOLDS, such as 1/5 .*, got 0/5"),
        ({"validation_fold": "6/5"}, "got 6/5"),
        ({"validation_fold": "1/1"}, "got 1/1"),
        ({"validation_fold": "2"}, "got 2"),
        ({"log_to": "mlfow"}, "unknown tracker 'mlfow', did you mean 'mlflow'.* FILE.py:CLASS"),
        ({"log_to": ["mine.py:"]}, "unknown tracker 'mine.py:'.* FILE.py:CLASS"),
        ({"log_to": ["wandb", "wandb"]}, "--log-to names a tracker twice"),
        ({"recipe": "notebok"}, "unknown recipe 'notebok', did you mean 'notebook'"),
    ],
    ids=str,
)
def test_config_settings_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Config(**options)


def test_these_tests_cover_every_setting():
    assert CHANGEABLE.keys() | FIXED.keys() | {"recipe", "steps", "model_args"} == FIELDS.keys()


def test_resolve_recipe_gives_its_settings():
    assert resolve({}) == Config() == resolve({"recipe": "default"})
    notebook = resolve({"recipe": "notebook"})
    expected = {"steps": 20_000, "epochs": None, "batch_size": 100, "lr": 0.001, "momentum": 0.0, "optimizer": "sgd",
                "conv_channels": (32, 64), "kernel_size": 5, "dense_units": (1024,), "dropout": 0.4, "pixels": "raw",
                "batch_norm": "none", "validation_fraction": 0.3, "checkpoint_every_s": None, "keep": 5,
                "log_every": 100, "weight_decay": 0.0, "schedule": "constant", "rotate": 0.0, "scale": 0.0,
                "shear": 0.0, "shift": 0.0, "label_smoothing": 0.0, "clip_norm": 0.0, "ema_decay": 0.0}  # fmt: skip
    assert {name: getattr(notebook, name) for name in expected} == expected
    assert notebook.differences(resolve({"recipe": "notebook-bn"})) == [
        "recipe: notebook -> notebook-bn",
        "batch_norm: none -> dense",
    ]
    with pytest.raises(UserError, match="unknown recipe 'notbook', did you mean 'notebook'"):
        resolve({"recipe": "notbook"})


def test_resolve_given_settings_override_the_recipe():
    config = resolve({"recipe": "notebook", "lr": 0.5, "dropout": None})
    assert (config.lr, config.dropout, config.batch_size) == (0.5, 0.4, 100)
    assert [getattr(resolve({"recipe": "notebook", "epochs": 2.0}), n) for n in ("epochs", "steps")] == [2.0, None]
    assert [getattr(resolve({"steps": 7}), n) for n in ("epochs", "steps")] == [None, 7]
    with pytest.raises(UserError, match="exactly one"):
        resolve({"epochs": 1.0, "steps": 7})


STARTED = {"recipe": "notebook", "lr": 0.25, "run_dir": Path("runs/x"), "workers": 1, "precision": "fp32"}


@pytest.mark.parametrize("given", [{}, {"lr": 0.25}, STARTED, {"precision": "auto"}], ids=str)
def test_resolve_resumed_run_keeps_its_settings(given):
    started = resolve(STARTED)
    assert resolve(given, started) == started


@pytest.mark.parametrize("name", CHANGEABLE)
def test_resolve_changeable_setting_changes_on_resume(name):
    started = resolve(STARTED)
    config = resolve({name: CHANGEABLE[name]}, started)
    assert getattr(config, name) == CHANGEABLE[name] != getattr(started, name)
    assert config.digest("") == started.digest("") and started.differences(config) == []


@pytest.mark.parametrize("name", [*(name for name in FIXED if name != "invariant"), "steps"])
def test_resolve_fixed_setting_is_refused_on_resume(name):
    value, started = (FIXED | {"steps": 9})[name], Config(run_dir=Path("runs/x"), precision="fp32")
    shown = json.dumps(value) if isinstance(value, tuple) else str(value)
    with pytest.raises(UserError) as caught:
        resolve({name: value}, started)
    assert f"{name}: {started.to_json()[name]} -> {shown}" in str(caught.value)
    assert "runs/x" in str(caught.value) and "another --run-dir" in str(caught.value)
    changed = Config(**({"epochs": None} if name == "steps" else {}) | {"precision": "fp32"} | {name: value})
    assert changed.digest("") != started.digest("")


@pytest.mark.parametrize(
    "config",
    [Config(), Config(**FIXED | CHANGEABLE | {"dataset": None}), *(resolve({"recipe": recipe}) for recipe in RECIPES)],
)
def test_from_json_reads_what_to_json_wrote(config):
    text = json.dumps(config.to_json())
    assert from_json(json.loads(text), "config.json") == config
    assert from_json(json.loads(text), "config.json").digest("ab") == config.digest("ab") != config.digest("cd")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, "--lr must be"),
        ({"lrr": 1.0, "a": 1}, "unknown setting a, lrr: the file is from another version"),
        ({"seed": "0"}, "--seed expects"),
    ],
)
def test_from_json_unsound_setting_is_refused(values, message):
    with pytest.raises(UserError, match=f"^config.json: {message}"):
        from_json(Config().to_json() | values, "config.json")


def test_config_strings_and_lists_are_coerced_to_the_declared_types():
    config = Config(optimizer="adam", run_dir="runs/x", conv_channels=[8, 16], lr=1)
    assert config.optimizer is Optimizer.ADAM and config.run_dir == Path("runs/x")
    assert config.conv_channels == (8, 16) and type(config.lr) is float
    assert hash(config) == hash(Config(optimizer=Optimizer.ADAM, run_dir=Path("runs/x"), conv_channels=(8, 16), lr=1.0))


def test_to_json_holds_plain_values():
    values = Config(device=Device.CPU, run_dir=Path("runs/x")).to_json()
    assert {type(value) for value in values.values()} == {str, int, float, bool, list, type(None)}
    assert list(values) == list(FIELDS)


def test_resolve_unknown_setting_suggests_nearest():
    with pytest.raises(UserError, match="unknown setting 'batchsize', did you mean 'batch_size'"):
        resolve({"batchsize": 8})


def test_resolve_resumed_run_keeps_the_precision_that_auto_meant():
    started = resolve({"run_dir": "runs/x", "precision": "bf16"})
    assert resolve({"precision": "auto"}, started).precision is Precision.BF16


# What the names of run directories end with: runs that were begun by an earlier version are found again, if its recipe
# has the same settings.
DIGESTS = {"default": "ac60de23", "best": "8e4390f5", "notebook-adam": "abd88e10"}


@pytest.mark.parametrize("recipe", DIGESTS)
def test_digest_is_that_of_earlier_versions(recipe):
    assert resolve({"recipe": recipe}).digest("ab12") == DIGESTS[recipe]


def test_from_json_removed_setting_is_ignored_if_it_was_off():
    config = resolve({"recipe": "best"})
    assert from_json(config.to_json() | {"elastic": 0.0}, "config.json") == config


def test_from_json_removed_setting_that_was_on_is_refused():
    with pytest.raises(UserError, match=r"^config.json: elastic is 1.0, but this version no longer has --elastic"):
        from_json(Config().to_json() | {"elastic": 1.0}, "config.json")
