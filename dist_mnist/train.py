"""The training entry point: `torchrun --nproc_per_node=4 -m dist_mnist.train [options]`.

Each rank prepares the run and builds the model without communication. The ranks then form the process group, resume
from the newest checkpoint if there is one, train, now and then log, validate and save, and leave the group. Rank 0
evaluates the result on the test set. `Collective` in a docstring means that all ranks must make the call, as each waits
for the others in it.
"""

if __name__ == "__main__":  # signals become stop requests before torch is imported, which takes seconds
    from dist_mnist.elastic.preemption import StopSignal
    from dist_mnist.utils.imports import garbage_collection_paused, let_threads_sleep

    STOP, importing = StopSignal.listening(), garbage_collection_paused()
    let_threads_sleep()
    importing.__enter__()  # until the last lines of this file: imports are faster without garbage collection

from contextlib import closing
from pathlib import Path

from torch import nn

from dist_mnist.cli.options import run_as_rank
from dist_mnist.config.overrides import Overrides
from dist_mnist.data.coverage import Coverage
from dist_mnist.data.loader import Loader
from dist_mnist.elastic.preemption import StopSignal
from dist_mnist.evaluation.checkpoints.result import evaluate_best
from dist_mnist.evaluation.evaluate import evaluate_unless_stopped
from dist_mnist.reporting.reporter import Listeners, Reporter
from dist_mnist.run.network import prepare_rank
from dist_mnist.run.session import ResumePoint, Session, open_session
from dist_mnist.training.async_saver import AsyncSaver
from dist_mnist.training.metrics import Meter
from dist_mnist.training.profiler import profiling
from dist_mnist.training.trainer import Trainer


def run(overrides: Overrides, stop: StopSignal, module: nn.Module | None = None, listeners: Listeners = ()) -> Path:
    """Train a network on all ranks, evaluate it on the test set, and return the run directory. Collective."""
    plan, network = prepare_rank(overrides, module)
    stop.wait_for_a_step()  # until here a stop request ends the process at once, later after a step
    with (
        open_session(plan, network, stop) as session,
        Reporter.on_main(session.world, plan, listeners) as reporter,
    ):
        with session.process_group() as start:
            steps_done, ended = train(session, reporter, start)
        if ended is None:
            reporter.stopped()
        elif session.world.is_main:
            test(session, reporter, ended)
        session.end(steps_done, stopping=ended is None)
    return plan.run.path


def train(session: Session, reporter: Reporter, start: ResumePoint) -> tuple[int, str | None]:
    """Train from `start`; return the steps done and why the run ended (None: by a stop request). Collective."""
    plan, world, watchdog = session.plan, session.world, session.watchdog
    config, data, order = plan.config, plan.data, plan.order
    trainer = Trainer.build(plan, world, session.network.model, watchdog.enter, start.tensors)
    remaining = range(start.step, plan.total_steps)
    loader = Loader(data.train, order, remaining, world, workers=config.workers, on_device=config.data_on_device)
    coverage = Coverage(order, world, start.ledger)
    meter = Meter(order, world, trainer.collective_timer, start.step, start.meter)
    early = session.early_stopping(start, meter.elapsed_s, reporter.say)
    batches = meter.timing(loader)
    reporter.begin(session.network, start.step, early.reason)
    with (
        closing(trainer),
        closing(AsyncSaver.on_main(world, plan.run.checkpoints, trainer.state_arrays, config, reporter.saved)) as saver,
        session.agreement(trainer.state_tensors, saver.overdue, early) as agreement,  # on when to stop or save
        profiling(plan, world, watchdog, meter, reporter.say, remaining),
    ):
        done, stopping, due = start.step, False, plan.owes_validation(start.step, start.validated, early.reason)
        while True:
            if due:  # now and then: log, validate, save
                watchdog.enter("report")
                with meter.paused():
                    trainer.check_finite(done)
                    if plan.wants_log(done) and meter.step < done:
                        reporter.log(meter.read(done, trainer.statistics()))
                    validation = None
                    if plan.wants_validation(done, early.reason) and not stopping:
                        watchdog.enter("validation")
                        with trainer.evaluation_model() as model:
                            validation = evaluate_unless_stopped(
                                model, data.validation, data.num_classes, world, loader.resident,
                                watchdog.keep_alive, agreement.to_stop,
                            )  # fmt: skip
                        stopping = validation is None  # interrupted by a stop request
                    if validation:
                        early.validated(validation.accuracy)
                        reporter.validation(done, meter.elapsed_s(), validation, trainer.model)
                    watchdog.enter("checkpoint")
                    sums, score = (coverage.reduced(), meter.reduced()), validation.score if validation else None
                    if stopping or plan.wants_checkpoint(done, early.reason) or agreement.to_save:
                        agreement.before_save(done)  # raises unless all ranks hold the same weights
                        saver.save(session.checkpoint_info(done, *sums, score, early.state()))
            if stopping or early.reason or done == plan.total_steps:
                break

            # one step on one global batch
            watchdog.enter("data", done)
            batch = next(batches)
            values = trainer.step(batch, done, order.epoch(done), order.batch_size(done))
            coverage.add(batch.ids)
            meter.add(values)
            done += 1
            reporter.step(done)
            stopping = done < plan.total_steps and agreement.after_step(done)
            if plan.ends_epoch(done):
                coverage.close(order.epoch(done - 1))  # raises unless each sample was used once
            due = stopping or agreement.to_save or plan.pauses(done, early.reason)
        saver.finish()
    return done, early.conclude(done, stopping)


def test(session: Session, reporter: Reporter, ended: str) -> None:
    """Evaluate the run's best checkpoint on the test set and write the result; on rank 0 only."""
    plan, watchdog = session.plan, session.watchdog
    watchdog.enter("evaluation")
    tested = evaluate_best(plan, session.network.model, session.alone(), watchdog.keep_alive, session.seconds, ended)
    plan.run.write_json(plan.run.result_path, tested.result)
    reporter.finished(tested)


if __name__ == "__main__":
    importing.__exit__(None, None, None)
    run_as_rank(run, STOP, own_process=True)
