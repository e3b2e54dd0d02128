"""Runs in MLflow's own server, on SQLite, and in the files of W&B's offline mode: each step once, whatever happens."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dist_mnist.reporting.listeners.to_wandb import _records
from helpers.runs import SMALL, dist_mnist, end, records, start, train_here, wait_for
from helpers.trackers import find_trackers, free_port, mlflow_server

pytestmark = pytest.mark.xdist_group("trackers")  # one server for all
OPTIONS = (
    *SMALL, "--log-to=mlflow", "--log-to=wandb", "--log-every=1", "--validate-every=20", "--checkpoint-every=50",
    "--schedule=constant", "--warmup-fraction=0",
)  # fmt: skip


class Server:
    """An MLflow server that goes and comes back, at the same address and with the same database."""

    def __init__(self, folder: Path, env: dict[str, str]):
        self.folder, self.env, self.port = folder, env, free_port()
        self.up = ExitStack()

    def start(self) -> str:
        return self.up.enter_context(mlflow_server(self.folder, self.port, self.env))

    def stop(self) -> None:
        self.up.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """A server that is up; the variables by which it and W&B are found are set."""
    folder, env = tmp_path_factory.mktemp("trackers"), find_trackers()
    server = Server(folder, env)
    env |= {"MLFLOW_TRACKING_URI": server.start(), "WANDB_MODE": "offline"}
    env |= {f"WANDB_{what}_DIR": str(folder) for what in ("CONFIG", "CACHE", "DATA")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        yield server
        server.stop()
        import wandb

        wandb.teardown()


def in_mlflow(run_dir: Path):
    """The client, and the one run of that name."""
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    [found] = client.search_runs(experiments, f"attributes.run_name = '{run_dir.name}'")
    return client, found


def rows_in_wandb(run_dir: Path) -> list[dict]:
    """The rows in all of W&B's files of a run, in the order of their making."""
    rows = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for record in _records(path.read_bytes()):
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            rows += [{name: json.loads(value) for name, value in items.items()}] if items else []
    return rows


@pytest.fixture(scope="module")
def killed(server, digits, tmp_path_factory) -> Path:
    """A run that was killed while the server was down, and resumed from an earlier step once it was back."""
    run_dir = tmp_path_factory.mktemp("runs") / "killed"
    command = [sys.executable, "-m", "dist_mnist.train", f"--data-dir={digits}", f"--run-dir={run_dir}", *OPTIONS]
    running = start(*command, "--steps=1000000")
    try:
        wait_for(lambda: (run_dir / "mlflow.json").exists() and in_mlflow_to(run_dir) > 30, running)
        server.stop()
        seen = records(run_dir, "train")[-1]["step"]
        wait_for(lambda: records(run_dir, "train")[-1]["step"] > seen + 60, running)
    finally:
        end(running)
    server.start()
    steps = records(run_dir, "train")[-1]["step"] + 45
    done = train_here(digits, run_dir, *OPTIONS, f"--steps={steps}")
    assert done.returncode == 0 and "resume    after step" in done.stdout, done.stderr
    assert "logging to" not in done.stderr and "does not have" not in done.stderr
    return run_dir


def in_mlflow_to(run_dir: Path) -> float:
    """The last step of training that the server has of a run."""
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"attributes.run_name = '{run_dir.name}'")
    return found[0].data.metrics.get("train/step", 0) if found else 0


def test_killed_run_is_one_in_mlflow_with_each_step_once_and_its_values(killed):
    client, found = in_mlflow(killed)
    assert found.info.status == "FINISHED"
    for kind in ("train", "validation"):
        expected = {record["step"]: record for record in records(killed, kind)}
        for name in ("loss", "accuracy", "step", "elapsed_s"):
            history = client.get_metric_history(found.info.run_id, f"{kind}/{name}")
            assert Counter(metric.step for metric in history) == Counter(list(expected))
            if name != "elapsed_s":  # which is of the attempt that was first to send it
                assert {metric.step: metric.value for metric in history} == {
                    step: record[name] for step, record in expected.items()
                }
    times = [metric.timestamp for metric in client.get_metric_history(found.info.run_id, "validation/loss")]
    assert times == sorted(times) and abs(times[-1] / 1000 - records(killed, "validation")[-1]["unix_time_s"]) < 1


