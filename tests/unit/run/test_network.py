"""Initial weights from a file: matched by name and shape, told in lines; what cannot be taken is a sentence."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import save_file
from torch import nn

from dist_mnist.config.settings import Config
from dist_mnist.model.build import build_model
from dist_mnist.model.classifier import Classifier
from dist_mnist.run.checkpoints.file import save_checkpoint
from dist_mnist.run.network import load_initial_weights
from dist_mnist.run.records import ValidationScore
from dist_mnist.utils.errors import UserError
from helpers import networks
from helpers.checkpoints import INFO

SHAPE, CLASSES = (1, 8, 8), 10
SMALL = {"conv_channels": (2,), "dense_units": (4,), "kernel_size": 3}


def cnn(seed: int = 0, classes: int = CLASSES, **settings) -> Classifier:
    return build_model(Config(seed=seed, **SMALL, **settings), SHAPE, classes, [30.0], [80.0])


def own(module: nn.Module, **settings) -> Classifier:
    return build_model(Config(model="mine.py:Net", **settings), SHAPE, CLASSES, [30.0], [80.0], module)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def checkpoint(path: Path, model: Classifier, average: Classifier | None = None, **info) -> Path:
    """A checkpoint of a model, and with an EMA of its weights if one is given."""
    parts = {"model": model} | ({"average": average} if average else {})
    arrays = {f"{part}/{name}": value.numpy() for part, of in parts.items() for name, value in of.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, arrays, replace(INFO, **info))
    return path


def load(model: Classifier, path: Path) -> tuple[str, list[str]]:
    """All lines, and what deserves a look."""
    told: list[str] = []
    init, lines = load_initial_weights(model, path, CLASSES, told.append)
    file = Path(init.path)
    assert init.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    return "\n".join(lines), told


def same(one: nn.Module, other: nn.Module, names: str = "") -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return all(tensor.equal(others[name]) for name, tensor in mine.items() if name.startswith(names))


def test_init_from_a_checkpoint_takes_all_but_the_pixel_statistics(tmp_path):
    there = build_model(Config(seed=1, **SMALL), SHAPE, CLASSES, [50.0], [100.0])
    here = cnn()
    lines, told = load(here, checkpoint(tmp_path / "c.safetensors", there))
    assert all(same(getattr(here, part), getattr(there, part)) for part in ("stages", "dense", "head"))
    assert (here.pixel_mean.item(), here.pixel_std.item()) == (30, 80)
    assert lines.splitlines() == [
        f"init      10 of 10 tensors (100.0% of the numbers) from {tmp_path}/c.safetensors",
        "          pixels normalised as (x - 30) / 80, by --pixels and this run's images; in the file as "
        "(x - 50) / 100",
    ]
    assert not told


def test_init_from_other_pixels_warns_and_from_the_same_says_nothing(tmp_path):
    raw = build_model(Config(seed=1, **SMALL), SHAPE, CLASSES)
    _, [told] = load(cnn(), checkpoint(tmp_path / "raw.safetensors", raw))
    assert "trained on pixels normalised as (x - 0) / 1, and now gets (x - 30) / 80: give the --pixels" in told
    lines, told = load(cnn(), checkpoint(tmp_path / "same.safetensors", cnn(1)))
    assert "pixels normalised" not in lines and not told


def test_init_of_other_classes_initialises_the_head_alone(tmp_path):
    here, there = cnn(), cnn(1, classes=47)
    head = weights(here.head)
    lines, _ = load(here, checkpoint(tmp_path / "c.safetensors", there))
    assert "head.weight: 47 classes in the file, 10 here: newly initialised" in lines
    assert "head.bias: 47 classes in the file, 10 here: newly initialised" in lines and "8 of 10 tensors" in lines
    assert same(here.stages, there.stages) and same(here.dense, there.dense)
    assert all(tensor.equal(head[name]) for name, tensor in here.head.state_dict().items())


def test_init_of_a_fresh_part_that_is_frozen_says_so(tmp_path):
    path = checkpoint(tmp_path / "c.safetensors", cnn(1, classes=47))
    lines, _ = load(cnn(freeze="head.bias"), path)
    assert "head.bias: 47 classes in the file, 10 here: newly initialised, and frozen" in lines
    assert "head.weight: 47 classes in the file, 10 here: newly initialised\n" in lines


def test_init_names_what_does_not_fit_and_counts_the_rest(tmp_path):
    here = own(networks.BatchNormDropout(SHAPE, CLASSES))
    state = weights(here.inner)
    state["dense.bias"] = torch.zeros(3)
    state["conv.weight"] = torch.zeros(8, 1, 3, 3, dtype=torch.int8)
    del state["head.bias"]
    save_file({**state, **{f"extra{i}": torch.zeros(1) for i in range(9)}}, tmp_path / "f.safetensors")
    lines, _ = load(here, tmp_path / "f.safetensors")
    assert "          conv.weight: int8 in the file, float32 here: newly initialised\n" in lines
    assert "          dense.bias: (3,) in the file, (16,) here: newly initialised\n" in lines
    assert "          head.bias: not in the file: newly initialised\n" in lines
    assert "          extra0: not in this network\n" in lines
    assert lines.endswith("\n          and 4 more")


def test_init_takes_the_ema_where_a_checkpoint_has_one(tmp_path):
    here, live, average = cnn(), cnn(1), cnn(2)
    load(here, checkpoint(tmp_path / "c.safetensors", live, average))
    assert same(here.head, average.head) and not same(here.head, live.head)


def test_init_from_a_run_directory_takes_its_best(tmp_path):
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.7)):
        score = ValidationScore(accuracy=accuracy)
        checkpoint(tmp_path / f"checkpoints/step-{step:08}.safetensors", cnn(step), step=step, validation=score)
    here = cnn()
    lines, _ = load(here, tmp_path)
    assert f"from {tmp_path}/checkpoints/step-00000020.safetensors" in lines
    assert same(here.head, cnn(20).head)


def test_init_from_a_damaged_best_takes_the_next_and_tells(tmp_path):
    for step in (10, 20):
        path = checkpoint(tmp_path / f"checkpoints/step-{step:08}.safetensors", cnn(step), step=step)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    here = cnn()
    _, [told] = load(here, tmp_path)
    assert "step-00000020" in told and "The next best checkpoint is used" in told
    assert same(here.head, cnn(10).head)


@pytest.mark.parametrize("wrapped", [True, False], ids=["into a module", "into the CNN"])
@pytest.mark.parametrize("change", ["{}", "module.{}"])
def test_init_by_names_with_and_without_module_before_them(tmp_path, change, wrapped):
    make = (lambda: own(networks.GroupNormed(SHAPE, CLASSES))) if wrapped else cnn
    here, there = make(), make()
    for number, parameter in enumerate(there.parameters()):
        nn.init.constant_(parameter, number + 1)
    named = {change.format(name): tensor.contiguous() for name, tensor in there.inner.state_dict().items()}
    save_file(named, tmp_path / "f.safetensors")
    lines, _ = load(here, tmp_path / "f.safetensors")
    assert same(here, there) and "(100.0% of the numbers)" in lines and "not in" not in lines


class Nested(nn.Module):
    """A module whose own parts have the names that a wrapper gives, and a buffer called like the wrapper's."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(64, CLASSES)
        self.weight = nn.Parameter(torch.rand(CLASSES, 64))
        self.register_buffer("pixel_mean", torch.rand(1, 1, 1))


