"""Spikes: what is usual is not told, and what is far beyond it is; a step taken again shows whether it was a fault."""

import numpy as np
import pytest
import torch

from dist_mnist.config.settings import Config
from dist_mnist.data.loader import Batch
from dist_mnist.data.sampler import GlobalOrder
from dist_mnist.model.build import build_model
from dist_mnist.training.spikes.watch import FEWEST, KEPT, TOLD, RecentSteps, SpikeWatch
from dist_mnist.training.trainer import Trainer

SIZE, LOSS, NORM = 8, 0.5, 2.0
ORDER = GlobalOrder(num_samples=5 * SIZE - 3, global_batch_size=SIZE, seed=1)  # each fifth batch is shorter


def usual(steps: int, seed: int = 0) -> np.ndarray:
    """Loss and gradient norm of each step, (steps, 2), spread as widely as at the end of a run."""
    return np.array([LOSS, NORM]) * np.exp(np.random.default_rng(seed).normal(0, 0.7, (steps, 2)))


def values(step: int, loss: float = LOSS, norm: float = NORM) -> torch.Tensor:
    """What `Trainer.step` gives."""
    size = ORDER.batch_size(step)
    return torch.tensor([loss * size, 3, size, norm], dtype=torch.float64)


@pytest.fixture
def watch(alone) -> SpikeWatch:
    """One that has seen so many usual steps that it judges."""
    found = SpikeWatch(ORDER, alone, step=10)
    for step in range(10, 10 + 2 * FEWEST):
        found.add(values(step))
    assert found.look() == 0
    return found


@pytest.mark.parametrize("loss", [1e4, 0.0])
def test_recent_steps_find_the_step_that_is_far_beyond(loss):
    found, steps = RecentSteps(), usual(1000)
    steps[700] = (loss, 1e5)
    assert found.spikes(steps[:690]).tolist() == []
    assert found.spikes(steps[690:]).tolist() == [10]


@pytest.mark.parametrize("looks", [1, 7, 100, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_recent_steps_of_usual_values_have_no_spike_however_often_one_looks(looks, seed):
    found, steps = RecentSteps(), usual(3000, seed) * np.geomspace(100, 1, 3000)[:, None]
    assert [one for part in np.array_split(steps, looks) for one in found.spikes(part)] == []


def test_recent_steps_that_hardly_change_are_no_reason_to_warn_of_a_small_change():
    found = RecentSteps()
    found.spikes(np.full((200, 2), 1.0))
    assert found.spikes(np.array([[1.5, 1.5], [100, 1], [1, 100]])).tolist() == [1, 2]


def test_recent_steps_that_are_not_finite_are_none_and_do_not_count():
    found, steps = RecentSteps(), usual(300)
    steps[::2] = np.nan, np.inf
    assert found.spikes(steps).tolist() == []
    assert found.spikes(np.array([[np.inf, np.nan], [1e6, 1.0]])).tolist() == [1]


def test_watch_tells_of_a_spike_with_its_values_and_the_ids_of_its_samples(watch, capsys):
    first = 10 + 2 * FEWEST
    for step in range(first, first + 5):
        watch.add(values(step, loss=1e4 if step == first + 1 else LOSS))
    assert watch.look() == 1
    warning = capsys.readouterr().err
    ids = ", ".join(map(str, ORDER.ids(range(first + 1, first + 2))[0]))
    assert f"warning: step {first + 1} is a spike: loss 1e+04, usually 0.5; gradient norm 2, usually 2" in warning
    assert f"training split: {ids}\n" in warning


def test_watch_does_not_judge_an_epochs_last_shorter_batch(watch):
    steps = range(10 + 2 * FEWEST, 20 + 2 * FEWEST)
    for step in steps:
        watch.add(values(step, loss=1e4 if ORDER.batch_size(step) < SIZE else LOSS))
    assert sum(ORDER.batch_size(step) < SIZE for step in steps) == 2
    assert watch.look() == 0


def test_watch_that_nobody_asks_looks_when_it_is_full_and_tells_of_a_few_only(watch, capsys):
    first = 10 + 2 * FEWEST
    for step in range(first, first + KEPT):
        watch.add(values(step, norm=1e9 if step % 100 == 1 else NORM))
    told = capsys.readouterr().err
    assert told.count("is a spike") == TOLD and told.count("further spikes are only counted") == 1
    assert watch.look() == sum(
        step % 100 == 1 and ORDER.batch_size(step) == SIZE for step in range(first, first + KEPT)
    )


def batch(step: int) -> Batch:
    images = torch.rand(SIZE, 1, 8, 8, generator=torch.Generator().manual_seed(step))
    return Batch(images * (1e6 if step == 2 * FEWEST else 1), torch.arange(SIZE) % 3, torch.arange(SIZE))


@pytest.mark.parametrize(("wrong", "said"), [(0, "with the same bits"), (1, "with OTHER BITS on rank 0 on ")])
def test_audit_takes_a_spike_again_and_says_whether_it_computes_the_same(alone, capsys, wrong, said):
    """A step is a spike by its images, or by a gradient that is wrong the first time and right the second."""
    common = {"conv_channels": (2,), "dense_units": (4,), "precision": "fp32", "batch_size": SIZE, "pixels": "raw",
              "batch_norm": "none", "clip_norm": 1.0, "lr": 0.01, "ema_decay": 0.9}  # fmt: skip
    trainers = []
    for audit in (True, False):
        config = Config(**common, audit_spikes=audit)
        trainers.append(Trainer(config, alone, build_model(config, (1, 8, 8), 3), total_steps=200))
    audited, plain = trainers
    compute, spike, taken = audited.gradient, 2 * FEWEST, []

    def disturbed(part, forward, size):
        gradient = compute(part, forward, size)
        taken.append(step)
        if wrong and taken.count(spike) == 1:
            gradient.gradients[0].mul_(1e9)
        return gradient

    audited.gradient = disturbed
    for step in range(spike + 3):
        images = batch(0 if wrong else step)
        audited.step(images, step, 0, SIZE)
        plain.step(images, step, 0, SIZE)
    told = capsys.readouterr().err
    assert taken.count(spike) == 2 and len(taken) == spike + 4
    assert told.count("warning: ") == 1 and f"warning: step {spike}, a spike (loss " in told and said in told, told
    mine, expected = audited.state_arrays(), plain.state_arrays()
    assert all(np.array_equal(mine[name], expected[name]) for name in expected), "as if nothing had been"
