"""The same run with 1, 2, 3 and 4 processes: how far their loss curves are apart.

    python tests/benchmarks/world_sizes.py --data-dir DIR [--steps 200] [training options]

Runs in fp32 without batch normalisation, dropout and augmentation, at a learning rate at which training is stable,
with a log line for every step. Exact arithmetic would give the same curves. Rounding differs, because sums are taken
in another order; a likely further source, not isolated, is that kernels block other batch sizes otherwise, so that
max-pooling breaks ties on flat background differently; and training amplifies it all, without bound at a learning
rate that makes the loss jump.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

WORLD_SIZES = (1, 2, 3, 4)
TIMEOUT_S = 1800


def losses(run_dir: Path, nproc: int, options: list[str]) -> list[float]:
    """The loss of every step of a run."""
    command = [sys.executable, "-m", "dist_mnist", "train", f"--nproc={nproc}", f"--run-dir={run_dir}"]
    settings = ["--precision=fp32", "--log-every=1", "--device=cpu", "--lr=0.02", "--batch-norm=none", "--dropout=0"]
    settings += ["--rotate=0", "--scale=0", "--shift=0", *options]
    subprocess.run([*command, *settings], check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        curves = {nproc: losses(Path(scratch) / str(nproc), nproc, sys.argv[1:]) for nproc in WORLD_SIZES}
    reference = curves[WORLD_SIZES[0]]
    for nproc, curve in curves.items():
        apart = [abs(one - other) for one, other in zip(curve, reference, strict=True)]
        early = max(apart[:10])
        print(
            f"{nproc} process(es): {len(curve)} steps, last loss {curve[-1]:.6f}, largest difference to 1 process "
            f"{max(apart):.2e} (in the first ten steps {early:.2e})"
        )


if __name__ == "__main__":
    main()
