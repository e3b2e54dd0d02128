"""MLflow: the server $MLFLOW_TRACKING_URI, the experiment $MLFLOW_EXPERIMENT_NAME."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_mnist.reporting.figures import confusion_picture
from dist_mnist.reporting.listener import Outcome
from dist_mnist.reporting.listeners.tracker import Point, TrackedRun
from dist_mnist.run.records import DataFacts, RunResult
from dist_mnist.utils.files import to_json

EXPERIMENT = "dist_mnist"
KEY = "dist_mnist_key"  # tag that identifies a run
MAX_PARAMS = 100  # per request
LONGEST = 6000  # characters of a parameter value
STATUS: Mapping[Outcome, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# Timeout and retries of a request; the library's defaults would take minutes.
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


class MLflow:
    """One run on the server, which stores all metrics of a request in one transaction."""

    name = "mlflow"

    def __init__(self) -> None:
        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient

        self.connect, self.run_id = MlflowClient, ""

    def open(self, run: TrackedRun) -> Mapping[str, int]:
        """Find the run by its tag, or create it; this also finds a run whose creation was not acknowledged."""
        self.client = self.connect()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name)
        found = self.client.search_runs([experiment_id], f"tags.{KEY} = '{run.key}'", max_results=1)
        tags = {KEY: run.key, "mlflow.source.name": "dist-mnist train"} | run.tags
        entry = found[0] if found else self.client.create_run(experiment_id, tags=tags, run_name=run.name)
        self.run_id = entry.info.run_id
        if entry.info.status != "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
        self._set_params(run.settings, entry.data.params)
        if not (entry.inputs and entry.inputs.dataset_inputs):
            self._set_data(run.config.data)
        return {
            kind: int(entry.data.metrics[f"{kind}/step"])
            for kind in ("train", "validation", "test")
            if f"{kind}/step" in entry.data.metrics
        }

    def send(self, points: Sequence[Point]) -> None:
        """Log the metrics; names are kind/name, such as train/loss."""
        from mlflow.entities import Metric

        metrics = [
            Metric(f"{point.kind}/{name}", value, int(1000 * (point.unix_time_s or 0)), point.step)
            for point in points
            for name, value in point.figures.items()
        ]
        self.client.log_batch(self.run_id, metrics=metrics)

    def send_result(self, point: Point, result: RunResult, files: Sequence[Path]) -> None:
        """Log files and the confusion matrix, then the metrics, whose presence proves that the files are there."""
        for path in files:
            self.client.log_artifact(self.run_id, str(path))
        picture = confusion_picture(result.confusion_matrix, result.names)
        self.client.log_image(self.run_id, picture, "confusion_matrix.png")
        self.send([point])

    def close(self, outcome: Outcome) -> None:
        """Set the status of the run."""
        self.client.set_terminated(self.run_id, STATUS[outcome])

    def _set_params(self, settings: Mapping[str, object], known: Mapping[str, str]) -> None:
        """Log the parameters that it lacks: MLflow's never change, so changeable settings keep their first values."""
        from mlflow.entities import Param

        missing = [Param(name, str(value)[:LONGEST]) for name, value in settings.items() if name not in known]
        for first in range(0, len(missing), MAX_PARAMS):
            self.client.log_batch(self.run_id, params=missing[first : first + MAX_PARAMS])

    def _set_data(self, data: DataFacts) -> None:
        """The data as MLflow's pages show it."""
        from mlflow.entities import Dataset, DatasetInput

        name, source = Path(data.folder).name or "data", to_json({"uri": data.folder})
        dataset = Dataset(name, data.fingerprint, source_type="local", source=source)
        self.client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, [])])
