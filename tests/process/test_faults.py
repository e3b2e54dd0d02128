"""Faults done to real runs: each ends as an undisturbed one, or with a sentence, and leaves nothing behind."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_mnist.data.idx import write_idx
from dist_mnist.elastic.progress import read_progress
from dist_mnist.run.checkpoints.file import load_checkpoint
from dist_mnist.run.directory import RunDirectory
from dist_mnist.tools.drill.flipped import Flip
from dist_mnist.utils.files import to_json
from helpers import HANGS_AFTER_S
from helpers.runs import (
    SMALL,
    are_gone,
    descendants,
    digest,
    dist_mnist,
    enters,
    reaches,
    records,
    trained_here,
    wait_for,
)


@pytest.fixture
def start(launch, digits, tmp_path) -> Callable[..., tuple[subprocess.Popen, RunDirectory]]:
    """`start(name, nproc, *options)` starts `dist-mnist train` in a run directory of that name."""

    def start(name: str, nproc: int, *options: str, data: Path = digits):
        settings = (f"--nproc={nproc}", f"--data-dir={data}", f"--run-dir={tmp_path / name}", *SMALL, *options)
        return launch(1, "-m", "dist_mnist", "train", *settings), RunDirectory(tmp_path / name)

    return start


def finish(process: subprocess.Popen, run: RunDirectory) -> RunDirectory:
    _, err = process.communicate(timeout=HANGS_AFTER_S)
    assert process.returncode == 0, err
    return run


def check_nothing_is_left(run: RunDirectory, pids: list[int]) -> None:
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    names = {path.name for path in run.path.iterdir()}
    assert names <= {
        ".lock",
        "chain.jsonl",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "result.json",
        "stopped.json",
    }
    assert all(path.suffix in (".safetensors", ".damaged") for path in run.checkpoints.folder.iterdir())
    with run.owned():
        pass


def test_drill_faults_of_each_kind_end_with_the_same_bits():
    """`dist-mnist drill` has more of them."""
    faults = ["kill", "stop", "rot", "no-room"]
    command = [sys.executable, "-m", "dist_mnist", "drill", "--json", "--seed=3", *(f"--fault={one}" for one in faults)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [outcome["fault"] for outcome in outcomes] == faults
    assert all(outcome["same"] and not outcome["left"] for outcome in outcomes)


@pytest.mark.quick
def test_drill_flip_of_a_bit_in_one_rank_of_three_is_named_and_undone():
    """Two of them, by the seed in weights and in an optimizer's state; `dist-mnist drill` has more."""
    options = ("--fault=flip", "--times=2", "--nproc=3", "--seed=14")
    command = [sys.executable, "-m", "dist_mnist", "drill", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [outcome["verdict"] for outcome in outcomes] == ["named, same bits"] * 2
    assert [outcome["phase"].split()[0] for outcome in outcomes] == ["model", "optimizer"]
    assert all(outcome["said"].startswith("flipped: bit ") and outcome["well"] for outcome in outcomes)


def test_weight_that_becomes_huge_on_one_rank_is_no_divergence(train, launch, digits, tmp_path):
    """The highest bit of its exponent changes: all ranks get a gradient that is not finite, and one is to blame."""
    options = (f"--data-dir={digits}", *SMALL, "--steps=20", "--checkpoint-every=5")
    train(3, tmp_path / "undisturbed", *options)
    flip = Flip(part="model", rank=1, step=12, before=True, seed=60)
    words = ("-m", "dist_mnist.tools.drill.flipped", 3, to_json(flip), *options, f"--run-dir={tmp_path / 'run'}")
    process, run = launch(1, *words), RunDirectory(tmp_path / "run")
    out, err = process.communicate(timeout=HANGS_AFTER_S)
    assert process.returncode == 0, err
    assert "flipped: bit 30 of element (2, 1, 2, 1) in model's model/stages.1.0.weight, rank 1, before step 12" in err
    [error] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: rank 1 on ") and ": model/stages.1.0.weight " in error, error
    assert "resume    after step 11" in out, "where an epoch ended"
    assert digest(run) == digest(RunDirectory(tmp_path / "undisturbed"))


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.quick), signal.SIGUSR1])
def test_run_asked_twice_to_stop_saves_and_leaves_nothing_behind(start, ranks_of, number):
    process, run = start("run", 2, "--steps=40000")
    wait_for(reaches(run, 5), process)
    ranks = ranks_of(process.pid)
    for victim in (process.pid, ranks[-1]):
        os.kill(victim, number)
    out, err = process.communicate(timeout=HANGS_AFTER_S)
    assert process.returncode == 0, err
    stopped = json.loads(run.stopped_path.read_text())
    assert stopped["signal"] == number.name
    assert f"stopped   after step {stopped['step']}, and saved" in out
    assert run.checkpoints.paths()[-1] == run.checkpoints.path(stopped["step"]) and 5 <= stopped["step"] < 40000
    assert not run.result_path.exists()
    check_nothing_is_left(run, ranks)


