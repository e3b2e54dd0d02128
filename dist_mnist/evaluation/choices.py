"""What can be chosen on the command line of evaluation, prediction and export; needs neither torch nor numpy."""

from enum import StrEnum


class Split(StrEnum):
    """The part of a data set that a model is evaluated on."""

    TEST = "test"
    TEST50K = "test50k"
    VALIDATION = "validation"
    TRAIN = "train"


class Fit(StrEnum):
    """How a picture is brought to the size of a model's images."""

    AUTO = "auto"
    DIGIT = "digit"
    WHOLE = "whole"


class ExportFormat(StrEnum):
    """A file format for other programs."""

    SAFETENSORS = "safetensors"
    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"
