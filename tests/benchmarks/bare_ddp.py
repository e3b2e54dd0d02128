"""Upper bound for several processes on one machine: bare DDP on a constant batch, compared with dist_mnist.

    python tests/benchmarks/bare_ddp.py --data-dir DIR [--rounds 5]

Images per second at a global batch size of 256 for the notebook's network in fp32: one process with all threads, two
processes that share the cores (with and without DDP between them), and dist_mnist with the same two processes (recipe
notebook). Ratios are to the first, within each round.
"""

import argparse
import subprocess
import sys
import time
from functools import partial

from dist_mnist.tools.measure import TIMEOUT_S, Way, by_turns, print_rows, train

BATCH_SIZE, STEPS, NPROC = 256, 60, 2


def bare(ddp: bool) -> None:
    """Train on one constant batch and print the images per second over all ranks. Runs in each process."""
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


def bare_rate(nproc: int, ddp: bool) -> float:
    """Return the images per second of `bare` in processes started by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    command = ["env", "OMP_NUM_THREADS=1", *torchrun, __file__, "ddp" if ddp else "apart"]  # else torchrun warns
    return float(subprocess.check_output(command, timeout=TIMEOUT_S))


def trainer_rate(data_dir: str) -> float:
    """Return the images per second of dist_mnist with the same network and processes."""
    settings = ("--recipe=notebook", f"--batch-size={BATCH_SIZE}", f"--steps={2 * STEPS}", f"--log-every={STEPS}")
    return train(*settings, f"--data-dir={data_dir}", "--device=cpu", nproc=NPROC)[-1].images_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    alone = "one process, all threads"
    ways: dict[str, Way] = {
        alone: partial(bare_rate, 1, ddp=False),
        f"{NPROC} processes, no DDP": partial(bare_rate, NPROC, ddp=False),
        f"{NPROC} processes, bare DDP": partial(bare_rate, NPROC, ddp=True),
        f"{NPROC} processes, this trainer": partial(trainer_rate, given.data_dir),
    }
    print_rows("images/s", by_turns(ways, given.rounds, alone), given.rounds)


if __name__ == "__main__":
    if sys.argv[1:] in (["apart"], ["ddp"]):
        bare(sys.argv[1] == "ddp")
    else:
        main()
