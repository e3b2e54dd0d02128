"""Replay: train again from each checkpoint of a run to the next, to verify that the run computed what it stored.

A run is deterministic, so replaying a segment gives the same bits. If it does not, a checkpoint was modified, or a
processor or memory made an error. Where equal bits cannot be expected, as on another processor, the weights are
compared within a tolerance instead; this is announced first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dist_mnist.config.overrides import Overrides
from dist_mnist.data.coverage import Coverage
from dist_mnist.data.loader import Loader
from dist_mnist.distributed.collectives import broadcast_state
from dist_mnist.distributed.consistency import RankFacts, check_ranks, software_versions
from dist_mnist.distributed.device import use_device
from dist_mnist.distributed.process_group import process_group
from dist_mnist.distributed.world import World
from dist_mnist.model.classifier import copy_network
from dist_mnist.run.checkpoints.chain import Chain
from dist_mnist.run.checkpoints.file import (
    Arrays,
    Checkpoint,
    arrays_digest,
    difference,
    load_checkpoint,
    part_of,
    read_info,
)
from dist_mnist.run.checkpoints.store import store_of
from dist_mnist.run.network import Network, prepare_rank
from dist_mnist.run.plan import Plan
from dist_mnist.run.records import Arithmetic, CheckpointInfo
from dist_mnist.run.session import arithmetic
from dist_mnist.tools.choices import Choice, Replayed
from dist_mnist.training.trainer import Trainer
from dist_mnist.utils.errors import UserError

# Maximum distance of a segment's replayed weights from the stored ones, as a fraction of the distance that the weights
# moved in the segment: rounding makes runs diverge, but by less than they move.
TOLERANCE = 0.5
TIMEOUT_S = 600.0  # of the process group


@dataclass(frozen=True)
class Segment:
    """The steps between two checkpoints of a run."""

    start: Path | None  # None for the initial weights
    stop: Path
    info: CheckpointInfo  # of `stop`
    first_step: int
    between: Mapping[int, str]  # digests of the arrays of pruned checkpoints, by step


def segments(run_dir: Path, choice: Choice) -> list[Segment]:
    """Return the chosen segments, oldest first.

    Raises:
        UserError: a checkpoint cannot be read, two have different settings, or no checkpoint is chosen.
    """
    store = store_of(run_dir)
    infos = {path: read_info(path) for path in store.paths()}
    newest = list(infos.values())[-1]
    for path, info in infos.items():
        if path != store.path(info.step):
            raise UserError(f"{path} holds the checkpoint of step {info.step}: restore its name, or remove the file")
        if differences := newest.config(path).differences(info.config(path)):
            raise UserError(
                f"the settings of {path} differ from those of the run's newest checkpoint ({'; '.join(differences)}): "
                "it belongs to another run, or was modified"
            )
    steps = [0] + [info.step for info in infos.values()]
    for asked in (choice.first, choice.last):
        if asked is not None and asked not in steps:
            raise UserError(f"{run_dir} has no checkpoint of step {asked}, only of {', '.join(map(str, steps[1:]))}")
    last = steps[-1] if choice.last is None else choice.last
    chosen = [path for path, info in infos.items() if choice.first < info.step <= last][
        choice.every - 1 :: choice.every
    ]
    if not chosen:
        raise UserError(f"{run_dir}: no checkpoint is selected after step {choice.first} up to step {last}")
    return [_segment(path, infos, store.chain) for path in chosen]


def _segment(stop: Path, infos: Mapping[Path, CheckpointInfo], chain: Chain) -> Segment:
    info = infos[stop]
    before = [path for path, other in infos.items() if other.step < info.step]
    start = before[-1] if before else None
    first_step = infos[start].step if start else 0
    link = next((link for link in reversed(chain.links) if link.step == info.step), None)
    ancestors = chain.before(link) if link else ()
    between = {other.step: other.arrays_sha256 for other in ancestors if other.step > first_step}
    return Segment(start, stop, info, first_step, between)


def why_not_exact(info: CheckpointInfo, here: Arithmetic, versions: Mapping[str, str]) -> str | None:
    """Return why replaying a segment may not give the stored bits; None if equal bits are expected."""
    there = info.computed_by
    if there is None:
        return "the processor and number of processes that trained it are unknown"
    invariant = bool(info.settings.get("invariant"))
    facts: dict[str, tuple[object, object]] = {
        "device": (here.device, there.device),
        "torch": (versions["torch"], info.versions.get("torch")),
    }
    if not invariant:
        facts["number of processes"] = (here.processes, there.processes)
        facts["threads of each"] = (here.threads, there.threads)
    apart = [f"{name} {mine} here, {theirs} then" for name, (mine, theirs) in facts.items() if mine != theirs]
    return "; ".join(apart) or None


def replay(
    run_dir: Path,
    overrides: Overrides,
    choice: Choice,
    announce: Callable[[str], None],
    tell: Callable[[Replayed], None],
) -> list[Replayed]:
    """Replay segments of a run, from rank 0's copy of it. Collective over torchrun's ranks, if there are any.

    The run directory is not modified. The data must have the run's fingerprint; they are read from where the run had
    them, or from `--data-dir`. No code is loaded from the run.

    Args:
        announce: called on rank 0 with a notice before segments that are compared within a tolerance.
        tell: called on rank 0 with each result.

    Returns:
        The results on rank 0; an empty list on other ranks.

    Raises:
        UserError: the run or its data cannot be read, or do not belong together.
    """
    world = World.from_environment()
    plan, network = prepare_rank(Overrides({**overrides, "run_dir": run_dir}))
    chosen = segments(run_dir, choice)
    world = use_device(world, plan.config.device, plan.config.threads or _threads_of(chosen[-1].info))
    versions = software_versions(world.device)
    found, told = list[Replayed](), None
    with process_group(world, TIMEOUT_S):
        facts = RankFacts(plan.config.shared(), plan.data.fingerprint, network.facts, versions)
        check_ranks(world, facts, run_dir, lambda: None)
        for segment in chosen:
            why = why_not_exact(segment.info, arithmetic(world), versions)
            if why and why != told and world.is_main:
                announce(
                    f"from step {segment.first_step} on, equal bits cannot be expected ({why}); the weights must agree "
                    f"within {TOLERANCE:.0%} of their movement in a segment"
                )
            told = why
            if replayed := _replay(segment, plan, network, world, why):
                tell(replayed)
                found.append(replayed)
    return found


def _threads_of(info: CheckpointInfo) -> int:
    """Return the threads per process that trained a checkpoint; 0 if unknown."""
    return info.computed_by.threads if info.computed_by else 0


def _replay(segment: Segment, plan: Plan, network: Network, world: World, why: str | None) -> Replayed | None:
    """Train a segment again and compare; return the result on rank 0, None on others. Collective."""
    own = {name: getattr(plan.config, name) for name in ("device", "threads", "model", "data_dir", "data_on_device")}
    plan = replace(plan, config=segment.info.config(segment.stop, **own))
    start = load_checkpoint(segment.start) if segment.start and world.is_main else None
    sums = start.info.ledger if start else None
    tensors, ledger = broadcast_state(world, start.arrays if start else {}, {"sums": sums})
    # Training modifies the network, and a later segment may start from the initial weights as well: use a copy.
    trainer = Trainer.build(plan, world, copy_network(network.model), lambda phase: None, tensors)
    before = trainer.state_arrays()
    coverage, differs_from = Coverage(plan.order, world, ledger["sums"]), None
    steps = range(segment.first_step, segment.info.step)
    for step, batch in zip(steps, Loader(plan.data.train, plan.order, steps, world), strict=True):
        trainer.step(batch, step, plan.order.epoch(step), plan.order.batch_size(step))
        coverage.add(batch.ids)
        if plan.ends_epoch(step + 1):
            coverage.close(plan.order.epoch(step))
        digest = segment.between.get(step + 1)
        if digest and world.is_main and not why and differs_from is None:
            differs_from = None if arrays_digest(trainer.state_arrays()) == digest else step + 1
    sums_found = coverage.reduced()
    trainer.close()
    if not world.is_main:
        return None
    stop = load_checkpoint(segment.stop)
    return _compared(segment, before, trainer.state_arrays(), sums_found, stop, differs_from, why)


def _compared(
    segment: Segment,
    before: Arrays,
    found: Arrays,
    sums: Sequence[int],
    stored: Checkpoint,
    differs_from: int | None,
    why: str | None,
) -> Replayed:
    """Compare the final state of a replayed segment with the stored checkpoint."""
    if apart := difference(found, stored.arrays):
        raise UserError(f"{stored.path} does not match the network and optimizer in its own settings: {apart}")
    different = [name for name in found if not _same_bits(found[name], stored.arrays[name])]
    ledger_differs = stored.info.ledger is not None and tuple(sums) != tuple(stored.info.ledger)
    largest = max((_largest_difference(found[name], stored.arrays[name]) for name in different), default=None)
    distance = _distance(*(part_of(arrays, "model") for arrays in (before, found, stored.arrays)))
    first = different[0] if different else "ledger" if ledger_differs else None
    reproduced = not ledger_differs and (distance <= TOLERANCE if why else not different and differs_from is None)
    return Replayed(
        start=segment.first_step,
        stop=segment.info.step,
        reproduced=reproduced,
        expected_other_bits=why,
        differs_from_step=None if reproduced else differs_from or segment.info.step,
        first_different=first,
        largest_difference=largest,
        distance=distance if different else None,
    )


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.tobytes() == other.tobytes()


def _largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest difference between corresponding elements; infinite if one of a pair is not finite."""
    apart = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return float(np.nan_to_num(apart, nan=np.inf).max(initial=0))


def _distance(before: Arrays, found: Arrays, stored: Arrays) -> float:
    """Return the distance of found and stored weights over that of before and stored (Euclidean, over all tensors)."""
    apart = sum(_squares(found[name], stored[name]) for name in stored)
    way = sum(_squares(before[name], stored[name]) for name in stored)
    return float((apart / way) ** 0.5) if way > 0 else 0.0 if apart == 0 else float("inf")


def _squares(one: np.ndarray, other: np.ndarray) -> float:
    return float(((one.astype(np.float64) - other.astype(np.float64)) ** 2).sum())
