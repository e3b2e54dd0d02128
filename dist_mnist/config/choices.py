"""Enumerations for settings with a fixed set of values."""

from enum import StrEnum

DataSet = StrEnum(
    "DataSet",
    {
        "MNIST": "mnist", "FASHION_MNIST": "fashion-mnist", "KMNIST": "kmnist", "EMNIST_BYCLASS": "emnist-byclass",
        "EMNIST_BYMERGE": "emnist-bymerge", "EMNIST_BALANCED": "emnist-balanced", "EMNIST_LETTERS": "emnist-letters",
        "EMNIST_DIGITS": "emnist-digits", "EMNIST_MNIST": "emnist-mnist", "QMNIST": "qmnist",
        "KUZUSHIJI_49": "kuzushiji-49", "PATHMNIST": "pathmnist", "DERMAMNIST": "dermamnist", "OCTMNIST": "octmnist",
        "PNEUMONIAMNIST": "pneumoniamnist", "RETINAMNIST": "retinamnist", "BREASTMNIST": "breastmnist",
        "BLOODMNIST": "bloodmnist", "TISSUEMNIST": "tissuemnist", "ORGANAMNIST": "organamnist",
        "ORGANCMNIST": "organcmnist", "ORGANSMNIST": "organsmnist", "SYNTHETIC": "synthetic",
    },
)  # fmt: skip
Schedule = StrEnum("Schedule", {"CONSTANT": "constant", "COSINE": "cosine", "ONE_CYCLE": "one-cycle"})

# The values of these are the member names in lower case.
ValidationSplit = StrEnum("ValidationSplit", ["RANDOM", "LAST"])
Layout = StrEnum("Layout", ["AUTO", "NHWC", "NCHW"])
DataOnDevice = StrEnum("DataOnDevice", ["AUTO", "YES", "NO"])
BatchNorm = StrEnum("BatchNorm", ["NONE", "DENSE", "ALL"])
Padding = StrEnum("Padding", ["SAME", "VALID"])
WeightInit = StrEnum("WeightInit", ["GLOROT", "FAN_IN"])
Pixels = StrEnum("Pixels", ["RAW", "UNIT", "STANDARD"])
Optimizer = StrEnum("Optimizer", ["SGD", "ADAM", "ADAMW"])
Device = StrEnum("Device", ["AUTO", "CUDA", "CPU"])
Precision = StrEnum("Precision", ["AUTO", "FP32", "BF16"])
AllReduce = StrEnum("AllReduce", ["FP32", "BF16"])
NonFinite = StrEnum("NonFinite", ["STOP", "SKIP"])
SaveErrors = StrEnum("SaveErrors", ["WARN", "STOP"])
