"""How fast each part of a run is on this machine, beside what the machine could do: `dist-mnist bench`.

Each part is measured several times, by turns with its limit, and compared within a round, because machines are shared
and their speed drifts. The limit of a part is the least that has to be done in any case: a copy of the same bytes, a
bare loop over one batch, the import of torch.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dist_mnist.config.overrides import as_options
from dist_mnist.config.settings import Config
from dist_mnist.data.coverage import Coverage
from dist_mnist.data.loader import Loader, keep_on_device
from dist_mnist.data.sampler import GlobalOrder
from dist_mnist.distributed.device import autocast, num_cores, resolve_precision, use_device
from dist_mnist.distributed.world import World
from dist_mnist.evaluation.evaluate import BATCH_SIZE, evaluate
from dist_mnist.model.cnn import CNN, build_model, to_device
from dist_mnist.run.directory import RunDirectory
from dist_mnist.run.plan import Plan, prepare
from dist_mnist.tools.doctor import SIZES
from dist_mnist.tools.scaling import Link, Work, all_reduce_s, batch_size_for, efficiency, link_on_paper
from dist_mnist.training.async_saver import AsyncSaver
from dist_mnist.training.optim import make_optimizer
from dist_mnist.training.trainer import Trainer
from dist_mnist.utils.versions import versions

BATCH_SIZES = {"cpu": (100, 256, 1000), "cuda": (256, 1024, 4096)}
TRAINED_IMAGES = {"cpu": 2_000, "cuda": 400_000}  # in one measurement of the training loop
COPYING_S, COPIED_BYTES = 0.1, 1 << 26
MATRIX = {"cpu": 2048, "cuda": 8192}
SCALING_BATCH = {"cpu": 256, "cuda": 1024}  # of one process
SCALING_STEPS = {"cpu": 40, "cuda": 1000}
TIMEOUT_S = 600

# For the model of many GPUs. Where none is at hand to be measured: what an H100 took with recipe `default`. Half of a
# step is counted on to hide the all-reduce: the dense layers, which have nearly all of the gradient, come first in the
# backward pass.
GPU_ON_PAPER: dict[str, Any] = {"fixed_s": 5e-4, "image_s": 1.5e-6}
GPU_HIDES = 0.5
CLUSTERS = (8, 64, 512)
GPU_BATCHES = (256, 1024, 4096)

Pair = tuple[float, float]  # a part's value, and its limit's


class Figure(NamedTuple):
    """One thing to measure: its name, the unit of its values (images/s or ms), its limit in words, and how."""

    what: str
    unit: str
    limit: str
    measure: Callable[[], Pair]

    def summary(self, rounds: int) -> dict[str, Any]:
        """Measure so often; medians, and the value as a multiple of its limit with its range over the rounds."""
        pairs = [self.measure() for _ in range(rounds)]
        values, limits = zip(*pairs, strict=True)
        ratios = [value / limit for value, limit in pairs]
        return {
            "what": self.what, "unit": self.unit, "value": statistics.median(values), "limit": self.limit,
            "limit_value": statistics.median(limits), "ratio": statistics.median(ratios), "lowest": min(ratios),
            "highest": max(ratios),
        }  # fmt: skip


class Bench:
    """What is measured, on one device and one data set."""

    def __init__(self, given: Mapping[str, Any], plan: Plan, world: World):
        own = (
            "run_dir",
            "data_dir",
            "dataset",
            "threads",
            "batch_size",
            "epochs",
            "steps",
        )  # are given to each run anew
        self.given = {name: value for name, value in given.items() if name not in own}
        precision = resolve_precision(plan.config.precision, world.device.type)
        self.plan = replace(plan, config=replace(plan.config, precision=precision))
        self.world, self.data, self.kind = world, plan.data, world.device.type
        self.resident = keep_on_device(plan.config.data_on_device, plan.data.train, world.device)
        self.most = torch.cuda.device_count() if self.kind == "cuda" else num_cores()
        self.batch_sizes = [size for size in BATCH_SIZES[self.kind] if size <= len(plan.data.train)]

    def input(self) -> Iterator[Figure]:
        """The input path alone, on the host."""
        for size in self.batch_sizes:
            yield Figure(
                f"input, batch {size}", "images/s", "a memory copy",
                partial(self._input, size),
            )  # fmt: skip

    def _input(self, size: int) -> Pair:
        return _rate(self._batches(size)), _rate(_copies(self.data.train.images))

    def _batches(self, batch_size: int) -> Iterator[int]:
        order = GlobalOrder(num_samples=len(self.data.train), global_batch_size=batch_size)
        for batch in Loader(self.data.train, order, range(1 << 40), replace(self.world, device=torch.device("cpu"))):
            yield len(batch.labels)

    def loop(self) -> Iterator[Figure]:
        """The training loop of one process, against the network's work on one batch over and over."""
        for size in self.batch_sizes:
            yield Figure(
                f"training, batch {size}", "images/s", "a bare loop",
                partial(self._loop, size),
            )  # fmt: skip

    def _loop(self, size: int) -> Pair:
        return size / self._step_s(size), size / self._bare_s(size)

    def _trainer(self, config: Config, enter: Callable[[str], object] = lambda phase: None) -> Trainer:
        return Trainer(config, self.world, self._model(config), 1 << 40, enter)

    def _model(self, config: Config) -> CNN:
        train = self.data.train
        return build_model(config, train.image_shape, self.data.num_classes, *train.pixel_scaling(config.pixels))

    def _step_s(self, batch_size: int, enter: Callable[[str], object] = lambda phase: None) -> float:
        """Seconds of a step as `train.train` takes it."""
        config = replace(self.plan.config, batch_size=batch_size)
        trainer, train = self._trainer(config, enter), self.data.train
        order = GlobalOrder(num_samples=len(train), global_batch_size=batch_size)
        ledger = Coverage(order, self.world)
        batches = iter(Loader(train, order, range(1 << 40), self.world, resident=self.resident))

        def step(number: int) -> None:
            enter("data")
            batch = next(batches)
            trainer.step(batch, number, order.epoch(number), len(batch.labels))
            ledger.add(batch.ids)
            enter("")

        seconds = self._seconds(step, batch_size)
        trainer.close()  # with the memory that it keeps
        return seconds

    def _bare_s(self, batch_size: int) -> float:
        """Seconds of plain PyTorch: forward, loss, backward and optimizer on one batch that is there."""
        config = replace(self.plan.config, batch_size=batch_size)
        model = to_device(self._model(config), self.world.device)
        optimizer = make_optimizer(model, config, torch.tensor(1e-3, device=self.world.device))
        samples = self.data.train.__getitems__(np.arange(batch_size))
        images = torch.from_numpy(samples.images).permute(0, 3, 1, 2).to(self.world.device)
        labels = torch.from_numpy(samples.labels).to(self.world.device)
        cast = autocast(config.precision, self.world.device)

        def step(_: int) -> None:
            optimizer.zero_grad()
            with cast():
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

        return self._seconds(step, batch_size)

    def _seconds(self, work: Callable[[int], object], images: int) -> float:
        """Mean seconds of some work on `images` images, after it has been done a few times."""
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

    def phases(self) -> dict[str, float]:
        """The share of each phase in a training step at the run's own batch size."""
        clock = _Clock(self._wait)
        self._step_s(self.plan.config.batch_size, clock.enter)
        whole = sum(clock.seconds.values())
        return {phase: seconds / whole for phase, seconds in clock.seconds.items()}

    def evaluation(self) -> Iterator[Figure]:
        """An evaluation of the test set, against inference on one batch over and over."""
        network, test = to_device(self._model(self.plan.config), self.world.device).eval(), self.data.test
        samples = test.__getitems__(np.arange(min(BATCH_SIZE[self.kind], len(test))))
        images = torch.from_numpy(samples.images).permute(0, 3, 1, 2).to(self.world.device)

        @torch.inference_mode()
        def inference(_: int) -> None:
            network(images)

        def measure() -> Pair:
            began = time.perf_counter()
            evaluate(network, test, self.data.num_classes, self.world)
            seconds = time.perf_counter() - began
            return len(test) / seconds, len(images) / self._seconds(inference, len(images))

        yield Figure("evaluation", "images/s", "bare inference", measure)

    def saving(self) -> Iterator[Figure]:
        """How long a save holds up training, against a step."""
        size = self.plan.config.batch_size
        with tempfile.TemporaryDirectory() as folder:
            plan = replace(self.plan, run=RunDirectory(Path(folder) / "run"))
            with (
                plan.run.owned(),
                closing(
                    AsyncSaver(plan.run.checkpoints, self._trainer(plan.config).state_arrays, plan.config)
                ) as saver,
            ):

                def measure() -> Pair:
                    step_s = self._step_s(size)
                    began = time.perf_counter()
                    saver.save(plan.checkpoint_info(1, [0] * 4, [0.0] * 3, None))
                    stalled_s = time.perf_counter() - began
                    saver.finish()
                    return stalled_s * 1e3, step_s * 1e3

                yield Figure("stall of a save", "ms", f"a step of {size} images", measure)

    def starting(self) -> Iterator[Figure]:
        """From the start of a process to its first step, against the import of torch."""
        yield Figure("start to first step", "ms", "import torch", self._start)

    def _start(self) -> Pair:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True, timeout=TIMEOUT_S)
        import_s = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as folder:
            command = self._training(Path(folder) / "run", "--steps=1", "--log-every=1")
            began = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                next(line for line in process.stdout if line.startswith("step 1/"))
                first_step_s = time.perf_counter() - began
                process.communicate(timeout=TIMEOUT_S)
        return first_step_s * 1e3, import_s * 1e3

    def _training(self, run_dir: Path, *options: str) -> list[str]:
        """The command of a run with the settings that were given."""
        own = {"data_dir": self.plan.folder, "run_dir": run_dir, "device": self.kind, "tensorboard": False}
        settings = as_options(self.given | own | {"validation_fraction": 0.0})
        return [sys.executable, "-m", "dist_mnist.train", *settings, *options]

    def scaling(self) -> Iterator[Figure]:
        """Several processes, which share this machine's cores or take a GPU each, against one."""
        one, on_gpus = SCALING_BATCH[self.kind], self.kind == "cuda"
        for nproc in [2**power for power in range(1, self.most.bit_length()) if 2**power <= self.most]:
            times = nproc if on_gpus else 1
            yield Figure(
                f"{nproc} processes, batch {one * times}", "images/s",
                f"{nproc} x one process" if on_gpus else f"one process, {self.most} threads",
                partial(self._scaling, nproc, one, times),
            )  # fmt: skip

    def _scaling(self, nproc: int, batch_size: int, times: int) -> Pair:
        return self._run(nproc, batch_size * times), self._run(1, batch_size) * times

    def _run(self, nproc: int, batch_size: int) -> float:
        """Images per second in the second half of a whole run."""
        steps = SCALING_STEPS[self.kind]
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            length = (f"--steps={2 * steps}", f"--log-every={steps}", f"--batch-size={batch_size}")
            _start_ranks(nproc, self._training(run_dir, *length))
            lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == "train"][-1]["images_per_s"]

    def model(self) -> dict[str, Any]:
        """What is to be expected of more ranks than there are, by `scaling`; JSON values."""
        small, large = self.batch_sizes[0], self.batch_sizes[-1]
        few_s, many_s = (statistics.median(self._step_s(size) for _ in range(3)) for size in (small, large))
        image_s = (many_s - few_s) / (large - small)
        network = self._model(self.plan.config)
        work = Work(
            fixed_s=max(0.0, few_s - image_s * small),
            image_s=image_s,
            gradient_bytes=4 * network.num_parameters(),
            hidden_share=GPU_HIDES if self.kind == "cuda" else 0.0,  # on a CPU both take the same cores
            norm_layers=sum(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in network.modules()),
        )
        gpu = work if self.kind == "cuda" else work._replace(**GPU_ON_PAPER, hidden_share=GPU_HIDES)
        return {
            "here": self._model_here(work) if self.most > 1 else None,
            "gpu": gpu._asdict() | {"measured": self.kind == "cuda"},
            "clusters": [_expect(gpu, gpus) for gpus in CLUSTERS],
        }

    def _model_here(self, work: Work) -> dict[str, Any]:
        """The model for two ranks on this machine, by the doctor's measurement of the way between them."""
        with tempfile.TemporaryDirectory() as folder:
            where = (f"--data-dir={self.plan.folder}", f"--run-dir={folder}/run", f"--device={self.kind}")
            doctor = [sys.executable, "-m", "dist_mnist.tools.doctor", *where, "--json"]
            seconds = {row["size"]: row["seconds"] for row in json.loads(_start_ranks(2, doctor))["all_reduce"]}
        few, many = "8 B", "16 MB"
        link = Link(seconds[few] / 2, 4 * SIZES[many] / (seconds[many] - seconds[few]))
        # Ranks that share the cores take as long for their halves of a batch as one rank takes for the whole.
        size = SCALING_BATCH[self.kind]
        return {"ranks": 2, "batch": size, "efficiency": efficiency(work, 2, size, link), **link._asdict()}

    def machine(self) -> dict[str, float]:
        """What the machine could do: bytes copied, and the best matrix product in the run's precision."""
        size, device = MATRIX[self.kind], self.world.device
        dtype = torch.bfloat16 if self.plan.config.precision == "bf16" else torch.float32
        one, other = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
        numbers = torch.ones(1 << 26, device=device)
        target = torch.empty_like(numbers)
        least = TRAINED_IMAGES[self.kind]  # a few times will do
        product_s = min(self._seconds(lambda _: one @ other, least) for _ in range(3))
        copy_s = min(self._seconds(lambda _: target.copy_(numbers), least) for _ in range(3))
        return {"matrix_gflop_per_s": 2 * size**3 / product_s / 1e9, "copied_gb_per_s": numbers.nbytes / copy_s / 1e9}


