"""The values of settings that have a fixed set of them."""

from enum import StrEnum


class DataSet(StrEnum):
    """Data sets known by name."""

    MNIST = "mnist"
    FASHION_MNIST = "fashion-mnist"
    KMNIST = "kmnist"
    SYNTHETIC = "synthetic"


class ValidationSplit(StrEnum):
    """Which training images are held out."""

    RANDOM = "random"
    LAST = "last"


class DataOnDevice(StrEnum):
    """Whether the images stay in device memory."""

    AUTO = "auto"
    YES = "yes"
    NO = "no"


class BatchNorm(StrEnum):
    """Which layers have batch normalisation."""

    NONE = "none"
    DENSE = "dense"
    ALL = "all"


class Pixels(StrEnum):
    """How pixels are normalised."""

    RAW = "raw"
    UNIT = "unit"
    STANDARD = "standard"


class Optimizer(StrEnum):
    """Optimizers."""

    SGD = "sgd"
    ADAM = "adam"
    ADAMW = "adamw"


class Schedule(StrEnum):
    """Learning-rate schedules after the warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    ONE_CYCLE = "one-cycle"


class Device(StrEnum):
    """Where to compute; auto: on GPUs if there are any."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


class Precision(StrEnum):
    """Arithmetic of the model; auto: bf16 where the hardware is faster with it."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class AllReduce(StrEnum):
    """Precision of the gradient all-reduce."""

    FP32 = "fp32"
    BF16 = "bf16"


class NonFinite(StrEnum):
    """What a gradient that is not finite does: stop the run, or skip the step."""

    STOP = "stop"
    SKIP = "skip"


class SaveErrors(StrEnum):
    """What a failure to write a checkpoint does: warn and train on, or stop the run."""

    WARN = "warn"
    STOP = "stop"
