"""Storage of a search, shared by all workers: an Optuna study in a journal file.

Optuna's journal is a file of JSON lines to which every worker appends. Unlike SQLite it lets us choose the lock, so it
works wherever a run directory does, including NFS, and it holds no pickles. (`optuna-dashboard` can show it, too.)
"""

import json
import math
import random
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from msgspec import Struct, convert, to_builtins

from dist_mnist.tools.choices import SearchMethod
from dist_mnist.tools.sweep.words import Choices, Interval, Space
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.files import drop_partial_line, locked
from dist_mnist.utils.hashing import key_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

SETTINGS = "settings"  # study attribute with the settings of the search
POINT = "point"  # trial attribute with the values of a trial, written at once
DRAWS = 20  # attempts of the sampler to draw a new point, before one is drawn uniformly
ETA = 3  # reduction factor of successive halving: one of ETA trials is promoted to the next rung
UNGUARDED = "concurrent workers of a search are not safe here: run only one at a time"


class SearchSettings(Struct, frozen=True, kw_only=True):
    """The settings that identify a search and must stay the same when it is resumed; only --trials may change."""

    method: SearchMethod
    prune: bool
    seed: int
    space: Mapping[str, str]
    options: list[str]  # training options of every trial

    def check_same(self, started: "SearchSettings", folder: Path) -> None:
        """Raise a UserError that lists the differences from the settings `started` of the search in `folder`."""
        before, now = started._words(), self._words()
        different = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if different or self.options != started.options:
            shown = "; ".join(f"{before.get(name, 'none')} -> {now.get(name, 'none')}" for name in different)
            raise UserError(
                f"the search in {folder} was started with other settings ({shown or 'in another order'}): give the "
                "same command again, or another --run-dir"
            )

    def _words(self) -> dict[str, str]:
        """The command-line words of these settings, by name."""
        words = {
            "search": f"--search={self.method}",
            "search-seed": f"--search-seed={self.seed}",
            **({"prune": "--prune"} if self.prune else {}),
            **{name: f"{name}={possible}" for name, possible in self.space.items()},
        }
        for option in self.options:  # some may be repeated
            name = option.partition("=")[0].removeprefix("--no-")
            words[name] = " ".join(filter(None, (words.get(name), option)))
        return words


class Lock:
    """A reentrant lock on a file next to the journal, with the interface that Optuna expects."""

    def __init__(self, journal: Path):
        self.journal, self._depth, self._stack = journal, 0, ExitStack()

    def acquire(self) -> bool:
        """Wait for the lock, and remove an incomplete last line of the journal, which a full disk can leave."""
        if not self._depth:
            self._stack.enter_context(locked(self.journal.with_name(".journal.lock"), UNGUARDED))
            drop_partial_line(self.journal)
        self._depth += 1
        return True

    def release(self) -> None:
        """Release the lock, once released as often as acquired."""
        self._depth -= 1
        if not self._depth:
            self._stack.close()

    @contextmanager
    def held(self) -> "Iterator[None]":
        """Context manager: hold the lock."""
        self.acquire()
        try:
            yield
        finally:
            self.release()


def check_optuna() -> None:
    """Raise a UserError if Optuna cannot be imported."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(f"--search needs Optuna ({error}): pip install 'dist-mnist[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_study(lock: Lock, space: Space, settings: SearchSettings) -> "Study":
    """The study whose journal the lock is for, begun if it is not there.

    Raises:
        UserError: the search was begun with other settings, or the journal cannot be read.
    """
    from optuna import create_study
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = lock.journal
    with lock.held():
        try:
            storage = JournalStorage(JournalFileBackend(str(path), cast(Any, lock)))
            study = create_study(
                storage=storage,
                study_name="search",
                direction="maximize",
                load_if_exists=True,
                sampler=_sampler(space, settings),
                pruner=_pruner(settings),
            )
            _recorded(study)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not the journal of a search by Optuna ({type(error).__name__}: {error}): give another "
                "--run-dir"
            ) from None
    check_begun(study, settings, path.parent.parent)
    return study


def check_begun(study: "Study", settings: SearchSettings, folder: Path) -> bool:
    """Whether the search in `folder` has begun, its settings checked and recorded.

    Raises:
        UserError: it has, with other settings.
    """
    if started := _recorded(study):
        settings.check_same(started, folder)
    return started is not None


def _recorded(study: "Study") -> SearchSettings | None:
    return convert(study.user_attrs.get(SETTINGS), SearchSettings | None)


def begin(study: "Study", settings: SearchSettings) -> None:
    """Record the settings of a search, which from then on stay the same."""
    study.set_user_attr(SETTINGS, to_builtins(settings))


def distributions(space: Space) -> "dict[str, BaseDistribution]":
    """Return the space as Optuna's distributions."""
    return {name: _distribution(possible) for name, possible in space.items()}


