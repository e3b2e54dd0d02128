"""A step whose gradient is not finite changes nothing; see test_group.py for what steps do otherwise."""

import json
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

from dist_mnist.config.settings import Config
from dist_mnist.data.loader import Batch
from dist_mnist.data.sampler import GlobalOrder
from dist_mnist.distributed.device import resolve_precision
from dist_mnist.model.build import build_model
from dist_mnist.training.metrics import Meter
from dist_mnist.training.trainer import TOO_MANY_SKIPPED, Trainer
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.files import to_json
from helpers import HANGS_AFTER_S

SHAPE, NUM_CLASSES, SIZE = (1, 8, 8), 3, 6


def batch(step: int, broken: bool) -> Batch:
    images = torch.rand(SIZE, *SHAPE, generator=torch.Generator().manual_seed(step))
    images[2, 0, 3, 3] = float("nan") if broken else images[2, 0, 3, 3]
    return Batch(images, torch.arange(SIZE) % NUM_CLASSES, torch.arange(SIZE))


@pytest.fixture
def trainer(alone):
    def make(**settings) -> Trainer:
        small = {"conv_channels": (2,), "dense_units": (4,), "precision": "fp32", "batch_size": SIZE, "rotate": 0.0}
        config = Config(**small | {"scale": 0.0, "shift": 0.0, "non_finite": "skip"} | settings)
        return Trainer(config, alone, build_model(config, SHAPE, NUM_CLASSES), total_steps=100)

    return make


def numbers(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: array for name, array in trainer.state_arrays().items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.0}, {"optimizer": "adam"}, {"optimizer": "adamw"},
                                      {"invariant": True, "microbatches": 2}, {"clip_norm": 0.1}, {"ema_decay": 0.9}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("when", [0, 2])
def test_step_with_a_gradient_that_is_not_finite_changes_nothing(trainer, settings, when):
    disturbed, undisturbed = trainer(**settings), trainer(**settings)
    for step in range(4):
        if step == when:
            before = numbers(disturbed)
            disturbed.step(batch(step, broken=True), step, 0, SIZE)
            after = numbers(disturbed)
            assert all(np.array_equal(after[name], before[name]) for name in before)
        for one in (disturbed, undisturbed):
            one.step(batch(step, broken=False), step, 0, SIZE)
    disturbed.check_finite(4)
    assert disturbed.skipped_steps == 1
    mine, expected = numbers(disturbed), numbers(undisturbed)
    assert mine.keys() == expected.keys() and all(np.array_equal(mine[name], expected[name]) for name in expected)


def test_check_finite_after_too_many_skipped_steps_ends_the_run(trainer):
    one = trainer()
    for step in range(TOO_MANY_SKIPPED - 1):
        one.step(batch(step, broken=True), step, 0, SIZE)
    one.check_finite(step + 1)
    one.step(batch(step, broken=True), step + 1, 0, SIZE)
    with pytest.raises(UserError, match=f"{TOO_MANY_SKIPPED} gradients in a row were not finite by step 21"):
        one.check_finite(21)


def test_meter_resumed_from_sums_that_are_not_finite_keeps_them(trainer, alone):
    one, order = trainer(), GlobalOrder(num_samples=SIZE, global_batch_size=SIZE)
    meter = Meter(order, alone, one.collective_timer)
    meter.add(one.step(batch(0, broken=True), 0, 0, SIZE))
    saved = json.loads(to_json(meter.reduced()))
    assert saved == [None, 2.0, SIZE]
    again = Meter(order, alone, one.collective_timer, sums=saved)
    assert json.loads(to_json(again.reduced())) == saved


@pytest.mark.parametrize("other", [{"momentum": 0.0}, {"optimizer": "adam"}, {"ema_decay": 0.9}, {"dense_units": (5,)}],
                         ids=str)  # fmt: skip
def test_load_state_of_another_run_is_refused(trainer, other):
    one, another = trainer(), trainer(**other)
    before = one.state_arrays()
    with pytest.raises(UserError, match=r"does not match its network and optimizer: .* should be .* but is "):
        one.load_state({name: torch.from_numpy(array) for name, array in another.state_arrays().items()})
    assert all(np.array_equal(array, before[name]) for name, array in one.state_arrays().items())


def test_gradient_norm_with_clipping_is_that_before_it(trainer):
    clipped, free = trainer(clip_norm=0.01), trainer()
    for one in (clipped, free):
        one.step(batch(0, broken=False), 0, 0, SIZE)
    assert float(clipped.gradient_norm) == float(free.gradient_norm) > 0.01


def test_crop_in_early_steps_trains_on_the_centre_only(trainer):
    settings = {"crop": 2, "crop_fraction": 0.03, "batch_norm": "all"}  # of 100 steps the first 3
    one, other = trainer(**settings), trainer(**settings)
    for step in range(5):
        images = batch(step, broken=False)
        framed = images.images.clone()
        for edge in (framed[..., :2], framed[..., -2:], framed[..., :2, :], framed[..., -2:, :]):
            edge.fill_(9.0)
        one.step(images, step, 0, SIZE)
        other.step(images._replace(images=framed), step, 0, SIZE)
        mine, others = numbers(one), numbers(other)
        same = all(np.array_equal(mine[name], others[name]) for name in mine if not name.endswith("running_mean"))
        assert same == (step < 3), step


def test_adversarial_training_with_larger_distance_has_larger_loss(trainer):
    """The first step's loss, of the same weights, grows with the distance; each image is moved its own part of it."""
    losses = []
    for adversarial in (0.0, 0.05, 0.1):
        one = trainer(adversarial=adversarial)
        one.step(batch(0, broken=False), 0, 0, SIZE)
        losses.append(float(one.totals[0]))
    assert losses == sorted(set(losses))


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}], ids=str)
def test_step_on_mixtures_of_images_with_themselves_is_one_without(trainer, settings):
    """With others it is not."""
    alone, images = trainer(), batch(0, broken=False)
    alone.step(images, 0, 0, SIZE)
    totals = []
    for partners in (images, batch(1, broken=False)._replace(labels=images.labels.flip(0))):
        mixed = trainer(**settings)
        both = (torch.cat([of, of_partners]) for of, of_partners in zip(images[:2], partners[:2], strict=True))
        mixed.step(Batch(*both, images.ids), 0, 0, SIZE)
        totals.append(mixed.totals.clone())
    torch.testing.assert_close(totals[0], alone.totals, rtol=1e-5, atol=0)
    assert abs(float(totals[1][0] - alone.totals[0])) > 1e-3


@pytest.mark.parametrize(
    ("processor", "precision"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, "bf16"),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, "fp32"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, "fp32"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bf16"),
        ({"architecture": "aarch64"}, "fp32"),
    ],
)
def test_resolve_precision_auto_is_bf16_where_that_is_faster(monkeypatch, processor, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert resolve_precision("auto", "cpu") == precision
    assert resolve_precision("bf16", "cpu") == "bf16"


PAGES = """
import resource, torch
from dist_mnist.distributed.device import use_device
from dist_mnist.distributed.world import World
use_device(World.from_environment(), "cpu", 1)
for turn in range(20):
    if turn == 10:  # the first have made the heap as large as it has to be
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.zeros(megabytes << 18) for megabytes in (1, 40, 100)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_on_cpu_is_kept_for_the_next_step():
    run = subprocess.run(
        [sys.executable, "-c", PAGES], capture_output=True, text=True, timeout=HANGS_AFTER_S, check=True
    )
    assert int(run.stdout) < 100  # pages that the kernel had to give; without it hundreds of thousands
