"""Runs of every combination of some settings, one after the other: `dist-mnist sweep lr={0.05,0.1} seed={0,1,2}`.

The same words, and the same run directories, as slurm/sweep.sh has for a cluster.
"""

import itertools
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_mnist.config.overrides import as_options
from dist_mnist.config.settings import PARTNERS, is_own_code
from dist_mnist.utils.errors import UserError

Combination = tuple[tuple[str, str], ...]  # names and values, in the order in which names were first given

NOT_SWEPT = ("run_dir", "dry_run", "config", "print_config", "help")  # what is no setting of a training


def combinations(words: list[str]) -> list[Combination]:
    """What `NAME=VALUE` words combine to; a name that is given several times has several values.

    Raises:
        UserError: a word is not of that form, or a combination would be there twice.
    """
    values: dict[str, list[str]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_")
        if not equals or not name.isidentifier():
            raise UserError(f"{word} is not NAME=VALUE, such as lr=0.05")
        if name in NOT_SWEPT:
            raise UserError(f"{word}: {name} is no setting that runs can differ in; each has a folder of its own")
        values.setdefault(name, []).append(value)
    if not values:
        raise UserError("no settings to combine were given, such as seed={0,1,2}")
    found = [tuple(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    name, times = Counter(map(folder, found)).most_common(1)[0]
    if times > 1:
        raise UserError(f"{name} is there twice: give each value once")
    return found


def folder(combination: Combination) -> str:
    """The name of a combination's run directory: `lr=0.05,seed=1`."""
    return ",".join(f"{name}={value}" for name, value in combination).replace("/", "_")


def options(combination: Combination) -> list[str]:
    """A combination as options of training."""
    return as_options({name: {"true": True, "false": False}.get(value, value) for name, value in combination})


class Sweep:
    """Trainings that are processes of their own, as `dist-mnist train` makes them.

    Args:
        words: what is combined, `NAME=VALUE`; they win over `others`.
        parent: the folder for the run directories.
        others: settings of all trainings, by name.
    """

    def __init__(self, words: list[str], parent: Path, others: Mapping[str, Any]):
        found = combinations(words)
        swept = {name for name, _ in found[0]}
        swept |= {other for name, other in PARTNERS if name in swept}
        shared = as_options({name: value for name, value in others.items() if name not in swept})
        self.runs = {parent / folder(one): [*shared, *options(one)] for one in found}
        models = [value for one in found for name, value in one if name == "model"] or [str(others.get("model", ""))]
        self.own_models = sorted(set(filter(is_own_code, models)))
        self.asked_to_stop = False
        self.running: subprocess.Popen | None = None

    def check(self) -> None:
        """Let every training check its settings before the first begins.

        Raises:
            UserError: some do not fit; the first to say so has said why.
        """
        for path in self.runs:
            if self._train(path, "--dry-run", stdout=subprocess.DEVNULL):
                raise UserError(f"{path} cannot be trained, so nothing was started")

    def run(self) -> tuple[list[Path], list[Path]]:
        """Train what is not finished; gives the finished and the failed. A request to stop is passed on to the run."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        failed = []
        for count, path in enumerate(self.runs, start=1):
            if self.asked_to_stop:
                break
            if (path / "result.json").exists():
                continue
            print(f"\n{path}, {count} of {len(self.runs)}", flush=True)
            if self._train(path) and not self.asked_to_stop:
                failed.append(path)
        return [path for path in self.runs if (path / "result.json").exists()], failed

    def _train(self, path: Path, *more: str, stdout: int | None = None) -> int:
        command = [sys.executable, "-m", "dist_mnist", "train", f"--run-dir={path}", *self.runs[path], *more]
        # In a group of its own: an interrupt from the keyboard comes to it once, from here.
        with subprocess.Popen(command, stdout=stdout, process_group=0) as self.running:
            return self.running.wait()

    def _on_signal(self, *_: object) -> None:
        self.asked_to_stop = True
        if self.running:
            self.running.send_signal(signal.SIGTERM)
