"""What `dist-mnist bench` and `dist-mnist drill` can be asked for, apart from their heavy imports."""

from enum import StrEnum

# Parts of a run that are measured; each is a method of `Bench`.
BenchPart = StrEnum("BenchPart", ["INPUT", "LOOP", "PHASES", "EVALUATION", "SAVING", "STARTING", "SCALING"])
# What a drill does to a run.
Fault = StrEnum(
    "Fault",
    {"KILL": "kill", "TERM": "term", "STOP": "stop", "TRUNCATE": "truncate", "FLIP": "flip", "NO_ROOM": "no-room"},
)
