"""What several processes on one machine's cores can reach: bare DDP, one constant batch and nothing else, beside ours.

    python tests/benchmarks/bare_ddp.py --data-dir DIR [--rounds 5]

Images per second at a global batch of 256 for the notebook's network in fp32: one process with all threads, two
processes that share the cores (with and without DDP between them), and this trainer with the same two processes
(recipe notebook). Ratios are to the first, by rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH_SIZE, STEPS, NPROC, TIMEOUT_S = 256, 60, 2, 600


def bare(ddp: bool) -> None:
    """Train on one constant batch, and print images per second of the whole world. Run in each process."""
    import torch
    from torch import distributed as dist
    from torch import nn

    from dist_mnist.distributed.device import use_device
    from dist_mnist.distributed.world import World

    world = use_device(World.from_environment(), "cpu")
    layers = [nn.Conv2d(1, 32, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()]
    layers += [nn.Conv2d(32, 64, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()]
    layers += [nn.Linear(7 * 7 * 64, 1024), nn.ReLU(), nn.Dropout(0.4), nn.Linear(1024, 10)]
    network: nn.Module = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    if world.size > 1:
        dist.init_process_group("gloo")
    if ddp:
        network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(network.parameters(), 0.001, fused=True)
    images = torch.rand(BATCH_SIZE // world.size, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (len(images),))
    for step in range(2 * STEPS):
        if step == STEPS:
            began = time.perf_counter()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    if world.size > 1:
        dist.barrier()
    if world.is_main:
        print(STEPS * BATCH_SIZE / (time.perf_counter() - began))
    if world.size > 1:
        dist.destroy_process_group()


def start(nproc: int, *command: str) -> str:
    """The output of some processes that torchrun starts."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", *command]
    quiet = {"OMP_NUM_THREADS": "1"}  # torchrun would say that it sets it
    return subprocess.run(
        torchrun, check=True, timeout=TIMEOUT_S, stdout=subprocess.PIPE, text=True, env=os.environ | quiet
    ).stdout


def ours(data_dir: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--recipe=notebook", f"--batch-size={BATCH_SIZE}", f"--steps={2 * STEPS}", f"--log-every={STEPS}"]
        start(NPROC, "-m", "dist_mnist.train", *settings, f"--data-dir={data_dir}", f"--run-dir={folder}/run")
        records = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "train"][-1]["images_per_s"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    ways = {
        "one process, all threads": lambda: float(start(1, __file__, "apart")),
        f"{NPROC} processes, no DDP": lambda: float(start(NPROC, __file__, "apart")),
        f"{NPROC} processes, bare DDP": lambda: float(start(NPROC, __file__, "ddp")),
        f"{NPROC} processes, this trainer": lambda: ours(given.data_dir),
    }
    rounds = [{name: way() for name, way in ways.items()} for _ in range(given.rounds)]
    first = next(iter(ways))
    for name in ways:
        ratios = [one[name] / one[first] for one in rounds]
        rate = statistics.median(one[name] for one in rounds)
        print(
            f"{name:28}{rate:9,.0f} images/s  {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    if sys.argv[1:] in (["apart"], ["ddp"]):
        bare(sys.argv[1] == "ddp")
    else:
        main()
