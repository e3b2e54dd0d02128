"""The ranks of a run, one of which flips a bit in its memory once.

    python -m dist_mnist.tools.drill.flipped NPROC FLIP [OPTIONS OF train]

This is `dist-mnist train --nproc=NPROC` plus FLIP, the JSON of a `Flip`, in the first start of the ranks.
"""

import os
import random
import runpy
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from dist_mnist.elastic.rendezvous import Nodes
from dist_mnist.elastic.torchrun import start_ranks, under_launcher
from dist_mnist.utils.schema import parse

if TYPE_CHECKING:
    import torch

    from dist_mnist.training.trainer import Trainer

GRADIENT = "gradient"  # the gradient of the rank's part of the batch, before the all-reduce
PARTS = ("model", "average", "optimizer", GRADIENT)
RESTARTS = 3


class Flip(Struct, frozen=True):
    """The bit to flip, and the moment."""

    part: str
    rank: int
    step: int
    before: bool  # before the computation of that step, or after it
    seed: int  # for the choice of tensor, element and bit

    @classmethod
    def drawn(cls, draw: random.Random, nproc: int, steps: int) -> "Flip":
        part, before = draw.choice(PARTS), draw.random() < 0.5
        return cls(part, draw.randrange(nproc), draw.randrange(steps), before, draw.randrange(2**32))


def main() -> None:
    """Start the ranks, or run as one of them."""
    nproc, flip, *options = sys.argv[1:]
    if not under_launcher():
        command = ["-m", "dist_mnist.tools.drill.flipped", *sys.argv[1:]]
        start_ranks(command, int(nproc), Nodes(), "flipped", 60, RESTARTS, ranks_listen=True)
        return
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    sys.argv[1:] = options
    _be_rank(parse(flip, Flip) if first_start else None)


def _be_rank(flip: Flip | None) -> None:
    from dist_mnist.training.trainer import Trainer

    if flip and int(os.environ["RANK"]) == flip.rank:
        Trainer.step = with_flip(Trainer.step, flip)  # type: ignore[method-assign]
    runpy.run_module("dist_mnist.train", run_name="__main__", alter_sys=True)


def with_flip(step: Callable[..., Any], flip: Flip) -> Callable[..., Any]:
    """Wrap `Trainer.step` so that it flips a bit before or after one step."""

    def disturbed(trainer: "Trainer", batch: object, number: int, *rest: object) -> Any:
        due = number == flip.step
        if due and flip.part == GRADIENT:
            _flip_gradient(trainer, flip)
        elif due and flip.before:
            _flip_state(trainer, flip)
        values = step(trainer, batch, number, *rest)
        if due and flip.part != GRADIENT and not flip.before:
            _flip_state(trainer, flip)
        return values

    return disturbed


def _flip_state(trainer: "Trainer", flip: Flip) -> None:
    draw = random.Random(flip.seed)
    tensors = {name: one for name, one in trainer.state_tensors().items() if name.startswith(f"{flip.part}/")}
    name = draw.choice(list(tensors))
    _tell(flip, name, flip_bit(tensors[name], draw))


def _flip_gradient(trainer: "Trainer", flip: Flip) -> None:
    draw = random.Random(flip.seed)
    name, parameter = draw.choice([one for one in trainer.model.named_parameters() if one[1].requires_grad])

    def change(gradient: "torch.Tensor") -> "torch.Tensor":
        handle.remove()
        changed = gradient.clone()
        _tell(flip, name, flip_bit(changed, draw))
        return changed

    handle = parameter.register_hook(change)


def flip_bit(tensor: "torch.Tensor", draw: random.Random) -> str:
    """Flip a random bit of a random element of a tensor; return which, in words."""
    import torch

    at = tuple(draw.randrange(side) for side in tensor.shape)
    number = tensor.detach()[at].reshape(1).view(torch.uint8)
    bit = draw.randrange(8 * len(number))
    number[bit // 8] ^= 1 << bit % 8
    return f"bit {bit} of element {at}"


def _tell(flip: Flip, name: str, which: str) -> None:
    when = "before" if flip.before else "after"
    print(f"flipped: {which} in {flip.part}'s {name}, rank {flip.rank}, {when} step {flip.step}", file=sys.stderr)


if __name__ == "__main__":
    main()
