"""All settings of a run: declared once, here, with their defaults, help and limits; checked on construction."""

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
    """The settings of a run. Immutable; an instance has passed every check.

    Strings are taken as choices and paths, lists as tuples.

    Raises:
        UserError: on construction, naming the option, its limits and what was given.
    """

    # fmt: off
    recipe: str = setting("default", "Run", "recipe, a named set of settings; single options override it")
    run_dir: Path | None = setting(None, "Run", "run directory; a run that is there resumes from its newest checkpoint "
        "(default: runs/<recipe>-<data>-<digest>)", changeable=True)
    seed: int = setting(0, "Run", "random seed of the weights, sample order, augmentation, dropout and validation "
        "split", minimum=0)
    epochs: float | None = setting(3.0, "Run", "length of the run in epochs, which are passes over the training images",
        minimum=0, maximum=1e6)
    steps: int | None = setting(None, "Run", "length of the run in optimizer steps, instead of --epochs", minimum=1,
        maximum=10**12)
    patience: int = setting(0, "Run", "early stopping: end the run after so many validations in a row without a higher "
        "accuracy; 0 turns it off. Learning rate and crop still follow the whole length", minimum=0, changeable=True)
    max_time: Duration = setting(0.0, "Run", "end the run after so much training time, as 90 (seconds), 30m or 1h30m, "
        "over all its starts; 0 turns it off. Learning rate and crop still follow the whole length", minimum=0,
        changeable=True)

    dataset: DataSet | None = setting(None, "Data", "data set to train on, downloaded or generated if it is missing "
        "(default: the files in data/ itself, else mnist)", changeable=True)
    data_dir: Path | None = setting(None, "Data", "folder of idx files to train on (default: $DIST_MNIST_DATA, else "
        "data/)", changeable=True)
    validation_fraction: float = setting(0.1, "Data", "fraction of the training images held out as the validation "
        "split; 0 trains on all", minimum=0, maximum=0.99)
    validation_split: ValidationSplit = setting(ValidationSplit.RANDOM, "Data", "how the validation split is chosen: "
        "at random, by --seed, or as the last images of the files, which in MNIST are by other writers")
    validation_fold: str = setting("", "Data", "fold of a k-fold cross-validation to hold out as the validation split, "
        "instead of --validation-fraction: 1/5 to 5/5, say")
    test_fraction: float = setting(0.0, "Data", "fraction of the training images held out as the test split, chosen as "
        "the validation split is, where the data has no test images", minimum=0, maximum=0.99)
    layout: Layout = setting(Layout.AUTO, "Data", "axes of images in 4 dimensions: NxHxWxC or NxCxHxW; auto: the "
        "latter where 1, 3 or 4 comes before two larger sides", changeable=True)
    drop_last: bool = setting(False, "Data", "drop each epoch's last batch if it is smaller than --batch-size")
    workers: int = setting(0, "Data", "data-loader workers per rank; 0 loads in the training process", minimum=0,
        maximum=256, changeable=True)
    stage_data: bool = setting(False, "Data", "copy the data to each node's own disk ($TMPDIR) at the start, and train "
        "from there", changeable=True)
    data_on_device: DataOnDevice = setting(DataOnDevice.AUTO, "Data", "keep the images in device memory; auto: if they "
        "take at most a quarter of a GPU's free memory", changeable=True)

    model: str = setting("cnn", "Model", "network: cnn, resnet, mlp, torchvision:NAME, timm:NAME, or an nn.Module "
        "class of your own, or a function that returns one, as FILE.py:NAME or package.module:NAME")
    model_args: str = setting("", "Model", "arguments of the network's class or function, other than --model cnn, such "
        "as width=32,depth=3")
    init: Path | None = setting(None, "Model", "initial weights: checkpoint, run directory or safetensors file, "
        "matched by name; what does not fit is initialised as without")
    freeze: str = setting("", "Model", "patterns of parameters that are not trained, with commas between them, such as "
        "'stages.*'; running statistics beside them stay as well")
    conv_channels: Ints = setting((32, 64), "Model", "output channels of each convolution stage; 2x2 max-pooling ends "
        "a stage", minimum=1, maximum=65_536)
    strided_stages: int = setting(0, "Model", "so many of the first stages end in a convolution of stride 2 instead of "
        "max-pooling, which is faster", minimum=0, maximum=100)
    conv_layers: int = setting(1, "Model", "convolution layers in each stage", minimum=1, maximum=100)
    kernel_size: int = setting(5, "Model", "side of the convolution kernels, in pixels (odd)", minimum=1, maximum=101)
    padding: Padding = setting(Padding.SAME, "Model", "convolutions keep the size of what they see (same), or leave "
        "out its edges (valid), which is faster")
    dense_units: Ints = setting((1024,), "Model", "units of each dense layer", minimum=1, maximum=65_536)
    dropout: float = setting(0.4, "Model", "dropout probability of the last dense layer's units", minimum=0,
        maximum=0.99)
    batch_norm: BatchNorm = setting(BatchNorm.DENSE, "Model", "synchronised batch normalisation, over the global "
        "batch: in no layer, in the dense layers, or in all layers")
    pool_first: bool = setting(False, "Model", "pooling before a stage's last batch normalisation, which then has a "
        "quarter of the values to normalise, and is faster")
    weight_init: WeightInit = setting(WeightInit.GLOROT, "Model", "initial weights, uniform: variance 2 / (fan-in + "
        "fan-out), TensorFlow's default (glorot), or 1 / (3 fan-in), torch's default (fan_in)")
    pixels: Pixels = setting(Pixels.STANDARD, "Model", "normalisation of pixels: raw values, scaled to 0..1 (unit), or "
        "standardised by the training images' mean and standard deviation")

    rotate: float = setting(10.0, "Augmentation", "largest random rotation of a training image, in degrees", minimum=0,
        maximum=180)
    scale: float = setting(0.1, "Augmentation", "largest random change of a training image's size, as a fraction of it",
        minimum=0, maximum=0.9)
    shear: float = setting(0.0, "Augmentation", "largest random shear of a training image, in degrees", minimum=0,
        maximum=60)
    shift: float = setting(1.0, "Augmentation", "largest random shift of a training image along each axis, in pixels",
        minimum=0)
    flip: bool = setting(False, "Augmentation", "flip half of the training images horizontally, at random")
    erasing: float = setting(0.0, "Augmentation", "random erasing: probability with which a random box of a training "
        "image becomes noise; 0 turns it off", minimum=0, maximum=1)
    mixup: float = setting(0.0, "Augmentation", "mixup: alpha of the Beta(alpha, alpha) by which a training image and "
        "its label are blended with another's, such as 0.2; 0 turns it off", minimum=0, maximum=1000)
    cutmix: float = setting(0.0, "Augmentation", "cutmix: the same alpha, such as 1.0, for the area of a box that is "
        "cut from another training image; 0 turns it off. With --mixup, either has half of the images", minimum=0,
        maximum=1000)
    mixup_prob: float = setting(1.0, "Augmentation", "probability with which an image is mixed with another, with "
        "--mixup or --cutmix", minimum=0, maximum=1)
    adversarial: float = setting(0.0, "Augmentation", "adversarial training (fast gradient method): largest "
        "perturbation of a training image, as a fraction of its norm; 0 turns it off", minimum=0)
    views: int = setting(1, "Augmentation", "test-time augmentation (TTA): views of each image whose predictions are "
        "averaged, the image itself and augmented pairs (odd); 1 turns it off", minimum=1, maximum=10_001)
    crop: int = setting(0, "Augmentation", "progressive resizing: pixels that the centre crop of the first part of a "
        "run leaves out on each side, which is faster; 0 turns it off", minimum=0)
    crop_fraction: float = setting(0.6, "Augmentation", "fraction of the run that trains on centre-cropped images, "
        "with --crop", minimum=0, maximum=1)

    batch_size: int = setting(250, "Optimization", "GLOBAL batch size: images per optimizer step, over all processes",
        minimum=1)
    invariant: bool = setting(False, "Optimization", "deterministic (pairwise) tree reduction: the same bits with 1, "
        "2, 4, ... processes")
    microbatches: int = setting(8, "Optimization", "microbatches of a global batch with --invariant, a power of two: "
        "the leaves of the reduction tree, and the most processes that can take part", minimum=1, maximum=65_536)
    accumulate: int = setting(1, "Optimization", "gradient accumulation: microbatches that each rank cuts its part of "
        "a batch into, to save memory", minimum=1)
    optimizer: Optimizer = setting(Optimizer.SGD, "Optimization", "optimizer of the weights")
    lr: float | None = setting(None, "Optimization", "peak learning rate (default: 0.1 with sgd, else 0.001)",
        minimum=0)
    momentum: float = setting(0.9, "Optimization", "momentum of SGD", minimum=0, maximum=1)
    nesterov: bool = setting(True, "Optimization", "Nesterov momentum in SGD")
    beta1: float = setting(0.9, "Optimization", "decay of the first moment in Adam and AdamW", minimum=0, maximum=1)
    beta2: float = setting(0.999, "Optimization", "decay of the second moment in Adam and AdamW", minimum=0, maximum=1)
    weight_decay: float = setting(5e-4, "Optimization", "weight decay of the weights; biases and batch normalisation "
        "have none", minimum=0)
    schedule: Schedule = setting(Schedule.ONE_CYCLE, "Optimization", "learning-rate schedule after the warm-up: "
        "constant, cosine decay, or linear decay (one-cycle)")
    warmup_fraction: float = setting(0.2, "Optimization", "fraction of the run in which the learning rate warms up "
        "linearly", minimum=0, maximum=1)
    final_lr_fraction: float = setting(0.0, "Optimization", "learning rate at the end, as a fraction of --lr",
        minimum=0, maximum=1)
    label_smoothing: float = setting(0.0, "Optimization", "label smoothing: fraction of each label that is spread "
        "evenly over all classes", minimum=0, maximum=0.99)
    clip_norm: float = setting(0.0, "Optimization", "gradient clipping: largest norm of the gradient; 0 turns it off",
        minimum=0)
    ema_decay: float = setting(0.0, "Optimization", "exponential moving average (EMA) of the weights, which is then "
        "what is evaluated: decay per step; 0 turns it off", minimum=0, maximum=0.999999)

    device: Device = setting(Device.AUTO, "Device", "device to train on; auto: GPUs if there are any", changeable=True)
    precision: Precision = setting(Precision.AUTO, "Device", "arithmetic of the model; auto: bf16 where the hardware "
        "is faster with it, else fp32")
    channels_last: bool = setting(True, "Device", "channels-last memory format of images and kernels")
    all_reduce: AllReduce = setting(AllReduce.FP32, "Device", "precision of DDP's gradient all-reduce; bf16 halves the "
        "bytes sent")
    cuda_graph: bool = setting(True, "Device", "launch each step on a GPU as one captured CUDA graph, if that gives "
        "the same result as the eager step", changeable=True)
    threads: int = setting(0, "Device", "CPU threads per process; 0 divides the node's cores among its processes",
        minimum=0, maximum=1024, changeable=True)

    stall_timeout: float = setting(120.0, "Faults", "watchdog: seconds without progress after which the run ends and "
        "the stalled rank is named", minimum=1, maximum=1e6, changeable=True)
    non_finite: NonFinite = setting(NonFinite.STOP, "Faults", "when a gradient is NaN or infinite: stop the run, or "
        "skip the step")
    check_ranks_every: int = setting(100, "Faults", "steps between digests of weights, EMA and optimizer, by which "
        "ranks are compared, as also before each checkpoint: one that computes wrong is named; 0: never", minimum=0,
        changeable=True)
    audit_spikes: bool = setting(False, "Faults", "when a step's loss or gradient norm is a spike, take it again, and "
        "say whether it computes the same; keeps a copy of weights and optimizer for that, which takes time",
        changeable=True)
    save_errors: SaveErrors = setting(SaveErrors.WARN, "Faults", "when a checkpoint cannot be written: warn and train "
        "on, or stop the run", changeable=True)

    validate_every: int = setting(0, "Output", "steps between validations; 0 validates after each epoch. The last step "
        "is always validated", minimum=0, changeable=True)
    log_every: int = setting(50, "Output", "steps between log lines and TensorBoard points", minimum=1, changeable=True)
    checkpoint_every_s: float | None = setting(None, "Output", "seconds between checkpoints; 0: none by time "
        "(default: 5 to 60, the fewest for which saving takes at most 0.5 % of the time)", minimum=0, changeable=True)
    checkpoint_every: int = setting(0, "Output", "steps between checkpoints; 0: none by steps", minimum=0,
        changeable=True)
    keep: int = setting(5, "Output", "number of newest checkpoints that are kept; of older ones the best stays, and "
        "about one for each doubling of age", minimum=1, changeable=True)
    tensorboard: bool = setting(True, "Output", "write TensorBoard event files", changeable=True)
    log_to: Names = setting((), "Output", "tracker that the run is logged to: mlflow, wandb, or a Listener class of "
        "your own as FILE.py:CLASS; may be repeated, and is given anew at each start", changeable=True)
    profile: bool = setting(False, "Output", "profile a few steps: write a trace, and print what bounds the run",
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
            raise UserError("the length of a run is either --epochs or --steps: give exactly one of them")
        if self.epochs == 0:
            raise UserError("--epochs is 0, which trains nothing: give a positive number")
        if self.data_dir is not None and self.dataset is not None:
            raise UserError("--data-dir says where the data is, --dataset what to look for: give one of them")
        if self.validation_fold and self.fold is None:
            raise UserError(
                f"--validation-fold takes a fold and their number, such as 1/5; {short(self.validation_fold)} was given"
            )
        for name in self.log_to:
            if name not in TRACKERS and not re.fullmatch(r"([^:]+\.py|[\w.]+):[^\W\d]\w*", name):
                where = f"{', '.join(TRACKERS)}, or a class of your own as FILE.py:CLASS"
                raise UserError(f"--log-to: {unknown('tracker', name, TRACKERS, f'there are: {where}')}")
        if len(set(self.log_to)) < len(self.log_to):
            raise UserError("--log-to has a name twice: give each once")

    def _check_model(self) -> None:
        if self.model == "cnn" and self.model_args:
            raise UserError(
                "--model-args are for other networks: --model cnn has options, such as --conv-channels 32,64"
            )
        for name in ("model", "model_args", "freeze"):
            if len(text := getattr(self, name)) > LONGEST_TEXT:
                raise UserError(f"{option(name)} has {len(text)} characters; at most {LONGEST_TEXT} are read")
        if self.kernel_size % 2 == 0:
            raise UserError(f"--kernel-size must be odd, so that images keep their size; {self.kernel_size} was given")
        if self.views % 2 == 0:
            raise UserError(f"--views must be odd, the image itself and augmented pairs; {self.views} was given")
        if self.views > 1 and not any((self.rotate, self.scale, self.shear, self.shift, self.flip)):
            raise UserError(
                f"--views {self.views} averages predictions over augmented images, and none of --rotate, --scale, "
                "--shear, --shift and --flip changes them: train with one of these, or give --views 1"
            )
        if not self.conv_channels and not self.dense_units:
            raise UserError("--conv-channels and --dense-units cannot both be empty: give at least one layer")
        if len(self.dense_units) > 100:
            raise UserError(f"--dense-units has {len(self.dense_units)} layers; at most 100 are built")

    def _check_optimization(self) -> None:
        if max(self.beta1, self.beta2) >= 1:
            raise UserError("--beta1 and --beta2 must be below 1")
        if self.invariant and self.microbatches & (self.microbatches - 1):
            raise UserError(f"--microbatches must be a power of two, not {self.microbatches}")
        if self.invariant and self.accumulate > 1:
            raise UserError("--invariant already cuts each batch into --microbatches: leave --accumulate out")
        if self.model == "cnn" and self.batch_norm is not BatchNorm.NONE:
            self.check_parts("--batch-norm none")

    def check_parts(self, other: str) -> None:
        """Raise a UserError if parts of a batch are too small for batch normalisation; `other` is what else helps."""
        name, parts = ("microbatches", self.microbatches) if self.invariant else ("accumulate", self.accumulate)
        if parts > max(1, self.batch_size // 2):
            raise UserError(
                f"--{name} {parts} leaves less than two images of {self.batch_size} to a part, which cannot be "
                f"normalised: give half the batch size or less, or {other}"
            )

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed with others."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def split_seed(self) -> int | None:
        """The seed by which the validation split is drawn; None if it is the last images."""
        return self.seed if self.validation_split is ValidationSplit.RANDOM else None

    @property
    def fold(self) -> tuple[int, int] | None:
        """The fold, from 0, that is the validation split, and the number of folds; None without cross-validation."""
        found = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", self.validation_fold)
        fold, folds = (int(found[1]), int(found[2])) if found else (0, 0)
        return (fold - 1, folds) if 1 <= fold <= folds > 1 else None

    def to_json(self) -> dict[str, JsonValue]:
        """The settings as JSON values."""
        return {name: _plain(getattr(self, name)) for name in FIELDS}

    def digest(self, fingerprint: str) -> str:
        """8 hexadecimal digits for what a run computes: over all settings that are not changeable, and its data."""
        return hashlib.sha256(json.dumps([self._essential(), fingerprint], sort_keys=True).encode()).hexdigest()[:8]

    def sha256(self) -> str:
        """The digest (hexadecimal) of what a run computes: over all settings that stay when it is resumed."""
        fixed = self._essential()
        if self._length_is_free:
            fixed = {name: value for name, value in fixed.items() if name not in LENGTH}
        if is_own_code(self.model):
            fixed["model"] = self.model.rpartition(":")[2]  # its file may move
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()

    @property
    def _length_is_free(self) -> bool:
        """Whether neither a learning rate nor a crop depends on it."""
        return self.schedule is Schedule.CONSTANT and self.warmup_fraction == 0 and not self.crop

    def _essential(self) -> dict[str, JsonValue]:
        return REMOVED | {
            name: value
            for name, value in self.to_json().items()
            if not FIELDS[name].changeable and not (name in ADDED and value == ADDED[name])
        }

    def shared(self) -> dict[str, JsonValue]:
        """The settings that all ranks must agree on, as JSON values: not where a node keeps its files, say."""
        own = {"run_dir", "data_dir", "dataset", "device", "threads", "workers", "data_on_device", "stage_data"}
        own |= {"log_to"}  # which is of rank 0 alone
        own |= {"model", "init"}  # of which the content is compared
        return {name: value for name, value in self.to_json().items() if name not in own}

    def differences(self, other: "Config") -> list[str]:
        """What keeps `other` from resuming a run of this one, a line for each setting: `lr: 0.1 -> 0.2`.

        The length is free where neither a learning rate nor a crop depends on it; so is the place of the user's code.
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
LONGEST_TEXT = 4000  # characters of a name, arguments or patterns: a checkpoint's settings may ask for anything
FIELDS = declared(dataclasses.fields(Config))
# Of each pair, one that is given replaces the other that a recipe or a file has.
PARTNERS = (("steps", "epochs"), ("epochs", "steps"), ("data_dir", "dataset"), ("dataset", "data_dir"))
# Settings of earlier versions, each with the value that turned it off, which names of run directories still count in.
REMOVED: dict[str, JsonValue] = {"elastic": 0.0}
# Later settings, each with the value that leaves all as it was before; these do not count in such names.
ADDED: dict[str, JsonValue] = {
    "model": "cnn", "model_args": "", "init": None, "freeze": "", "validation_fold": "", "test_fraction": 0.0,
    "padding": "same", "strided_stages": 0, "pool_first": False, "weight_init": "glorot", "erasing": 0.0, "mixup": 0.0,
    "cutmix": 0.0, "mixup_prob": 1.0,
}  # fmt: skip
# Settings of --model cnn alone.
OF_CNN = (
    "conv_channels", "strided_stages", "conv_layers", "kernel_size", "padding", "dense_units", "dropout", "batch_norm",
    "pool_first", "weight_init",
)  # fmt: skip


# Trackers of `--log-to`, called as the packages that they need.
TRACKERS = ("mlflow", "wandb")
# Packages whose networks `--model` names as PACKAGE:NAME.
LIBRARIES = ("torchvision", "timm")


def is_own_code(model: str) -> bool:
    """Whether `--model` names the user's own code, as FILE.py:NAME or package.module:NAME."""
    return model.rpartition(":")[0] not in ("", *LIBRARIES)


def named_again(model: str) -> str:
    """How to name the user's own code again; what a program has made needs a function in a file."""
    return "FILE.py:NAME" if model.startswith("__main__:") else model


def _plain(value: object) -> JsonValue:
    """A setting's value as JSON has it."""
    if isinstance(value, Path):
        return path_text(value)
    if isinstance(value, str):
        return as_utf8(str(value))
    return list(map(_plain, value)) if isinstance(value, tuple) else value  # type: ignore[return-value]
