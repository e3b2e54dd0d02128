"""torchvision and timm, from the separate folder where launch/setup.sh installs them; as a script, a rank of a run.

The wheels of torchvision on PyPI are for torch with CUDA. With another build of torch they lack their detection
operators and cannot be imported unless these are declared; image classifiers use none of them.
"""

import importlib.util
import sys
from pathlib import Path

import torch

from dist_mnist.cli.options import run_as_rank
from dist_mnist.elastic.preemption import StopSignal
from dist_mnist.train import run

FOLDER = Path(sys.prefix) / "networks"
_declared = torch.library.Library("torchvision", "FRAGMENT")


def find_libraries() -> None:
    """Make both importable, if installed."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    found = None if "torchvision" in sys.modules else importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        torch.ops.load_library(next(Path(found.origin).parent.glob("_C.*")))
    except OSError:
        for name in ("nms", "qnms"):
            _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if __name__ == "__main__":
    find_libraries()
    run_as_rank(run, StopSignal())
