"""Faults done to real runs: each ends as an undisturbed one, or with a sentence, and leaves nothing behind."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_mnist.data.idx import write_idx
from dist_mnist.elastic.progress import read_progress
from dist_mnist.run.checkpoint import load_checkpoint
from dist_mnist.run.directory import RunDirectory
from helpers.runs import SMALL, digest, reaches, records, wait_for

TIMEOUT_S = 60


@pytest.fixture
def start(launch, digits, tmp_path) -> Callable[..., tuple[subprocess.Popen, RunDirectory]]:
    """`start(name, nproc, *options)` starts `dist-mnist train` in a run directory of that name."""

    def start(name: str, nproc: int, *options: str, data: Path = digits):
        settings = (f"--nproc={nproc}", f"--data-dir={data}", f"--run-dir={tmp_path / name}", *SMALL, *options)
        return launch(1, "-m", "dist_mnist", "train", *settings), RunDirectory(tmp_path / name)

    return start


def finish(process: subprocess.Popen, run: RunDirectory) -> RunDirectory:
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    return run


def check_nothing_is_left(run: RunDirectory, pids: list[int]) -> None:
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    names = {path.name for path in run.path.iterdir()}
    assert names <= {".lock", "checkpoints", "config.json", "metrics.jsonl", "result.json", "stopped.json"}
    assert all(path.suffix in (".safetensors", ".damaged") for path in run.checkpoints.folder.iterdir())
    with run.owned():
        pass


@pytest.mark.timeout(400)
def test_a_drill():
    """Of faults of each kind; `dist-mnist drill` has more of them."""
    faults = ["kill", "stop", "flip", "no-room"]
    command = [sys.executable, "-m", "dist_mnist", "drill", "--json", "--seed=3", *(f"--fault={one}" for one in faults)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [outcome["fault"] for outcome in outcomes] == faults
    assert all(outcome["same"] and not outcome["left"] for outcome in outcomes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_twice(start, ranks_of, number):
    process, run = start("run", 2, "--steps=400")
    wait_for(reaches(run, 5), process)
    ranks = ranks_of(process.pid)
    for victim in (process.pid, ranks[-1]):
        os.kill(victim, number)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    stopped = json.loads(run.stopped_path.read_text())
    assert stopped["signal"] == number.name
    assert f"stopped   after step {stopped['step']}, and saved" in out
    assert run.checkpoints.paths()[-1] == run.checkpoints.path(stopped["step"]) and 5 <= stopped["step"] < 400
    assert not run.result_path.exists()
    check_nothing_is_left(run, ranks)


def test_a_whole_process_group_is_asked_to_stop(launch, digits, tmp_path):
    """As torchrun does, which asks loader workers together with their rank; and where a validation is due."""
    run = RunDirectory(tmp_path / "run")
    settings = (f"--data-dir={digits}", f"--run-dir={run.path}", *SMALL, "--log-every=1", "--validate-every=1")

    def begin(steps: int) -> subprocess.Popen[str]:  # longer each time, which a constant rate allows
        options = ("--workers=2", "--schedule=constant", "--warmup-fraction=0", f"--steps={steps}")
        return launch(1, "-m", "dist_mnist.train", *settings, *options)

    assert finish(begin(2), run).result_path.exists()
    process = begin(4000)
    wait_for(reaches(run, 6), process)
    assert not run.result_path.exists(), "it is that of the shorter run"
    os.killpg(process.pid, signal.SIGTERM)
    steps = json.loads(finish(process, run).stopped_path.read_text())["step"] + 3
    assert finish(begin(steps), run).result_path.exists() and not run.stopped_path.exists()
    assert [one["step"] for one in records(run.path, "validation")] == list(range(1, steps + 1))


def test_asked_to_stop_during_a_validation(start, ranks_of, write_set, tmp_path):
    """Twice at the last step's, of a hundred batches and many views, by one rank: it is left, and then made up for."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (50_200, 8, 8), np.uint8), np.arange(50_200, dtype=np.uint8) % 3
    data = write_set(images, labels, images[:200], labels[:200])
    options = ("--validation-fraction=0.99", "--steps=3", "--batch-size=150", "--views=41", "--tensorboard")
    run = RunDirectory(tmp_path / "run")
    for _ in range(2):
        process, _ = start("run", 2, *options, data=data)
        wait_for(lambda: (read_progress(run.progress_path) or (0, ""))[1] == "validation", process)
        os.kill(sorted(ranks_of(process.pid))[1], signal.SIGTERM)
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, err
        assert "stopped   after step 3, and saved" in out and "validation  loss" not in out, f"{out}\n{err}"
        assert json.loads(run.stopped_path.read_text()) == {"step": 3, "signal": "SIGTERM"}
        assert load_checkpoint(run.checkpoints.path(3))[1]["validation"] is None
        assert not run.result_path.exists() and not records(run.path, "validation")
    finish(*start("run", 2, *options, data=data))
    [validation] = records(run.path, "validation")
    assert load_checkpoint(run.checkpoints.path(3))[1]["validation"]["accuracy"] == validation["accuracy"]
    assert run.result_path.exists() and not run.stopped_path.exists()
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    for name in ("accuracy/validation_percent", "accuracy/test_percent"):
        assert [event.step for event in events.Scalars(name)] == [3]


