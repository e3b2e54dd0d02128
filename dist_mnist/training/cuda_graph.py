"""A training step as one CUDA graph: some two hundred small kernels that are launched at once, without Python between.

The graph holds a step on a whole batch: random keys, augmentation, forward, backward, all-reduce, optimizer, averaged
weights. A batch is copied to where it reads, and what changes from step to step stands in `Trainer.controls`. Before it
is used, a step by the graph is held against the same step without, from the same state; all ranks must find them
alike. Otherwise, or if the step cannot be recorded at all, steps are taken one operation after another, as ever.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

import torch

from dist_mnist.data.loader import Batch
from dist_mnist.distributed.collectives import sum_over_ranks
from dist_mnist.utils.errors import warn

if TYPE_CHECKING:
    from dist_mnist.training.trainer import Trainer

WARM_UP = 3  # steps before recording: libraries choose their kernels
# Of what a step changes in a tensor, at its largest: sums over ranks may be in another order, rounded to `all_reduce`.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}

Record = Callable[[Callable[[], None]], Callable[[], None]]


def record(work: Callable[[], None]) -> Callable[[], None]:
    """Record what `work` launches on the GPU, without doing it; gives what does it, as often as it is called."""
    graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    try:
        # A loader's thread may ask for memory meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # from here on all is as before, of which torch does not take care
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        raise (error.__context__ or error) from None  # what went wrong first
    return graph.replay


class StepGraph:
    """Takes a trainer's steps on batches of one size, once it has found that it may."""

    def __init__(self, trainer: "Trainer", record: Record = record):
        self.trainer, self.record = trainer, record
        self.batch: Batch | None = None  # where the graph reads
        self.replay: Callable[[], None] | None = None
        self.gradients: list[torch.Tensor | None] = []  # where the graph writes them

    def take(self, batch: Batch) -> bool:
        """Take a step, if this can. Collective; the first call prepares, and its batch is then of the size of all."""
        if self.batch is None:
            self.batch = Batch(*(torch.empty_like(tensor).copy_(tensor) for tensor in batch))
            self._prepare()
        if self.replay is None:
            return False
        self.trainer.enter("graph")
        for place, tensor in zip(self.batch, batch, strict=True):
            place.copy_(tensor)
        for parameter, gradient in zip(self.trainer.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.replay()
        return True

    def _step(self) -> None:
        assert self.batch is not None
        self.trainer.take(self.batch, self.trainer.config.batch_size, by_ddp=False)

    def _prepare(self) -> None:
        trainer, device = self.trainer, self.trainer.world.device
        totals = trainer.totals.clone()
        trainer.totals.zero_()  # which a skipped step may have made not a number
        before = _copies(self._state())
        on_gpu = device.type == "cuda"
        aside = torch.cuda.Stream(device) if on_gpu else None
        if aside:
            aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside) if aside else nullcontext():
            for _ in range(WARM_UP):
                self._step()
        if aside:
            torch.cuda.current_stream(device).wait_stream(aside)
        state = self._state()
        _put(before, state)
        assert self.batch is not None
        trainer.take(self.batch, trainer.config.batch_size)
        expected = _copies(state)
        _put(before, state)
        replay, why = None, ""
        try:
            replay = self.record(self._step)
            self.gradients = [parameter.grad for parameter in trainer.parameters]
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            for norm in trainer.norms:
                norm.moments.clear()  # of a step that was not finished
        if self._all(not why):  # else a replay would wait for ranks that have none
            assert replay
            replay()
            why = _difference(before, expected, state, TOLERANCE[trainer.config.all_reduce])
            _put(before, state)
            if self._all(not why):
                self.replay = replay
        trainer.totals.copy_(totals)
        if not self.replay and trainer.world.is_main:
            warn(f"steps are not launched as one CUDA graph ({why or 'another rank cannot'}): training is slower")

    def _all(self, well: bool) -> bool:
        """Whether all is well on all ranks. Collective."""
        world = self.trainer.world
        return not float(sum_over_ranks(torch.tensor([float(not well)], device=world.device), world))

    def _state(self) -> list[torch.Tensor]:
        """All that a step changes."""
        trainer = self.trainer
        counts = [trainer.totals, trainer.skipped, trainer.skipped_in_a_row, trainer.gradient_norm]
        return [*trainer.tensors().values(), *counts]


def _copies(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def _put(values: list[torch.Tensor], places: list[torch.Tensor]) -> None:
    for value, place in zip(values, places, strict=True):
        place.copy_(value)


def _difference(
    before: list[torch.Tensor], expected: list[torch.Tensor], found: list[torch.Tensor], tolerance: float
) -> str:
    """In words, what is wrong with a state that should be `expected`; nothing if nothing is."""
    for start, right, value in zip(before, expected, found, strict=True):
        change, apart = (right - start).double().abs().max(), (value - right).double().abs().max()
        if not apart <= tolerance * change:  # not a number is not alike either
            return f"it changed a tensor by up to {float(apart):.1e} beside {float(change):.1e}"
    return ""
