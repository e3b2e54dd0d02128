"""One attempt at a run by this process: its device, the watchdog, rank 0's run directory, the group of all ranks."""

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
BEFORE_TRAINING = ("start", RENDEZVOUS, "set-up")  # phases; all that follow but those below are training
AFTER_TRAINING = ("exit", "evaluation")


@dataclass(frozen=True)
class ResumePoint:
    """Where training begins: after how many steps, with which sums of the interrupted epoch and log interval."""

    step: int = 0
    ledger: Sequence[int] | None = None  # what `Coverage.reduced` gave
    meter: Sequence[float | None] | None = None  # what `Meter.reduced` gave
    validated: bool = False  # whether this state was validated before it was saved
    early_stopping: Mapping[str, object] = field(default_factory=dict)  # an `EarlyStoppingState` as JSON
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # the trainer's state, on the device; none at step 0


@dataclass(frozen=True)
class Session:
    """What lives as long as this attempt: `world` with its device, the watchdog, and rank 0's newest checkpoint."""

    plan: Plan
    world: World
    stop: StopSignal
    watchdog: Watchdog
    network: Network
    newest: ResumePoint  # on rank 0; its arrays are in `_arrays`
    _arrays: Arrays

    @property
    def ended(self) -> Ended | None:
        """On rank 0: why the run had ended before its length, if it had when this attempt began."""
        return ended_early(self.plan.config, convert(self.newest.early_stopping, EarlyStoppingState))

    @contextmanager
    def process_group(self) -> Iterator[ResumePoint]:
        """Form the group of all ranks for a `with` block, check that they are alike, and give each rank the checkpoint
        to resume from. Collective.

        Raises:
            UserError: on every rank, if one differs in settings, data, versions or in the run directory it sees.
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
                    f"no checkpoint of {self.plan.run.path} can be read, and its first weights were those of --init: "
                    "give the same command again, which begins anew"
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
        """The description of a checkpoint after `steps_done` steps; sums as `Coverage` and `Meter` gave them."""
        init, computed_by = self.network.init, arithmetic(self.world)
        return self.plan.checkpoint_info(steps_done, ledger, meter, validation, init, computed_by, early_stopping)

    def early_stopping(
        self, start: ResumePoint, elapsed_s: Callable[[], float], say: Callable[[str], None]
    ) -> EarlyStopping:
        """What decides whether the run ends before its length; `elapsed_s` and `say` as in `EarlyStopping`."""
        return EarlyStopping(self.plan, start.early_stopping, elapsed_s if self.world.is_main else None, say)

    @contextmanager
    def agreement(self, state: State, overdue: Callable[[], bool], early: EarlyStopping) -> Iterator[Agreement]:
        """By which all ranks stop, save, run out of time and compare their `state` after the same steps, for a `with`
        block. Collective.

        Raises:
            StatesDiffer: in place of a `NotFinite` from the block, if ranks differ: then training has not diverged.
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
        """Rank 0 by itself, which has all cores once the others have left."""
        return use_device(self.world.alone(), self.plan.config.device, self.plan.config.threads)

    def seconds(self) -> RunSeconds | None:
        """What the run took so far, on rank 0 once it has trained; None if it resumed: this process saw only a part."""
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
        """Note that training ended in order: finished, or by a stop request."""
        if stopping and self.world.spans_nodes:
            self.stop.wait_for_own(OWN_SIGNAL_S)
        if self.world.is_main:
            self.plan.run.end_attempt(steps_done, self.stop.signal if stopping else None)


def arithmetic(world: World) -> Arithmetic:
    """What decides which bits these processes compute, as this rank sees it."""
    return Arithmetic(device=device_name(world.device), processes=world.size, threads=num_threads(world.device))


@contextmanager
def open_session(plan: Plan, network: Network, stop: StopSignal) -> Iterator[Session]:
    """Take this rank's device and start its watchdog; rank 0 owns the run directory, and finds the newest checkpoint.

    Raises:
        UserError: there is no such device, the run directory cannot be written, or another run is at work in it.
        Shortage: memory ran out, also later in the `with` block.
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
    """Begin the run directory's records, and find its newest checkpoint."""
    plan.run.begin_attempt()
    found = plan.run.checkpoints.newest()
    if found:
        plan.check_resumes(found.info)
    if not found or (found.info.step < plan.total_steps and not ended_early(plan.config, found.info.early_stopping)):
        plan.run.result_path.unlink(missing_ok=True)  # of the run when it was shorter
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
