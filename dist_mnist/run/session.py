"""One attempt at a run by this process: its device, watchdog, process group, and rank 0's run directory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field

import torch
from msgspec import convert, to_builtins

from dist_mnist.distributed.agreement import Agreement
from dist_mnist.distributed.collectives import broadcast_state
from dist_mnist.distributed.consistency import RankFacts, check_ranks, software_versions
from dist_mnist.distributed.device import device_name, machine, num_threads, use_device
from dist_mnist.distributed.process_group import process_group
from dist_mnist.distributed.states.compare import State
from dist_mnist.distributed.world import World
from dist_mnist.elastic.preemption import StopSignal
from dist_mnist.elastic.watchdog import RENDEZVOUS, Watchdog
from dist_mnist.run.checkpoints.file import Arrays
from dist_mnist.run.early_stopping import EarlyStopping, ended_early
from dist_mnist.run.network import Network
from dist_mnist.run.plan import Plan
from dist_mnist.run.records import (
    Arithmetic,
    CheckpointInfo,
    EarlyStoppingState,
    Ended,
    Machine,
    RunConfig,
    RunSeconds,
    ValidationScore,
)
from dist_mnist.utils.errors import NotFinite, UserError, named_out_of_memory
from dist_mnist.utils.versions import versions

OWN_SIGNAL_S = 3.0
BEFORE_TRAINING = ("start", RENDEZVOUS, "set-up")  # phases; all later ones are training, except those below
AFTER_TRAINING = ("exit", "evaluation")


@dataclass(frozen=True)
class ResumePoint:
    """The point where training begins: the steps done, and the sums of the interrupted epoch and log interval."""

    step: int = 0
    ledger: Sequence[int] | None = None  # sums over the ids used so far in the epoch; result of `Coverage.reduced`
    meter: Sequence[float | None] | None = None  # result of `Meter.reduced`
    validated: bool = False  # whether this state was validated before it was saved
    early_stopping: Mapping[str, object] = field(default_factory=dict)  # an `EarlyStoppingState` as JSON
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # the trainer's state on the device; empty at step 0


@dataclass(frozen=True)
class Session:
    """The state of this attempt: `world` with its device, the watchdog, and rank 0's newest checkpoint."""

    plan: Plan
    world: World
    stop: StopSignal
    watchdog: Watchdog
    network: Network
    newest: ResumePoint  # on rank 0; its arrays are in `_arrays`
    _arrays: Arrays

    @property
    def ended(self) -> Ended | None:
        """On rank 0: why the run had already ended before its length when this attempt began; None if it had not."""
        return ended_early(self.plan.config, convert(self.newest.early_stopping, EarlyStoppingState))

    @contextmanager
    def process_group(self) -> Iterator[ResumePoint]:
        """Form the process group for a `with` block, check that all ranks are consistent, and broadcast the checkpoint
        to resume from. Collective.

        Raises:
            UserError: on every rank, if one has other settings, data, versions or another run directory.
        """
        self.watchdog.enter(RENDEZVOUS)
        timeout_s = 2 * self.plan.config.stall_timeout
        with process_group(self.world, timeout_s) as store, self.watchdog.monitoring(store):
            self.watchdog.enter("set-up")
            facts = RankFacts(
                settings=self.plan.config.shared(),
                data=self.plan.data.fingerprint,
                network=self.network.facts,
                versions=software_versions(self.world.device),
            )
            check_ranks(self.world, facts, self.plan.run.path, self.plan.run.ownership.token)
            tensors, position = broadcast_state(self.world, self._arrays, asdict(self.newest))
            if self.plan.started and self.plan.config.init and not tensors:
                raise UserError(
                    f"no checkpoint of {self.plan.run.path} can be read, and its initial weights came from --init: "
                    "give the same command again, which starts the run anew"
                )
            yield ResumePoint(**position | {"tensors": tensors})
            self.watchdog.enter("exit")

    def checkpoint_info(
        self,
        steps_done: int,
        ledger: list[int],
        meter: list[float],
        validation: ValidationScore | None,
        early_stopping: EarlyStoppingState,
    ) -> CheckpointInfo:
        """Return the description of a checkpoint after `steps_done` steps, with sums of `Coverage` and `Meter`."""
        init, computed_by = self.network.init, arithmetic(self.world)
        return self.plan.checkpoint_info(steps_done, ledger, meter, validation, init, computed_by, early_stopping)

    def early_stopping(
        self, start: ResumePoint, elapsed_s: Callable[[], float], say: Callable[[str], None]
    ) -> EarlyStopping:
        """Return the early stopping of this run; `elapsed_s` and `say` are as in `EarlyStopping`."""
        return EarlyStopping(self.plan, start.early_stopping, elapsed_s if self.world.is_main else None, say)

    @contextmanager
    def agreement(self, state: State, overdue: Callable[[], bool], early: EarlyStopping) -> Iterator[Agreement]:
        """Yield the agreement by which all ranks stop, save, run out of time and compare their `state` after the same
        steps. Collective.

        Raises:
            StatesDiffer: instead of a `NotFinite` from the block, if ranks differ: training has not diverged then.
        """
        every, exact = self.plan.config.check_ranks_every, self.network.exact
        agreement = Agreement(self.world, self.stop, overdue, early, state, every, exact)
        try:
            yield agreement
        except NotFinite:
            agreement.states.check(agreement.steps_done)
            raise
        finally:
            agreement.close()

    def alone(self) -> World:
        """Return rank 0 as a world of one process, which has all cores after the others have ended."""
        return use_device(self.world.alone(), self.plan.config.device, self.plan.config.threads)

    def seconds(self) -> RunSeconds | None:
        """Return the run's times so far, on rank 0 after training; None if it was resumed, as part is unknown then."""
        if self.newest.step:
            return None
        phases = self.watchdog.clock.seconds()
        before, evaluation = (
            sum(phases.get(phase, 0.0) for phase in some) for some in (BEFORE_TRAINING, (*AFTER_TRAINING, "validation"))
        )
        whole = sum(phases.values())
        return RunSeconds(
            training=whole - before - evaluation, training_with_evaluation=whole - before, since_start=whole
        )

    def end(self, steps_done: int, stopping: bool) -> None:
        """Record that training finished, or was stopped by a request."""
        if stopping and self.world.spans_nodes:
            self.stop.wait_for_own(OWN_SIGNAL_S)
        if self.world.is_main:
            self.plan.run.end_attempt(steps_done, self.stop.signal if stopping else None)