class _Clock:
    """Adds up the time between the beginnings of phases."""

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
    given: Mapping[str, Any], parts: list[str], rounds: int, tell: Callable[[str], object] = str
) -> dict[str, Any]:
    """Measure `parts`, which are methods of `Bench`, in `rounds` rounds; JSON values.

    `tell` is given a word on each thing before it is measured.

    Raises:
        UserError: settings or data do not fit.
    """
    plan = prepare(given, 1)
    bench = Bench(given, plan, use_device(World.from_environment().alone(), plan.config.device, plan.config.threads))
    result: dict[str, Any] = {
        "device": str(bench.world), "cores": num_cores(), "threads": torch.get_num_threads(), **versions(),
        "recipe": plan.config.recipe, "precision": bench.plan.config.precision, "rounds": rounds, **bench.machine(),
        "figures": [],
    }  # fmt: skip
    for part in parts:
        if part in ("phases", "model"):
            tell(part)
            result[part] = getattr(bench, part)()
            continue
        for figure in getattr(bench, part)():
            tell(figure.what)
            result["figures"].append(figure.summary(rounds))
    return result


def _expect(gpu: Work, gpus: int) -> dict[str, Any]:
    link = link_on_paper(gpus)
    return {
        "gpus": gpus,
        "all_reduce_ms": 1e3 * all_reduce_s(gpu.gradient_bytes, gpus, link),
        "efficiency": {str(size): efficiency(gpu, gpus, size, link) for size in GPU_BATCHES},
        "batch_per_gpu_for_90_percent": batch_size_for(0.9, gpu, gpus, link),
    }


def _start_ranks(nproc: int, command: list[str]) -> str:
    """Run `python -m module ...` on so many processes of this machine, and give what it prints."""
    python, *module = command
    agent = ["-m", "dist_mnist.elastic.agent", "--standalone", f"--nproc-per-node={nproc}"] if nproc > 1 else []
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if nproc > 1 else {})
    return subprocess.run(
        [python, *agent, *module], check=True, timeout=TIMEOUT_S, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout


def _rate(batches: Iterator[int]) -> float:
    """Images per second of an endless iterator over batches' sizes, after its first."""
    next(batches)
    began, images = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < COPYING_S:
        images += next(batches)
    return images / seconds


def _copies(images: np.ndarray) -> Iterator[int]:
    """Copies the images of the mapped file, or so many as are a good deal, to other memory by plain memcpy."""
    images = images[: max(1, COPIED_BYTES // images[:1].nbytes)]
    target = np.empty_like(images)
    while True:
        np.copyto(target, images)
        yield len(images)