@pytest.mark.parametrize(("waits", "code"), [("pass", 128 + signal.SIGTERM), ("STOP.wait_for_a_step()", 0)])
def test_before_there_is_anything_to_save_a_request_ends_the_process(waits, code):
    program = (
        f"from dist_mnist.elastic.preemption import STOP; STOP.listen(); {waits}; import os; os.kill(os.getpid(), 15)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    assert subprocess.run([sys.executable, "-c", program], env=environment, timeout=20).returncode == code


def test_one_rank_is_asked_to_stop_before_they_have_met(start, ranks_of):
    process, run = start("run", 2, "--steps=4000")
    wait_for(lambda: len(ranks_of(process.pid)) == 2, process)
    late, asked = sorted(ranks_of(process.pid))
    os.kill(late, signal.SIGSTOP)
    wait_for(lambda: "SigCgt:\t0000000000000000" not in Path(f"/proc/{asked}/status").read_text(), process)
    time.sleep(0.5)
    os.kill(asked, signal.SIGTERM)
    os.kill(late, signal.SIGCONT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    assert json.loads(run.stopped_path.read_text())["signal"] == "SIGTERM"


def test_ranks_do_not_outlive_torchrun(start, ranks_of):
    process, run = start("run", 2, "--steps=4000")
    wait_for(reaches(run, 5), process)
    ranks = ranks_of(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    check_nothing_is_left(run, ranks)
    assert json.loads(run.stopped_path.read_text())["step"] == int(run.checkpoints.paths()[-1].stem.split("-")[1])


def test_a_rank_that_stands_still_is_named(start, ranks_of):
    process, run = start("run", 2, "--steps=4000", "--stall-timeout=10", "--max-restarts=0")
    wait_for(reaches(run, 5), process)
    ranks = sorted(ranks_of(process.pid))
    os.kill(ranks[1], signal.SIGSTOP)
    began = time.monotonic()
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert time.monotonic() - began < 25, err
    assert process.returncode == 1
    assert f"held up by rank 1 on {os.uname().nodename} (process {ranks[1]}), last heard of in phase " in err
    assert "Stacks of rank 0" in err and "step.py" in err
    assert err.splitlines()[-1].startswith("error: the first to fail was rank")
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


def broken_set(folder: Path, digits: Path) -> Path:
    """Images as float32, one of them not a number."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 300), ("t10k", 50)):
        images = rng.random((count, 12, 12), np.float32)
        if split == "train":
            images[7] = np.nan
        write_idx(folder / f"{split}-images-idx3-float", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte", np.arange(count).astype(np.uint8) % 3)
    return folder


def test_a_gradient_that_is_not_finite(start, digits, tmp_path):
    data = broken_set(tmp_path / "nan", digits)
    options = ("--pixels=raw", "--validation-fraction=0", "--epochs=2", "--log-every=1")
    process, run = start("stop", 2, *options, data=data)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert err.count("error: ") == 1 and "a gradient was not finite by step" in err and "--non-finite skip" in err

    process, run = start("skip", 2, *options, "--non-finite=skip", data=data)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    found = records(run.path, "train")
    assert found[-1]["skipped_steps"] == 2, "one in each epoch"
    assert sum(record["loss"] is None for record in found) == 2
    arrays, _ = load_checkpoint(run.checkpoints.paths()[-1])
    assert all(np.isfinite(array).all() for array in arrays.values())


@pytest.mark.timeout(300)
def test_the_same_bits_for_any_world_size(start):
    """With 1 and 2 processes; and with 4 that are killed, after which 1 goes on."""
    options = ("--invariant", "--steps=14", "--batch-norm=all", "--clip-norm=1", "--ema-decay=0.9", "--adversarial=0.1")
    digests = {}
    for nproc in (1, 2):
        digests[nproc] = digest(finish(*start(str(nproc), nproc, *options)))
    process, run = start("changing", 4, *options, "--checkpoint-every=1")
    wait_for(reaches(run, 4), process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while (run.path / ".owner").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    digests["changing"] = digest(finish(*start("changing", 1, *options)))
    assert len(set(digests.values())) == 1
    default = finish(*start("default", 2, *options[1:]))
    assert digest(default) != digests[1], "else this test would say nothing"


@pytest.mark.timeout(300)
def test_a_slow_rank_is_named(start, ranks_of):
    """Rank 1 is stopped for most of the time, until two log intervals have passed."""
    process, run = start("run", 2, "--steps=40000", "--log-every=40", "--validation-fraction=0")
    wait_for(reaches(run, 2), process)
    rank, began, slowed_at = sorted(ranks_of(process.pid))[1], time.monotonic(), read_progress(run.progress_path)[0]
    while read_progress(run.progress_path)[0] < slowed_at + 100 and time.monotonic() - began < 2.5 * TIMEOUT_S:
        for number, seconds in ((signal.SIGSTOP, 0.2), (signal.SIGCONT, 0.02)):
            os.kill(rank, number)
            time.sleep(seconds)
    process.terminate()
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    [warning] = [line for line in err.splitlines() if "times as long as the median rank" in line]
    assert warning.startswith(f"warning: rank 1 on {os.uname().nodename} takes ")


def test_a_longer_run_where_the_schedule_allows_it(start):
    options = ("--schedule=constant", "--warmup-fraction=0", "--lr=0.01")
    whole = finish(*start("whole", 1, *options, "--steps=12"))
    finish(*start("longer", 1, *options, "--steps=7"))
    assert digest(finish(*start("longer", 1, "--steps=12"))) == digest(whole)


def test_plain_torchrun_starts_a_killed_rank_again(train, launch, ranks_of, digits, tmp_path):
    options = (f"--data-dir={digits}", *SMALL, "--steps=40", "--checkpoint-every=5")
    train(2, tmp_path / "undisturbed", *options)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    process = launch(1, *torchrun, "-m", "dist_mnist.train", *options, f"--run-dir={tmp_path / 'run'}")
    run = RunDirectory(tmp_path / "run")
    wait_for(reaches(run, 12), process)
    os.kill(sorted(ranks_of(process.pid))[1], signal.SIGKILL)
    finish(process, run)
    assert digest(run) == digest(RunDirectory(tmp_path / "undisturbed"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which takes root")
def test_a_disk_without_room(start, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], check=False).returncode:
        pytest.skip("a disk cannot be mounted here")
    try:
        process, _ = start("disk/run", 2, "--steps=4", "--dense-units=512")
        _, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 2
        assert err.count("error: ") == 1 and "there is no room for checkpoints" in err and "Traceback" not in err
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("policy", ["warn", "stop"])
def test_nothing_can_be_written_any_more(start, ranks_of, policy):
    """Limiting the size of files makes every write fail, as a full disk does."""
    options = ("--steps=60", "--checkpoint-every=4", "--log-every=1", "--max-restarts=0", f"--save-errors={policy}")
    process, run = start("run", 2, *options)
    wait_for(lambda: len(run.checkpoints.paths()) >= 2, process)
    resource.prlimit(sorted(ranks_of(process.pid))[0], resource.RLIMIT_FSIZE, (1, 1))
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2, err
    last = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(last) == 1 and "a checkpoint could not be written (File too large); those before it are kept" in last[0]
    assert "metrics.jsonl cannot be written (File too large); training goes on without" in err
    assert ("training goes on WITHOUT A NEW ONE" in err) == ("step 60/60" in out) == (policy == "warn")
    load_checkpoint(run.checkpoints.paths()[-1])
    assert not list(run.checkpoints.folder.glob(".*"))
    if policy == "stop":
        assert digest(finish(*start("run", 2, *options))) == digest(finish(*start("undisturbed", 2, *options)))


def test_a_run_that_was_stopped_as_a_whole_goes_on(start, ranks_of):
    """As a scheduler suspends a job, for longer than the stall timeout."""
    process, run = start("run", 2, "--steps=150", "--stall-timeout=8", "--max-restarts=0")
    wait_for(reaches(run, 5), process)
    pids = [process.pid, *ranks_of(process.pid)]
    for number, seconds in ((signal.SIGSTOP, 11), (signal.SIGCONT, 0)):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(seconds)
    finish(process, run)
    assert run.result_path.exists()
