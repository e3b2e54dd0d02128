"""The story of a run: `torchrun --nproc_per_node=4 -m dist_mnist.train [options]`.

Prepare (no processes meet yet), form the group, build the network or continue where a checkpoint left off, train, once
in a while report, validate and save, leave the group; then rank 0 evaluates the result on the test set.
"""

if __name__ == "__main__":  # before torch is imported, which takes seconds: a signal is a request from the beginning
    from dist_mnist.elastic.preemption import STOP

    STOP.listen()

import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from dist_mnist.cli.errors import named_shortage
from dist_mnist.cli.options import run_command
from dist_mnist.data.coverage import Ledger
from dist_mnist.data.loader import Loader, keep_on_device
from dist_mnist.distributed.collectives import share_state
from dist_mnist.distributed.consistency import check_ranks
from dist_mnist.distributed.device import machine, resolve_precision, use_device
from dist_mnist.distributed.process_group import process_group
from dist_mnist.distributed.world import World
from dist_mnist.elastic.preemption import STOP, Agreement
from dist_mnist.elastic.watchdog import MEETING, Watch
from dist_mnist.evaluation.checkpoints import judge, load_alike
from dist_mnist.evaluation.evaluate import Abandoned, evaluate, predict
from dist_mnist.model.cnn import build_model
from dist_mnist.reporting.reporter import Report, silent
from dist_mnist.run.checkpoint import Arrays
from dist_mnist.run.plan import Plan, prepare
from dist_mnist.training.async_saver import Saver
from dist_mnist.training.metrics import Meter
from dist_mnist.training.profiler import Profile
from dist_mnist.training.trainer import Trainer
from dist_mnist.utils.versions import versions

AFTER_PEERS_S = 1.0
OWN_REQUEST_S = 3.0


def run(given: Mapping[str, Any]) -> None:
    """Train a CNN on images in idx files, on all processes that torchrun started, and evaluate it on the test set."""
    world = World.from_environment()
    plan = prepare(given, world.size)
    STOP.wait_for_a_step()
    config = plan.config
    world = use_device(world, config.device, config.threads or int(config.invariant))
    plan = replace(plan, config=replace(config, precision=resolve_precision(config, world.device)))
    with ExitStack() as stack:
        stack.enter_context(named_shortage())
        watch = stack.enter_context(closing(Watch(world, config.stall_timeout)))
        arrays: Arrays = {}
        info: dict[str, Any] = {}
        report = silent(Report)
        if world.is_main:
            stack.enter_context(plan.run.owned(wait_s=min(5.0, config.stall_timeout / 2)))
            arrays, info = open_run(plan, world, watch)
            report = stack.enter_context(closing(Report(plan, info["step"])))
        watch.enter(MEETING)
        with process_group(world, 2 * config.stall_timeout) as store, watch.over(store):
            watch.enter("set-up")
            check_ranks(world, plan)
            steps_done, stopping = train(plan, world, watch, report, *share_state(world, arrays, info))
            watch.enter("exit")
        if stopping and world.spans_machines:
            STOP.wait_for_own(OWN_REQUEST_S)
        if world.is_main:
            if not stopping:
                watch.enter("evaluation")
                test(plan, use_device(world.alone(), config.device, config.threads), watch, report)
            else:
                report.stopped(steps_done)
            plan.run.end_attempt(steps_done, STOP.signal if stopping else None)


def open_run(plan: Plan, world: World, watch: Watch) -> tuple[Arrays, dict[str, Any]]:
    """Begin the run directory's records, or find its newest checkpoint: arrays, and the position to go on from."""
    plan.run.begin_attempt()
    newest = plan.run.checkpoints.newest()
    if newest:
        plan.check_goes_on(newest[1])
    if not newest or newest[1]["step"] < plan.total_steps:
        plan.run.result_path.unlink(missing_ok=True)  # of the run when it was shorter
    made_with = {"versions": versions(), "machine": machine(world)}
    plan.run.write_json(plan.run.config_path, plan.identity() | made_with)
    watch.record_in(plan.run.progress_path)
    return newest or ({}, {"step": 0, "ledger": None, "meter": None, "validation": None})