def _distribution(possible: Interval | Choices) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(possible, tuple):
        return CategoricalDistribution(possible)
    if possible.whole:
        return IntDistribution(int(possible.low), int(possible.high))
    return FloatDistribution(possible.low, possible.high, log=possible.log)


def _pruner(settings: SearchSettings) -> Any:
    """Return the pruner: asynchronous successive halving (Li et al., "A system for massively parallel hyperparameter
    tuning", 2020) with the validations as resource, or the median rule (Golovin et al., "Google Vizier", 2017).
    """
    from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner

    if settings.method is SearchMethod.HALVING:
        return SuccessiveHalvingPruner(min_resource=1, reduction_factor=ETA)
    return MedianPruner() if settings.prune else NopPruner()


def _sampler(space: Space, settings: SearchSettings) -> "BaseSampler":
    """Return a stateless sampler: its draws are a function of the seed, the trial's number and the results so far.

    A search that is killed and resumed thus draws the same points. No point is drawn twice.
    TPE: Bergstra et al., "Algorithms for hyper-parameter optimization", 2011.
    """
    from optuna.samplers import BaseSampler, RandomSampler, TPESampler

    whole = distributions(space)

    class KeyedSampler(BaseSampler):
        def infer_relative_search_space(self, study: "Study", trial: "FrozenTrial") -> "dict[str, BaseDistribution]":
            return whole

        def sample_relative(self, study: "Study", trial: "FrozenTrial", search_space: object) -> dict[str, Any]:
            if POINT not in trial.system_attrs:  # else its worker was killed before it had written all values
                point = self._new_point(study, trial)
                study._storage.set_trial_system_attr(trial._trial_id, POINT, point)
                return point
            return dict(trial.system_attrs[POINT])

        def sample_independent(self, study: "Study", trial: "FrozenTrial", name: str, distribution: object) -> Any:
            raise AssertionError("all values are drawn together")

        def _new_point(self, study: "Study", trial: "FrozenTrial") -> dict[str, Any]:
            others = (other for other in study.get_trials(deepcopy=False) if other.number != trial.number)
            tried = {_as_key(other.system_attrs.get(POINT)) for other in others}
            for draw in range(DRAWS):
                point = self._draw(study, trial, draw)
                if _as_key(point) not in tried:
                    return point
            numbers = random.Random(key_bytes("search", settings.seed, trial.number))
            while _as_key(point := {name: _drawn(space[name], numbers) for name in whole}) in tried:
                continue
            return point

        def _draw(self, study: "Study", trial: "FrozenTrial", draw: int) -> dict[str, Any]:
            seed = int.from_bytes(key_bytes("search", settings.seed, trial.number, draw)[:4], "little")
            by_tpe = settings.method is SearchMethod.TPE
            sampler = TPESampler(seed=seed, constant_liar=True) if by_tpe else RandomSampler(seed)
            point = sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))
            missing = [name for name in whole if name not in point]
            return point | {name: sampler.sample_independent(study, trial, name, whole[name]) for name in missing}

    return KeyedSampler()


def _as_key(point: Mapping[str, object] | None) -> str:
    return json.dumps(point, sort_keys=True)


def _drawn(possible: Interval | Choices, numbers: random.Random) -> Any:
    if isinstance(possible, tuple):
        return numbers.choice(possible)
    if possible.whole:
        return numbers.randint(int(possible.low), int(possible.high))
    if possible.log:
        return math.exp(numbers.uniform(math.log(possible.low), math.log(possible.high)))
    return numbers.uniform(possible.low, possible.high)


def as_text(trial: "FrozenTrial | Trial") -> dict[str, str]:
    """Return a trial's values as command-line arguments; numbers round-trip bit for bit."""
    return {name: str(value) for name, value in trial.params.items()}
