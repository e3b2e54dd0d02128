"""Speed of each part of a run, compared with its limit on this machine: `dist-mnist bench`.

Measurements of a part and its limit alternate and are compared within a round, because machines are shared and their
speed drifts. The limit is the work that cannot be avoided: copying the same bytes, a bare loop over one batch,
importing torch.
"""

import itertools
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_mnist.config.fields import SettingValue
from dist_mnist.config.overrides import as_options
from dist_mnist.config.settings import Config
from dist_mnist.data.coverage import Coverage
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.loader import Batch, Loader, collate, keep_on_device
from dist_mnist.data.sampler import GlobalOrder
from dist_mnist.distributed.cores import num_cores
from dist_mnist.distributed.device import resolve_precision, use_device
from dist_mnist.distributed.world import World
from dist_mnist.evaluation.evaluate import BATCH_SIZE, evaluate
from dist_mnist.model.build import build_model
from dist_mnist.model.classifier import Classifier, to_device
from dist_mnist.run.directory import RunDirectory
from dist_mnist.run.plan import Plan, prepare
from dist_mnist.tools.bare_loop import bare_inference, bare_training
from dist_mnist.tools.choices import BenchPart
from dist_mnist.tools.measure import TIMEOUT_S, Way, by_turns, first_step_s, rate, train
from dist_mnist.training.async_saver import AsyncSaver
from dist_mnist.training.trainer import OnPhase, Trainer
from dist_mnist.utils.versions import versions

BATCH_SIZES = {"cpu": (100, 256, 1000), "cuda": (256, 1024, 4096)}
TRAINED_IMAGES = {"cpu": 2_000, "cuda": 400_000}  # per measurement of the training loop
COPYING_S, COPIED_BYTES = 0.1, 1 << 26
MATRIX = {"cpu": 2048, "cuda": 8192}
SCALING_BATCH = {"cpu": 256, "cuda": 1024}  # batch size of one process
SCALING_STEPS = {"cpu": 40, "cuda": 1000}
GIVEN_ANEW = {"run_dir", "data_dir", "dataset", "threads", "batch_size", "epochs", "steps"}  # settings set per run


@dataclass(frozen=True)
class Figure:
    """The speed of a part and of its limit: medians in `unit`, and their ratio with its range over the rounds."""

    what: str
    unit: str
    value: float
    limit: str
    limit_value: float
    ratio: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class BenchResult:
    """All measurements, and the machine; `phases` maps each phase to its fraction of a step, None if not measured."""

    device: str
    cores: int
    threads: int
    versions: dict[str, str]
    recipe: str
    precision: str
    rounds: int
    matrix_gflop_per_s: float
    copied_gb_per_s: float
    figures: list[Figure]
    phases: dict[str, float] | None

    def as_json(self) -> dict[str, Any]:
        """Return JSON values in one flat object, versions included."""
        fields = asdict(self)
        return fields.pop("versions") | fields