def train(
    plan: Plan,
    world: World,
    watch: Watch,
    report: Report,
    tensors: dict[str, torch.Tensor],
    info: dict[str, Any],
) -> tuple[int, bool]:
    """Train from where `info` says; gives the steps done, and whether a request stopped it there. Collective."""
    config, data, order = plan.config, plan.data, plan.order
    model = build_model(config, data.train.image_shape, data.num_classes, *data.train.pixel_scaling(config.pixels))
    trainer = Trainer(config, world, model, plan.total_steps, watch.enter)
    if tensors:
        trainer.restore(tensors)
    report.begin(world, model.num_parameters())

    resident = keep_on_device(config.data_on_device, data.train, world.device)
    steps = range(info["step"], plan.total_steps)
    batches = Loader(data.train, order, steps, world, workers=config.workers, resident=resident)
    ledger, meter = Ledger(order, world, info["ledger"]), Meter(trainer, order, world, steps.start, info["meter"])
    done = steps.start

    def save(stopping: bool, now: bool = False) -> bool:
        """Validate and save what is due; gives whether to stop, which may also be asked for during a validation."""
        validation = None
        if plan.wants_validation(done) and not stopping:
            watch.enter("validation")
            try:
                with trainer.evaluated() as network:
                    validation = evaluate(
                        network, data.validation, data.num_classes, world, resident, watch.move, agreement.to_stop
                    )
                report.validation(done, validation, model)
            except Abandoned:
                stopping = True
        watch.enter("checkpoint")
        sums: dict[str, list] = {"ledger": ledger.reduced(), "meter": meter.reduced()}
        saver.save_if_due(done, sums, validation, now or stopping)
        return stopping

    with ExitStack() as stack:
        agreement = stack.enter_context(closing(Agreement(world)))
        stack.callback(setattr, trainer, "graph", None)  # NCCL would wait at its end for graphs that hold its work
        saver = stack.enter_context(closing(Saver(plan, trainer) if world.is_main else silent(Saver)))
        if config.profile and world.is_main:
            stack.enter_context(closing(Profile(plan.run, meter, watch, report, steps)))
        stopping = False
        if done and plan.wants_validation(done) and not info["validation"]:
            stopping = save(stopping, now=True)  # which a request to stop did not leave the time for
        for step, batch in watch.fetching(range(0) if stopping else steps, meter.timing(batches)):
            trainer.step(batch, step, order.epoch(step), order.batch_size(step))
            ledger.add(batch.ids)
            done = step + 1
            report.moved(done)
            stopping = done < plan.total_steps and agreement.to_stop(done)
            if plan.ends_epoch(done):
                ledger.close(order.epoch(step))
            if not (stopping or plan.pauses(done)):
                continue
            watch.enter("report")
            with meter.paused():
                trainer.check_finite(done)
                if plan.wants_log(done):
                    report.train(meter.read(done))
                stopping = save(stopping)
            if stopping:
                break
        saver.finish()
    return done, stopping


def test(plan: Plan, world: World, watch: Watch, report: Report) -> None:
    """Evaluate the run's best checkpoint on the test set and write the result; on rank 0 by itself."""
    [best], dataset = load_alike([plan.run.path], world), plan.data.test
    result = judge([best], "test", dataset, world, watch.move)
    plan.run.write_json(plan.run.result_path, result)
    report.test(result)
    if plan.config.tensorboard:
        probabilities = predict([best.network], dataset, world, watch.move)
        report.looked_at(best.network, probabilities.numpy(), dataset, result["step"])


@record
def main() -> None:
    """Entry point of `python -m dist_mnist.train`."""
    try:
        run_command(run)
    except RuntimeError as error:
        # Most likely another rank was lost, and this one noticed. torchrun is to see that one's end first, which is the
        # cause; it then tells this one to end, whose own story is of no use.
        time.sleep(AFTER_PEERS_S)
        if not STOP.signal:
            raise
        sys.exit(f"rank {os.environ.get('RANK', 0)} ends, because others are gone: {str(error).splitlines()[0][:200]}")


if __name__ == "__main__":
    main()
