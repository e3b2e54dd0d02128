"""Enumerations of an import's choices, cheap to import for the command line's help."""

from enum import StrEnum


class Split(StrEnum):
    """The splits of a source."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


class Layout(StrEnum):
    """The order of an array's axes: height, width, channels, or channels first."""

    HWC = "hwc"
    CHW = "chw"


class Colour(StrEnum):
    """The colours of imported images: as in the source, all gray, or all RGB."""

    AS_IS = "as-is"
    GRAY = "gray"
    COLOUR = "colour"
