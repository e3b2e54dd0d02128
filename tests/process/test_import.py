"""`dist-mnist data import` as a process: what comes of it in training, and how it ends when it is stopped or killed."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dist_mnist.data.convert.export import Format
from dist_mnist.data.idx import open_idx
from dist_mnist.data.sources.classes import write_class_names
from dist_mnist.run.directory import RunDirectory
from helpers import HANGS_AFTER_S
from helpers.data import encoded, some_digits, write_npz, write_parquet
from helpers.runs import are_gone, descendants, digest, dist_mnist, end, start, trained_here, wait_for

NAMES = ("zero", "Zero", "10", "1", "T-shirt/top", ".five", "шесть", "100 %", "a b", "9")

SLOW = 600  # pictures of a million pixels: some seconds of work, of which a moment can be caught


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory) -> Path:
    """Two classes of large pictures, which are one file under many names."""
    folder = tmp_path_factory.mktemp("large")
    pixels = np.add.outer(np.arange(1000), np.arange(1000)).astype(np.uint8)
    (folder / "picture").write_bytes(encoded(pixels))
    for number in range(SLOW):
        path = folder / "set" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / "picture", path)
    return folder / "set"


def command(source: Path, to: Path) -> list[str]:
    return [
        sys.executable, "-m", "dist_mnist", "data", "import", str(source), "--to", str(to), "--size=28x28",
        "--test-fraction=0.2", "--jobs=2",
    ]  # fmt: skip


@contextmanager
def under_way(source: Path, to: Path) -> Iterator[subprocess.Popen]:
    """An import that has written its first images, and all of whose workers are at work."""
    before = set(to.parent.glob(".*"))
    process = start(*command(source, to))

    def has_written() -> bool:
        made = [path for path in to.parent.glob(".*/train-images*") if path.parent not in before]
        return any(path.stat().st_size > 1000 for path in made)

    try:
        wait_for(has_written, process)
        yield process
    finally:
        end(process)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_import_that_is_stopped_leaves_nothing(number, slow_source, tmp_path):
    with under_way(slow_source, tmp_path / "new" / "out") as process:
        workers = descendants(process.pid)
        assert len(workers) >= 2
        process.send_signal(number)
        assert process.wait(HANGS_AFTER_S) == 128 + number
        wait_for(are_gone(workers))
        assert process.communicate() == ("", "")
    assert not list(tmp_path.iterdir())


def test_import_that_is_killed_leaves_no_process_and_the_same_command_goes_through(slow_source, tmp_path):
    with under_way(slow_source, tmp_path / "out") as process:
        workers = descendants(process.pid)
        process.kill()
        wait_for(are_gone(workers))
    assert [path.name.startswith(".out.") for path in tmp_path.iterdir()] == [True]
    with under_way(slow_source, tmp_path / "out") as other:  # it removes what is left, but not what is under way
        [hidden] = tmp_path.iterdir()
        other.send_signal(signal.SIGSTOP)
        source = write_npz(tmp_path / "a.npz", some_digits(80, 20))
        done = dist_mnist("data", "import", source, "--to", tmp_path / "out")
        assert done.returncode == 0 and hidden.is_dir(), done.stderr
        other.send_signal(signal.SIGCONT)
        assert other.wait(HANGS_AFTER_S) == 2  # the folder has been taken
        assert "the dataset cannot be stored there (Directory not empty)" in other.communicate()[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "out"]


def test_import_whose_worker_is_killed_says_so_and_leaves_nothing(slow_source, tmp_path):
    with under_way(slow_source, tmp_path / "out") as process:
        spawned = [
            pid for pid in descendants(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(spawned[0], signal.SIGKILL)
        assert process.wait(HANGS_AFTER_S) == 1
        wait_for(are_gone(spawned))
        said = process.communicate()[1]
    assert said.startswith("error: a worker process was killed") and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_import_of_any_export_trains_to_the_same_bits_and_says_names(digits, tmp_path):
    """The way of a user: exported, imported, trained, evaluated, and a picture predicted."""
    named = tmp_path / "named"
    shutil.copytree(digits, named)
    write_class_names(named, NAMES)
    sources = {"original": named}
    for kind in Format:
        sources[kind] = tmp_path / kind
        assert dist_mnist("data", "export", named, "--to", kind, "--output", sources[kind]).returncode == 0
    if importlib.util.find_spec("pyarrow"):
        sources["parquet"] = tmp_path / "parquet"
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images, labels = (
                np.array(open_idx(digits / f"{prefix}-{what}-ubyte")) for what in ("images-idx3", "labels-idx1")
            )
            write_parquet(sources["parquet"] / f"{split}.parquet", images, labels, NAMES)
    picture = tmp_path / "pictures" / "test" / "T-shirt%2Ftop" / "002.png"
    assert picture.exists()
    ends, said = set(), set()
    for kind, source in sources.items():
        folder = source if kind == "original" else tmp_path / f"{kind}-imported"
        if folder != source:
            done = dist_mnist("data", "import", source, "--to", folder)
            assert done.returncode == 0, done.stderr
        run = trained_here(folder, tmp_path / f"{kind}-run", "--steps=20")
        evaluated = json.loads(dist_mnist("eval", "--ckpt", run, "--json").stdout)
        assert tuple(evaluated["class_names"]) == NAMES
        assert evaluated["correct"] == json.loads((run / "result.json").read_text())["correct"]
        [prediction] = json.loads(dist_mnist("predict", picture, "--ckpt", run, "--json").stdout)
        assert prediction["name"] == NAMES[prediction["class"]]
        ends.add(digest(RunDirectory(run)))
        said.add((evaluated["loss"], *prediction["probabilities"]))
    assert len(ends) == len(said) == 1
