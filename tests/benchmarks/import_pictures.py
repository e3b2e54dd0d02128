"""Speed and memory of `dist-mnist data import` on PNG files, compared with a bare loop of Pillow's decoding.

    python tests/benchmarks/import_pictures.py [--pictures 200000] [--few 2000] [--jobs N] [--rounds 3]

It generates digits as PNG files in ten folders. Each round decodes all of them in a pool of as many processes, which
only open and decode to an array, and imports them; the result is the median of the ratios. Memory is the largest
RssAnon of the import's main process, and of all its processes together, read from /proc; an import of a few pictures
serves for comparison. Last, an import is killed halfway and run again. The files are deleted at the end.
"""

import argparse
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from memory import anonymous_memory, children
from PIL import Image

from dist_mnist.data.sources.synthetic import make_digits

BLOCK = 5000


class Imported(NamedTuple):
    """Cost of an import: seconds, CPU seconds, and memory in bytes of the main process and of all processes."""

    seconds: float
    cpu_s: float
    main: int
    together: int


def write_pictures(folder: Path, count: int) -> list[str]:
    """Write PNG files of digits in one subfolder per class; return their paths."""
    paths = []
    for start in range(0, count, BLOCK):
        images, labels = make_digits(min(BLOCK, count - start), seed=0, start=start)
        for index, (image, label) in enumerate(zip(images, labels, strict=True), start):
            path = folder / str(label) / f"{index:07}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            paths.append(str(path))
    return paths


def decode(path: str) -> None:
    """Decode a picture: the work of the bare loop."""
    with Image.open(path) as picture:
        np.asarray(picture)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the children it has waited for."""
    return sum(os.times()[:4])


def bare_loop(paths: list[str], jobs: int) -> tuple[float, float]:
    """Return seconds and CPU seconds of a pool that decodes all files, including its start."""
    start, cpu = time.perf_counter(), cpu_seconds()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for _ in pool.imap_unordered(decode, paths, 64):
            pass
        pool.close()
        pool.join()
    return time.perf_counter() - start, cpu_seconds() - cpu


def import_command(source: Path, to: Path, jobs: int) -> list[str]:
    """Return the command under test."""
    return [
        sys.executable, "-m", "dist_mnist", "data", "import", str(source), "--to", str(to), f"--jobs={jobs}",
        "--test-fraction=0.15", "--json",
    ]  # fmt: skip


def timed_import(source: Path, to: Path, jobs: int) -> Imported:
    """Import the pictures and measure time and memory."""
    start, cpu, main, together = time.perf_counter(), os.times(), 0, 0
    with subprocess.Popen(import_command(source, to, jobs), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            own = anonymous_memory(process.pid)
            main = max(main, own)
            together = max(together, own + sum(map(anonymous_memory, children(process.pid))))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"the import failed with exit code {process.returncode}")
    spent = sum(os.times()[2:4]) - sum(cpu[2:4])  # of the import alone, not of this process
    return Imported(time.perf_counter() - start, spent, main, together)


def kill_in_the_middle(source: Path, to: Path, jobs: int, number: int) -> tuple[int, list[str]]:
    """Signal an import once it has written images; return its exit code and the names of files left next to `to`."""
    with subprocess.Popen(import_command(source, to, jobs), stdout=subprocess.DEVNULL) as process:
        while not any(path.stat().st_size > 1 << 20 for path in to.parent.glob(".*/train-images*")):
            if process.poll() is not None:
                raise SystemExit("the import was over before it could be killed: give more --pictures")
            time.sleep(0.001)
        process.send_signal(number)
    return process.returncode, sorted(path.name for path in to.parent.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=200_000)
    parser.add_argument("--few", type=int, default=2_000)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the files; default: the system's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        many, few, made = Path(scratch, "many"), Path(scratch, "few"), Path(scratch, "made")
        paths = write_pictures(many, arguments.pictures)
        write_pictures(few, arguments.few)
        made.mkdir()
        ratios, memory = [], []
        for number in range(arguments.rounds):
            bare, bare_cpu_s = bare_loop(paths, arguments.jobs)
            imported = timed_import(many, made / f"many-{number}", arguments.jobs)
            ratios.append(bare / imported.seconds)
            memory.append(imported)
            print(
                f"bare loop {len(paths) / bare:,.0f} pictures/s, import {len(paths) / imported.seconds:,.0f}: "
                f"{ratios[-1]:.2f}; CPU time {bare_cpu_s:.1f} s and {imported.cpu_s:.1f} s: "
                f"{bare_cpu_s / imported.cpu_s:.2f}",
                flush=True,
            )
        small = timed_import(few, made / "few", arguments.jobs)
        print(f"median ratio {statistics.median(ratios):.2f} with {arguments.jobs} jobs")
        for what in ("main", "together"):
            most, least = max(getattr(one, what) for one in memory), getattr(small, what)
            print(f"memory ({what}): {most / 1e6:.0f} MB, of {arguments.few} pictures {least / 1e6:.0f} MB")
        for number in (signal.SIGTERM, signal.SIGKILL):
            before = sorted(path.name for path in made.iterdir())
            code, left = kill_in_the_middle(many, made / "killed", arguments.jobs, number)
            print(f"{signal.Signals(number).name}: exit code {code}, left behind: {sorted(set(left) - set(before))}")
        timed_import(many, made / "killed", arguments.jobs)
        print(f"given again: {sorted(path.name for path in made.iterdir())}")


if __name__ == "__main__":
    main()
