"""What `dist-mnist bench` and `dist-mnist drill` can be asked for, apart from their heavy imports."""

from enum import StrEnum


class BenchPart(StrEnum):
    """What is measured; each is a method of `Bench`."""

    INPUT = "input"
    LOOP = "loop"
    PHASES = "phases"
    EVALUATION = "evaluation"
    SAVING = "saving"
    STARTING = "starting"
    SCALING = "scaling"
    MODEL = "model"


class Fault(StrEnum):
    """What a drill does to a run."""

    KILL = "kill"
    TERM = "term"
    STOP = "stop"
    TRUNCATE = "truncate"
    FLIP = "flip"
    NO_ROOM = "no-room"
