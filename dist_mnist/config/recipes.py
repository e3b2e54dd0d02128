"""Recipes: named sets of settings."""

from collections.abc import Mapping
from dataclasses import dataclass

from dist_mnist.config.choices import BatchNorm, DataSet, Optimizer, Padding, Pixels, Precision, Schedule, WeightInit
from dist_mnist.config.fields import SettingValue
from dist_mnist.utils.errors import UserError, unknown


@dataclass(frozen=True)
class Recipe:
    """A recipe: a description, and its differences from the defaults; None removes a default."""

    about: str
    settings: Mapping[str, SettingValue | None]


# fmt: off
# Strong augmentation, for long runs.
STRONG: dict[str, SettingValue | None] = {"rotate": 15.0, "scale": 0.15, "shear": 10.0, "shift": 2.0}

# Six 3 x 3 convolutions in two stages instead of two 5 x 5 ones: a fifth of the parameters, and fewer errors.
SMALL: dict[str, SettingValue | None] = {
    "validation_fraction": 0.0, "weight_decay": 1e-3, "ema_decay": 0.999, "label_smoothing": 0.05,
    "batch_norm": BatchNorm.ALL, "kernel_size": 3, "conv_layers": 3, "conv_channels": (16, 48), "dense_units": (256,),
    **STRONG,
}

# For images that fill their frame, so that none are cropped, and are harder than digits, so that views pay.
WHOLE: dict[str, SettingValue | None] = SMALL | {"epochs": 40.0, "views": 9}

# The notebook's run: 20 000 steps of plain SGD on raw pixels in fp32, 30 % held out.
NOTEBOOK: dict[str, SettingValue | None] = {
    "epochs": None, "steps": 20_000, "validation_fraction": 0.3, "batch_size": 100, "lr": 0.001, "momentum": 0.0,
    "nesterov": False, "weight_decay": 0.0, "schedule": Schedule.CONSTANT, "warmup_fraction": 0.0,
    "batch_norm": BatchNorm.NONE, "pixels": Pixels.RAW, "rotate": 0.0, "scale": 0.0, "shift": 0.0,
    "precision": Precision.FP32, "log_every": 100, "validate_every": 5_000,
}


def _variant(about: str, **changes: SettingValue) -> Recipe:
    """Return a variant from the notebook's author."""
    return Recipe(f"the notebook's recipe with {about}", NOTEBOOK | changes)


RECIPES = {
    "default": Recipe(
        "the network of the notebook recipe with batch normalisation in the dense layer; one-cycle SGD, light "
        "augmentation, 3 epochs", {},
    ),
    # Shortest time to 99 % on MNIST's test set. Each image is used at most once, so augmentation is not needed.
    "fast": Recipe(
        "the default network with batch normalisation in all layers, 0.45 epochs: its shortest time to 99 %",
        {
            "epochs": 0.45, "validation_fraction": 0.0, "batch_size": 100, "batch_norm": BatchNorm.ALL, "dropout": 0.0,
            "lr": 0.15, "weight_decay": 2e-3, "label_smoothing": 0.1, "rotate": 0.0, "scale": 0.0, "shift": 0.0,
            "crop": 4, "tensorboard": False,
        },
    ),
    # Chosen for speed: a first convolution of stride 2 instead of the most expensive pooling, no padding, batch
    # normalisation after pooling, few weights. The learning rate is the highest that label smoothing allows.
    "sprint": Recipe(
        "a network with 1/40 of the default's parameters, 0.6 epochs: the shortest time to 99 %",
        {
            "epochs": 0.6, "validation_fraction": 0.0, "batch_size": 100, "conv_channels": (16, 32),
            "strided_stages": 1, "padding": Padding.VALID, "dense_units": (128,), "batch_norm": BatchNorm.ALL,
            "pool_first": True, "weight_init": WeightInit.FAN_IN, "dropout": 0.0, "lr": 0.5, "label_smoothing": 0.2,
            "rotate": 0.0, "scale": 0.0, "shift": 0.0, "tensorboard": False,
        },
    ),
    # The default network, trained longer and on all training images. Centre crops for most of the run are twice as
    # fast and lead to fewer errors. No dropout: strong augmentation and adversarial training prevent overfitting.
    "accurate": Recipe(
        "the default network without dropout, 30 epochs on all training images, mostly on centre crops, with "
        "strong augmentation, adversarial training, an exponential moving average of the weights and label smoothing",
        {
            "epochs": 30.0, "validation_fraction": 0.0, "dropout": 0.0, "lr": 0.2, "ema_decay": 0.999,
            "label_smoothing": 0.1, "crop": 4, "crop_fraction": 0.7, "adversarial": 0.1, **STRONG,
        },
    ),
    # As accurate as 40 epochs with a dropout of 0.4, pooling last and fewer centre crops, in half the time.
    "best": Recipe(
        "a network of six 3 x 3 convolutions with a fifth of the default's parameters, 26 epochs, mostly on centre "
        "crops, with strong augmentation",
        SMALL | {"epochs": 26.0, "dropout": 0.0, "pool_first": True, "crop": 4, "crop_fraction": 0.9},
    ),
    # Clothes are upright and fill their images: they are moved, mirrored and partly erased, not rotated or scaled.
    "fashion": Recipe(
        "a network of eight 3 x 3 convolutions on Fashion-MNIST, 120 epochs on whole images with shifts, horizontal "
        "flips and random erasing, and test-time augmentation over nine views",
        WHOLE | {
            "dataset": DataSet.FASHION_MNIST, "epochs": 120.0, "conv_layers": 4, "rotate": 0.0, "scale": 0.0,
            "shear": 0.0, "flip": True, "erasing": 0.5,
        },
    ),
    # Handwriting varies as digits do, and is never mirrored.
    "kuzushiji": Recipe(
        "a network of six 3 x 3 convolutions on Kuzushiji-MNIST, or with `--dataset kuzushiji-49` on that: 40 epochs "
        "on whole images with strong augmentation, and test-time augmentation over nine views",
        WHOLE | {"dataset": DataSet.KMNIST},
    ),
    "letters": Recipe(
        "a network of six 3 x 3 convolutions on the letters of EMNIST, or with `--dataset` another of its splits: 20 "
        "epochs on whole images with strong augmentation, and test-time augmentation over nine views",
        WHOLE | {"dataset": DataSet.EMNIST_LETTERS, "epochs": 20.0},
    ),
    "notebook": Recipe(
        "the TensorFlow notebook that this project grew from: 20 000 steps of 100, SGD 0.001, raw pixels, 30 % held "
        "out",
        NOTEBOOK,
    ),
    # The author's variants: each changes one thing. The best was the one with batch normalisation.
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
    """Return the recipe called `name`.

    Raises:
        UserError: the recipe is unknown; the message lists all recipes and the closest match.
    """
    if name not in RECIPES:
        raise UserError(unknown("recipe", name, RECIPES))
    return RECIPES[name]
