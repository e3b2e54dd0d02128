"""Checks that need a process group, run by every rank under torchrun; test_group.py reads what came of them.

torchrun --standalone --nproc-per-node=3 group_checks.py OUTPUT_FOLDER
"""

import copy
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dist_mnist.config.resolve import resolve
from dist_mnist.data.coverage import Coverage, CoverageError
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.loader import Batch
from dist_mnist.data.sampler import GlobalOrder, shard
from dist_mnist.distributed.agreement import Agreement
from dist_mnist.distributed.collectives import broadcast_state, check_agreement, sum_over_ranks
from dist_mnist.distributed.device import use_device
from dist_mnist.distributed.process_group import process_group
from dist_mnist.distributed.states.compare import StatesDiffer
from dist_mnist.distributed.world import World
from dist_mnist.elastic.preemption import StopSignal
from dist_mnist.evaluation.evaluate import evaluate
from dist_mnist.model.build import build_model
from dist_mnist.model.families.cnn import CNN
from dist_mnist.model.layers.batch_norm import RunningStatistics, collect_moments, synchronise_batch_norm
from dist_mnist.training.cuda_graph import Capture
from dist_mnist.training.spikes.watch import FEWEST
from dist_mnist.training.trainer import Trainer
from dist_mnist.utils.errors import UserError

MIXED = {"erasing": 0.5, "mixup": 0.2, "cutmix": 1.0}
NETWORKS = Path(__file__).parents[1] / "helpers" / "networks.py"
OWN = ("BatchNormDropout", "LayerNormed", "GroupNormed", "Attention", "TiedWeights", "OneParameter", "Lazy", "function")


def images_and_labels(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 1, 12, 12), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


def small_config(**settings: object):
    small = {"conv_channels": (4,), "dense_units": (16,), "precision": "fp32", "lr": 0.05, "batch_norm": "none"}
    return resolve(small | settings)


def small_trainer(world: World, total_steps: int, **settings: object) -> Trainer:
    config = small_config(**settings)
    return Trainer(config, world, build_model(config, (1, 12, 12), 10, [128.0], [64.0]), total_steps)


def train_steps(world: World, batch_sizes: list[int], graph: Capture | None = None, **settings: object) -> CNN:
    """The network after a step on each batch, this rank having its part of each."""
    trainer = small_trainer(world, len(batch_sizes), **settings)
    trainer.graph = trainer.step_graph(capture=graph) if graph else None
    for step, size in enumerate(batch_sizes):
        take_step(trainer, step, size)
    return trainer.model


def take_step(trainer: Trainer, step: int, size: int) -> None:
    """A step on the batch of that size, this rank having its part of it."""
    images, labels = images_and_labels(size)
    part = slice_of(shard(0, size, trainer.world.rank, trainer.world.size))
    samples = [images[part], labels[part]]
    if trainer.config.mixes:
        samples = [torch.cat([of, all_of.flip(0)[part]]) for of, all_of in zip(samples, (images, labels), strict=True)]
    trainer.step(Batch(*samples, torch.arange(size)[part]), step, 0, size)


def slice_of(part: range) -> slice:
    return slice(part.start, part.stop)


