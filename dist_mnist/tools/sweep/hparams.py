"""TensorBoard's tab HPARAMS for sweeps: the settings that vary, and the accuracies.

Each finished run writes an entry with all its settings. An experiment definition in the parent folder selects those
that become columns, and axes of the parallel coordinates.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dist_mnist.config.recipes import named_recipe
from dist_mnist.config.settings import FIELDS
from dist_mnist.tools.sweep.words import named_values, with_partners

METRICS = {
    "accuracy/validation_percent": "validation %",  # short, as they are written side by side above the axes
    "accuracy/test_percent": "test %",
}


def shared_settings(words: Iterable[str], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the settings `others` that the `NAME=VALUE` arguments leave to all runs.

    TensorBoard's files are on even if a recipe turns them off, unless the user does.

    Raises:
        UserError: an argument does not have this form, or a recipe is unknown.
    """
    values = named_values(words)
    swept = with_partners(values)
    shared = {name: value for name, value in others.items() if name not in swept}
    recipes = values.get("recipe") or [str(shared.get("recipe", "default"))]
    has_files = all(named_recipe(name).settings.get("tensorboard", True) for name in recipes)
    return shared if has_files or "tensorboard" in shared else {**shared, "tensorboard": True}


def write_columns(folder: Path, names: Iterable[str]) -> None:
    """Define the columns for the runs below `folder`: the settings in `names` that affect the result of a run."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    if list(folder.glob("events.*")):
        return
    settings = [FIELDS[name] for name in names if name in FIELDS and not FIELDS[name].changeable]
    number, text = api_pb2.DATA_TYPE_FLOAT64, api_pb2.DATA_TYPE_STRING
    columns = [
        api_pb2.HParamInfo(name=setting.name, type=number if setting.kind in (int, float, bool) else text)
        for setting in settings
    ]
    metrics = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=title) for tag, title in METRICS.items()
    ]
    experiment = api_pb2.Experiment(hparam_infos=columns, metric_infos=metrics)
    summary = Summary.Value(
        tag=metadata.EXPERIMENT_TAG,
        metadata=metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(experiment=experiment)),
        tensor=metadata.NULL_TENSOR,
    )
    writer = EventFileWriter(str(folder))
    writer.add_event(Event(summary=Summary(value=[summary])))
    writer.close()