def test_finished_run_in_mlflow_has_settings_facts_result_and_files(killed):
    client, found = in_mlflow(killed)
    config, result = (json.loads((killed / name).read_text()) for name in ("config.json", "result.json"))
    assert (found.data.params["batch_size"], found.data.params["conv_channels"]) == ("50", "[4, 4]")
    assert "recipe" in found.data.params and "init" not in found.data.params
    [data] = found.inputs.dataset_inputs
    assert found.data.tags["data_fingerprint"] == data.dataset.digest == config["data"]["fingerprint"]
    assert found.data.tags["host"] == config["machine"]["host"]
    assert found.data.tags["version_torch"] == config["versions"]["torch"]
    assert found.data.metrics["test/accuracy"] == result["accuracy"] and found.data.metrics["test/images"] == 200
    files = {file.path: file.file_size for file in client.list_artifacts(found.info.run_id)}
    [checkpoint] = result["checkpoints"]
    assert files.keys() >= {"config.json", "metrics.jsonl", "report.html", "confusion_matrix.png"}
    assert files[checkpoint] == (killed / "checkpoints" / checkpoint).stat().st_size


def test_killed_run_is_one_in_wandb_with_each_step_once_and_its_values(killed):
    rows = rows_in_wandb(killed)
    assert len({path.name.split("-")[-1] for path in killed.glob("wandb/offline-run-*")}) == 1
    assert len(list(killed.glob("wandb/offline-run-*"))) == 2
    for kind in ("train", "validation"):
        expected = records(killed, kind)
        found = [row for row in rows if f"{kind}/step" in row]
        assert [row["step"] for row in found] == [record["step"] for record in expected]
        assert [row[f"{kind}/loss"] for row in found] == [record["loss"] for record in expected]
    last = rows[-1]
    assert last["test/accuracy"] == json.loads((killed / "result.json").read_text())["accuracy"]
    [picture] = killed.glob("wandb/offline-run-*/files/media/images/confusion_matrix_*.png")
    assert picture.stat().st_size > 1000
    assert abs(rows[-2]["_timestamp"] - records(killed, "validation")[-1]["unix_time_s"]) < 0.01


def test_log_command_sends_a_run_afterwards_and_only_what_is_missing(server, digits, tmp_path):
    run_dir = tmp_path / "afterwards"
    without = [option for option in OPTIONS if not option.startswith("--log-to")]
    assert train_here(digits, run_dir, *without, "--steps=30").returncode == 0
    for _ in range(2):
        done = dist_mnist("log", run_dir, "--to", "mlflow", "--to", "wandb")
        assert done.returncode == 0 and f"mlflow has all of {run_dir}" in done.stdout, done.stderr
    client, found = in_mlflow(run_dir)
    assert found.info.status == "FINISHED" and found.data.metrics["test/step"] >= 20
    for name in ("train/loss", "test/accuracy"):
        steps = Counter(metric.step for metric in client.get_metric_history(found.info.run_id, name))
        assert set(steps.values()) == {1} and len(steps) == (30 if name == "train/loss" else 1)
    steps = Counter((row["step"], "test/step" in row, "validation/step" in row) for row in rows_in_wandb(run_dir))
    assert len(steps) == 30 + 2 + 1 and set(steps.values()) == {1}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["nowhere", "--to=mlflow"], "nowhere is not a run directory"),
        (["{run}", "--to=mlflw"], "unknown tracker 'mlflw', did you mean 'mlflow'"),
        (["{run}", "--to=mlflow"], "logging to mlflow failed: "),
        (["{run}", "--to=wandb"], "W&B has no API key: give one to `wandb login`, or set WANDB_MODE=offline"),
    ],
)
def test_log_command_that_cannot_send_is_a_sentence(server, finished_runs, monkeypatch, words, why):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NETRC", "/dev/null")
    import wandb

    wandb.teardown()  # it reads the variables once
    monkeypatch.setenv("WANDB_MODE", "online")
    done = dist_mnist("log", *(word.format(run=finished_runs[1]) for word in words))
    monkeypatch.undo()
    wandb.teardown()
    assert done.returncode == 2 and why in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not Path("nowhere").exists()