def test_init_of_a_module_with_the_wrappers_names_takes_each_from_its_own(tmp_path):
    here, there = own(Nested()), own(Nested())
    load(here, checkpoint(tmp_path / "c.safetensors", there))
    assert same(here.inner, there.inner)


def test_init_of_tied_weights_by_one_of_their_names_is_whole(tmp_path):
    here, there = (own(networks.TiedWeights(SHAPE, CLASSES)) for _ in range(2))
    state = weights(there.inner)
    del state["encode.weight"]
    save_file(state, tmp_path / "f.safetensors")
    lines, _ = load(here, tmp_path / "f.safetensors")
    assert same(here.inner, there.inner) and here.inner.encode.weight is here.inner.again.weight
    assert "newly" not in lines


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_init_of_another_precision_is_converted(tmp_path, dtype):
    here, there = cnn(), cnn(1)
    rounded = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights(there).items()
    }
    save_file({name: tensor.contiguous() for name, tensor in rounded.items()}, tmp_path / "f.safetensors")
    load(here, tmp_path / "f.safetensors")
    assert here.head.weight.dtype == torch.float32
    assert here.head.weight.equal(there.head.weight.to(dtype).float())


def _integers_alone(path: Path) -> None:
    save_file({"head.weight": torch.zeros(10, 4, dtype=torch.int64)}, path)