def test_process_group_asked_to_stop_where_a_validation_is_due_makes_up_for_it(launch, digits, tmp_path):
    """As torchrun does, which asks loader workers together with their rank; and where a validation is due."""
    run = RunDirectory(tmp_path / "run")
    longer = ("--log-every=1", "--validate-every=1", "--schedule=constant", "--warmup-fraction=0")  # each time
    trained_here(digits, run.path, *longer, "--steps=2")
    assert run.result_path.exists()
    options = (f"--data-dir={digits}", f"--run-dir={run.path}", *SMALL, *longer, "--workers=2", "--steps=40000")
    process = launch(1, "-m", "dist_mnist.train", *options)
    wait_for(reaches(run, 6), process)
    assert not run.result_path.exists(), "it is that of the shorter run"
    os.killpg(process.pid, signal.SIGTERM)
    steps = json.loads(finish(process, run).stopped_path.read_text())["step"] + 3
    trained_here(digits, run.path, *longer, f"--steps={steps}")
    assert run.result_path.exists() and not run.stopped_path.exists()
    assert [one["step"] for one in records(run.path, "validation")] == list(range(1, steps + 1))


def test_validation_left_on_a_request_to_stop_is_made_up_for(start, ranks_of, write_set, tmp_path):
    """Left twice, at the last step's: one rank is asked, in a validation that is much longer than asking takes."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30_200, 8, 8), np.uint8), np.arange(30_200, dtype=np.uint8) % 3
    data = write_set(images, labels, images[:200], labels[:200])
    options = ("--validation-fraction=0.99", "--steps=3", "--validate-every=3", "--views=21", "--tensorboard")
    for _ in range(2):
        process, run = start("run", 2, *options, data=data)
        wait_for(enters(run, "validation"), process)
        os.kill(sorted(ranks_of(process.pid))[1], signal.SIGTERM)
        out, err = process.communicate(timeout=HANGS_AFTER_S)
        assert process.returncode == 0, err
        assert "stopped   after step 3, and saved" in out and "validation  loss" not in out, f"{out}\n{err}"
        assert json.loads(run.stopped_path.read_text()) == {"step": 3, "signal": "SIGTERM"}
        assert load_checkpoint(run.checkpoints.path(3)).info.validation is None
        assert not run.result_path.exists() and not records(run.path, "validation")
    finish(*start("run", 2, *options, data=data))
    [validation] = records(run.path, "validation")
    assert load_checkpoint(run.checkpoints.path(3)).info.validation.accuracy == validation["accuracy"]
    assert run.result_path.exists() and not run.stopped_path.exists()
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    for name in ("accuracy/validation_percent", "accuracy/test_percent"):
        assert [event.step for event in events.Scalars(name)] == [3]


@pytest.mark.parametrize(("waits", "code"), [("pass", 128 + signal.SIGTERM), ("stop.wait_for_a_step()", 0)])
def test_stop_request_before_the_first_step_ends_the_process(waits, code):
    program = (
        "import os; from dist_mnist.elastic.preemption import StopSignal; stop = StopSignal.listening(); "
        f"{waits}; os.kill(os.getpid(), 15)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    assert subprocess.run([sys.executable, "-c", program], env=environment, timeout=HANGS_AFTER_S).returncode == code


def test_rank_asked_to_stop_before_the_ranks_have_met_stops_all(start, ranks_of):
    process, run = start("run", 2, "--steps=40000")
    wait_for(lambda: len(ranks_of(process.pid)) == 2, process)
    late, asked = sorted(ranks_of(process.pid))
    os.kill(late, signal.SIGSTOP)
    wait_for(lambda: "SigCgt:\t0000000000000000" not in Path(f"/proc/{asked}/status").read_text(), process)
    time.sleep(0.5)
    os.kill(asked, signal.SIGTERM)
    os.kill(late, signal.SIGCONT)
    _, err = process.communicate(timeout=HANGS_AFTER_S)
    assert process.returncode == 0, err
    assert json.loads(run.stopped_path.read_text())["signal"] == "SIGTERM"


def test_ranks_of_a_killed_torchrun_save_and_end(start, ranks_of):
    process, run = start("run", 2, "--steps=40000")
    wait_for(reaches(run, 5), process)
    ranks = ranks_of(process.pid)
    process.kill()
    process.wait()
    wait_for(are_gone(ranks))
    check_nothing_is_left(run, ranks)
    assert json.loads(run.stopped_path.read_text())["step"] == int(run.checkpoints.paths()[-1].stem.split("-")[1])


@pytest.mark.quick
def test_watchdog_on_a_rank_that_stands_still_names_it(start, ranks_of):
    stall_timeout_s = 10
    process, run = start("run", 2, "--steps=40000", f"--stall-timeout={stall_timeout_s}", "--max-restarts=0")
    wait_for(reaches(run, 5), process)
    ranks = sorted(ranks_of(process.pid))
    os.kill(ranks[1], signal.SIGSTOP)
    began = time.monotonic()
    _, err = process.communicate(timeout=HANGS_AFTER_S)
    assert time.monotonic() - began < 10 * stall_timeout_s, err
    assert process.returncode == 1
    assert f"held up by rank 1 on {os.uname().nodename} (process {ranks[1]}), last heard of in phase " in err
    assert "Stacks of rank 0" in err and "train.py" in err
    assert err.splitlines()[-1].startswith("error: the first rank to fail was rank")
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


def test_gradient_that_is_not_finite_ends_the_run_or_is_skipped(start, digits, tmp_path):
    data = broken_set(tmp_path / "nan", digits)
    options = ("--pixels=raw", "--validation-fraction=0", "--epochs=2", "--log-every=1")
    process, run = start("stop", 2, *options, data=data)
    _, err = process.communicate(timeout=HANGS_AFTER_S)
    assert process.returncode == 2
    assert err.count("error: ") == 1 and "a gradient was not finite by step" in err and "--non-finite skip" in err

    run = RunDirectory(trained_here(data, tmp_path / "skip", *options, "--non-finite=skip"))
    found = records(run.path, "train")
    assert found[-1]["skipped_steps"] == 2, "one in each epoch"
    assert sum(record["loss"] is None for record in found) == 2
    arrays = load_checkpoint(run.checkpoints.paths()[-1]).arrays
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_invariant_run_any_world_size_ends_with_the_same_bits(start, ranks_of, digits, tmp_path):
    """With 1 and 2 processes; and with 4 that are killed, after which 1 resumes."""
    options = ("--invariant", "--steps=14", "--batch-norm=all", "--clip-norm=1", "--ema-decay=0.9", "--adversarial=0.1",
               "--erasing=0.5", "--mixup=0.2", "--cutmix=1")  # fmt: skip

    def alone(name: str, *options: str) -> str:
        return digest(RunDirectory(trained_here(digits, tmp_path / name, *options)))

    expected = alone("one", *options)
    assert digest(finish(*start("two", 2, *options))) == expected
    process, run = start("changing", 4, *options, "--checkpoint-every=1")
    wait_for(reaches(run, 4), process)
    ranks = ranks_of(process.pid)
    process.kill()
    process.wait()
    wait_for(are_gone(ranks))
    assert alone("changing", *options) == expected
    assert alone("default", *options[1:]) != expected, "else this test would say nothing"


def test_report_on_a_slow_rank_names_it(start, ranks_of):
    """Rank 1 is stopped for most of the time, until that is said: when a log interval has passed."""
    process, run = start("run", 2, "--steps=1000000", "--log-every=20", "--validation-fraction=0")
    wait_for(reaches(run, 2), process)
    ranks, said = sorted(ranks_of(process.pid)), []
    reader = threading.Thread(target=lambda: [said.append(line) for line in process.stderr], daemon=True)
    reader.start()
    named = f"warning: rank 1 on {os.uname().nodename} is a straggler"
    deadline = time.monotonic() + HANGS_AFTER_S
    while not any(line.startswith(named) for line in said):
        assert process.poll() is None and time.monotonic() < deadline, said
        for number, seconds in ((signal.SIGSTOP, 0.2), (signal.SIGCONT, 0.02)):
            os.kill(ranks[1], number)
            time.sleep(seconds)
    process.terminate()
    assert process.wait(timeout=HANGS_AFTER_S) == 0, said
    [warning] = [line for line in said if line.startswith(named)]
    assert "times as long as the median rank" in warning


def test_rank_killed_is_forked_anew_also_once_its_server_is_gone(start, ranks_of):
    """By the command line of a process is told whether it is a fork; without its server a rank is a new program."""
    options = ("--steps=40000", "--checkpoint-every=5", "--max-restarts=2")

    def are_forks(pids: list[int]) -> list[bool]:
        return [b"\0dist_mnist.elastic.forkserver\0" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids]

    def kill_one_and_wait(ranks: list[int]) -> list[int]:
        os.kill(ranks[0], signal.SIGKILL)
        wait_for(are_gone(ranks), process)
        step, _ = read_progress(run.progress_path)
        wait_for(reaches(run, step + 2), process)
        return ranks_of(process.pid)

    process, run = start("run", 2, *options)
    wait_for(reaches(run, 12), process)
    ranks = ranks_of(process.pid)
    [server] = set(descendants(process.pid)) - set(ranks)
    assert are_forks(ranks) == [True, True]
    ranks = kill_one_and_wait(ranks)
    assert are_forks(ranks) == [True, True]
    os.kill(server, signal.SIGKILL)
    ranks = kill_one_and_wait(ranks)
    assert are_forks(ranks) == [False, False]
    assert all(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == process.pid for pid in ranks)
    os.kill(ranks[0], signal.SIGTERM)
    _, err = process.communicate(timeout=HANGS_AFTER_S)
    assert process.returncode == 0, err
    check_nothing_is_left(run, [server, *ranks])


def test_resume_for_more_steps_at_a_constant_rate_ends_with_the_bits_of_a_whole_run(digits, tmp_path):
    options = ("--schedule=constant", "--warmup-fraction=0", "--lr=0.01")
    whole = trained_here(digits, tmp_path / "whole", *options, "--steps=12")
    trained_here(digits, tmp_path / "longer", *options, "--steps=7")
    longer = trained_here(digits, tmp_path / "longer", "--steps=12")
    assert digest(RunDirectory(longer)) == digest(RunDirectory(whole))
    assert dist_mnist("ckpt", "verify", longer).returncode == 0


@pytest.mark.quick
def test_rank_killed_under_plain_torchrun_starts_again_to_the_same_bits(train, launch, ranks_of, digits, tmp_path):
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
def test_run_directory_on_a_disk_without_room_is_refused(start, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], check=False).returncode:
        pytest.skip("a disk cannot be mounted here")
    try:
        process, _ = start("disk/run", 2, "--steps=4", "--dense-units=512")
        _, err = process.communicate(timeout=HANGS_AFTER_S)
        assert process.returncode == 2
        assert (
            err.count("error: ") == 1 and "not enough disk space for two checkpoints" in err and "Traceback" not in err
        )
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("policy", ["warn", "stop"])
def test_checkpoint_that_cannot_be_written_follows_the_policy(start, ranks_of, policy):
    """Limiting the size of files makes every write fail, as a full disk does."""
    options = ("--steps=60", "--checkpoint-every=4", "--log-every=1", "--max-restarts=0", f"--save-errors={policy}")
    process, run = start("run", 2, *options)
    wait_for(lambda: len(run.checkpoints.paths()) >= 2, process)
    resource.prlimit(sorted(ranks_of(process.pid))[0], resource.RLIMIT_FSIZE, (1, 1))
    out, err = process.communicate(timeout=HANGS_AFTER_S)
    assert process.returncode == 2, err
    last = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(last) == 1
    assert "a checkpoint could not be written (File too large); earlier checkpoints are kept" in last[0]
    assert "metrics.jsonl cannot be written (File too large); training goes on without it" in err
    assert ("training continues WITHOUT A NEW ONE" in err) == ("step 60/60" in out) == (policy == "warn")
    load_checkpoint(run.checkpoints.paths()[-1])
    assert not list(run.checkpoints.folder.glob(".*"))
    if policy == "stop":
        assert digest(finish(*start("run", 2, *options))) == digest(finish(*start("undisturbed", 2, *options)))


def test_run_suspended_as_a_whole_for_longer_than_the_stall_timeout_goes_on(start, ranks_of):
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
