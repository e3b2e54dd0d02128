"""Recipes: named sets of settings."""

from collections.abc import Mapping
from dataclasses import dataclass

from dist_mnist.config.choices import BatchNorm, DataSet, Optimizer, Padding, Pixels, Precision, Schedule, WeightInit
from dist_mnist.config.fields import SettingValue
from dist_mnist.utils.errors import UserError, unknown


@dataclass(frozen=True)
class Recipe:
    """What a recipe is, for people, and how it differs from the defaults; None takes a default away."""

    about: str
    settings: Mapping[str, SettingValue | None]


# fmt: off
# The augmentation that long runs learn from.
STRONG: dict[str, SettingValue | None] = {"rotate": 15.0, "scale": 0.15, "shear": 10.0, "shift": 2.0}

# Six convolutions of 3 x 3 in two stages instead of two of 5 x 5: a fifth of the parameters, for fewer errors.
BEST: dict[str, SettingValue | None] = {
    "epochs": 40.0, "validation_fraction": 0.0, "weight_decay": 1e-3, "ema_decay": 0.999, "label_smoothing": 0.05,
    "batch_norm": BatchNorm.ALL, "kernel_size": 3, "conv_layers": 3, "conv_channels": (16, 48), "dense_units": (256,),
    "crop": 4, "crop_fraction": 0.7, **STRONG,
}

# The notebook's run: 20 000 steps of plain SGD on raw pixels in fp32, 30 % held out.
NOTEBOOK: dict[str, SettingValue | None] = {
    "epochs": None, "steps": 20_000, "validation_fraction": 0.3, "batch_size": 100, "lr": 0.001, "momentum": 0.0,
    "nesterov": False, "weight_decay": 0.0, "schedule": Schedule.CONSTANT, "warmup_fraction": 0.0,
    "batch_norm": BatchNorm.NONE, "pixels": Pixels.RAW, "rotate": 0.0, "scale": 0.0, "shift": 0.0,
    "precision": Precision.FP32, "log_every": 100, "validate_every": 5_000,
}


def _variant(about: str, **changes: SettingValue) -> Recipe:
    """One of the notebook's variants by its author."""
    return Recipe(f"the notebook's recipe with {about}", NOTEBOOK | changes)


RECIPES = {
    "default": Recipe(
        "the notebook's network with batch normalisation in the dense layer; one-cycle SGD, light augmentation, "
        "3 epochs", {},
    ),
    # The least time to 99 % on MNIST's test set: each image is seen once at most, so no augmentation is needed.
    "fast": Recipe(
        "the default's network with batch normalisation in all layers, for 0.45 epochs: its least time to 99 %",
        {
            "epochs": 0.45, "validation_fraction": 0.0, "batch_size": 100, "batch_norm": BatchNorm.ALL, "dropout": 0.0,
            "lr": 0.15, "weight_decay": 2e-3, "label_smoothing": 0.1, "rotate": 0.0, "scale": 0.0, "shift": 0.0,
            "crop": 4, "tensorboard": False,
        },
    ),
    # All of it is chosen for speed: a first convolution of stride 2 in the place of the most expensive pooling, no
    # padding, a normalisation of pooled values, few weights. The rate is as high as label smoothing lets it be.
    "sprint": Recipe(
        "a network with a fortieth of the default's parameters, for 0.6 epochs: the least time to 99 %",
        {
            "epochs": 0.6, "validation_fraction": 0.0, "batch_size": 100, "conv_channels": (16, 32),
            "strided_stages": 1, "padding": Padding.VALID, "dense_units": (128,), "batch_norm": BatchNorm.ALL,
            "pool_first": True, "weight_init": WeightInit.FAN_IN, "dropout": 0.0, "lr": 0.5, "label_smoothing": 0.2,
            "rotate": 0.0, "scale": 0.0, "shift": 0.0, "tensorboard": False,
        },
    ),
    # The default's network, for longer, on all training images. Centre crops for most of the run are twice as fast, and
    # make for fewer errors in the end. There is no dropout: strong augmentation and adversarial training keep the
    # network from overfitting.
    "accurate": Recipe(
        "the default's network without dropout for 30 epochs on all training images, mostly on centre crops, with "
        "strong augmentation, adversarial training, an exponential moving average of the weights and label smoothing",
        {
            "epochs": 30.0, "validation_fraction": 0.0, "dropout": 0.0, "lr": 0.2, "ema_decay": 0.999,
            "label_smoothing": 0.1, "crop": 4, "crop_fraction": 0.7, "adversarial": 0.1, **STRONG,
        },
    ),
    "best": Recipe(
        "a network of six 3 x 3 convolutions with a fifth of the default's parameters, for 40 epochs with strong "
        "augmentation",
        BEST,
    ),
    # Clothes are upright and fill their images: all augmentation is weaker, but for the flip.
    "fashion": Recipe(
        "the network of `best` on Fashion-MNIST, for 20 epochs of whole images with weaker augmentation, horizontal "
        "flips, and test-time augmentation over nine views",
        BEST | {
            "dataset": DataSet.FASHION_MNIST, "epochs": 20.0, "rotate": 5.0, "scale": 0.1, "shear": 0.0, "shift": 1.0,
            "flip": True, "crop": 0, "views": 9,
        },
    ),
    "notebook": Recipe(
        "the TensorFlow notebook that this project grew from: 20 000 steps of 100, SGD 0.001, raw pixels, 30 % held "
        "out",
        NOTEBOOK,
    ),
    # Its author's variants: one thing is changed in each. The best was that with batch normalisation.
    "notebook-bn": _variant(
        "batch normalisation in the dense layer, its author's best variant", batch_norm=BatchNorm.DENSE
    ),
    "notebook-bn-dropout-20": _variant(
        "batch normalisation in the dense layer and a dropout of 0.2", batch_norm=BatchNorm.DENSE, dropout=0.2
    ),
    "notebook-dropout-20": _variant("a dropout of 0.2", dropout=0.2),
    "notebook-dropout-60": _variant("a dropout of 0.6", dropout=0.6),
    "notebook-shallow": _variant("one convolution stage", conv_channels=(32,)),
    "notebook-deep": _variant("two convolutions in each stage", conv_layers=2),
    "notebook-narrow": _variant("half as many channels", conv_channels=(16, 32)),
    "notebook-wide": _variant("twice as many channels", conv_channels=(64, 128)),
    "notebook-momentum": _variant("a momentum of 0.9", momentum=0.9),
    "notebook-adam": _variant("Adam", optimizer=Optimizer.ADAM),
}


# fmt: on
def named_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        UserError: there is none; the sentence names all, and the nearest.
    """
    if name not in RECIPES:
        raise UserError(unknown("recipe", name, RECIPES))
    return RECIPES[name]
