"""What can be chosen for an import, by name; light enough for the command line's help."""

from enum import StrEnum


class Split(StrEnum):
    """The parts of a source."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


class Layout(StrEnum):
    """The order of an array's axes: height, width, channels, or channels first."""

    HWC = "hwc"
    CHW = "chw"


class Colour(StrEnum):
    """What becomes of colours: as they are, all gray, or all red, green and blue."""

    AS_IS = "as-is"
    GRAY = "gray"
    COLOUR = "colour"
