"""Grid sweeps: a run for every combination of some settings, as in `dist-mnist sweep lr={0.05,0.1} seed={0,1,2}`.

slurm/sweep.sh takes the same arguments and makes the same run directories on a cluster.
"""

import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_mnist.config.overrides import as_options
from dist_mnist.config.settings import is_own_code
from dist_mnist.tools.sweep.hparams import shared_settings, write_columns
from dist_mnist.tools.sweep.process import Trainings
from dist_mnist.tools.sweep.words import is_distribution, named_values, options, with_partners
from dist_mnist.utils.errors import UserError, tell

Combination = dict[str, str]  # values by name, in the order of the names' first occurrence


def combinations(words: list[str]) -> list[Combination]:
    """Return all combinations of `NAME=VALUE` arguments; a name that occurs several times has several values.

    Raises:
        UserError: an argument does not have this form, or a combination occurs twice.
    """
    values = named_values(words)
    for name, each in values.items():
        if drawn := list(filter(is_distribution, each)):
            raise UserError(f"{name}={drawn[0]} is an interval to search: give --search, or plain values")
    found = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    name, times = Counter(map(folder, found)).most_common(1)[0]
    if times > 1:
        raise UserError(f"{name} is repeated: give each value once")
    return found


def folder(combination: Combination) -> str:
    """Return the name of a combination's run directory, such as `lr=0.05,seed=1`."""
    return ",".join(f"{name}={value}" for name, value in combination.items()).replace("/", "_")


class Sweep:
    """A grid of runs, each started as a separate `dist-mnist train`.

    Args:
        words: `NAME=VALUE` arguments to combine; they override `others`.
        parent: folder for the run directories.
        others: settings of all runs, by name.
    """

    def __init__(self, words: list[str], parent: Path, others: Mapping[str, Any]):
        found = combinations(words)
        shared = shared_settings(words, others)
        self.runs = {parent / folder(one): [*as_options(shared), *options(one)] for one in found}
        models = [one["model"] for one in found if "model" in one] or [str(others.get("model", ""))]
        self.own_models = sorted(set(filter(is_own_code, models)))
        self.columns = with_partners(found[0]) if shared.get("tensorboard", True) else set()
        self.parent, self.trainings = parent, Trainings()

    @property
    def asked_to_stop(self) -> bool:
        """Whether this process got a stop request."""
        return self.trainings.asked_to_stop

    def check(self) -> None:
        """Check the settings of every run before the first starts, by `--dry-run`.

        Raises:
            UserError: the settings of a run are invalid; its own output says why.
        """
        for path, of_run in self.runs.items():
            if self.trainings.train(path, [*of_run, "--dry-run"], subprocess.DEVNULL):
                raise UserError(f"{path} cannot be trained (see above), so nothing was started")

    def run(self) -> tuple[list[Path], list[Path]]:
        """Train the unfinished runs; return the finished and the failed ones. The current run gets stop requests."""
        self.trainings.listen()
        if self.columns:
            write_columns(self.parent, sorted(self.columns))
        failed = []
        for count, (path, of_run) in enumerate(self.runs.items(), start=1):
            if self.asked_to_stop:
                break
            if (path / "result.json").exists():
                continue
            tell(f"\n{path}, {count} of {len(self.runs)}", sys.stdout)
            if self.trainings.train(path, of_run) and not self.asked_to_stop:
                failed.append(path)
        return [path for path in self.runs if (path / "result.json").exists()], failed
