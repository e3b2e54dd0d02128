"""All settings of a run: declared once, here, with their help, limits and recipes; checked on construction."""

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_mnist.config.recipes import RECIPES, VARIANTS
from dist_mnist.utils.errors import UserError, short
from dist_mnist.utils.schema import number

Ints = tuple[int, ...]


def setting(
    default: Any,
    group: str,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float = -math.inf,
    maximum: float = math.inf,
    changeable: bool = False,
) -> Any:
    """Declare one setting. `changeable`: a run may be continued with another value of it."""
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum}
    metadata = limits | {"group": group, "help": help, "changeable": changeable}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a run. Immutable; an instance has passed every check.

    Raises:
        UserError: on construction, naming the option, its limits and what was given.
    """

    # fmt: off
    recipe: str = setting("default", "Run", "named set of defaults; every option given beside it overrides it")
    run_dir: Path | None = setting(
        None, "Run", "folder of the run; given again, the run continues there (default: runs/<recipe>-<data>-<digest>)",
        changeable=True,
    )
    seed: int = setting(0, "Run", "seed of everything that is drawn at random", minimum=0)
    epochs: float | None = setting(3.0, "Run", "length of the run in passes over the training images", minimum=0,
                                   maximum=1e6)
    steps: int | None = setting(None, "Run", "length of the run in optimizer steps, instead of --epochs", minimum=1,
                                maximum=10**12)

    dataset: str | None = setting(
        None, "Data", "data set to use, downloaded or generated if need be (default: what data/ holds itself, or "
        "mnist)",
        choices=("mnist", "fashion-mnist", "kmnist", "synthetic"), changeable=True,
    )
    data_dir: Path | None = setting(
        None, "Data", "folder of idx files (default: $DIST_MNIST_DATA, else data/)", changeable=True
    )
    validation_fraction: float = setting(
        0.1, "Data", "part of the training files that is held out for validation; 0 trains on all",
        minimum=0, maximum=0.99,
    )
    validation_split: str = setting(
        "random", "Data", "which are held out: drawn by the seed, or the last ones, of other writers in MNIST's files",
        choices=("random", "last"),
    )
    drop_last: bool = setting(False, "Data", "leave out an epoch's last, shorter batch")
    workers: int = setting(0, "Data", "loader processes per rank; 0 gathers in the training process", minimum=0,
                           maximum=256, changeable=True)
    stage_data: bool = setting(False, "Data", "read from copies on each machine's own disk (in $TMPDIR), made at the "
                               "start", changeable=True)
    data_on_device: str = setting(
        "auto", "Data", "keep the images in device memory: auto does where they take a quarter of it or less",
        choices=("auto", "yes", "no"), changeable=True,
    )

    conv_channels: Ints = setting((32, 64), "Model", "channels of each convolution stage; 2x2 pooling ends a stage",
                                  minimum=1, maximum=65_536)
    conv_layers: int = setting(1, "Model", "convolutions in each stage", minimum=1, maximum=100)
    kernel_size: int = setting(5, "Model", "side of the convolution kernels, in pixels (odd)", minimum=1,
                               maximum=101)
    dense_units: Ints = setting((1024,), "Model", "units of each dense layer", minimum=1, maximum=65_536)
    dropout: float = setting(0.4, "Model", "share of the last dense layer's units dropped", minimum=0, maximum=0.99)
    batch_norm: str = setting("dense", "Model", "batch normalisation: nowhere, in the dense layers, or in all layers",
                              choices=("none", "dense", "all"))
    pixels: str = setting(
        "standard", "Model", "raw values, scaled to 0..1, or standardised by the training images' mean and deviation",
        choices=("raw", "unit", "standard"),
    )

    rotate: float = setting(10.0, "Augmentation", "largest rotation, in degrees", minimum=0, maximum=180)
    scale: float = setting(0.1, "Augmentation", "largest change of size, as a part of 1", minimum=0, maximum=0.9)
    shear: float = setting(0.0, "Augmentation", "largest shear, in degrees", minimum=0, maximum=60)
    shift: float = setting(1.0, "Augmentation", "largest shift along each axis, in pixels", minimum=0)
    elastic: float = setting(0.0, "Augmentation", "largest elastic displacement of 5 x 5 points, in pixels", minimum=0)
    flip: bool = setting(False, "Augmentation", "mirror half of the images, left to right")
    adversarial: float = setting(0.0, "Augmentation", "largest move of an image to where the network errs more, as a "
                                 "part of its norm", minimum=0)
    views: int = setting(1, "Augmentation", "views of an image whose predictions are averaged in evaluation: "
                         "itself, and pairs that are changed as in training (odd)", minimum=1, maximum=10_001)
    crop: int = setting(0, "Augmentation", "pixels left out on each side of the images in the first part of a run, "
                        "which is faster for it", minimum=0)
    crop_fraction: float = setting(0.6, "Augmentation", "that part of the run", minimum=0, maximum=1)

    batch_size: int = setting(250, "Optimization", "GLOBAL batch size, over all processes", minimum=1)
    invariant: bool = setting(False, "Optimization", "the same bits with 1, 2, 4, ... processes, by sums over a tree")
    microbatches: int = setting(8, "Optimization", "leaves of that tree, a power of two: the most processes that can "
                                "take part", minimum=1, maximum=65_536)
    accumulate: int = setting(1, "Optimization", "parts that a rank cuts its share of a batch into, to save memory",
                              minimum=1)
    optimizer: str = setting("sgd", "Optimization", "optimizer", choices=("sgd", "adam", "adamw"))
    lr: float | None = setting(None, "Optimization", "learning rate at its peak (default: 0.1 with sgd, else 0.001)",
                               minimum=0)
    momentum: float = setting(0.9, "Optimization", "momentum of SGD", minimum=0, maximum=1)
    nesterov: bool = setting(True, "Optimization", "Nesterov's form of momentum, in SGD")
    beta1: float = setting(0.9, "Optimization", "first-moment decay of Adam and AdamW", minimum=0, maximum=1)
    beta2: float = setting(0.999, "Optimization", "second-moment decay of Adam and AdamW", minimum=0, maximum=1)
    weight_decay: float = setting(5e-4, "Optimization", "weight decay, on weights but not on biases and normalisation",
                                  minimum=0)
    schedule: str = setting("one-cycle", "Optimization", "learning rate after the warm-up: constant, down a cosine, or "
                            "linearly down (one-cycle)", choices=("constant", "cosine", "one-cycle"))
    warmup_fraction: float = setting(0.2, "Optimization", "part of the run in which the learning rate rises linearly",
                                     minimum=0, maximum=1)
    final_lr_fraction: float = setting(0.0, "Optimization", "learning rate at the end, as a part of --lr",
                                       minimum=0, maximum=1)
    label_smoothing: float = setting(0.0, "Optimization", "share of each label spread over all classes",
                                     minimum=0, maximum=0.99)
    clip_norm: float = setting(0.0, "Optimization", "largest norm of the gradient; 0 does not clip", minimum=0)
    ema_decay: float = setting(0.0, "Optimization", "decay of the averaged weights that are then evaluated; 0: none",
                               minimum=0, maximum=0.999999)

    device: str = setting("auto", "Device", "where to train: auto takes GPUs where there are any",
                          choices=("auto", "cuda", "cpu"), changeable=True)
    precision: str = setting("auto", "Device", "arithmetic of the network: auto is bf16 where that is faster",
                             choices=("auto", "fp32", "bf16"))
    channels_last: bool = setting(True, "Device", "keep images and kernels in channels-last order")
    all_reduce: str = setting("fp32", "Device", "precision in which DDP sums gradients over processes; bf16 halves the "
                              "bytes", choices=("fp32", "bf16"))
    cuda_graph: bool = setting(True, "Device", "launch a step on a GPU as one CUDA graph, where that gives the same "
                               "result", changeable=True)
    threads: int = setting(0, "Device", "CPU threads per process; 0 shares the machine's cores out", minimum=0,
                           maximum=1024, changeable=True)

    stall_timeout: float = setting(120.0, "Faults", "seconds without progress after which the run ends, naming the "
                                   "rank that stands still", minimum=1, maximum=1e6, changeable=True)
    non_finite: str = setting("stop", "Faults", "when a gradient is not finite: end the run, or skip the step",
                              choices=("stop", "skip"))
    save_errors: str = setting("warn", "Faults", "when a checkpoint cannot be written: train on, or end the run",
                               choices=("warn", "stop"), changeable=True)

    validate_every: int = setting(
        0, "Output", "steps between validations; 0 validates after each epoch. The last step is always validated",
        minimum=0, changeable=True,
    )
    log_every: int = setting(50, "Output", "steps between log lines and TensorBoard points", minimum=1, changeable=True)
    checkpoint_every_s: float = setting(600.0, "Output", "seconds between checkpoints, asked at log lines; 0: none by "
                                        "time", minimum=0, changeable=True)
    checkpoint_every: int = setting(0, "Output", "steps between checkpoints; 0: none by steps", minimum=0,
                                    changeable=True)
    keep: int = setting(5, "Output", "newest checkpoints kept, beside the best", minimum=1, changeable=True)
    tensorboard: bool = setting(True, "Output", "write TensorBoard scalars", changeable=True)
    profile: bool = setting(False, "Output", "record a trace of a few steps, and say what bounds the run",
                            changeable=True)

    # fmt: on
    def __post_init__(self) -> None:
        for declared in dataclasses.fields(self):
            check_value(declared, value := getattr(self, declared.name))
            if value is not None and value_type(declared) is float:
                object.__setattr__(self, declared.name, float(value))
        if self.lr is None:
            object.__setattr__(self, "lr", 0.1 if self.optimizer == "sgd" else 0.001)
        self._check_together()

    def _check_together(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise UserError("the length of a run is either --epochs or --steps: give exactly one of them")
        if self.epochs == 0:
            raise UserError("--epochs is 0, which trains nothing: give a positive number")
        if self.kernel_size % 2 == 0:
            raise UserError(f"--kernel-size must be odd, so that images keep their size; {self.kernel_size} was given")
        if self.views % 2 == 0:
            raise UserError(f"--views must be odd, an image itself and pairs of others; {self.views} was given")
        changes = (self.rotate, self.scale, self.shear, self.shift, self.elastic, self.flip)
        if self.views > 1 and not any(changes):
            raise UserError(
                f"--views {self.views} averages over images that are changed as in training, and none of --rotate, "
                "--scale, --shear, --shift, --elastic and --flip changes them: train with one, or give --views 1"
            )
        if not self.conv_channels and not self.dense_units:
            raise UserError("--conv-channels and --dense-units cannot both be empty")
        if len(self.dense_units) > 100:
            raise UserError(f"--dense-units names {len(self.dense_units)} layers; at most 100 are built")
        if self.data_dir is not None and self.dataset is not None:
            raise UserError("--data-dir says where the data is, --dataset what to look for: give one of them")
        if max(self.beta1, self.beta2) >= 1:
            raise UserError("--beta1 and --beta2 must be below 1")
        if self.invariant and self.microbatches & (self.microbatches - 1):
            raise UserError(f"--microbatches must be a power of two, not {self.microbatches}")
        if self.invariant and self.accumulate > 1:
            raise UserError("--invariant takes a batch in --microbatches already: leave --accumulate out")
        name, parts = ("microbatches", self.microbatches) if self.invariant else ("accumulate", self.accumulate)
        if self.batch_norm != "none" and parts > max(1, self.batch_size // 2):
            raise UserError(
                f"--{name} {parts} leaves less than two images of {self.batch_size} to a part, which cannot be "
                "normalised: give half the batch size or less, or --batch-norm none"
            )
        if self.recipe not in RECIPES:
            raise UserError(unknown("recipe", self.recipe, RECIPES))

    @property
    def split_seed(self) -> int | None:
        """By what validation images are drawn; None if they are the last ones."""
        return self.seed if self.validation_split == "random" else None

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def digest(self, fingerprint: str) -> str:
        """8 hexadecimal digits for what a run computes: over all settings that are not changeable, and its data."""
        essential = {name: value for name, value in self.to_json().items() if not FIELDS[name].metadata["changeable"]}
        return hashlib.sha256(json.dumps([essential, fingerprint], sort_keys=True).encode()).hexdigest()[:8]

    def shared(self) -> dict[str, Any]:
        """The settings that all ranks must agree on, as JSON values: not where a machine keeps its files, say."""
        own = ("run_dir", "data_dir", "dataset", "device", "threads", "workers", "data_on_device", "stage_data")
        return {name: value for name, value in self.to_json().items() if name not in own}

    def differences(self, other: "Config") -> list[str]:
        """What keeps `other` from continuing a run of this one, a line for each setting: `lr: 0.1 -> 0.2`.

        The length is free where neither a learning rate nor a crop depends on it.
        """
        free = self.schedule == "constant" and self.warmup_fraction == 0 and not self.crop
        length = ("epochs", "steps") if free else ()
        mine, others = self.to_json(), other.to_json()
        return [
            f"{name}: {mine[name]} -> {others[name]}"
            for name, declared in FIELDS.items()
            if mine[name] != others[name] and not declared.metadata["changeable"] and name not in length
        ]


IN_WORDS = {
    int: "a whole number", float: "a finite number", bool: "yes or no", str: "a name", Path: "a path",
    Ints: "a list of whole numbers",
}  # fmt: skip
# Of each pair, one that is given replaces the other that a recipe or a file has.
PARTNERS = (("steps", "epochs"), ("epochs", "steps"), ("data_dir", "dataset"), ("dataset", "data_dir"))
FIELDS = {declared.name: declared for declared in dataclasses.fields(Config)}

RECIPES |= {f"notebook-{name}": RECIPES["notebook"] | changes for name, changes in VARIANTS.items()}


def check_depth(num_stages: int, height: int, width: int, crop: int = 0) -> None:
    """Raise a UserError if so many 2x2 poolings leave nothing of an image, or do not go together with `crop`."""
    fitting = min(height, width).bit_length() - 1
    if num_stages > fitting:
        raise UserError(
            f"--conv-channels: {num_stages} pooling stages halve an image of {height}x{width} pixels to nothing; "
            f"at most {fitting} fit"
        )
    if crop % 2**num_stages or min(height, width) - 2 * crop < 2**num_stages:
        raise UserError(
            f"--crop {crop} does not suit images of {height}x{width} pixels and {num_stages} pooling stages: give a "
            f"multiple of {2**num_stages} that leaves {2**num_stages} pixels or more"
        )


def unknown(what: str, found: str, valid: typing.Iterable[str], where: str = "") -> str:
    """The sentence for a name that is not one of the valid ones, with the nearest, and all or `where` they are."""
    names = list(valid)
    near = difflib.get_close_matches(found, names, 1)
    suggestion = f", did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {short(repr(found))}{suggestion} ({where or 'there are: ' + ', '.join(names)})"


def option(name: str) -> str:
    """The command-line option of a setting."""
    return "--" + name.replace("_", "-")


def value_type(declared: dataclasses.Field) -> Any:
    """The type of a setting's value, None aside."""
    if isinstance(declared.type, types.UnionType):
        return next(part for part in typing.get_args(declared.type) if part is not types.NoneType)
    return declared.type


