"""Whole runs on a GPU, where there is one; on several, where there are several. (Steps on a GPU: unit/training.)"""

import gzip
import json
import os
import signal

import numpy as np
import pytest
import torch

from dist_mnist.run.checkpoints.file import load_checkpoint
from dist_mnist.run.directory import RunDirectory
from helpers import HANGS_AFTER_S
from helpers.runs import digest, losses, reaches, wait_for

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(not GPUS, reason="needs a GPU")

GPU = ("--device=cuda", "--steps=60", "--batch-size=100", "--log-every=10", "--lr=0.02", "--batch-norm=all")
EXACT = ("--precision=fp32", "--batch-norm=none")
SLOWER = "training is slower"  # in the warning that steps do not run as a CUDA graph


@pytest.fixture
def end_of(train, tmp_path):
    """`end_of(name, *options, nproc=1)`: a run on GPUs, with CUDA graphs; the digest of its end."""

    def end_of(name: str, *options: str, nproc: int = 1) -> str:
        assert SLOWER not in train(nproc, tmp_path / name, *GPU, *options).stderr
        return digest(RunDirectory(tmp_path / name))

    return end_of


@pytest.fixture
def command(digits, tmp_path) -> tuple[str, ...]:
    """The arguments of a run on a GPU."""
    return ("-m", "dist_mnist.train", f"--data-dir={digits}", f"--run-dir={tmp_path / 'run'}", *GPU)


def test_training_on_a_gpu_any_source_of_images_ends_with_the_same_bits(end_of):
    host = "--data-on-device=no"
    ends = [end_of("device"), end_of("again"), end_of("host", host), end_of("workers", host, "--workers=2")]
    assert len(set(ends)) == 1, ends


@pytest.mark.parametrize(
    "options",
    [
        (), ("--crop=4",), ("--accumulate=3",), ("--batch-size=70",), ("--optimizer=adamw", "--lr=0.002"),
        ("--clip-norm=0.5",), ("--ema-decay=0.9", "--flip"), ("--invariant", "--microbatches=4"),
        ("--precision=fp32",), ("--adversarial=0.1",), ("--erasing=0.5", "--mixup=0.2", "--cutmix=1"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_steps_launched_as_one_cuda_graph_are_the_eager_ones(options, end_of):
    assert end_of("graph", *options) == end_of("eager", *options, "--no-cuda-graph")


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGTERM])
def test_run_on_a_gpu_cut_off_resumes_to_the_same_bits(fault, end_of, launch, command, tmp_path):
    long = ("--steps=2000", "--checkpoint-every=200", "--validate-every=1000")
    run = RunDirectory(tmp_path / "run")
    process = launch(1, *command, *long)
    wait_for(reaches(run, 500), process)
    os.kill(process.pid, fault)
    process.communicate(timeout=HANGS_AFTER_S)
    assert load_checkpoint(run.checkpoints.paths()[-1]).info.step < 2000
    assert end_of("run", *long) == end_of("whole", *long)


def test_training_on_gpu_and_cpu_agrees(train, run, tmp_path):
    train(1, tmp_path / "gpu", *GPU, *EXACT)  # random changes and dropped units are the same by themselves
    train(1, tmp_path / "cpu", *GPU, *EXACT, "--device=cpu")
    np.testing.assert_allclose(losses(tmp_path / "gpu")[:2], losses(tmp_path / "cpu")[:2], rtol=2e-3)
    by_gpu = json.loads((tmp_path / "gpu" / "result.json").read_text())
    by_cpu = json.loads(
        run(1, "-m", "dist_mnist", "eval", f"--ckpt={tmp_path / 'gpu'}", "--json", "--device=cpu").stdout
    )
    assert by_cpu["loss"] == pytest.approx(by_gpu["loss"], rel=1e-4)
    assert by_cpu["confusion_matrix"] == by_gpu["confusion_matrix"]


def test_gradient_on_a_gpu_that_is_not_finite_ends_the_run_with_a_sentence(run, command):
    done = run(1, *command, "--lr=1e30", "--warmup-fraction=0")
    assert done.returncode == 2 and "diverged" in done.stderr and "Traceback" not in done.stderr


def test_processes_beyond_the_gpus_are_refused(run, command):
    done = run(GPUS + 1, *command)
    assert done.returncode == 1 and "start one process per GPU" in done.stderr


def test_network_beyond_a_gpus_memory_is_refused(run, command):
    done = run(1, *command, "--conv-channels=65536,4", "--batch-size=540")
    assert done.returncode == 1 and "memory" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_profile_on_a_gpu_shows_its_kernels(end_of, tmp_path):
    end_of("run", "--profile")
    [trace] = (tmp_path / "run" / "profile").glob("*.json.gz")
    assert b'"cat": "kernel"' in gzip.decompress(trace.read_bytes())


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_training_on_several_gpus_agrees_with_one(end_of, tmp_path):
    end_of("one", *EXACT)
    assert end_of("several", *EXACT, nproc=GPUS) == end_of("again", *EXACT, nproc=GPUS)
    np.testing.assert_allclose(losses(tmp_path / "several")[:2], losses(tmp_path / "one")[:2], rtol=2e-3)