class Bench:
    """Measurements on one device and data set; each `BenchPart` is a method that adds figures."""

    def __init__(
        self, given: Mapping[str, SettingValue], plan: Plan, world: World, rounds: int, tell: Callable[[str], object]
    ):
        self.given = {name: value for name, value in given.items() if name not in GIVEN_ANEW}
        precision = resolve_precision(plan.config.precision, world.device.type)
        self.plan = replace(plan, config=replace(plan.config, precision=precision))
        self.world, self.data, self.kind = world, plan.data, world.device.type
        self.rounds, self.tell = rounds, tell
        self.resident = keep_on_device(plan.config.data_on_device, plan.data.train, world.device)
        self.most = torch.cuda.device_count() if self.kind == "cuda" else num_cores()
        self.batch_sizes = [size for size in BATCH_SIZES[self.kind] if size <= len(plan.data.train)]
        self.figures: list[Figure] = []
        self.step_phases: dict[str, float] | None = None

    def compare(self, what: str, unit: str, part: Way, limit: str, bound: Way) -> None:
        """Measure a part of a run and its limit in alternation, and add the figure."""
        self.tell(what)
        mine, other = by_turns({what: part, limit: bound}, self.rounds, reference=limit)
        ratio = (mine.ratio, mine.lowest, mine.highest)
        self.figures.append(Figure(what, unit, mine.value, limit, other.value, *ratio))

    def input(self) -> None:
        """Measure the input pipeline alone, on the host."""
        for size in self.batch_sizes:
            batches = partial(rate, partial(self._batches, size), COPYING_S)
            copies = partial(rate, partial(_copies, self.data.train.images), COPYING_S)
            self.compare(f"input, batch {size}", "images/s", batches, "a memory copy", copies)

    def _batches(self, batch_size: int) -> Iterator[int]:
        order = GlobalOrder(num_samples=len(self.data.train), global_batch_size=batch_size)
        batches = Loader(self.data.train, order, range(1 << 40), replace(self.world, device=torch.device("cpu")))
        for _, size in zip(batches, sizes_of(order), strict=False):
            yield size

    def loop(self) -> None:
        """Measure the training loop of one process, compared with plain PyTorch on the same batch every step."""
        for size in self.batch_sizes:
            ways = partial(self.step_rate, size), partial(self.bare_rate, size)
            self.compare(f"training, batch {size}", "images/s", ways[0], "a bare loop", ways[1])

    def _trainer(self, config: Config, on_phase: OnPhase = lambda phase: None) -> Trainer:
        return Trainer(config, self.world, self._model(config), 1 << 40, on_phase)

    def _model(self, config: Config) -> Classifier:
        train = self.data.train
        return build_model(config, train.image_shape, self.data.num_classes, *train.pixel_scaling(config.pixels))

    def step_rate(self, batch_size: int, on_phase: OnPhase = lambda phase: None) -> float:
        """Return the images per second of steps as in `train.train`."""
        config = replace(self.plan.config, batch_size=batch_size)
        trainer, train = self._trainer(config, on_phase), self.data.train
        order = GlobalOrder(num_samples=len(train), global_batch_size=batch_size, partners=config.mixes)
        coverage = Coverage(order, self.world)
        batches = iter(Loader(train, order, range(1 << 40), self.world, resident=self.resident))

        def step(number: int) -> None:
            on_phase("data")
            batch = next(batches)
            trainer.step(batch, number, order.epoch(number), len(batch.ids))
            coverage.add(batch.ids)
            on_phase("")

        seconds = self._seconds(step, batch_size)
        trainer.close()  # releases its memory
        return batch_size / seconds

    def bare_rate(self, batch_size: int) -> float:
        """Return the images per second of plain PyTorch: forward, loss, backward and optimizer on a resident batch."""
        config = replace(self.plan.config, batch_size=batch_size)
        batch = self._batch(self.data.train, batch_size)
        step = bare_training(to_device(self._model(config), self.world.device), config, batch)
        return batch_size / self._seconds(step, batch_size)

    def inference_rate(self) -> float:
        """Return the images per second of plain PyTorch: logits of one resident batch of the evaluation's size."""
        network, test = to_device(self._model(self.plan.config), self.world.device).eval(), self.data.test
        images = self._batch(test, min(BATCH_SIZE[self.kind], len(test))).images
        return len(images) / self._seconds(bare_inference(network, images), len(images))

    def _batch(self, dataset: IdxDataset, size: int) -> Batch:
        return Batch(*(part.to(self.world.device) for part in collate(dataset.__getitems__(np.arange(size)))))

    def _seconds(self, work: Callable[[int], object], images: int) -> float:
        """Return the mean seconds of `work` on `images` images, after a few warm-up calls."""
        warm_up, times = 3, max(4, TRAINED_IMAGES[self.kind] // images)
        for number in range(warm_up):
            work(number)
        self._wait()
        began = time.perf_counter()
        for number in range(warm_up, warm_up + times):
            work(number)
        self._wait()
        return (time.perf_counter() - began) / times

    def _wait(self) -> None:
        if self.kind == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(self.world.device)

    def phases(self) -> None:
        """Measure the fraction of each phase in a training step at the run's own batch size."""
        self.tell("phases")
        clock = _Clock(self._wait)
        self.step_rate(self.plan.config.batch_size, clock.enter)
        whole = sum(clock.seconds.values())
        self.step_phases = {phase: seconds / whole for phase, seconds in clock.seconds.items()}

    def evaluation(self) -> None:
        """Measure an evaluation of the test set, compared with inference on the same batch every step."""
        network, test = to_device(self._model(self.plan.config), self.world.device).eval(), self.data.test

        def whole() -> float:
            began = time.perf_counter()
            evaluate(network, test, self.data.num_classes, self.world)
            return len(test) / (time.perf_counter() - began)

        self.compare("evaluation", "images/s", whole, "bare inference", self.inference_rate)

    def saving(self) -> None:
        """Measure how long a save stalls training, compared with the time of a step."""
        size = self.plan.config.batch_size
        with tempfile.TemporaryDirectory() as folder:
            plan = replace(self.plan, run=RunDirectory(Path(folder) / "run"))
            state_arrays = self._trainer(plan.config).state_arrays
            with plan.run.owned(), closing(AsyncSaver(plan.run.checkpoints, state_arrays, plan.config)) as saver:

                def stall_ms() -> float:
                    began = time.perf_counter()
                    saver.save(plan.checkpoint_info(1, [0] * 4, [0.0] * 3))
                    stalled_s = time.perf_counter() - began
                    saver.finish()
                    return stalled_s * 1e3

                def step_ms() -> float:
                    return 1e3 * size / self.step_rate(size)

                self.compare("stall of a save", "ms", stall_ms, f"a step of {size} images", step_ms)

    def starting(self) -> None:
        """Measure the time from process start to the first step, compared with importing torch."""
        options = self._options()
        self.compare("start to first step", "ms", lambda: 1e3 * first_step_s(*options), "import torch", _import_ms)

    def _options(self, **own: int) -> list[str]:
        """Return command-line options for a run with the given settings and `own`."""
        where: dict[str, SettingValue] = {"data_dir": self.plan.folder, "device": self.kind, "validation_fraction": 0.0}
        return as_options(self.given | where | own)

    def scaling(self) -> None:
        """Measure several processes, which share the cores or have a GPU each, compared with one process."""
        one, on_gpus = SCALING_BATCH[self.kind], self.kind == "cuda"
        for nproc in [2**power for power in range(1, self.most.bit_length()) if 2**power <= self.most]:
            times = nproc if on_gpus else 1
            limit = f"{nproc} x one process" if on_gpus else f"one process, {self.most} threads"
            several, single = partial(self._run_rate, nproc, one * times), partial(self._run_rate, 1, one, times)
            self.compare(f"{nproc} processes, batch {one * times}", "images/s", several, limit, single)

    def _run_rate(self, nproc: int, batch_size: int, times: int = 1) -> float:
        """Return the images per second in the second half of a whole run, multiplied by `times`."""
        steps = SCALING_STEPS[self.kind]
        options = self._options(steps=2 * steps, log_every=steps, batch_size=batch_size)
        return (train(*options, nproc=nproc)[-1].images_per_s or 0.0) * times

    def machine(self) -> tuple[float, float]:
        """Return the machine's GFLOP/s in a matrix product at the run's precision, and its GB/s in a memory copy."""
        size, device = MATRIX[self.kind], self.world.device
        dtype = torch.bfloat16 if self.plan.config.precision == "bf16" else torch.float32
        one, other = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
        numbers = torch.ones(1 << 26, device=device)
        target = torch.empty_like(numbers)
        least = TRAINED_IMAGES[self.kind]  # so that `_seconds` repeats only a few times
        product_s = min(self._seconds(lambda _: one @ other, least) for _ in range(3))
        copy_s = min(self._seconds(lambda _: target.copy_(numbers), least) for _ in range(3))
        return 2 * size**3 / product_s / 1e9, numbers.nbytes / copy_s / 1e9


def sizes_of(order: GlobalOrder) -> Iterator[int]:
    """Yield the sizes of all batches, epoch after epoch; the length of a tensor would cost half a microsecond each."""
    return itertools.cycle(order.sizes(range(order.steps_per_epoch)))


class _Clock:
    """Accumulates the time spent in each phase."""

    def __init__(self, wait: Callable[[], None]):
        self.wait, self.phase, self.since = wait, "", 0.0
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def enter(self, phase: str) -> None:
        self.wait()
        now = time.perf_counter()
        if self.phase:
            self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now


def bench(
    given: Mapping[str, SettingValue],
    parts: Sequence[BenchPart],
    rounds: int,
    tell: Callable[[str], object] = lambda what: None,
) -> BenchResult:
    """Measure `parts`, which are methods of `Bench`, in `rounds` rounds.

    `tell` is called with the name of each measurement before it starts.

    Raises:
        UserError: settings or data are invalid.
    """
    plan = prepare(given, 1)
    world = use_device(World.from_environment().alone(), plan.config.device, plan.config.threads)
    bench = Bench(given, plan, world, rounds, tell)
    matrix_gflop_per_s, copied_gb_per_s = bench.machine()
    for part in parts:
        getattr(bench, part)()
    return BenchResult(
        device=str(world), cores=num_cores(), threads=torch.get_num_threads(), versions=versions(),
        recipe=plan.config.recipe, precision=bench.plan.config.precision, rounds=rounds,
        matrix_gflop_per_s=matrix_gflop_per_s, copied_gb_per_s=copied_gb_per_s, figures=bench.figures,
        phases=bench.step_phases,
    )  # fmt: skip


def _import_ms() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, timeout=TIMEOUT_S)
    return 1e3 * (time.perf_counter() - began)


def _copies(images: np.ndarray) -> Iterator[int]:
    """Copy images of the mapped file, up to COPIED_BYTES, to other memory by plain memcpy; yield their number."""
    images = images[: max(1, COPIED_BYTES // images[:1].nbytes)]
    target = np.empty_like(images)
    while True:
        np.copyto(target, images)
        yield len(images)
