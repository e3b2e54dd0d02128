"""Memory of training on many gigabytes of data, compared with a small set: each process's own (anonymous) memory.

    python tests/benchmarks/large_set.py [--gigabytes 5] [--steps 200] [--nproc 2]

It writes an idx set of that size (generated digits, repeated), trains on it and on one of 60 000 images under torchrun,
and reads RssAnon of every worker from /proc meanwhile. It needs the disk space; the files are deleted at the end.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from memory import anonymous_memory, children

from dist_mnist.data.idx import write_idx, write_idx_chunks
from dist_mnist.data.sources.synthetic import make_digits

TIMEOUT_S = 1800


def write_set(folder: Path, num_images: int) -> None:
    """Write a training set of `num_images` that repeats 10 000 digits, with these digits as its test set."""
    images, labels = make_digits(10_000, seed=0)
    whole, rest = divmod(num_images, len(images))
    folder.mkdir()
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        chunks = [array] * whole + [array[:rest]]
        write_idx_chunks(folder / f"train-{name}-ubyte", np.uint8, (num_images, *array.shape[1:]), chunks)
        write_idx(folder / f"t10k-{name}-ubyte", array)


def train(folder: Path, run_dir: Path, nproc: int, steps: int) -> list[int]:
    """Train and return the peak RssAnon of each worker, in bytes, largest first."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}",
        "-m", "dist_mnist.train", f"--data-dir={folder}", f"--run-dir={run_dir}", f"--steps={steps}", "--device=cpu",
        "--validation-fraction=0",
    ]  # fmt: skip
    largest: dict[int, int] = {}
    deadline = time.monotonic() + TIMEOUT_S
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as torchrun:
        try:
            while torchrun.poll() is None:
                for pid in children(torchrun.pid):
                    largest[pid] = max(largest.get(pid, 0), anonymous_memory(pid))
                if time.monotonic() > deadline:
                    raise SystemExit(f"no end after {TIMEOUT_S} s")
                time.sleep(0.1)
        finally:
            torchrun.terminate()
    if torchrun.returncode:
        raise SystemExit(f"training failed with exit code {torchrun.returncode}")
    return sorted(largest.values(), reverse=True)[:nproc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the files; default: the system's")
    arguments = parser.parse_args()
    sizes = [60_000, int(arguments.gigabytes * 1e9 / 784) + 1]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for size in sizes:
            folder = Path(scratch) / str(size)
            write_set(folder, size)
            gigabytes = os.path.getsize(folder / "train-images-idx3-ubyte") / 1e9
            memory = train(folder, Path(scratch) / f"run-{size}", arguments.nproc, arguments.steps)
            shown = ", ".join(f"{anonymous / 1e6:.0f} MB" for anonymous in memory)
            print(f"{size} images ({gigabytes:.2f} GB): anonymous memory of the {arguments.nproc} processes {shown}")


if __name__ == "__main__":
    main()
