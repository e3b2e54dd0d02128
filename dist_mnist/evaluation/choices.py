"""Command-line choices of `eval`, `predict` and `export`; imports neither torch nor numpy."""

from enum import StrEnum


class Split(StrEnum):
    """The split of a data set that a model is evaluated on."""

    TEST = "test"
    TEST50K = "test50k"
    VALIDATION = "validation"
    TRAIN = "train"


class Fit(StrEnum):
    """How a picture is fitted to a network's input size."""

    AUTO = "auto"
    DIGIT = "digit"
    WHOLE = "whole"


class ExportFormat(StrEnum):
    """A file format for other programs."""

    SAFETENSORS = "safetensors"
    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"
