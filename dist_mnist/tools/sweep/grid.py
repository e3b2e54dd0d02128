"""Runs of every combination of some settings, one after the other: `dist-mnist sweep lr={0.05,0.1} seed={0,1,2}`.

The same words, and the same run directories, as slurm/sweep.sh has for a cluster.
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
from dist_mnist.tools.sweep.hparams import with_event_files, write_columns
from dist_mnist.tools.sweep.process import Trainings
from dist_mnist.tools.sweep.words import is_distribution, named_values, options, with_partners
from dist_mnist.utils.errors import UserError, tell

Combination = dict[str, str]  # values by name, in the order in which names were first given


def combinations(words: list[str]) -> list[Combination]:
    """What `NAME=VALUE` words combine to; a name that is given several times has several values.

    Raises:
        UserError: a word is not of that form, or a combination would be there twice.
    """
    values = named_values(words)
    for name, each in values.items():
        if drawn := list(filter(is_distribution, each)):
            raise UserError(f"{name}={drawn[0]} is for a search, which draws values: give --search, or plain values")
    found = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    name, times = Counter(map(folder, found)).most_common(1)[0]
    if times > 1:
        raise UserError(f"{name} is there twice: give each value once")
    return found


def folder(combination: Combination) -> str:
    """The name of a combination's run directory: `lr=0.05,seed=1`."""
    return ",".join(f"{name}={value}" for name, value in combination.items()).replace("/", "_")


class Sweep:
    """Trainings that are processes of their own, as `dist-mnist train` makes them.

    Args:
        words: what is combined, `NAME=VALUE`; they win over `others`.
        parent: the folder for the run directories.
        others: settings of all trainings, by name.
    """

    def __init__(self, words: list[str], parent: Path, others: Mapping[str, Any]):
        found = combinations(words)
        swept = with_partners(found[0])
        shared = {name: value for name, value in others.items() if name not in swept}
        shared = with_event_files(shared, named_values(words).get("recipe"))
        self.runs = {parent / folder(one): [*as_options(shared), *options(one)] for one in found}
        models = [one["model"] for one in found if "model" in one] or [str(others.get("model", ""))]
        self.own_models = sorted(set(filter(is_own_code, models)))
        self.columns = swept if shared.get("tensorboard", True) else set()
        self.parent, self.trainings = parent, Trainings()

    @property
    def asked_to_stop(self) -> bool:
        """Whether a stop request has come."""
        return self.trainings.asked_to_stop

    def check(self) -> None:
        """Let every training check its settings before the first begins.

        Raises:
            UserError: some do not fit; the first to say so has said why.
        """
        for path, of_run in self.runs.items():
            if self.trainings.train(path, [*of_run, "--dry-run"], subprocess.DEVNULL):
                raise UserError(f"{path} cannot be trained, so nothing was started")

    def run(self) -> tuple[list[Path], list[Path]]:
        """Train what is not finished; gives the finished and the failed. A request to stop is passed on to the run."""
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
