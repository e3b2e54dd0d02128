"""Early stopping: a run ends before its length, by `--patience` or `--max-time`, on all ranks at the same step."""

from collections.abc import Callable, Mapping

from msgspec import convert
from msgspec.structs import replace

from dist_mnist.config.settings import Config
from dist_mnist.distributed.world import counted
from dist_mnist.run.plan import Plan
from dist_mnist.run.records import EarlyStoppingState, Ended
from dist_mnist.utils.clock import duration


def ended_early(config: Config, state: EarlyStoppingState) -> Ended | None:
    """Return why a run in this state ends before its length; None if it does not."""
    if 0 < config.patience <= state.validations_since_best:
        return Ended.PATIENCE
    return Ended.MAX_TIME if 0 < config.max_time <= state.training_s else None


class EarlyStopping:
    """Count validations without improvement (Prechelt: "Early stopping - but when?", 1998) and seconds of training.

    Each checkpoint holds both counts, and a resumed run continues from them. Validations have the same result on all
    ranks. Clocks differ: one rank's decides, and all agree on `time_is_up` (see `distributed.agreement`).

    Args:
        before: the `EarlyStoppingState` to continue from, as JSON.
        elapsed_s: returns this rank's seconds of training since then, validations included; None on ranks whose clock
            does not decide.
        say: called with the reason if the run ends early.
    """

    def __init__(
        self,
        plan: Plan,
        before: Mapping[str, object],
        elapsed_s: Callable[[], float] | None,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.config, self.total_steps, self._elapsed_s, self._say = plan.config, plan.total_steps, elapsed_s, say
        self._before = self._state = convert(before, EarlyStoppingState)
        self.time_is_up = 0 < self.config.max_time <= self._before.training_s  # the same on all ranks

    @property
    def reason(self) -> Ended | None:
        """Why the run ends now, before its length; None while it continues."""
        return ended_early(self.config, self._state) or (Ended.MAX_TIME if self.time_is_up else None)

    def conclude(self, steps_done: int, stopping: bool) -> Ended | None:
        """Return why the run ended after `steps_done` steps, and say so if early; None if `stopping` by a request."""
        if stopping or steps_done == self.total_steps:
            return None if stopping else Ended.LENGTH
        self._say(f"ended     after step {steps_done}, {self._why()}")
        return self.reason

    def _why(self) -> str:
        if self.reason is Ended.MAX_TIME:
            return f"by --max-time {duration(self.config.max_time)}"
        count, best = self._state.validations_since_best, self._state.best_accuracy or 0.0
        return (
            f"by --patience {self.config.patience}: {counted(count, 'validation')} without an accuracy above {best:.2%}"
        )

    def out_of_time(self) -> bool:
        """Whether `--max-time` has passed by this rank's clock."""
        return self._elapsed_s is not None and 0 < self.config.max_time <= self._training_s(self._elapsed_s)

    def validated(self, accuracy: float) -> None:
        """Add a validation's result, the same on all ranks. Only a higher accuracy is an improvement."""
        best, count = self._state.best_accuracy, self._state.validations_since_best + 1
        if best is None or accuracy > best:
            best, count = accuracy, 0
        self._state = replace(self._state, best_accuracy=best, validations_since_best=count)

    def state(self) -> EarlyStoppingState:
        """Return the state for a checkpoint; the seconds are up to date on the rank whose clock decides."""
        if self._elapsed_s is None:
            return self._state
        return replace(self._state, training_s=self._training_s(self._elapsed_s))

    def _training_s(self, elapsed_s: Callable[[], float]) -> float:
        return self._before.training_s + elapsed_s()
