"""What `dist-mnist bench`, `drill`, `replay` and `sweep` can be asked for, apart from heavy imports."""

from enum import StrEnum

from msgspec import Struct

# Parts of a run that are measured; each is a method of `Bench`.
BenchPart = StrEnum("BenchPart", ["INPUT", "LOOP", "PHASES", "EVALUATION", "SAVING", "STARTING", "SCALING"])
# What a drill does to a run; to rot is to change a bit of a checkpoint, to flip one of a rank's memory.
Fault = StrEnum("Fault", {
    "KILL": "kill", "TERM": "term", "STOP": "stop", "TRUNCATE": "truncate", "ROT": "rot", "FLIP": "flip",
    "NO_ROOM": "no-room",
})  # fmt: skip

# How a search chooses: at random; by a tree-structured Parzen estimator; at random, and halving the trials as they go.
SearchMethod = StrEnum("SearchMethod", ["RANDOM", "TPE", "HALVING"])


class Replayed(Struct, frozen=True, kw_only=True):
    """What came of a segment."""

    start: int
    stop: int
    reproduced: bool
    expected_other_bits: str | None = None  # why the same bits could not be expected
    differs_from_step: int | None = None  # the first step at which a difference is known
    first_different: str | None = None  # tensor, or "ledger"
    largest_difference: float | None = None  # between two numbers, in that tensor or any later one
    distance: float | None = None  # between the weights, as a fraction of the way that they went


class Choice(Struct, frozen=True, kw_only=True):
    """Which checkpoints are replayed: those of steps `first` to `last`, of these every `every`th."""

    first: int = 0
    last: int | None = None
    every: int = 1
