"""A StepGraph, on a GPU if there is one; on the CPU what it captures is the work itself, to be done again."""

import numpy as np
import pytest
import torch

from dist_mnist.config.settings import Config
from dist_mnist.data.loader import Batch
from dist_mnist.distributed.device import use_device
from dist_mnist.distributed.world import World
from dist_mnist.model.build import build_model
from dist_mnist.training.cuda_graph import Capture, capture
from dist_mnist.training.trainer import Trainer

SIZE, STEPS, SHORT = 8, 6, 3  # images in a batch; steps; the step of a short batch
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def world(request, alone) -> World:
    """A world of one process, on each kind of device that there is."""
    return use_device(alone, request.param, threads=1)


@pytest.fixture
def capturing(world) -> Capture:
    """What captures a step on that device."""
    return capture if world.device.type == "cuda" else again


def batch(step: int, device: torch.device, partners: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(step)
    size = SIZE // 2 if step == SHORT else SIZE
    count = size * 2 if partners else size
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return Batch(*(tensor.to(device) for tensor in (images, torch.arange(count) % 3, torch.arange(size) + step)))


def again(work):
    """In the place of a capture on a GPU."""
    return work


def trained(world, captured_by=None, steps=range(STEPS), state=None, **settings):
    config = Config(conv_channels=(4,), dense_units=(8,), batch_size=SIZE, precision="fp32", **settings)
    trainer = Trainer(config, world, build_model(config, (1, 8, 8), 3, [128.0], [64.0]), total_steps=STEPS)
    if state:
        trainer.load_state({name: torch.from_numpy(array) for name, array in state.items()})
    trainer.graph = trainer.step_graph(capture=captured_by) if captured_by else None
    take_steps(trainer, steps)
    return trainer


def take_steps(trainer, steps=range(STEPS)):
    for step in steps:
        images = batch(step, trainer.world.device, trainer.config.mixes)
        trainer.step(images, step, step // 4, len(images.ids))


def check_same(one: Trainer, other: Trainer) -> None:
    assert one.totals.equal(other.totals) and one.gradient_norm.equal(other.gradient_norm)
    mine, expected = one.state_arrays(), other.state_arrays()
    assert mine.keys() == expected.keys()
    for name, array in mine.items():
        assert np.array_equal(array, expected[name]), name


SETTINGS = [
    {}, {"optimizer": "adamw"}, {"ema_decay": 0.9}, {"momentum": 0.0}, {"batch_norm": "all", "clip_norm": 0.5},
    {"accumulate": 2}, {"invariant": True, "microbatches": 4}, {"adversarial": 0.1},
    {"erasing": 0.5, "mixup": 0.2, "cutmix": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_graphed_steps_equal_eager_steps(world, capturing, settings):
    graphed = trained(world, capturing, **settings)
    assert graphed.graph.replay is not None
    check_same(graphed, trained(world, **settings))


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_graphed_run_resumed_half_way_equals_uninterrupted_run(world, capturing, settings):
    half = trained(world, capturing, range(3), **settings)
    goes_on = trained(world, capturing, range(3, STEPS), half.state_arrays(), **settings)
    expected = trained(world, **settings)
    mine = goes_on.state_arrays()
    assert all(np.array_equal(array, mine[name]) for name, array in expected.state_arrays().items())


def test_graph_after_totals_that_are_not_finite_is_used(world, capturing):
    trainer = trained(world, capturing, range(0))
    trainer.totals.fill_(torch.nan)
    trainer.step(batch(0, world.device), 0, 0, SIZE)
    assert trainer.graph.replay is not None and trainer.totals.isfinite().all()


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_capture_that_cuda_breaks_off_falls_back_to_eager_steps(alone, capsys):
    gpu = use_device(alone, "cuda")
    trainer = trained(gpu, steps=range(0))
    # A step that waits for the device cannot be captured.
    trainer.graph = trainer.step_graph(capture=lambda work: capture(lambda: (work(), trainer.gradient_norm.item())))
    take_steps(trainer)
    assert trainer.graph.replay is None and "training is slower" in capsys.readouterr().err
    check_same(trainer, trained(gpu))


def broken(work):
    raise RuntimeError("operation not permitted when stream is capturing\nmore about that")


def test_capture_that_raises_falls_back_with_one_warning(world, capsys):
    check_same(trained(world, broken), trained(world))
    said = capsys.readouterr().err
    assert said.count("operation not permitted") == 1 and "training is slower" in said and "more about" not in said


def test_capture_that_fails_half_way_leaves_the_state_alone(world):
    trainer = trained(world, steps=range(0))

    def capture_it(work):
        trainer.model(batch(0, world.device).images)
        raise RuntimeError("out of memory")

    trainer.graph = trainer.step_graph(capture=capture_it)
    take_steps(trainer)
    check_same(trainer, trained(world))


@pytest.mark.parametrize("name", ["head.weight", "dense.0.1.running_mean"])
@pytest.mark.parametrize("wrong", [1e-2, float("nan")])
def test_graph_with_another_result_is_not_used(world, capsys, name, wrong):
    trainer = trained(world, steps=range(0))
    tensor = trainer.model.state_dict()[name]

    def capture_it(work):
        def replay():
            work()
            tensor.view(-1)[0] += wrong

        return replay

    trainer.graph = trainer.step_graph(capture=capture_it)
    take_steps(trainer)
    check_same(trainer, trained(world))
    assert "a replayed step is off by" in capsys.readouterr().err
