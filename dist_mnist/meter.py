"""What is measured while training: loss, accuracy and speed between log lines."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from dist_mnist.data.order import GlobalOrder
from dist_mnist.distributed import World, sum_over_ranks
from dist_mnist.step import Trainer


class Meter:
    """Reads a trainer's totals now and then. Time in pauses (validation, saving) does not count as training."""

    def __init__(self, trainer: Trainer, order: GlobalOrder, world: World):
        self.trainer, self.order, self.world = trainer, order, world
        self.seconds, self.running_since = 0.0, time.perf_counter()

    def read(self, steps_done: int) -> dict[str, float]:
        """Means over the steps since the last reading, over all ranks; then begins anew. Collective."""
        loss, correct, images = sum_over_ranks(self.trainer.totals, self.world).tolist()
        self.trainer.totals.zero_()
        seconds, self.seconds = self.seconds, 0.0
        return {
            "step": steps_done,
            "epoch": steps_done / self.order.steps_per_epoch,
            "loss": loss / images,
            "accuracy": correct / images,
            "learning_rate": self.trainer.optimizer.param_groups[0]["lr"],
            "gradient_norm": float(self.trainer.gradient_norm),
            "skipped_steps": self.trainer.skipped_steps,
            "images_per_s": images / seconds,
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for the time of a `with` block."""
        self.trainer.wait()
        self.seconds += time.perf_counter() - self.running_since
        yield
        self.running_since = time.perf_counter()