def _other_shapes(path: Path) -> None:
    other = build_model(Config(conv_channels=(3,), dense_units=(5,), batch_norm="none"), SHAPE, 11)
    checkpoint(path, other)


def _damaged(path: Path) -> None:
    checkpoint(path, cnn())
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def _cut_off(path: Path) -> None:
    checkpoint(path, cnn())
    path.write_bytes(path.read_bytes()[:-5])


def _of_another_version(path: Path) -> None:
    save_file(weights(cnn()), path, {"format": "dist_mnist/9"})


def _not_finite(path: Path) -> None:
    state = weights(own(networks.OneParameter(CLASSES)).inner)
    save_file({**weights(cnn()), "head.weight": torch.full((10, 4), torch.nan)} | state, path)


def _too_large(path: Path) -> None:
    save_file({"head.weight": torch.full((10, 4), 1e300, dtype=torch.float64)}, path)


def _escape(path: Path) -> None:
    save_file({"\x1b[31mred": torch.zeros(1)}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_other_shapes, r"fits the network: the file has .* head.weight \[11, 5\], .* head.weight \[10, 4\]"),
        (_integers_alone, r"fits the network: the file has head.weight \[10, 4\], the network has dense"),
        (_escape, "none of its tensors fits the network: (?!.*\x1b)"),
        (_damaged, "is damaged or not a checkpoint: its content does not match its SHA-256"),
        (_cut_off, "neither a checkpoint nor a safetensors file"),
        (_of_another_version, "was written by another version"),
        (_not_finite, "its head.weight has numbers that are not finite"),
        (_too_large, "its head.weight has numbers that are not finite"),
        (lambda path: torch.save(weights(cnn()), path), "neither a checkpoint .* convert them"),
        (os.mkfifo, r"neither a checkpoint nor a safetensors file \(not a regular file\)"),
        (lambda path: path.write_bytes(b""), "neither a checkpoint nor a safetensors file"),
        (lambda path: path.mkdir(), "there is no valid checkpoint in its folder checkpoints/"),
        (lambda path: None, "neither a checkpoint nor a safetensors file"),
    ],
)  # fmt: skip
def test_init_that_cannot_be_taken_is_a_sentence(tmp_path, write, message):
    write(tmp_path / "f")
    with pytest.raises(UserError, match=message):
        load(cnn(), tmp_path / "f")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("head.weigth", "--freeze head.weigth matches no parameter; the names are stages.0.0.weight, stages"),
        ("head.*,nothing", "--freeze nothing matches no parameter"),
        ("*", r"--freeze \* leaves no parameter to train"),
    ],
)
def test_freeze_of_nothing_or_of_all_is_a_sentence(patterns, message):
    with pytest.raises(UserError, match=message):
        cnn(freeze=patterns)


@pytest.mark.parametrize(
    ("patterns", "frozen", "statistics"),
    [
        ("", [], 0),
        ("stages.*", ["stages.0.0.weight", "stages.0.0.bias"], 0),
        ("dense.*, head.bias", ["dense.0.0.weight", "dense.0.1.weight", "dense.0.1.bias", "head.bias"], 1),
        ("*.running_mean", [], 1),
        ("dense.0.1.weight", ["dense.0.1.weight"], 0),
    ],
)
def test_freeze_keeps_parameters_and_statistics_beside_them(patterns, frozen, statistics):
    model = cnn(freeze=patterns)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == frozen
    model.eval()
    model.train()
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d)]
    assert [layer.training for layer in norms] == [not statistics]


def test_freeze_of_either_name_of_tied_weights_freezes_both():
    for name in ("encode.weight", "again.weight"):
        module = networks.TiedWeights(SHAPE, CLASSES)
        own(module, freeze=name)
        assert not module.encode.weight.requires_grad and module.head.weight.requires_grad
