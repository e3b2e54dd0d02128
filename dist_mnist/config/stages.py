"""What the convolution stages of `--model cnn` leave of an image."""

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

    The first `strided` of them do so by the stride of their last convolution, which rounds up, the others by 2x2
    max-pooling, which rounds down. Without padding each stage takes `trimmed` pixels from a side before.
    """

    number: int
    strided: int = 0
    trimmed: int = 0

    @classmethod
    def of(cls, number: int, strided: int, conv_layers: int, kernel_size: int, padding: str) -> Stages:
        """By the settings of these names."""
        return cls(number, strided, conv_layers * (kernel_size - 1) if padding == Padding.VALID else 0)

    @classmethod
    def of_config(cls, config: Config) -> Stages:
        """As a run's settings say."""
        number, strided = len(config.conv_channels), config.strided_stages
        return cls.of(number, strided, config.conv_layers, config.kernel_size, config.padding)

    def output(self, side: int) -> int:
        """What they leave of a side of an image, in pixels; 0 for none."""
        side = max(side, 0)
        for stage in range(self.number):
            side = (max(side - self.trimmed, 0) + (stage < self.strided)) // 2
        return side

    def check(self, height: int, width: int, crop: int = 0) -> None:
        """Raise a UserError if they leave nothing of an image, or do not go together with `--crop`."""
        if self.strided > self.number:
            raise UserError(f"--strided-stages {self.strided} is more than the {self.number} of --conv-channels")
        short, words = min(height, width), f"{self.number} stages{' without padding' if self.trimmed else ''}"
        if not self.output(short):
            fitting = next(n - 1 for n in count(1) if not Stages(n, self.strided, self.trimmed).output(short))
            raise UserError(
                f"--conv-channels: {words} halve an image of {height}x{width} pixels to nothing; at most {fitting} fit"
            )
        if crop % 2**self.number or not self.output(short - 2 * crop):
            least = next(side for side in count(1) if self.output(side))
            raise UserError(
                f"--crop {crop} does not suit images of {height}x{width} pixels and {words}: give a "
                f"multiple of {2**self.number} that leaves {least} pixels or more"
            )
