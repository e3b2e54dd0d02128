"""The story of a run: `torchrun --nproc_per_node=4 -m dist_mnist.train [options]`.

Prepare (no processes meet yet), form the group, build the network or continue where a checkpoint left off, train, once
in a while report, validate and save, leave the group; then rank 0 evaluates the result on the test set.
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from dist_mnist.checkpoint import Arrays, save_checkpoint
from dist_mnist.data.loader import Loader, keep_on_device
from dist_mnist.distributed import World, check_agreement, process_group, share_state, use_device
from dist_mnist.errors import warn
from dist_mnist.evaluate import Evaluation, evaluate, evaluate_checkpoints
from dist_mnist.ledger import Ledger
from dist_mnist.meter import Meter
from dist_mnist.model import build_model
from dist_mnist.options import run_command
from dist_mnist.plan import Plan, prepare
from dist_mnist.report import Report, Silence
from dist_mnist.step import Trainer, resolve_precision
from dist_mnist.versions import versions


def run(given: Mapping[str, Any]) -> None:
    """Train a CNN on images in idx files, on all processes that torchrun started, and evaluate it on the test set."""
    world = World.from_environment()
    plan = prepare(given, world.size)
    world = use_device(world, plan.config.device, plan.config.threads)
    plan = replace(plan, config=replace(plan.config, precision=resolve_precision(plan.config, world.device)))
    with ExitStack() as stack:
        arrays, info, report = {}, {}, Silence(Report)
        if world.is_main:
            stack.enter_context(plan.run.owned())
            arrays, info = open_run(plan)
            report = stack.enter_context(closing(Report(plan, info["step"])))
        with process_group(world, plan.config.timeout_s):
            check_agreement(world, settings=plan.config.shared(), data=plan.data.fingerprint, versions=versions())
            train(plan, world, report, *share_state(world, arrays, info))
        if world.is_main:
            report.test(test(plan, use_device(world.alone(), plan.config.device, plan.config.threads)))


def open_run(plan: Plan) -> tuple[Arrays, dict[str, Any]]:
    """Begin the run directory's records, or find its newest checkpoint: arrays, and the position to go on from."""
    newest = plan.run.newest(warn)
    plan.run.write_json(plan.run.config_path, plan.identity() | {"versions": versions()})
    return newest or ({}, {"step": 0, "ledger": None})


def train(
    plan: Plan, world: World, report: Report | Silence, tensors: dict[str, torch.Tensor], info: dict[str, Any]
) -> None:
    """Train from where `info` says to the end of the plan. Collective."""
    config, data, order = plan.config, plan.data, plan.order
    model = build_model(config, data.train.image_shape, data.num_classes, *data.train.pixel_scaling(config.pixels))
    trainer = Trainer(config, world, model, plan.total_steps)
    if tensors:
        trainer.restore(tensors)
    report.begin(world, model.num_parameters())

    resident = keep_on_device(config.data_on_device, data.train, world.device)
    steps = range(info["step"], plan.total_steps)
    batches = Loader(data.train, order, steps, world, workers=config.workers, resident=resident)
    ledger, meter = Ledger(order, world, info["ledger"]), Meter(trainer, order, world)
    saver = Saver(plan, trainer) if world.is_main else Silence(Saver)

    for step, batch in zip(steps, batches, strict=True):
        trainer.step(batch, step, order.epoch(step), order.batch_size(step))
        ledger.add(batch.ids)
        done = step + 1
        if plan.ends_epoch(done):
            ledger.close(order.epoch(step))
        if not plan.pauses(done):
            continue
        with meter.paused():
            if plan.wants_log(done):
                report.train(meter.read(done))
            validation = None
            if plan.wants_validation(done):
                with trainer.evaluated() as network:
                    validation = evaluate(network, data.validation, data.num_classes, world, resident)
                report.validation(done, validation)
            saver.save_if_due(done, ledger.reduced(), validation)


class Saver:
    """Rank 0's: decides when to save, by steps or by the clock, and saves."""

    def __init__(self, plan: Plan, trainer: Trainer):
        self.plan, self.trainer = plan, trainer
        self.saved_at = time.monotonic()

    def save_if_due(self, steps_done: int, ledger: list[int], validation: Evaluation | None) -> None:
        """Write a checkpoint after `steps_done` steps if one is wanted, and delete those no longer kept."""
        config, run = self.plan.config, self.plan.run
        overdue = config.checkpoint_every_s and time.monotonic() - self.saved_at >= config.checkpoint_every_s
        if not (overdue or self.plan.wants_checkpoint(steps_done)):
            return
        info = self.plan.identity() | {
            "step": steps_done,
            "epoch": steps_done / self.plan.order.steps_per_epoch,
            "ledger": ledger,
            "validation": validation and {"accuracy": validation.accuracy, "loss": validation.loss},
            "versions": versions(),
        }
        save_checkpoint(run.checkpoint_path(steps_done), self.trainer.state(), info)
        run.prune(config.keep)
        self.saved_at = time.monotonic()


def test(plan: Plan, world: World) -> dict[str, Any]:
    """Evaluate the run's best checkpoint on the test set and write the result; on rank 0 by itself."""
    result = evaluate_checkpoints([plan.run.path], "test", plan.folder, world)
    plan.run.write_json(plan.run.result_path, result)
    return result


@record
def main() -> None:
    """Entry point of `python -m dist_mnist.train`."""
    run_command(run)


if __name__ == "__main__":
    main()