def check_value(declared: dataclasses.Field, value: Any) -> None:
    """Raise a UserError if a setting's declared type, choices or limits do not admit `value`."""
    kind, limits = value_type(declared), declared.metadata
    if value is None and isinstance(declared.type, types.UnionType):
        return
    if not _is(value, kind):
        raise UserError(f"{option(declared.name)} takes {IN_WORDS[kind]}; {short(value)} was given")
    if limits["choices"] and value not in limits["choices"]:
        raise UserError(unknown(f"value of {option(declared.name)}:", value, limits["choices"]))
    for each in value if isinstance(value, tuple) else (value,):
        if isinstance(each, int | float) and not limits["minimum"] <= each <= limits["maximum"]:
            upper = "" if limits["maximum"] == math.inf else f" and at most {limits['maximum']:g}"
            least = f"{limits['minimum']:g}"
            raise UserError(f"{option(declared.name)} must be at least {least}{upper}, not {short(each)}")


def _is(value: Any, kind: Any) -> bool:
    if kind == Ints:
        return isinstance(value, tuple) and all(_is(item, int) for item in value)
    if kind is float:
        return number(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def as_options(given: Mapping[str, Any]) -> list[str]:
    """Settings as command-line options."""
    return [argument for name, value in given.items() for argument in _as_option(name, value)]


def _as_option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [option(name) if value else option("no_" + name)]
    return [f"{option(name)}={','.join(map(str, value)) if isinstance(value, tuple) else value}"]
