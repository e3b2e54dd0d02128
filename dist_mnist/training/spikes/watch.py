"""Detection of spikes: steps whose loss or gradient norm is far above that of recent steps."""

import numpy as np
import torch

from dist_mnist.data.sampler import GlobalOrder
from dist_mnist.distributed.collectives import sum_over_ranks
from dist_mnist.distributed.world import World
from dist_mnist.utils.errors import short, warn

WINDOW = 100  # recent steps that a step is compared with
FEWEST = 50  # recent steps needed for a comparison
DEVIATIONS = 8.0  # threshold above the median of the logarithms, in standard deviations
LEAST_DEVIATION = 0.15  # of the logarithms: where values hardly vary, a tenth more is no spike
AS_NORMAL = 1.4826  # standard deviation of a normal distribution / median absolute deviation (MAD)
TOLD = 3  # warnings; further spikes are only counted
KEPT = 1024  # steps whose values are kept on the device
LONGEST_LIST = 2000  # characters of sample ids


class RecentSteps:
    """Median and MAD of the logarithms of recent steps' loss and gradient norm.

    Both values are positive, and late in a run, when most batches have no wrong prediction left, they spread over
    orders of magnitude: a logarithmic scale covers that. Spikes themselves hardly move a median.
    """

    def __init__(self) -> None:
        self.logarithms = np.zeros((0, 2))

    def spikes(self, values: np.ndarray) -> np.ndarray:
        """Return the indices of those of the next n steps, with loss and gradient norm (n, 2), that are spikes.

        Steps with values that are not finite are ignored; `Trainer.check_finite` reports them.
        """
        found = [np.zeros(0, np.int64)]
        finite = np.flatnonzero(np.isfinite(values).all(1))
        for steps in np.split(finite, range(WINDOW, len(finite), WINDOW)):
            logarithms = np.log(np.maximum(values[steps], np.finfo(np.float64).tiny))
            if len(self.logarithms) >= FEWEST:
                found.append(steps[(logarithms > self._bounds()).any(1)])
            self.logarithms = np.concatenate([self.logarithms, logarithms])[-WINDOW:]
        return np.concatenate(found)

    def describe(self, loss: float, gradient_norm: float) -> str:
        """Describe a step's values and the medians of recent steps."""
        usual_loss, usual_norm = np.exp(np.median(self.logarithms, 0))
        return f"loss {loss:.4g}, usually {usual_loss:.4g}; gradient norm {gradient_norm:.4g}, usually {usual_norm:.4g}"

    def _bounds(self) -> np.ndarray:
        medians = np.median(self.logarithms, 0)
        deviations = AS_NORMAL * np.median(np.abs(self.logarithms - medians), 0)
        return medians + DEVIATIONS * np.maximum(deviations, LEAST_DEVIATION)


class SpikeWatch:
    """Keep each step's values on the device, look for spikes now and then, and warn with their sample ids.

    Only whole batches are considered: the values of an epoch's last, shorter one vary more.

    Args:
        step: number of steps done before.
    """

    def __init__(self, order: GlobalOrder, world: World, step: int = 0):
        self.order, self.world, self.first = order, world, step
        self.rows = torch.zeros(KEPT, 4, dtype=torch.float64, device=world.device)
        self.steps, self.found = 0, 0
        self.recent = RecentSteps()

    def add(self, values: torch.Tensor) -> None:
        """Keep a step's values (see `Trainer.step`), (4,) float64. Collective; synchronises once in `KEPT` steps."""
        self.rows[self.steps].copy_(values)
        self.steps += 1
        if self.steps == KEPT:
            self.look()

    def look(self) -> int:
        """Check the steps since the last call, and warn; return the number of spikes so far, on rank 0. Collective."""
        rows = self.rows[: self.steps]
        loss_sums = sum_over_ranks(rows[:, 0].contiguous(), self.world)
        if self.world.is_main and self.steps:
            self._judge(torch.stack([loss_sums, rows[:, 3]], 1).cpu().numpy())
        self.first, self.steps = self.first + self.steps, 0
        return self.found

    def _judge(self, values: np.ndarray) -> None:
        order = self.order
        whole = [i for i in range(len(values)) if order.batch_size(self.first + i) == order.global_batch_size]
        values = values[whole] / (order.global_batch_size, 1)
        for i in self.recent.spikes(values):
            self.found += 1
            if self.found <= TOLD:
                self._tell(self.first + whole[i], *values[i].tolist())

    def _tell(self, step: int, loss: float, gradient_norm: float) -> None:
        [ids] = self.order.ids(range(step, step + 1))
        last = " (further spikes are only counted, in metrics.jsonl)" if self.found == TOLD else ""
        warn(
            f"step {step} is a spike: {self.recent.describe(loss, gradient_norm)}; --audit-spikes would compute it "
            f"again. Sample ids in the training split: {short(', '.join(map(str, ids)), LONGEST_LIST)}{last}"
        )
