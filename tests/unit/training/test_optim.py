"""Optimizer, schedules and averaged weights: against formulas, and a restored optimizer against one that went on."""

import math

import pytest
import torch
from torch import nn

from dist_mnist.config.settings import Config
from dist_mnist.model.build import build_model
from dist_mnist.training.optim import EmaWeights, learning_rate, make_optimizer, move_together, optimizer_state
from dist_mnist.utils.errors import UserError

SMALL: dict = {"dropout": 0.0, "conv_channels": (2, 3), "dense_units": (4,), "kernel_size": 3}
LR = torch.tensor(0.01)
SCHEDULES = ["constant", "cosine", "one-cycle"]


def rates(total: int = 100, **options) -> list[float]:
    config = Config(lr=0.5, **{"warmup_fraction": 0.2, **options})
    return [learning_rate(config, step, total) for step in range(total + 1)]


def network(seed: int = 0) -> nn.Module:
    return build_model(Config(**SMALL, seed=seed), (1, 8, 8), 3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(6) % 3).backward()
        optimizer.step()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0, 0.2, 1])
@pytest.mark.parametrize("final", [0, 0.1])
def test_learning_rate_rises_then_falls_and_is_never_negative(schedule, total, warmup, final):
    found = rates(total, schedule=schedule, warmup_fraction=warmup, final_lr_fraction=final)
    assert all(0 <= rate <= 0.5 for rate in found) and all(rate > 0 for rate in found[:total])
    peak = round(warmup * total)
    assert found[:peak] == sorted(found[:peak]) and found[peak:] == sorted(found[peak:], reverse=True)
    if peak < total:
        assert found[peak] == pytest.approx(0.5)
        assert found[total] == pytest.approx(0.5 if schedule == "constant" else 0.5 * final)


def test_learning_rate_in_warm_up_rises_linearly_to_the_peak():
    found = rates(schedule="constant")
    assert found[:21] == pytest.approx([0.5 * (step + 1) / 21 for step in range(21)])
    assert found[21:] == [0.5] * 80


def test_learning_rate_after_warm_up_follows_cosine_or_line():
    for step in range(20, 101):
        progress = (step - 20) / 80
        line = 0.5 * (0.1 + 0.9 * (1 - progress))
        cosine = 0.5 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
        assert rates(schedule="one-cycle", final_lr_fraction=0.1)[step] == pytest.approx(line)
        assert rates(schedule="cosine", final_lr_fraction=0.1)[step] == pytest.approx(cosine)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_weight_decay_spares_biases_and_normalisation(name):
    model = network()
    optimizer = make_optimizer(model, Config(optimizer=name, weight_decay=0.3), LR)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for parameter in model.parameters():
        assert decay[id(parameter)] == (0.3 if parameter.dim() > 1 else 0)


@pytest.mark.parametrize(
    ("options", "kind", "facts"),
    [
        ({"optimizer": "sgd", "momentum": 0.8}, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ({"optimizer": "sgd", "momentum": 0.0}, torch.optim.SGD, {"momentum": 0, "nesterov": False}),
        ({"optimizer": "adam", "beta1": 0.8, "beta2": 0.9}, torch.optim.Adam, {"betas": (0.8, 0.9)}),
        ({"optimizer": "adamw", "beta1": 0.0, "beta2": 0.9}, torch.optim.AdamW, {"betas": (0, 0.9)}),
    ],
)
def test_make_optimizer_gives_the_one_that_was_asked_for(options, kind, facts):
    optimizer = make_optimizer(network(), Config(**options), LR)
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert group["lr"] is LR and {name: group[name] for name in facts} == facts


@pytest.mark.parametrize("options", [{"beta1": 1.0}, {"beta2": 1.0}], ids=str)
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_config_with_decays_that_adam_cannot_take_is_refused(name, options):
    with pytest.raises(UserError, match="|".join(options).replace("_", "-")):
        Config(optimizer=name, **options)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.0, "nesterov": False}, {"optimizer": "adam"}, {"optimizer": "adamw"}],
    ids=["sgd", "plain sgd", "adam", "adamw"],
)
def test_optimizer_state_restored_gives_the_same_steps(options, channels_last):
    config = Config(**SMALL, channels_last=channels_last, **options)
    one = build_model(config, (1, 8, 8), 3)
    first = make_optimizer(one, config, LR)
    train(one, first, range(3))
    saved = {name: tensor.clone().contiguous() for name, tensor in optimizer_state(first, one).items()}
    other = build_model(config, (1, 8, 8), 3)
    other.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    second = make_optimizer(other, config, LR)
    for name, tensor in optimizer_state(second, other).items():
        tensor.copy_(saved[name])
    before = other.state_dict()["head.weight"].clone()
    train(one, first, range(3, 6))
    train(other, second, range(3, 6))
    for name, tensor in one.state_dict().items():
        assert tensor.equal(other.state_dict()[name]), name
    assert not other.head.weight.equal(before)
    expected = {"sgd": 1 if config.momentum else 0, "adam": 3, "adamw": 3}[config.optimizer]
    assert len(saved) == expected * len(list(one.parameters()))


def test_ema_follows_the_weights_as_tensorflows_does():
    model = network()
    averaged = EmaWeights(model, 0.6)
    floats = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    expected = {name: model.state_dict()[name].clone().double() for name in floats}
    optimizer = make_optimizer(model, Config(), torch.tensor(0.1))
    for step in range(20):  # 0.6 is reached at step 12
        train(model, optimizer, range(step, step + 1))
        averaged.update(torch.tensor(averaged.weight(step)))
        decay = min(0.6, (1 + step) / (10 + step))
        for name in floats:
            expected[name] = decay * expected[name] + (1 - decay) * model.state_dict()[name]
    assert set(averaged.tensors) == set(floats)
    for name in floats:
        torch.testing.assert_close(averaged.tensors[name].double(), expected[name], atol=1e-6, rtol=1e-5)
    assert not averaged.tensors["head.weight"].allclose(model.head.weight)


@pytest.mark.parametrize("weight", [0.9, 0.001])
def test_averages_that_move_together_go_as_far_as_each_by_itself(weight):
    averages, live = ([torch.randn(n, 3) for n in (1, 7, 50)] for _ in range(2))
    expected = [average.lerp(current, weight) for average, current in zip(averages, live, strict=True)]
    move_together(averages, live, torch.tensor(weight))
    torch.testing.assert_close(averages, expected)


def test_ema_without_decay_keeps_nothing():
    averaged = EmaWeights(network(), 0.0)
    averaged.update(torch.tensor(0.5))
    assert averaged.tensors == {}
