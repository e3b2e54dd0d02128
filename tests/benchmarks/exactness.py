"""What exactness and recovery cost: training with and without them, by turns, as ratios of images per second.

    python tests/benchmarks/exactness.py --data-dir DIR [--rounds 5] [--steps 120] [--nproc 2] [--baseline CHECKOUT]

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--baseline", type=Path)
    arguments = parser.parse_args()
    arguments.data_dir = arguments.data_dir.resolve()
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
