"""Choices and results of `dist-mnist bench`, `drill`, `replay` and `sweep`, in a module without heavy imports."""

from enum import StrEnum

from msgspec import Struct

# The parts of a run that bench measures; each is a method of `Bench`.
BenchPart = StrEnum("BenchPart", ["INPUT", "LOOP", "PHASES", "EVALUATION", "SAVING", "STARTING", "SCALING"])
# The faults that a drill injects; ROT flips a bit of a checkpoint, FLIP one of a rank's memory.
Fault = StrEnum("Fault", {
    "KILL": "kill", "TERM": "term", "STOP": "stop", "TRUNCATE": "truncate", "ROT": "rot", "FLIP": "flip",
    "NO_ROOM": "no-room",
})  # fmt: skip

# Search methods: random; tree-structured Parzen estimator (TPE); random with successive halving.
SearchMethod = StrEnum("SearchMethod", ["RANDOM", "TPE", "HALVING"])


class Replayed(Struct, frozen=True, kw_only=True):
    """The result of replaying a segment."""

    start: int
    stop: int
    reproduced: bool
    expected_other_bits: str | None = None  # why the same bits could not be expected
    differs_from_step: int | None = None  # the first step known to differ
    first_different: str | None = None  # tensor, or "ledger"
    largest_difference: float | None = None  # between two elements, over that tensor and all later ones
    distance: float | None = None  # between the weights, as a fraction of the change that the segment made to them


class Choice(Struct, frozen=True, kw_only=True):
    """The checkpoints to replay: every `every`th of steps `first` to `last`."""

    first: int = 0
    last: int | None = None
    every: int = 1
