"""Whole runs on a GPU, where there is one; on several, where there are several. (Steps on a GPU: test_graph.py.)"""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import digest, end, reaches, start, wait_for

from dist_mnist.checkpoint import load_checkpoint
from dist_mnist.run_directory import RunDirectory

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.skipif(not GPUS, reason="needs a GPU"), pytest.mark.timeout(200)]

SETTINGS = ("--steps=60", "--batch-size=100", "--log-every=10", "--lr=0.02", "--no-tensorboard", "--batch-norm=all")
TIMEOUT_S = 150


def command(nproc: int, run_dir: Path, data: Path, *options: str) -> list[str]:
    agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"] if nproc > 1 else []
    where = (f"--data-dir={data}", f"--run-dir={run_dir}")
    return [sys.executable, *agent, "-m", "dist_mnist.train", "--device=cuda", *where, *SETTINGS, *options]


@pytest.fixture
def train(digits):
    """`train(run_dir, *options, nproc=1)`: a run to its end, failing the test if it fails; what it said as errors."""

    def train(run_dir: Path, *options: str, nproc: int = 1) -> str:
        process = start(*command(nproc, run_dir, digits, *options))
        try:
            _, said = process.communicate(timeout=TIMEOUT_S)
        finally:
            end(process)
        assert process.returncode == 0, said
        return said

    return train


def losses(run_dir: Path) -> list[float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_the_same_bits_each_time_and_wherever_images_come_from(train, tmp_path):
    ends = {}
    for name, options in {
        "device": (), "again": (), "host": ("--data-on-device=no",), "workers": ("--data-on-device=no", "--workers=2"),
    }.items():  # fmt: skip
        assert "slower" not in train(tmp_path / name, *options)
        ends[name] = digest(RunDirectory(tmp_path / name))
    assert len(set(ends.values())) == 1, ends


@pytest.mark.parametrize(
    "options",
    [
        (), ("--crop=4",), ("--accumulate=3",), ("--batch-size=70",), ("--optimizer=adamw", "--lr=0.002"),
        ("--clip-norm=0.5",), ("--ema-decay=0.9", "--elastic=1", "--flip"), ("--invariant", "--microbatches=4"),
        ("--precision=fp32",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_steps_launched_as_one_graph_are_those_that_are_not(options, train, tmp_path):
    assert "slower" not in train(tmp_path / "graph", *options)
    train(tmp_path / "eager", *options, "--no-cuda-graph")
    assert digest(RunDirectory(tmp_path / "graph")) == digest(RunDirectory(tmp_path / "eager"))


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_cut_off_goes_on_to_the_same_bits(fault, train, digits, tmp_path):
    long = ("--steps=2000", "--checkpoint-every=200", "--validate-every=1000")
    train(tmp_path / "whole", *long)
    run = RunDirectory(tmp_path / "cut")
    process = start(*command(1, run.path, digits, *long))
    try:
        wait_for(reaches(run, 500), process)
        os.kill(process.pid, fault)
        process.communicate(timeout=60)
    finally:
        end(process)
    assert load_checkpoint(run.checkpoints()[-1])[1]["step"] < 2000
    train(run.path, *long)
    assert digest(run) == digest(RunDirectory(tmp_path / "whole"))


def test_a_gpu_and_a_cpu_train_alike_and_agree_on_what_was_trained(train, tmp_path):
    plain = ("--precision=fp32", "--batch-norm=none")  # random changes and dropped units are the same by themselves
    train(tmp_path / "gpu", *plain)
    train(tmp_path / "cpu", *plain, "--device=cpu")
    np.testing.assert_allclose(losses(tmp_path / "gpu")[:2], losses(tmp_path / "cpu")[:2], rtol=2e-3)
    result = json.loads((tmp_path / "gpu" / "result.json").read_text())
    judge = (sys.executable, "-m", "dist_mnist", "eval", "--json", f"--ckpt={tmp_path / 'gpu'}", "--device=cpu")
    on_cpu = json.loads(subprocess.run(judge, check=True, stdout=subprocess.PIPE, timeout=TIMEOUT_S).stdout)
    assert on_cpu["loss"] == pytest.approx(result["loss"], rel=1e-4)
    assert on_cpu["confusion_matrix"] == result["confusion_matrix"]


def test_a_gradient_that_is_not_finite_ends_a_run_with_a_sentence(digits, tmp_path):
    wild = command(1, tmp_path / "run", digits, "--lr=1e30", "--warmup-fraction=0")
    done = subprocess.run(wild, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 2 and "diverged" in done.stderr and "Traceback" not in done.stderr


def test_more_processes_than_gpus_are_a_sentence(digits, tmp_path):
    done = subprocess.run(
        command(GPUS + 1, tmp_path / "run", digits), capture_output=True, text=True, timeout=TIMEOUT_S
    )  # fmt: skip
    assert done.returncode == 1 and "start one per GPU" in done.stderr


def test_a_network_beyond_a_gpus_memory_is_a_sentence(digits, tmp_path):
    huge = command(1, tmp_path / "run", digits, "--conv-channels=65536,4", "--batch-size=540")
    done = subprocess.run(huge, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "memory" in done.stderr


def test_a_trace_shows_the_gpus_work(train, tmp_path):
    train(tmp_path / "run", "--profile")
    [trace] = (tmp_path / "run" / "profile").glob("*.json.gz")
    assert b'"cat": "kernel"' in gzip.decompress(trace.read_bytes())


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_several_gpus_train_as_one_does(train, tmp_path):
    exact = ("--precision=fp32", "--batch-norm=none")
    train(tmp_path / "one", *exact)
    for name in ("several", "again"):
        assert "slower" not in train(tmp_path / name, *exact, nproc=GPUS)
    np.testing.assert_allclose(losses(tmp_path / "several")[:2], losses(tmp_path / "one")[:2], rtol=2e-3)
    assert digest(RunDirectory(tmp_path / "several")) == digest(RunDirectory(tmp_path / "again"))