def compare(together: CNN, alone: CNN, tolerance: float = 2e-5) -> None:
    for (name, mine), expected in zip(together.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, expected, atol=tolerance, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def check_unequal_parts_give_the_global_gradient(world: World) -> None:
    sizes = [7, 10, 8]
    compare(train_steps(world, sizes), train_steps(world.alone(), sizes))


def check_resumed_training_has_the_bits_of_an_uninterrupted_one(world: World) -> None:
    """With three ranks, as sums of two do not depend on where a number stands in a bucket."""

    def trained(steps: range, state: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        trainer = small_trainer(world, 4, batch_norm="all", batch_size=12)
        trainer.load_state(
            {name: torch.from_numpy(array) for name, array in (state or {}).items()} or trainer.state_tensors()
        )
        for step in steps:
            take_step(trainer, step, 12)
        return trainer.state_arrays()

    expected, found = trained(range(4)), trained(range(2, 4), trained(range(2)))
    assert {name for name in expected if not np.array_equal(expected[name], found[name])} == set()


def check_waiting_counts_from_the_first_step(world: World) -> None:
    """A rank that comes late keeps the others in DDP's exchange before the first step; that is no time of training."""
    if world.rank == 1:
        time.sleep(0.5)
    trainer = small_trainer(world, 1, batch_norm="all")
    began = time.perf_counter()
    take_step(trainer, 0, 9)
    assert 0 < trainer.collective_timer.seconds < time.perf_counter() - began


def check_sums_in_bf16_come_close(world: World) -> None:
    for graph in (None, lambda work: work):
        together = train_steps(world, [9, 9], graph, all_reduce="bf16", batch_size=9)
        compare(together, train_steps(world.alone(), [9, 9]), tolerance=2e-3)


def check_a_recorded_step_is_the_same(world: World) -> None:
    """On a CPU there are no graphs: what is recorded is the work itself, which is all but DDP."""
    settings = {"dropout": 0.5, "rotate": 20.0, "batch_size": 9, "batch_norm": "all", "ema_decay": 0.9}
    compare(train_steps(world, [9, 9, 4], lambda work: work, **settings), train_steps(world, [9, 9, 4], **settings))


def check_all_ranks_do_without_a_graph_if_one_cannot(world: World) -> None:
    def record(work: Callable[[], None]) -> Callable[[], None]:
        if world.rank == 1:
            raise RuntimeError("this is too much")
        return work

    compare(train_steps(world, [9, 9], record, batch_size=9), train_steps(world, [9, 9]))


def check_empty_parts_take_part(world: World) -> None:
    sizes = [2, 1, 5]
    for settings in ({}, MIXED):
        compare(train_steps(world, sizes, **settings), train_steps(world.alone(), sizes, **settings))


def check_dropout_and_augmentation_do_not_depend_on_ranks(world: World) -> None:
    settings = {"dropout": 0.5, "rotate": 20.0, "shift": 1.0, "scale": 0.1, "adversarial": 0.1} | MIXED
    compare(train_steps(world, [9, 9], **settings), train_steps(world.alone(), [9, 9], **settings))


def check_accumulation_gives_the_large_batch(world: World) -> None:
    settings = {"dropout": 0.5, "clip_norm": 0.1, "ema_decay": 0.9} | MIXED
    compare(train_steps(world, [11, 2], accumulate=3, **settings), train_steps(world.alone(), [11, 2], **settings))


def own_trainer(world: World, name: str, total_steps: int, **settings: object) -> Trainer:
    """With one of the networks in helpers/networks.py."""
    config = resolve({"model": f"{NETWORKS}:{name}", "precision": "fp32", "lr": 0.02} | settings)
    return Trainer(config, world, build_model(config, (1, 12, 12), 10, [128.0], [64.0]), total_steps)


def check_users_networks_do_not_depend_on_ranks(world: World) -> None:
    """Batches in unequal parts, and in parts that are empty, which many a network cannot take."""
    for name in OWN:
        sizes, networks = [11, 2, 8, 1, 9], []
        for place in (world, world.alone()):
            trainer = own_trainer(place, name, len(sizes), rotate=10.0, ema_decay=0.9, clip_norm=1.0)
            for step, size in enumerate(sizes):
                take_step(trainer, step, size)
            with trainer.evaluation_model() as averaged:
                networks += [trainer.model, copy.deepcopy(averaged)]
        compare(networks[0], networks[2], tolerance=2e-4)
        compare(networks[1], networks[3], tolerance=2e-4)


def check_users_networks_accumulate(world: World) -> None:
    for name in ("BatchNormDropout", "TiedWeights", "function"):
        trained = []
        for place, parts in ((world, 3), (world, 1)):
            trainer = own_trainer(place, name, 2, accumulate=parts)
            take_step(trainer, 0, 12)
            trained.append(trainer.model)
        if name != "BatchNormDropout":  # whose parts are normalised each by its own statistics
            compare(*trained)


def check_users_network_is_recorded(world: World) -> None:
    for name in ("BatchNormDropout", "TiedWeights", "function"):
        networks = []
        for graph in (None, lambda work: work):
            trainer = own_trainer(world, name, 3, batch_size=9, ema_decay=0.9)
            trainer.graph = trainer.step_graph(capture=graph) if graph else None
            for step, size in enumerate([9, 9, 4]):
                take_step(trainer, step, size)
            networks.append(trainer.model)
        compare(*networks)


def check_batch_norm_is_that_of_the_global_batch(world: World) -> None:
    for batch_norm in ("dense", "all"):
        together, alone = (train_steps(w, [11, 2, 8], batch_norm=batch_norm) for w in (world, world.alone()))
        compare(together, alone, tolerance=2e-4)


def check_running_statistics_are_those_of_the_whole_batch(world: World) -> None:
    """Also of a batch in parts, some of them empty on a rank: in a first step, where the weights are still equal."""
    for size, accumulate in ((11, 3), (7, 9), (2, 4)):
        in_parts = train_steps(world, [size], batch_norm="dense", accumulate=accumulate).state_dict()
        whole = train_steps(world.alone(), [size], batch_norm="dense").state_dict()
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(in_parts[f"dense.0.1.{name}"], whole[f"dense.0.1.{name}"], atol=1e-5, rtol=1e-4)
        assert all(value.isfinite().all() for value in in_parts.values())


def check_batch_norm_has_the_exact_gradient(world: World) -> None:
    rows = torch.randn(10, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float32) * 3 + 100
    weights = torch.randn(10, 3, 4, generator=torch.Generator().manual_seed(2))
    results = {}
    for kind, part in (("alone", slice(0, 10)), ("together", slice_of(shard(0, 10, world.rank, world.size)))):
        layer = nn.Sequential(nn.BatchNorm1d(3))
        synchronised = synchronise_batch_norm(layer, over_ranks=True) if kind == "together" else []
        x = rows[part].clone().requires_grad_()
        with collect_moments() as seen:
            (layer(x).square() * weights[part]).sum().backward()
        statistics = RunningStatistics(synchronised, world.device)
        statistics.update(statistics.moments(seen))
        results[kind] = x.grad, layer[0].running_mean, layer[0].running_var
    mine = slice_of(shard(0, 10, world.rank, world.size))
    torch.testing.assert_close(results["together"][0], results["alone"][0][mine], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(results["together"][1:], results["alone"][1:])


def check_all_ranks_hold_the_same_bits(world: World) -> None:
    model = train_steps(world, [7, 8, 9], batch_norm="all", dropout=0.3)
    digests = {name: float(value.double().abs().sum()) for name, value in model.state_dict().items()}
    check_agreement(world, weights=digests)


def check_threads_of_the_group_take_turns(world: World) -> None:
    """Else gloo's event loop interrupts the thread whose lock it waits for."""
    policies = {os.sched_getscheduler(int(thread.name)) for thread in gloo_threads("gloo")}
    assert policies == {os.SCHED_BATCH}, policies


def check_disagreement_is_found_on_every_rank(world: World) -> None:
    check_agreement(world, same={"a": 1}, also="x")
    try:
        check_agreement(world, same=1, versions="new" if world.rank == 1 else "old")
    except UserError as error:
        assert "rank 1" in str(error) and "versions" in str(error), error
    else:
        raise AssertionError("a difference passed")


def check_state_reaches_every_rank(world: World) -> None:
    arrays = {"a/b": np.arange(6.0).reshape(2, 3), "n": np.array(7, np.int64), "none": np.zeros((0, 2), np.float32)}
    info = {"step": 12, "text": "ä"}
    tensors, shared = broadcast_state(world, *((arrays, info) if world.is_main else ({}, {})))
    assert shared == info and set(tensors) == set(arrays), (shared, tensors)
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name].numpy(), array)
        assert tensors[name].numpy().dtype == array.dtype


def check_the_ledger_is_closed_over_all_ranks(world: World) -> None:
    order = GlobalOrder(num_samples=20, global_batch_size=7, seed=3)
    ledger = Coverage(order, world)
    for ids in order.ids(range(order.steps_per_epoch), world.rank, world.size):
        ledger.add(torch.from_numpy(ids))
    ledger.close(0)
    for ids in order.ids(range(3), world.rank, world.size):
        ledger.add(torch.from_numpy(ids))
    if world.rank == 1:
        ledger.add(torch.tensor([4]))
    try:
        ledger.close(0)
    except CoverageError:
        return
    raise AssertionError("a sample used twice passed")


State = dict[str, torch.Tensor]


def numbered(count: int = 3) -> State:
    """A state that all ranks hold alike."""
    return {f"model/{name}": torch.arange(6.0) + name for name in range(count)}


def agreeing(
    world: World, state: State, every: int = 1, overdue: Callable[[], bool] = lambda: False, exact: bool = True
) -> Agreement:
    return Agreement(world, StopSignal(), overdue, Clock(), lambda: state, every, exact)


@dataclass
class Clock:
    """A rank's time limit."""

    time_is_up: bool = False
    is_over: bool = False

    def out_of_time(self) -> bool:
        return self.is_over


def heard(agreement: Agreement, steps_done: int = 0) -> int:
    """Take steps until all ranks stop or save; gives after which that is."""
    while True:
        steps_done += 1
        stopping = agreement.after_step(steps_done)
        if stopping or agreement.to_save or agreement.limit.time_is_up:
            agreement.close()
            return steps_done


def difference_found(agreement: Agreement, look: Callable[[], object]) -> str:
    """What all ranks say of a difference, which there has to be."""
    try:
        look()
    except StatesDiffer as error:
        agreement.close()
        check_agreement(agreement.states.world, said={"text": str(error)})
        return str(error)
    raise AssertionError("ranks that differ passed")


def check_ranks_stop_and_save_after_the_same_step(world: World) -> None:
    """One rank has a stop request, or finds that it is time to save, or that the run's time is over."""
    stopping, saving = agreeing(world, numbered()), agreeing(world, numbered(), overdue=lambda: world.rank == 0)
    ending = agreeing(world, numbered())
    if world.rank == 1:
        stopping.stop.signal = "SIGUSR1"
    ending.limit = Clock(is_over=world.rank == 0)
    check_agreement(world, stops_after=heard(stopping), saves_after=heard(saving), ends_after=heard(ending))
    assert stopping.stop.signal == "SIGUSR1" and not stopping.to_save and not stopping.limit.time_is_up
    assert ending.limit.time_is_up and not ending.to_save and ending.stop.signal is None
    assert saving.stop.signal is None
    saving.before_save(5)
    assert not saving.to_save


def check_save_that_was_due_is_asked_for_once(world: World) -> None:
    """What rank 0 said before it saved does not have all save again."""
    due = [True]
    agreement = agreeing(world, numbered(), overdue=lambda: due[0])
    step = heard(agreement)
    agreement.before_save(step)
    due[0] = False
    for _ in range(3 * agreement.every):
        step += 1
        agreement.after_step(step)
        assert not agreement.to_save
    agreement.close()


def check_rank_whose_state_differs_is_named_on_every_rank(world: World) -> None:
    """While it trains, and at the latest when it would save."""
    for look in (heard, lambda agreement: agreement.before_save(2)):
        state = numbered()
        agreement = agreeing(world, state)
        agreement.after_step(1)
        state["model/1"][3] += 1e-6 * (world.rank == 2)
        sentence = difference_found(agreement, lambda look=look, agreement=agreement: look(agreement))
        assert sentence.startswith("rank 2 on ") and " computed other bits than the other 2 ranks by " in sentence, (
            sentence
        )
        assert ": model/1 differs. All ranks compute the same" in sentence, sentence


def check_difference_that_has_gone_is_found_all_the_same(world: World) -> None:
    state = numbered()
    agreement = agreeing(world, state)
    kept = state["model/0"].clone()
    state["model/0"][0] += world.rank == 1
    agreement.after_step(1)
    state["model/0"].copy_(kept)
    sentence = difference_found(agreement, lambda: heard(agreement, 1))
    assert sentence.startswith("rank 1 on ") and "by now no tensor differs" in sentence, sentence


def check_ranks_that_may_differ_are_not_compared(world: World) -> None:
    """Not asked for; a network that is not exact; devices that may round differently."""
    for every, exact, threads in ((0, True, 1), (1, False, 1), (1, True, 1 + world.rank)):
        torch.set_num_threads(threads)
        agreement = agreeing(world, {"model/0": torch.tensor([world.rank])}, every, exact=exact)
        for step in range(1, 4):
            agreement.after_step(step)
        agreement.before_save(4)
        agreement.close()
        torch.set_num_threads(1)


def check_spike_is_taken_again_by_all_ranks(world: World) -> None:
    """And counts as if it had been taken once."""
    states = []
    for audit in (True, False):
        trainer = small_trainer(world, 100, clip_norm=1.0, lr=1e-4, audit_spikes=audit)
        images, labels = images_and_labels(9)
        part = slice_of(shard(0, 9, world.rank, world.size))
        for step in range(FEWEST + 1):
            seen = images.float() * (1e6 if step == FEWEST else 1.0)
            trainer.step(Batch(seen[part], labels[part], torch.arange(9)[part]), step, 0, 9)
        states.append(trainer.state_arrays())
        assert (trainer.audit.told if trainer.audit else 1) == 1
    audited, plain = states
    assert all(np.array_equal(audited[name], plain[name]) for name in plain)


def check_evaluation_gives_every_rank_the_logits_of_all_samples_in_order(world: World) -> None:
    images, labels = images_and_labels(1003)
    dataset = IdxDataset(images[:, 0].numpy(), labels.numpy())

    def network(batch: torch.Tensor) -> torch.Tensor:
        return batch.float().flatten(1)[:, :10]

    together, alone = (evaluate(network, dataset, 10, each, keep_logits=True) for each in (world, world.alone()))
    assert together.logits.equal(images.flatten(1)[:, :10].float()) and together.logits.equal(alone.logits)


def check_sums_over_ranks(world: World) -> None:
    total = sum_over_ranks(torch.tensor([world.rank, 1]), world)
    assert total.tolist() == [sum(range(world.size)), world.size]


def gloo_threads(name: str) -> list[Path]:
    """Threads of gloo's: one that is alive while the interpreter ends may abort the process."""
    return [task for task in Path("/proc/self/task").iterdir() if name in (task / "comm").read_text()]


def main() -> None:
    world = use_device(World.from_environment(), "cpu", 1)
    outcome = {}
    with process_group(world, 600):
        for name, check in CHECKS.items():
            try:
                check(world)
                outcome[name] = "passed"
            except Exception:
                outcome[name] = traceback.format_exc()
    outcome["no_thread_outlives_the_group"] = "passed" if not gloo_threads("gloo_run") else "there are some"
    (Path(sys.argv[1]) / f"rank-{world.rank}.json").write_text(json.dumps(outcome))


CHECKS = {name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")}
del CHECKS["agreement"]

if __name__ == "__main__":
    main()
