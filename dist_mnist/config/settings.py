"""All settings of a run, declared once with default, help and limits, and validated on construction."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from dist_mnist.config.choices import (
    AllReduce,
    BatchNorm,
    DataOnDevice,
    DataSet,
    Device,
    Layout,
    NonFinite,
    Optimizer,
    Padding,
    Pixels,
    Precision,
    SaveErrors,
    Schedule,
    ValidationSplit,
    WeightInit,
)
from dist_mnist.config.fields import Duration, Ints, Names, declared, option, setting
from dist_mnist.config.recipes import named_recipe
from dist_mnist.utils.errors import UserError, as_utf8, short, unknown
from dist_mnist.utils.files import path_text

JsonValue = bool | int | float | str | list[int] | list[str] | None


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a run. Immutable; an instance has passed all checks.

    Strings are converted to choices and paths, lists to tuples.

    Raises:
        UserError: on construction, naming the option, its limits and the value found.
    """

    # fmt: off
    recipe: str = setting("default", "Run", "recipe: a named set of settings; options override single ones")
    run_dir: Path | None = setting(None, "Run", "run directory; an existing run resumes from its newest checkpoint "
        "(default: runs/<recipe>-<data>-<digest>; in sweep the parent of all runs, runs/sweep)", changeable=True)
    seed: int = setting(0, "Run", "random seed of the weights, sample order, augmentation, dropout and validation "
        "split", minimum=0)
    epochs: float | None = setting(3.0, "Run", "length of the run in epochs (passes over the training images)",
        minimum=0, maximum=1e6)
    steps: int | None = setting(None, "Run", "length of the run in optimizer steps, instead of --epochs", minimum=1,
        maximum=10**12)
    patience: int = setting(0, "Run", "early stopping: end the run after this number of consecutive validations "
        "without a higher accuracy; 0: off. The learning rate and crop schedules keep the full length", minimum=0,
        changeable=True)
    max_time: Duration = setting(0.0, "Run", "end the run after this total training time over all its starts: 90 "
        "(seconds), 30m or 1h30m; 0: off. The learning rate and crop schedules keep the full length", minimum=0,
        changeable=True)

    dataset: DataSet | None = setting(None, "Data", "dataset to train on, downloaded or generated if missing (default: "
        "the files in data/, else mnist)", changeable=True)
    data_dir: Path | None = setting(None, "Data", "folder of idx files to train on (default: $DIST_MNIST_DATA, else "
        "data/)", changeable=True)
    validation_fraction: float = setting(0.1, "Data", "fraction of the training images held out as the validation "
        "split; 0 trains on all images", minimum=0, maximum=0.99)
    validation_split: ValidationSplit = setting(ValidationSplit.RANDOM, "Data", "how to choose the validation split: "
        "at random by --seed, or the last images of the files (in MNIST, digits by other writers)")
    validation_fold: str = setting("", "Data", "fold of a k-fold cross-validation to hold out as the validation split "
        "instead of --validation-fraction, such as 1/5")
    test_fraction: float = setting(0.0, "Data", "fraction of the training images held out as the test split if the "
        "data has no test images; chosen like the validation split", minimum=0, maximum=0.99)
    layout: Layout = setting(Layout.AUTO, "Data", "axis order of 4-dimensional image files: NxHxWxC or NxCxHxW; auto: "
        "nchw if axis 1 is 1, 3 or 4 and smaller than the last two", changeable=True)
    drop_last: bool = setting(False, "Data", "drop the last batch of each epoch if it is smaller than --batch-size")
    workers: int = setting(0, "Data", "data-loader workers per rank; 0 loads in the training process", minimum=0,
        maximum=256, changeable=True)
    stage_data: bool = setting(False, "Data", "copy the data to each node's local disk ($TMPDIR) at the start, and "
        "train from the copy", changeable=True)
    data_on_device: DataOnDevice = setting(DataOnDevice.AUTO, "Data", "keep the images in device memory; auto: if they "
        "fit in a quarter of a GPU's free memory", changeable=True)

    model: str = setting("cnn", "Model", "network: cnn, resnet, mlp, torchvision:NAME, timm:NAME, or your own "
        "nn.Module class or a function that returns one, as FILE.py:NAME or package.module:NAME")
    model_args: str = setting("", "Model", "arguments of the network's class or function (not for --model cnn), such "
        "as width=32,depth=3")
    init: Path | None = setting(None, "Model", "initial weights: checkpoint, run directory or safetensors file, "
        "matched by name; tensors that do not match keep their random initialisation")
    freeze: str = setting("", "Model", "comma-separated patterns of parameters that are not trained, such as "
        "'stages.*'; running statistics of the same layers are frozen too")
    conv_channels: Ints = setting((32, 64), "Model", "output channels of each convolution stage; a stage ends with 2x2 "
        "max-pooling", minimum=1, maximum=65_536)
    strided_stages: int = setting(0, "Model", "number of first stages that end with a convolution of stride 2 instead "
        "of max-pooling, which is faster", minimum=0, maximum=100)
    conv_layers: int = setting(1, "Model", "convolution layers in each stage", minimum=1, maximum=100)
    kernel_size: int = setting(5, "Model", "side of the convolution kernels, in pixels (odd)", minimum=1, maximum=101)
    padding: Padding = setting(Padding.SAME, "Model", "padding of convolutions: same keeps the size of the input; "
        "valid has no padding and is faster")
    dense_units: Ints = setting((1024,), "Model", "units of each dense layer", minimum=1, maximum=65_536)
    dropout: float = setting(0.4, "Model", "dropout probability of the last dense layer's units", minimum=0,
        maximum=0.99)
    batch_norm: BatchNorm = setting(BatchNorm.DENSE, "Model", "synchronised batch normalisation, over the global "
        "batch: in no layer, in the dense layers, or in all layers")
    pool_first: bool = setting(False, "Model", "pool before the last batch normalisation of a stage, which then "
        "normalises a quarter of the values and is faster")
    weight_init: WeightInit = setting(WeightInit.GLOROT, "Model", "uniform weight initialisation: variance 2 / (fan-in "
        "+ fan-out), TensorFlow's default (glorot), or 1 / (3 fan-in), torch's default (fan_in)")
    pixels: Pixels = setting(Pixels.STANDARD, "Model", "normalisation of pixels: raw values, scaled to 0..1 (unit), or "
        "standardised by mean and standard deviation of the training images (standard)")

    rotate: float = setting(10.0, "Augmentation", "largest random rotation of a training image, in degrees", minimum=0,
        maximum=180)
    scale: float = setting(0.1, "Augmentation", "largest random change of a training image's size, as a fraction",
        minimum=0, maximum=0.9)
    shear: float = setting(0.0, "Augmentation", "largest random shear of a training image, in degrees", minimum=0,
        maximum=60)
    shift: float = setting(1.0, "Augmentation", "largest random shift of a training image along each axis, in pixels",
        minimum=0)
    flip: bool = setting(False, "Augmentation", "flip half of the training images horizontally, at random")
    erasing: float = setting(0.0, "Augmentation", "random erasing: probability that a random box of a training image "
        "is replaced by noise; 0: off", minimum=0, maximum=1)
    mixup: float = setting(0.0, "Augmentation", "mixup: alpha of the Beta(alpha, alpha) distribution of the ratio in "
        "which two training images and their labels are blended, such as 0.2; 0: off", minimum=0, maximum=1000)
    cutmix: float = setting(0.0, "Augmentation", "cutmix: alpha of the Beta(alpha, alpha) distribution of the area "
        "that is pasted from another training image, such as 1.0; 0: off. With --mixup, each applies to half of the "
        "images", minimum=0, maximum=1000)
    mixup_prob: float = setting(1.0, "Augmentation", "probability that --mixup or --cutmix is applied to an image",
        minimum=0, maximum=1)
    adversarial: float = setting(0.0, "Augmentation", "adversarial training (fast gradient method): largest "
        "perturbation of a training image, as a fraction of its norm; 0: off", minimum=0)
    views: int = setting(1, "Augmentation", "test-time augmentation (TTA): views of each image whose predictions are "
        "averaged, an odd number: the image itself and pairs of augmented ones; 1: off", minimum=1, maximum=10_001)
    crop: int = setting(0, "Augmentation", "progressive resizing: pixels that a centre crop removes on each side in "
        "the first part of the run, which is faster; 0: off", minimum=0)
    crop_fraction: float = setting(0.6, "Augmentation", "fraction of the run that trains on centre crops, with --crop",
        minimum=0, maximum=1)

    batch_size: int = setting(250, "Optimization", "GLOBAL batch size: images per optimizer step, over all processes",
        minimum=1)
    invariant: bool = setting(False, "Optimization", "sum gradients by deterministic (pairwise) tree reduction, so "
        "that weights have the same bits with 1, 2, 4, ... processes")
    microbatches: int = setting(8, "Optimization", "microbatches per global batch with --invariant, a power of two: "
        "the leaves of the reduction tree, and the largest number of processes", minimum=1, maximum=65_536)
    accumulate: int = setting(1, "Optimization", "gradient accumulation: microbatches per rank and step, to save "
        "memory", minimum=1)
    optimizer: Optimizer = setting(Optimizer.SGD, "Optimization", "optimizer")
    lr: float | None = setting(None, "Optimization", "peak learning rate (default: 0.1 with sgd, else 0.001)",
        minimum=0)
    momentum: float = setting(0.9, "Optimization", "momentum of SGD", minimum=0, maximum=1)
    nesterov: bool = setting(True, "Optimization", "Nesterov momentum in SGD")
    beta1: float = setting(0.9, "Optimization", "decay of the first moment in Adam and AdamW", minimum=0, maximum=1)
    beta2: float = setting(0.999, "Optimization", "decay of the second moment in Adam and AdamW", minimum=0, maximum=1)
    weight_decay: float = setting(5e-4, "Optimization", "weight decay; not applied to biases and batch normalisation",
        minimum=0)
    schedule: Schedule = setting(Schedule.ONE_CYCLE, "Optimization", "learning-rate schedule after the warm-up: "
        "constant, cosine decay, or linear decay (one-cycle)")
    warmup_fraction: float = setting(0.2, "Optimization", "fraction of the run in which the learning rate warms up "
        "linearly", minimum=0, maximum=1)
    final_lr_fraction: float = setting(0.0, "Optimization", "learning rate at the end of the run, as a fraction of "
        "--lr", minimum=0, maximum=1)
    label_smoothing: float = setting(0.0, "Optimization", "label smoothing: fraction of each label spread evenly over "
        "all classes", minimum=0, maximum=0.99)
    clip_norm: float = setting(0.0, "Optimization", "gradient clipping: largest norm of the gradient; 0: off",
        minimum=0)
    ema_decay: float = setting(0.0, "Optimization", "exponential moving average (EMA) of the weights: decay per step; "
        "evaluations use the EMA; 0: off", minimum=0, maximum=0.999999)

    device: Device = setting(Device.AUTO, "Device", "device to train on; auto: GPUs if there are any", changeable=True)
    precision: Precision = setting(Precision.AUTO, "Device", "precision of the model's arithmetic; auto: bf16 where "
        "the hardware runs it faster, else fp32")
    channels_last: bool = setting(True, "Device", "channels-last memory format of images and kernels")
    all_reduce: AllReduce = setting(AllReduce.FP32, "Device", "precision of DDP's gradient all-reduce; bf16 halves the "
        "traffic")
    cuda_graph: bool = setting(True, "Device", "run each step on a GPU as one captured CUDA graph, if its result "
        "equals that of the eager step", changeable=True)
    threads: int = setting(0, "Device", "CPU threads per process; 0 divides the node's cores among its processes",
        minimum=0, maximum=1024, changeable=True)

    stall_timeout: float = setting(120.0, "Faults", "watchdog timeout: seconds without progress after which the "
        "stalled rank is named and all ranks end, to restart if restarts are left", minimum=1, maximum=1e6,
        changeable=True)
    non_finite: NonFinite = setting(NonFinite.STOP, "Faults", "reaction to a NaN or infinite gradient: stop the run, "
        "or skip the step")
    check_ranks_every: int = setting(100, "Faults", "steps between comparisons of all ranks' weights, EMA and "
        "optimizer state (by digest), which name a rank that computes wrong; also before each checkpoint; 0: never",
        minimum=0, changeable=True)
    audit_spikes: bool = setting(False, "Faults", "recompute a step whose loss or gradient norm spikes, and report "
        "whether the result is the same; slower, as it copies weights and optimizer state each step", changeable=True)
    save_errors: SaveErrors = setting(SaveErrors.WARN, "Faults", "reaction to a checkpoint that cannot be written: "
        "warn and continue, or stop the run", changeable=True)

    validate_every: int = setting(0, "Output", "steps between validations; 0: validate after each epoch. The last step "
        "is always validated", minimum=0, changeable=True)
    log_every: int = setting(50, "Output", "steps between log lines and TensorBoard points", minimum=1, changeable=True)
    checkpoint_every_s: float | None = setting(None, "Output", "seconds between checkpoints; 0: not by time (default: "
        "the shortest interval from 5 to 60 s in which saving takes at most 0.5 % of the time)", minimum=0,
        changeable=True)
    checkpoint_every: int = setting(0, "Output", "steps between checkpoints; 0: not by steps", minimum=0,
        changeable=True)
    keep: int = setting(5, "Output", "number of newest checkpoints to keep; of older ones, the best and about one per "
        "doubling of age are kept too", minimum=1, changeable=True)
    tensorboard: bool = setting(True, "Output", "write TensorBoard event files", changeable=True)
    log_to: Names = setting((), "Output", "experiment tracker: mlflow, wandb, or your own Listener class as "
        "FILE.py:CLASS; may be repeated; not remembered when a run resumes", changeable=True)
    profile: bool = setting(False, "Output", "profile a few steps: write a trace, and print the bottleneck",
        changeable=True)

    # fmt: on
    def __post_init__(self) -> None:
        for name, field in FIELDS.items():
            if (value := getattr(self, name)) is not None or not field.optional:
                object.__setattr__(self, name, field.coerce(value))
        if self.lr is None:
            object.__setattr__(self, "lr", 0.1 if self.optimizer is Optimizer.SGD else 0.001)
        self._check_run()
        self._check_model()
        self._check_optimization()
        named_recipe(self.recipe)

    def _check_run(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise UserError("--epochs and --steps both set the length of the run: give exactly one of them")
        if self.epochs == 0:
            raise UserError("--epochs must be positive, got 0")
        if self.data_dir is not None and self.dataset is not None:
            raise UserError("--data-dir (a folder) and --dataset (a name) exclude each other: give one of them")
        if self.validation_fold and self.fold is None:
            raise UserError(
                "--validation-fold expects FOLD/FOLDS, such as 1/5 (FOLD from 1, at least 2 folds), got "
                f"{short(self.validation_fold)}"
            )
        for name in self.log_to:
            if name not in TRACKERS and not re.fullmatch(r"([^:]+\.py|[\w.]+):[^\W\d]\w*", name):
                where = f"{', '.join(TRACKERS)}, or your own class as FILE.py:CLASS; TensorBoard: --tensorboard"
                raise UserError(f"--log-to: {unknown('tracker', name, TRACKERS, f'there are: {where}')}")
        if len(set(self.log_to)) < len(self.log_to):
            raise UserError("--log-to names a tracker twice: give each once")

    def _check_model(self) -> None:
        if self.model == "cnn" and self.model_args:
            raise UserError(
                "--model-args does not apply to --model cnn: use its own options, such as --conv-channels 32,64"
            )
        for name in ("model", "model_args", "freeze"):
            if len(text := getattr(self, name)) > LONGEST_TEXT:
                raise UserError(f"{option(name)} has {len(text)} characters; at most {LONGEST_TEXT} are allowed")
        if self.kernel_size % 2 == 0:
            raise UserError(f"--kernel-size must be odd, so that images keep their size, got {self.kernel_size}")
        if self.views % 2 == 0:
            raise UserError(f"--views must be odd (the image itself and augmented pairs), got {self.views}")
        if self.views > 1 and not any((self.rotate, self.scale, self.shear, self.shift, self.flip)):
            raise UserError(
                f"--views {self.views} averages predictions over augmented images, but --rotate, --scale, --shear, "
                "--shift and --flip are all off: train with one of them, or give --views 1"
            )
        if not self.conv_channels and not self.dense_units:
            raise UserError("--conv-channels and --dense-units cannot both be empty: give at least one layer")
        if len(self.dense_units) > 100:
            raise UserError(f"--dense-units has {len(self.dense_units)} layers; at most 100 are allowed")

    def _check_optimization(self) -> None:
        if max(self.beta1, self.beta2) >= 1:
            raise UserError("--beta1 and --beta2 must be below 1")
        if self.invariant and self.microbatches & (self.microbatches - 1):
            raise UserError(f"--microbatches must be a power of two, got {self.microbatches}")
        if self.invariant and self.accumulate > 1:
            raise UserError("--invariant already splits each batch into --microbatches: omit --accumulate")
        if self.model == "cnn" and self.batch_norm is not BatchNorm.NONE:
            self.check_parts("--batch-norm none")

    def check_parts(self, other: str) -> None:
        """Raise a UserError if microbatches are too small for batch normalisation; `other` is an alternative fix."""
        name, parts = ("microbatches", self.microbatches) if self.invariant else ("accumulate", self.accumulate)
        if parts > max(1, self.batch_size // 2):
            raise UserError(
                f"--{name} {parts} leaves fewer than two of {self.batch_size} images per microbatch, too few for batch "
                f"normalisation: give at most half the batch size, or {other}"
            )

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def split_seed(self) -> int | None:
        """The seed of the random validation split; None if the split is the last images."""
        return self.seed if self.validation_split is ValidationSplit.RANDOM else None

    @property
    def fold(self) -> tuple[int, int] | None:
        """The fold (from 0) that is the validation split, and the number of folds; None without cross-validation."""
        found = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", self.validation_fold)
        fold, folds = (int(found[1]), int(found[2])) if found else (0, 0)
        return (fold - 1, folds) if 1 <= fold <= folds > 1 else None

    def to_json(self) -> dict[str, JsonValue]:
        """Return the settings as JSON values."""
        return {name: _plain(getattr(self, name)) for name in FIELDS}

    def digest(self, fingerprint: str) -> str:
        """Return 8 hexadecimal digits over what a run computes: its data and all settings that are not changeable."""
        return hashlib.sha256(json.dumps([self._essential(), fingerprint], sort_keys=True).encode()).hexdigest()[:8]

    def sha256(self) -> str:
        """Return the SHA-256 (hexadecimal) over all settings that stay fixed when a run is resumed."""
        fixed = self._essential()
        if self._length_is_free:
            fixed = {name: value for name, value in fixed.items() if name not in LENGTH}
        if is_own_code(self.model):
            fixed["model"] = self.model.rpartition(":")[2]  # its file may move
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()

    @property
    def _length_is_free(self) -> bool:
        """Whether neither the learning rate nor the crop depends on the length of the run."""
        return self.schedule is Schedule.CONSTANT and self.warmup_fraction == 0 and not self.crop

    def _essential(self) -> dict[str, JsonValue]:
        return REMOVED | {
            name: value
            for name, value in self.to_json().items()
            if not FIELDS[name].changeable and not (name in ADDED and value == ADDED[name])
        }

    def shared(self) -> dict[str, JsonValue]:
        """Return the settings that all ranks must agree on, as JSON values; paths, for instance, may differ by node."""
        own = {"run_dir", "data_dir", "dataset", "device", "threads", "workers", "data_on_device", "stage_data"}
        own |= {"log_to"}  # only rank 0 uses it
        own |= {"model", "init"}  # compared by content
        return {name: value for name, value in self.to_json().items() if name not in own}

    def differences(self, other: "Config") -> list[str]:
        """Return what keeps `other` from resuming a run with these settings, a line for each: `lr: 0.1 -> 0.2`.

        The length may change if neither learning rate nor crop depends on it, and so may the path of user code.
        """
        length = LENGTH if self._length_is_free else ()
        both_own = is_own_code(self.model) and is_own_code(other.model)
        same_name = self.model.rpartition(":")[2] == other.model.rpartition(":")[2]
        names_of_code = ("model",) if both_own and same_name else ()  # its file may have moved
        mine, others = self.to_json(), other.to_json()
        return [
            f"{name}: {mine[name]} -> {others[name]}"
            for name, field in FIELDS.items()
            if mine[name] != others[name] and not field.changeable and name not in (*length, *names_of_code)
        ]


LENGTH = ("epochs", "steps")
LONGEST_TEXT = 4000  # characters of a name, arguments or patterns: the settings in a checkpoint are not trusted
FIELDS = declared(dataclasses.fields(Config))
# (given, replaced): the first, if given, replaces the second in a recipe or a file.
PARTNERS = (("steps", "epochs"), ("epochs", "steps"), ("data_dir", "dataset"), ("dataset", "data_dir"))
# Settings of earlier versions, each with the value that turned it off. Names of run directories still depend on them.
REMOVED: dict[str, JsonValue] = {"elastic": 0.0}
# Settings added later, each with its neutral value, which does not change the name of a run directory.
ADDED: dict[str, JsonValue] = {
    "model": "cnn", "model_args": "", "init": None, "freeze": "", "validation_fold": "", "test_fraction": 0.0,
    "padding": "same", "strided_stages": 0, "pool_first": False, "weight_init": "glorot", "erasing": 0.0, "mixup": 0.0,
    "cutmix": 0.0, "mixup_prob": 1.0,
}  # fmt: skip
# Settings that only --model cnn has.
OF_CNN = (
    "conv_channels", "strided_stages", "conv_layers", "kernel_size", "padding", "dense_units", "dropout", "batch_norm",
    "pool_first", "weight_init",
)  # fmt: skip


# Trackers of `--log-to`, each named after the package it needs.
TRACKERS = ("mlflow", "wandb")
# Packages whose networks `--model` names as PACKAGE:NAME.
LIBRARIES = ("torchvision", "timm")


def is_own_code(model: str) -> bool:
    """Whether `--model` names user code, as FILE.py:NAME or package.module:NAME."""
    return model.rpartition(":")[0] not in ("", *LIBRARIES)


def named_again(model: str) -> str:
    """Return how to name user code in a later command; a class from `__main__` has to move to a file."""
    return "FILE.py:NAME" if model.startswith("__main__:") else model


def _plain(value: object) -> JsonValue:
    """Return a setting's value as JSON."""
    if isinstance(value, Path):
        return path_text(value)
    if isinstance(value, str):
        return as_utf8(str(value))
    return list(map(_plain, value)) if isinstance(value, tuple) else value  # type: ignore[return-value]
