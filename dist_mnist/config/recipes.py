"""Recipes: named sets of settings, and what each is, for people."""

from typing import Any

# fmt: off
# The changes of digits that long runs learn from.
STRONG = {"rotate": 15.0, "scale": 0.15, "shear": 10.0, "shift": 2.0}


# Six convolutions of 3 x 3 in two stages instead of two of 5 x 5: a fifth of the parameters, for fewer errors.
BEST: dict[str, Any] = {
    "epochs": 40.0, "validation_fraction": 0.0, "weight_decay": 1e-3, "ema_decay": 0.999, "label_smoothing": 0.05,
    "batch_norm": "all", "kernel_size": 3, "conv_layers": 3, "conv_channels": (16, 48), "dense_units": (256,),
    "crop": 4, "crop_fraction": 0.7, **STRONG,
}


# What makes one recipe differ from the defaults above.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    # The least time to 99 % on MNIST's test set: each image is seen once at most, so nothing has to be varied.
    "fast": {
        "epochs": 0.45, "validation_fraction": 0.0, "batch_size": 100, "batch_norm": "all", "dropout": 0.0, "lr": 0.15,
        "weight_decay": 2e-3, "label_smoothing": 0.1, "rotate": 0.0, "scale": 0.0, "shift": 0.0, "crop": 4,
        "tensorboard": False,
    },
    # The same network as the default's, for longer, on all training images; averaged weights are what is evaluated. To
    # see the middle of the images only for most of the time is twice as fast, and makes for fewer errors in the end. No
    # unit is dropped: images that are changed so much, and then moved against the network, keep it from overfitting.
    "accurate": {
        "epochs": 30.0, "validation_fraction": 0.0, "dropout": 0.0, "lr": 0.2, "ema_decay": 0.999,
        "label_smoothing": 0.1, "crop": 4, "crop_fraction": 0.7, "adversarial": 0.1, **STRONG,
    },
    "best": BEST,
    # Clothes are upright and fill their images, so all is changed less, but for the mirror.
    "fashion": BEST | {
        "dataset": "fashion-mnist", "epochs": 20.0, "rotate": 5.0, "scale": 0.1, "shear": 0.0, "shift": 1.0,
        "flip": True, "crop": 0, "views": 9,
    },
    # The notebook's run: 20 000 steps of plain SGD on raw pixels in fp32, 30 % held out.
    "notebook": {
        "epochs": None, "steps": 20_000, "validation_fraction": 0.3, "batch_size": 100, "lr": 0.001, "momentum": 0.0,
        "nesterov": False, "weight_decay": 0.0, "schedule": "constant", "warmup_fraction": 0.0, "batch_norm": "none",
        "pixels": "raw", "rotate": 0.0, "scale": 0.0, "shift": 0.0, "precision": "fp32", "log_every": 100,
        "validate_every": 5_000,
    },
}


# fmt: on
# Its author's variants: one thing is changed in each. The best was that with batch normalisation in the dense layer.
VARIANTS: dict[str, dict[str, Any]] = {
    "bn": {"batch_norm": "dense"},
    "bn-dropout-20": {"batch_norm": "dense", "dropout": 0.2},
    "dropout-20": {"dropout": 0.2},
    "dropout-60": {"dropout": 0.6},
    "shallow": {"conv_channels": (32,)},
    "deep": {"conv_layers": 2},
    "narrow": {"conv_channels": (16, 32)},
    "wide": {"conv_channels": (64, 128)},
    "momentum": {"momentum": 0.9},
    "adam": {"optimizer": "adam"},
}


# What each recipe is, for people.
ABOUT = {
    "default": "the notebook's network with batch normalisation in the dense layer; one-cycle SGD, light augmentation, "
    "3 epochs",
    "fast": "the same network with batch normalisation in all layers, for 0.45 epochs: the least time to 99 %",
    "accurate": "the default's network without dropout for 30 epochs on all training images, mostly on the middle of "
    "them, with strong and adversarial changes, averaged weights and smoothed labels",
    "best": "a network of six 3 x 3 convolutions with a fifth of the parameters, for 40 epochs with stronger "
    "changes of the images",
    "fashion": "that network on Fashion-MNIST, for 20 epochs of whole images, weaker changes, half of them mirrored, "
    "and nine views of each image in evaluation",
    "notebook": "the TensorFlow notebook that this project grew from: 20 000 steps of 100, SGD 0.001, raw pixels, 30 % "
    "held out",
    "notebook-bn": "the same with batch normalisation in the dense layer, its author's best variant",
    "notebook-bn-dropout-20": "that with less dropout",
    "notebook-dropout-20": "the notebook's with a dropout of 0.2",
    "notebook-dropout-60": "with 0.6",
    "notebook-shallow": "with one stage of convolution",
    "notebook-deep": "with two convolutions in each stage",
    "notebook-narrow": "with half as many filters",
    "notebook-wide": "with twice as many",
    "notebook-momentum": "with a momentum of 0.9",
    "notebook-adam": "with Adam",
}