def arithmetic(world: World) -> Arithmetic:
    """Return the device and the numbers of processes and threads, which determine the bits that are computed."""
    return Arithmetic(device=device_name(world.device), processes=world.size, threads=num_threads(world.device))


@contextmanager
def open_session(plan: Plan, network: Network, stop: StopSignal) -> Iterator[Session]:
    """Set up this rank's device and watchdog; rank 0 owns the run directory, and loads the newest checkpoint.

    Raises:
        UserError: the device does not exist, the run directory is not writable, or another run is using it.
        Shortage: out of memory, also later in the `with` block.
    """
    config = plan.config
    world = use_device(World.from_environment(), config.device, config.threads or int(config.invariant))
    with named_out_of_memory(), ExitStack() as stack:
        watchdog = stack.enter_context(closing(Watchdog(world, config.stall_timeout, stop)))
        newest, arrays = ResumePoint(), Arrays()
        if world.is_main:
            stack.enter_context(plan.run.owned(wait_s=min(5.0, config.stall_timeout / 2)))
            newest, arrays = _begin_attempt(plan, world, network)
            watchdog.write_progress_to(plan.run.progress_path)
        yield Session(plan, world, stop, watchdog, network, newest, arrays)


def _begin_attempt(plan: Plan, world: World, network: Network) -> tuple[ResumePoint, Arrays]:
    """Write the run directory's config.json, and load its newest checkpoint."""
    plan.run.begin_attempt()
    found = plan.run.checkpoints.newest()
    if found:
        plan.check_resumes(found.info)
    if not found or (found.info.step < plan.total_steps and not ended_early(plan.config, found.info.early_stopping)):
        plan.run.result_path.unlink(missing_ok=True)  # the result of a shorter run
    made_on = Machine(**machine(world))
    config = RunConfig(
        settings=plan.config.to_json(),
        data=plan.data_facts,
        versions=versions(),
        machine=made_on,
        code_sha256=plan.code_digest,
        init=network.init,
    )
    plan.run.write_json(plan.run.config_path, config)
    if not found:
        return ResumePoint(), {}
    info = found.info
    validated, early_stopping = info.validation is not None, to_builtins(info.early_stopping)
    return ResumePoint(info.step, info.ledger, info.meter, validated, early_stopping), found.arrays
