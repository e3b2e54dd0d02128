"""Commands that use trained networks: eval, predict, export."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from msgspec.structs import asdict

from dist_mnist.cli.options import JsonOutput, OwnModels, TestFraction, print_json
from dist_mnist.config.choices import Device
from dist_mnist.evaluation.choices import ExportFormat, Fit, Split
from dist_mnist.utils.errors import MISTAKE, UserError

app = typer.Typer()

Views = Annotated[
    int | None,
    typer.Option(
        help="test-time augmentation (TTA): views of each image whose predictions are averaged, which takes as many "
        "times as long (default: as its run did)"
    ),
]
Checkpoints = Annotated[
    list[Path], typer.Option("--ckpt", help="checkpoint file, or run directory for its best; several are averaged")
]
OnDevice = Annotated[Device, typer.Option(help="where to compute; auto: on a GPU if there is one")]


@app.command("eval")
def evaluate(
    checkpoints: Checkpoints,
    split: Annotated[Split, typer.Option(help="split of the data to evaluate on; test50k: of QMNIST")] = Split.TEST,
    views: Views = None,
    model: OwnModels = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder of idx files (default: as in training)")] = None,
    test_fraction: TestFraction = None,
    device: OnDevice = Device.AUTO,
    as_json: JsonOutput = False,
) -> None:
    """Evaluate a checkpoint: accuracy, loss, calibration and other figures, and the confusion matrix."""
    from dist_mnist.cli.tables import result_tables
    from dist_mnist.distributed.device import use_device
    from dist_mnist.distributed.world import World
    from dist_mnist.evaluation.checkpoints import evaluate_checkpoints

    world = use_device(World.from_environment().alone(), device)
    result = evaluate_checkpoints(checkpoints, split, data_dir, world, views, model or (), test_fraction)
    print_json(result) if as_json else result_tables(result)


@app.command("predict")
def run_predict(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="pictures (PNG, JPEG, ...), idx files, folders, - for standard input"),
    ],
    checkpoints: Checkpoints,
    fit: Annotated[
        Fit,
        typer.Option(
            help="digit: find what is drawn, scale and centre it as MNIST's digits; whole: scale the whole picture; "
            "auto: as digit, but leave pictures of the network's size as they are; in each case gray ones become dark "
            "on light or light on dark, as the network's training images",
        ),
    ] = Fit.AUTO,
    seen: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="write a picture of the images as the network gets them")
    ] = None,
    views: Views = None,
    model: OwnModels = None,
    device: OnDevice = Device.AUTO,
    as_json: JsonOutput = False,
) -> None:
    """Say what is on pictures: light on dark or dark on light, of any size. Exit code 2 if one could not be read."""
    from dist_mnist.cli.tables import prediction_line
    from dist_mnist.distributed.device import use_device
    from dist_mnist.distributed.world import World
    from dist_mnist.evaluation.predict import predict_images
    from dist_mnist.reporting.figures import draw_predictions

    unreadable: list[UserError] = []
    world = use_device(World.from_environment().alone(), device)
    predictions, inputs, names = predict_images(images, checkpoints, fit, world, unreadable.append, views, model or ())
    if as_json:
        print_json(predictions)
    else:
        for prediction in predictions:
            print(prediction_line(prediction, names))
    if seen and predictions:
        draw_predictions(seen, predictions, inputs)
    for error in unreadable:
        print(f"error: {error}", file=sys.stderr)
    if unreadable:
        raise typer.Exit(MISTAKE)


@app.command("export")
def run_export(
    checkpoint: Annotated[Path, typer.Option("--ckpt", help="checkpoint file, or run directory for its best")],
    kind: Annotated[ExportFormat, typer.Option("--format", help="file format")] = ExportFormat.ONNX,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="where to (default: the name of --ckpt, here)")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="folder of idx files to try it on (default: as in training)")
    ] = None,
    test_fraction: TestFraction = None,
    views: Views = None,
    model: OwnModels = None,
    as_json: JsonOutput = False,
) -> None:
    """Export a model for other programs, its normalisation inside, and check it against the original on test images."""
    from dist_mnist.cli.tables import facts_table
    from dist_mnist.distributed.world import World
    from dist_mnist.evaluation.export import KINDS, export

    path = output or Path(checkpoint.resolve().stem + KINDS[kind].suffix)
    world = World.from_environment().alone()
    facts = export(checkpoint, kind, path, data_dir, world, views, model or (), test_fraction)
    print_json(facts) if as_json else facts_table(str(path), asdict(facts))
