"""What exactness and recovery cost: training with and without them, by turns, as ratios of images per second.

    python tests/benchmarks/exactness.py --data-dir DIR [--rounds 5] [--steps 120] [--nproc 2] [--baseline CHECKOUT]

- `stall`: how long a save holds up training, against the time of a step (in one process, batch 250).
- `saving`: a checkpoint every 10 steps, whole wall-clock time of the steps included, against none on the way.
- `invariant`: sums over a fixed tree, so that bits do not depend on the number of processes, against DDP.
- `watched`: this checkout against another one (`--baseline`), such as that of a commit before ranks watched each other.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOG_EVERY = 20
TIMEOUT_S = 900


def records(checkout: Path, arguments: argparse.Namespace, *options: str) -> list[dict]:
    """The training lines of a run's metrics, without the first, in which everything is slow."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "dist_mnist", "train", f"--nproc={arguments.nproc}",
            f"--data-dir={arguments.data_dir}", f"--run-dir={folder}/run", f"--steps={arguments.steps}",
            f"--log-every={LOG_EVERY}", "--no-tensorboard", "--device=cpu", "--validation-fraction=0", *options,
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        subprocess.run(command, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL, env=environment, cwd=folder)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"][1:]


def speed(found: list[dict]) -> float:
    """Images per second, pauses left out."""
    return statistics.harmonic_mean([record["images_per_s"] for record in found])


def steps_per_s(found: list[dict]) -> float:
    """Steps per second, pauses for saving and logging included."""
    return (found[-1]["step"] - found[0]["step"]) / (found[-1]["elapsed_s"] - found[0]["elapsed_s"])


def stall(data_dir: Path, saves: int = 10) -> tuple[list[float], list[float]]:
    """Seconds that each save holds up the training thread, and seconds that each step takes."""
    import torch

    from dist_mnist.data.loader import Loader
    from dist_mnist.distributed.world import World
    from dist_mnist.model.cnn import build_model
    from dist_mnist.run.plan import prepare
    from dist_mnist.training.async_saver import Saver
    from dist_mnist.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        plan = prepare({"data_dir": data_dir, "run_dir": Path(folder) / "run"}, 1)
        plan.run.checkpoints.folder.mkdir(parents=True)
        world = World(0, 1, 0, 1, torch.device("cpu"))
        trainer = Trainer(plan.config, world, build_model(plan.config, plan.data.train.image_shape, 10), 1000)
        steps, saver, held_s, step_s = range(10 * saves), Saver(plan, trainer), [], []
        for step, batch in zip(steps, Loader(plan.data.train, plan.order, steps, world), strict=True):
            began = time.perf_counter()
            trainer.step(batch, step, 0, len(batch.ids))
            step_s.append(time.perf_counter() - began)
            if step % 10 == 9:
                began = time.perf_counter()
                saver.save_if_due(step + 1, {}, None, now=True)
                held_s.append(time.perf_counter() - began)
        saver.finish()
        saver.close()
    return held_s, step_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--baseline", type=Path)
    arguments = parser.parse_args()
    arguments.data_dir = arguments.data_dir.resolve()
    held_s, step_s = (statistics.median(seconds) for seconds in stall(arguments.data_dir))
    print(f"stall      {held_s / step_s:.3f} of a step ({held_s * 1e3:.1f} ms of {step_s * 1e3:.0f} ms)", flush=True)
    ratios: dict[str, list[float]] = {"saving": [], "invariant": [], "watched": []}
    for _ in range(arguments.rounds):
        plain = records(ROOT, arguments)
        saving = records(ROOT, arguments, "--checkpoint-every=10")
        ratios["saving"].append(steps_per_s(saving) / steps_per_s(plain))
        ratios["invariant"].append(speed(records(ROOT, arguments, "--invariant")) / speed(plain))
        if arguments.baseline:
            ratios["watched"].append(speed(plain) / speed(records(arguments.baseline, arguments)))
    for name, found in ratios.items():
        if found:
            low, high = min(found), max(found)
            print(
                f"{name:10} {statistics.median(found):.3f} times as fast ({low:.3f} to {high:.3f}, {len(found)} rounds)"
            )


if __name__ == "__main__":
    main()
