"""Training as other launchers than torchrun start it, and what a scheduler learns from its exit code."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dist_mnist.run.directory import RunDirectory
from helpers import HANGS_AFTER_S
from helpers.runs import SMALL, end, reaches, start, wait_for

TRAIN = ("-m", "dist_mnist.train")
TORCH_LAUNCH = ("-m", "torch.distributed.launch", "--nproc-per-node=2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0")


@pytest.fixture
def settings(digits: Path, tmp_path: Path) -> tuple[str, ...]:
    """Options of a short training."""
    return (f"--data-dir={digits}", f"--run-dir={tmp_path / 'run'}", *SMALL)


@pytest.mark.parametrize("launcher", [TORCH_LAUNCH, ACCELERATE], ids=["torch.distributed.launch", "accelerate"])
def test_launcher_of_ranks_trains_one_run(settings, tmp_path, launcher):
    command = [sys.executable, *launcher, *TRAIN, *settings, "--steps=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S)
    assert done.returncode == 0, done.stderr
    assert "2 steps of 50 images on 2 processes on CPU" in done.stdout and done.stdout.count("test accuracy") == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["step"] == 2


def of_open_mpi(rank: int, **others: str) -> dict[str, str]:
    """The environment that mpirun gives a rank of two."""
    name = "OMPI_COMM_WORLD"
    size = {f"{name}_SIZE": "2", f"{name}_LOCAL_SIZE": "2"}
    return os.environ | size | {f"{name}_RANK": str(rank), f"{name}_LOCAL_RANK": str(rank)} | others


def test_mpirun_with_an_address_trains_one_run(settings, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [start(sys.executable, *TRAIN, *settings, "--steps=2", env=of_open_mpi(rank, **meeting)) for rank in (0, 1)]
    try:
        said = [rank.communicate(timeout=HANGS_AFTER_S) for rank in ranks]
    finally:
        for rank in ranks:
            end(rank)
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "2 steps of 50 images on 2 processes on CPU" in said[0][0] and said[1][0] == ""


def test_mpirun_of_what_starts_ranks_itself_is_a_sentence(settings, tmp_path):
    command = [sys.executable, "-m", "dist_mnist", "train", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S, env=of_open_mpi(0))
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: mpirun started 2 processes, and each would start its own run")
    assert not (tmp_path / "run").exists()


def test_train_with_a_stop_code_leaves_with_it_until_the_run_has_ended(settings, tmp_path):
    run = RunDirectory(tmp_path / "run")
    options = (*settings, "--stop-code=75", "--max-restarts=0", "--schedule=constant", "--warmup-fraction=0")
    command = (sys.executable, "-m", "dist_mnist", "train", *options)
    process = start(*command, "--steps=1000000")
    try:
        wait_for(reaches(run, 5), process)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=HANGS_AFTER_S)
    finally:
        end(process)
    assert process.returncode == 75, said
    stopped = json.loads(run.stopped_path.read_text())["step"]
    steps = f"--steps={stopped + 2}"
    done = subprocess.run([*command, steps], capture_output=True, text=True, timeout=HANGS_AFTER_S)
    assert done.returncode == 0 and f"resume    after step {stopped}" in done.stdout, done.stderr


def test_agent_of_one_node_listens_on_loopback_only(settings, tmp_path):
    run = RunDirectory(tmp_path / "run")
    options = (*settings, "--nproc=2", "--schedule=constant", "--warmup-fraction=0", "--steps=1000000")
    process = start(sys.executable, "-m", "dist_mnist", "train", *options)
    try:
        wait_for(reaches(run, 5), process)
        sockets = psutil.Process(process.pid).net_connections()
        listening = {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}
    finally:
        end(process)
    assert listening == {"127.0.0.1"}


def test_train_help_names_the_variables_of_torchrun():
    command = [sys.executable, "-m", "dist_mnist", "train", "--help"]
    wide = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S, env=wide)
    names = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_RDZV_ENDPOINT", "PET_RDZV_ID", "PET_MAX_RESTARTS")
    assert all(name in done.stdout for name in names) and "--local-rank" not in done.stdout
