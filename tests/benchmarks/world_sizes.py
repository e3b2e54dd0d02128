"""The same run with 1, 2, 3 and 4 processes: the differences between their loss curves.

    python tests/benchmarks/world_sizes.py --data-dir DIR [--steps 200] [--model FILE.py:NAME] [training options]

Runs are in fp32, without augmentation, for the CNN also without batch normalisation and dropout, at a learning rate at
which training is stable, with a log line for every step. Exact arithmetic would give equal curves. Rounding differs,
because sums are in another order. A likely further source, not isolated: kernels use other blocking at other batch
sizes, so that max-pooling breaks ties on the flat background differently. Training amplifies all of this, without bound
at a learning rate that makes the loss jump.
"""

import sys

from dist_mnist.tools.measure import train

WORLD_SIZES = (1, 2, 3, 4)
SETTINGS = ("--precision=fp32", "--log-every=1", "--device=cpu", "--lr=0.02", "--rotate=0", "--scale=0",
            "--shift=0")  # fmt: skip
OF_CNN = ("--batch-norm=none", "--dropout=0")


def main() -> None:
    options = (*SETTINGS, *(() if any(word.startswith("--model") for word in sys.argv) else OF_CNN), *sys.argv[1:])
    curves = {nproc: [line.loss for line in train(*options, nproc=nproc)] for nproc in WORLD_SIZES}
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
