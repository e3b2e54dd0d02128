"""The output size of the convolution stages of `--model cnn`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from dist_mnist.config.choices import Padding
from dist_mnist.utils.errors import UserError

if TYPE_CHECKING:
    from dist_mnist.config.settings import Config


@dataclass(frozen=True)
class Stages:
    """Convolution stages, each of which halves the sides of an image.

    The first `strided` stages halve by the stride of their last convolution, which rounds up; the others by 2x2
    max-pooling, which rounds down. Without padding, each stage first shortens a side by `trimmed` pixels.
    """

    number: int
    strided: int = 0
    trimmed: int = 0

    @classmethod
    def of(cls, number: int, strided: int, conv_layers: int, kernel_size: int, padding: str) -> Stages:
        """Return the stages for the settings of these names."""
        return cls(number, strided, conv_layers * (kernel_size - 1) if padding == Padding.VALID else 0)

    @classmethod
    def of_config(cls, config: Config) -> Stages:
        """Return the stages for a run's settings."""
        number, strided = len(config.conv_channels), config.strided_stages
        return cls.of(number, strided, config.conv_layers, config.kernel_size, config.padding)

    def output(self, side: int) -> int:
        """Return the output size for a side of an image, in pixels; 0 if nothing is left."""
        side = max(side, 0)
        for stage in range(self.number):
            side = (max(side - self.trimmed, 0) + (stage < self.strided)) // 2
        return side

    def check(self, height: int, width: int, crop: int = 0) -> None:
        """Raise a UserError if the stages leave nothing of an image, or are incompatible with `--crop`."""
        if self.strided > self.number:
            raise UserError(f"--strided-stages {self.strided} exceeds the {self.number} stages of --conv-channels")
        short, words = min(height, width), f"{self.number} stages{' without padding' if self.trimmed else ''}"
        if not self.output(short):
            fitting = next(n - 1 for n in count(1) if not Stages(n, self.strided, self.trimmed).output(short))
            raise UserError(
                f"--conv-channels: {words} halve an image of {height}x{width} pixels to nothing; at most {fitting} fit"
            )
        if crop % 2**self.number or not self.output(short - 2 * crop):
            least = next(side for side in count(1) if self.output(side))
            raise UserError(
                f"--crop {crop} does not fit images of {height}x{width} pixels and {words}: give a multiple of "
                f"{2**self.number} that leaves at least {least} pixels on each axis"
            )
