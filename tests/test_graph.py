"""What a StepGraph does around a CUDA graph; without a GPU, what it records is the work itself, to be done again."""

import numpy as np
import pytest
import torch

from dist_mnist.config import Config
from dist_mnist.data.loader import Batch
from dist_mnist.graph import StepGraph
from dist_mnist.model import build_model
from dist_mnist.step import Trainer

SIZE, STEPS, SHORT = 8, 6, 3  # images in a batch; steps; the step of a short batch


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    size = SIZE // 2 if step == SHORT else SIZE
    images = torch.randint(0, 256, (size, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(size) % 3, torch.arange(size) + step)


def again(work):
    """In the place of recording on a GPU."""
    return work


def trained(world, record=None, steps=range(STEPS), state=None, **settings):
    config = Config(conv_channels=(4,), dense_units=(8,), batch_size=SIZE, precision="fp32", **settings)
    trainer = Trainer(config, world, build_model(config, (1, 8, 8), 3, [128.0], [64.0]), total_steps=STEPS)
    if state:
        trainer.restore({name: torch.from_numpy(array) for name, array in state.items()})
    trainer.graph = StepGraph(trainer, record) if record else None
    for step in steps:
        images = batch(step)
        trainer.step(images, step, step // 4, len(images.labels))
    return trainer


def check_same(one: Trainer, other: Trainer) -> None:
    assert one.totals.equal(other.totals) and one.gradient_norm.equal(other.gradient_norm)
    mine, expected = one.state(), other.state()
    assert mine.keys() == expected.keys()
    for name, array in mine.items():
        assert np.array_equal(array, expected[name]), name


SETTINGS = [
    {}, {"optimizer": "adamw"}, {"ema_decay": 0.9}, {"momentum": 0.0}, {"batch_norm": "all", "clip_norm": 0.5},
    {"accumulate": 2}, {"invariant": True, "microbatches": 4},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_its_steps_are_those_of_the_trainer(alone, settings):
    graphed = trained(alone, again, **settings)
    assert graphed.graph.replay is not None
    check_same(graphed, trained(alone, **settings))


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_a_run_goes_on_with_it(alone, settings):
    half = trained(alone, again, range(3), **settings)
    goes_on = trained(alone, again, range(3, STEPS), half.state(), **settings)
    expected = trained(alone, **settings)
    mine = goes_on.state()
    assert all(np.array_equal(array, mine[name]) for name, array in expected.state().items())


def test_totals_that_a_skipped_step_spoiled_are_no_reason_against_it(alone):
    trainer = trained(alone, again, range(0))
    trainer.totals.fill_(torch.nan)
    trainer.step(batch(0), 0, 0, SIZE)
    assert trainer.graph.replay is not None and trainer.totals.isnan().all()


def broken(work):
    raise RuntimeError("operation not permitted when stream is capturing\nmore about that")


def test_what_cannot_be_recorded_is_done_without(alone, capsys):
    check_same(trained(alone, broken), trained(alone))
    said = capsys.readouterr().err
    assert said.count("operation not permitted") == 1 and "training is slower" in said and "more about" not in said


def test_a_recording_that_fails_half_way_leaves_nothing(alone):
    trainer = trained(alone, steps=range(0))

    def record(work):
        trainer.model(batch(0).images)
        raise RuntimeError("out of memory")

    trainer.graph = StepGraph(trainer, record)
    for step in range(STEPS):
        trainer.step(batch(step), step, step // 4, len(batch(step).labels))
    check_same(trainer, trained(alone))


@pytest.mark.parametrize("name", ["head.weight", "dense.0.1.running_mean"])
@pytest.mark.parametrize("wrong", [1e-2, float("nan")])
def test_a_graph_that_gives_another_result_is_not_used(alone, capsys, name, wrong):
    trainer = trained(alone, steps=range(0))
    tensor = trainer.model.state_dict()[name]

    def record(work):
        def replay():
            work()
            tensor.view(-1)[0] += wrong

        return replay

    trainer.graph = StepGraph(trainer, record)
    for step in range(STEPS):
        trainer.step(batch(step), step, step // 4, len(batch(step).labels))
    check_same(trainer, trained(alone))
    assert "it changed a tensor by up to" in capsys.readouterr().err
