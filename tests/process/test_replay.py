"""`dist-mnist replay`: segments of runs trained again, honest and changed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from dist_mnist.data.sources.synthetic import write_digits
from dist_mnist.run.checkpoints.file import arrays_digest, load_checkpoint, save_checkpoint
from dist_mnist.run.checkpoints.store import store_of
from helpers.runs import SMALL, dist_mnist, trained_here

RANDOM = (
    "--dropout=0.2",
    "--rotate=10",
    "--erasing=0.5",
    "--mixup=0.2",
    "--cutmix=1",
    "--ema-decay=0.9",
    "--checkpoint-every=4",
    "--steps=12",
    "--validate-every=50",
)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory) -> Path:
    """A run of three segments, with all that draws at random."""
    return trained_here(digits, tmp_path_factory.mktemp("replay") / "run", *RANDOM)


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def rewrite(run: Path, step: int, change) -> None:
    """Change the arrays of a checkpoint, and make all its digests right again."""
    path = store_of(run).path(step)
    before = load_checkpoint(path)
    arrays = {name: array.copy() for name, array in before.arrays.items()}
    info = change(arrays, before.info) or before.info
    save_checkpoint(path, arrays, replace(info, arrays_sha256=arrays_digest(arrays)))


def segments(done) -> list[dict]:
    return json.loads(done.stdout)["segments"]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_replay_reproduces_every_segment_and_leaves_the_run_as_it_is(run):
    before = contents(run)
    done = dist_mnist("replay", run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"steps {a} to {b}".ljust(24) + "reproduced" for a, b in ((0, 4), (4, 8), (8, 12))
    ]
    assert contents(run) == before


def test_replay_of_the_segments_asked_for(run):
    done = dist_mnist("replay", run, "--from=4", "--json")
    assert [(one["start"], one["stop"]) for one in segments(done)] == [(4, 8), (8, 12)]
    done = dist_mnist("replay", run, "--to=8", "--every=2", "--json")
    assert [(one["start"], one["stop"]) for one in segments(done)] == [(4, 8)]
    done = dist_mnist("replay", run, "--from=5")
    assert done.returncode == 2 and "has no checkpoint of step 5, only of 4, 8, 12" in done.stderr


@pytest.mark.parametrize("part", ["model/", "optimizer/", "average/"])
def test_replay_of_a_checkpoint_with_one_other_bit_names_the_two_segments_beside_it(copied, part):
    def flip(arrays, info) -> None:
        name = next(name for name in arrays if name.startswith(part) and arrays[name].size > 8)
        arrays[name].reshape(-1).view(np.uint32)[5] ^= 1 << 20

    rewrite(copied, 8, flip)
    done = dist_mnist("replay", copied, "--json")
    assert done.returncode == 1
    found = segments(done)
    assert [one["reproduced"] for one in found] == [True, False, False]
    assert [one.get("differs_from_step") for one in found] == [None, 8, 12]
    assert found[1]["first_different"].startswith(part) and found[1]["largest_difference"] > 0


def test_replay_compares_with_checkpoints_that_were_pruned(copied):
    store_of(copied).path(8).unlink()
    assert dist_mnist("replay", copied).returncode == 0
    chain = copied / "chain.jsonl"
    links = [json.loads(line) for line in chain.read_text().splitlines()]
    links[1]["arrays_sha256"] = "00" * 32
    chain.write_text("".join(json.dumps(link) + "\n" for link in links))
    done = dist_mnist("replay", copied)
    assert done.returncode == 1
    assert done.stdout.splitlines()[1].startswith("steps 4 to 12           DIFFERS from step 8")


def test_replay_of_a_ledger_that_was_changed_differs(copied):
    rewrite(copied, 12, lambda arrays, info: replace(info, ledger=(1, 2, 3, 4)))
    done = dist_mnist("replay", copied, "--from=8", "--json")
    assert done.returncode == 1 and segments(done)[0]["first_different"] == "ledger"


@pytest.mark.parametrize(("name", "value"), [("seed", 7), ("lr", 0.5)])
def test_replay_of_a_checkpoint_with_other_settings_names_them(copied, name, value):
    def change(arrays, info):
        return replace(info, settings={**info.settings, name: value})

    rewrite(copied, 8, change)
    done = dist_mnist("replay", copied)
    assert done.returncode == 2 and f"({name}: " in done.stderr and "step-00000008" in done.stderr


def test_replay_on_other_data_names_them_and_finds_the_same_data_elsewhere(run, digits, tmp_path):
    write_digits(tmp_path / "other", num_train=300, num_test=50, seed=9)
    done = dist_mnist("replay", run, f"--data-dir={tmp_path / 'other'}")
    assert done.returncode == 2 and "was started on other data" in done.stderr
    shutil.copytree(digits, tmp_path / "moved")
    assert dist_mnist("replay", run, f"--data-dir={tmp_path / 'moved'}", "--from=8").returncode == 0


def test_replay_with_other_threads_says_so_and_compares_within_a_tolerance(copied):
    done = dist_mnist("replay", copied, "--threads=2", "--from=8", "--json")
    assert done.returncode == 0, done.stderr
    assert "equal bits cannot be expected" in done.stderr and "threads of each 2 here, 1 then" in done.stderr

    def spoil(arrays, info) -> None:
        for name in arrays:
            if name.startswith("model/") and arrays[name].dtype == np.float32:
                arrays[name] += 1

    rewrite(copied, 12, spoil)
    done = dist_mnist("replay", copied, "--threads=2", "--from=8", "--json")
    assert done.returncode == 1 and segments(done)[0]["distance"] > 0.5


def test_replay_of_two_processes_reproduces_every_segment_of_an_interrupted_run(digits, tmp_path):
    command = ("train", "--nproc=2", f"--data-dir={digits}", f"--run-dir={tmp_path / 'run'}", *SMALL, *RANDOM)
    assert dist_mnist(*command, "--batch-norm=all").returncode == 0
    moved = Path(shutil.move(tmp_path / "run", tmp_path / "elsewhere"))
    done = dist_mnist("replay", moved, "--json")
    assert done.returncode == 0, done.stderr
    assert [one["reproduced"] for one in segments(done)] == [True] * 3


def test_replay_by_more_processes_than_can_be_starts_none(copied):
    done = dist_mnist("replay", copied, "--nproc=51")
    assert (
        done.returncode == 2
        and "--batch-size 50 is the global batch size, less than one sample for each of 51" in done.stderr
    )
    rewrite(copied, 12, lambda arrays, info: replace(info, computed_by=replace(info.computed_by, processes=10**9)))
    done = dist_mnist("replay", copied)
    assert done.returncode == 2 and "was trained by 1000000000 processes, more than 8 per core" in done.stderr


def test_replay_of_a_checkpoint_under_the_name_of_another_step_names_it(copied):
    store_of(copied).path(4).rename(store_of(copied).path(16))
    done = dist_mnist("replay", copied)
    assert done.returncode == 2 and "step-00000016.safetensors holds the checkpoint of step 4" in done.stderr


def test_replay_of_no_run_is_a_sentence(tmp_path):
    done = dist_mnist("replay", tmp_path / "absent")
    assert done.returncode == 2 and "no valid checkpoint" in done.stderr
