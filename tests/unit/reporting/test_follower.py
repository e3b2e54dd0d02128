"""Following a run directory: whatever fails and wherever, a tracker has each step once, and none is missing."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from dist_mnist.reporting.listener import RunEnd, RunStart
from dist_mnist.reporting.listeners import follower
from dist_mnist.reporting.listeners.follower import Follower, Sync
from dist_mnist.reporting.listeners.tracker import Point, TrackedRun
from dist_mnist.run.ownership import TakenOver
from dist_mnist.run.records import RunResult, read_config
from helpers import HANGS_AFTER_S
from helpers.runs import wait_for


class Service:
    """A tracker in memory: its points by run. `faults` says of the next calls how each fails: "before" or "after"."""

    name = "mlflow"

    def __init__(self) -> None:
        self.runs: dict[str, list[Point]] = {}
        self.files: list[str] = []
        self.ends: list[str] = []
        self.faults: list[str] = []
        self.requests = 0

    def open(self, run: TrackedRun) -> Mapping[str, int]:
        self._call()
        self.points = self.runs.setdefault(run.key, [])
        return {point.kind: max(one.step for one in self.points if one.kind == point.kind) for point in self.points}

    def send(self, points: Sequence[Point]) -> None:
        self._call(lambda: self.points.extend(points))

    def send_result(self, point: Point, result: RunResult, files: Sequence[Path]) -> None:
        self.files += [path.name for path in files]
        self.send([point])

    def close(self, outcome: str) -> None:
        self._call(lambda: self.ends.append(outcome))

    def _call(self, do=lambda: None) -> None:
        self.requests += 1
        fault = self.faults.pop(0) if self.faults else ""
        if fault != "before":
            do()
        if fault:
            raise OSError("the server is gone")

    @property
    def steps(self) -> list[tuple[str, int]]:
        [points] = self.runs.values()
        return [(point.kind, point.step) for point in points]


@pytest.fixture
def run_dir(finished_runs, tmp_path) -> Path:
    """A run directory whose metrics are gone."""
    folder = Path(shutil.copytree(finished_runs[0], tmp_path / "run"))
    (folder / "metrics.jsonl").unlink()
    return folder


def write(run_dir: Path, kind: str, steps: Sequence[int], attempt: int = 1) -> None:
    """Append lines of metrics, which are the same in each attempt but for their times."""
    with open(run_dir / "metrics.jsonl", "a") as file:
        for step in steps:
            record = {"kind": kind, "step": step, "loss": 1 / step, "elapsed_s": float(attempt), "unix_time_s": 1e9}
            file.write(json.dumps(record) + "\n")


def sync(service: Service, run_dir: Path, start_step: int | None = None) -> Sync:
    return Sync(service, run_dir, read_config(run_dir), lambda: None, start_step)


def test_steps_that_a_killed_run_repeats_are_sent_once(run_dir):
    service = Service()
    write(run_dir, "train", range(10, 60, 10))
    write(run_dir, "validation", [50])
    sync(service, run_dir).catch_up()
    (run_dir / "metrics.jsonl").unlink()  # as the run resumes after step 20
    write(run_dir, "train", [10, 20])
    write(run_dir, "train", [30, 40, 50, 60], attempt=2)
    write(run_dir, "validation", [50, 60], attempt=2)
    sync(service, run_dir, start_step=20).catch_up()
    of_train = [("train", step) for step in range(10, 60, 10)]
    assert service.steps == [*of_train, ("validation", 50), ("train", 60), ("validation", 60)]
    [points] = service.runs.values()
    assert points[0] == Point("train", 10, 1e9, {"step": 10, "loss": 0.1, "elapsed_s": 1.0})


@pytest.mark.parametrize("fault", ["before", "after"])
@pytest.mark.parametrize("call", range(5))
def test_request_that_fails_before_or_after_it_took_effect_leaves_no_gap_and_nothing_twice(run_dir, fault, call):
    service = Service()
    service.faults = [*[""] * call, fault]
    write(run_dir, "train", range(1, 100))  # three batches, after one call to open
    following, failures = sync(service, run_dir), 0
    for _ in range(3):
        try:
            following.finish("finished")
            break
        except OSError:
            failures += 1
    assert failures == 1
    assert service.steps == [*(("train", step) for step in range(1, 100)), ("test", 30)]
    assert service.ends == ["finished"] and set(service.files) >= {"result.json", "step-00000030.safetensors"}
    [points], result = service.runs.values(), json.loads((run_dir / "result.json").read_text())
    assert points[-1].figures["since_start_s"] == result["seconds"]["since_start"]


def test_line_that_is_being_written_is_sent_once_it_is_whole(run_dir):
    service, metrics = Service(), run_dir / "metrics.jsonl"
    write(run_dir, "train", [1, 2])
    whole = metrics.read_bytes()
    metrics.write_bytes(whole[:-5])
    following = sync(service, run_dir)
    following.catch_up()
    assert service.steps == [("train", 1)]
    metrics.write_bytes(whole)
    following.catch_up()
    requests = service.requests
    following.catch_up()
    assert service.steps == [("train", 1), ("train", 2)] and service.requests == requests, "nothing new, no request"


def test_key_stays_on_resume_and_is_another_for_other_settings_from_the_first_step(run_dir):
    service = Service()
    keys = [sync(service, run_dir, start_step).run.key for start_step in (0, 0, 7)]
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | {"settings": config["settings"] | {"lr": 0.3}}))
    keys += [sync(service, run_dir, start_step).run.key for start_step in (7, 0)]
    assert keys[0] == keys[1] == keys[2] == keys[3] != keys[4]


def test_key_stays_with_a_run_that_is_moved_and_is_another_for_a_copy(run_dir):
    def key(folder: Path, start_step: int | None = 7) -> str:
        return sync(Service(), folder, start_step).run.key

    first, copy, moved = key(run_dir), run_dir.with_name("copy"), run_dir.with_name("moved")
    shutil.copytree(run_dir, copy)
    (by_link := run_dir.with_name("link")).symlink_to(run_dir)
    assert key(run_dir) == key(by_link) == first
    of_copy = key(copy, None)
    assert of_copy != first and key(copy) == of_copy and key(run_dir) == first
    run_dir.rename(moved)
    assert key(moved) == first and key(moved) == first and key(copy) == of_copy


@pytest.mark.parametrize("content", ["", "{}", '{"key": "\' OR 1", "digest": "x"}', "[" * 1000])
def test_identity_that_no_run_wrote_is_replaced(run_dir, content):
    (run_dir / "mlflow.json").write_text(content)
    key = sync(Service(), run_dir).run.key
    assert len(key) == 16 and json.loads((run_dir / "mlflow.json").read_text())["key"] == key


def test_files_of_a_result_are_of_its_run_directory_whatever_it_names(run_dir):
    service, result = Service(), json.loads((run_dir / "result.json").read_text())
    (run_dir.parent / "secret").write_text("not of this run")
    (run_dir / "result.json").write_text(json.dumps(result | {"checkpoints": ["../../secret"]}))
    sync(service, run_dir).finish("finished")
    assert "secret" not in service.files and "result.json" in service.files


@pytest.fixture
def follow(run_dir, monkeypatch):
    """A function that starts a follower of a service, which looks often."""
    for name in ("EVERY_S", "LONGEST_S", "RETRY_S"):
        monkeypatch.setattr(follower, name, 0.01)

    def follow(service: Service, check_owner=lambda: None, patience_s: float = HANGS_AFTER_S) -> Follower:
        monkeypatch.setattr(follower, "PATIENCE_S", dict.fromkeys(("finished", "stopped", "failed"), patience_s))
        following = Follower(service, check_owner)
        config = read_config(run_dir)
        config.settings["stall_timeout"] = 2.0 * HANGS_AFTER_S
        notes = {"parameters": 1, "step": 0, "total_steps": 99, "notes": ()}
        following.on_start(RunStart(run_dir=run_dir, config=config, **notes))
        return following

    return follow


def test_follower_of_a_service_that_is_down_for_a_while_sends_all_and_warns_once(run_dir, follow, capfd):
    service = Service()
    service.faults = ["before", "after"] * 3
    following = follow(service)
    write(run_dir, "train", range(1, 50))
    wait_for(lambda: not service.faults and len(service.runs) == 1 and len(service.steps) == 49)
    write(run_dir, "train", range(50, 60))
    following.on_end(RunEnd(outcome="stopped", step=59))
    assert service.steps == [("train", step) for step in range(1, 60)] and service.ends == ["stopped"]
    [warning] = capfd.readouterr().err.splitlines()
    assert "logging to mlflow failed (the server is gone); training goes on, and the rest is sent later" in warning


def test_follower_of_a_service_that_stays_down_gives_up_and_says_what_sends_the_rest(run_dir, follow, capfd):
    service = Service()
    service.faults = ["before"] * 100_000
    following = follow(service, patience_s=0.2)
    write(run_dir, "train", [1])
    following.on_end(RunEnd(outcome="failed", step=1))
    assert not service.runs
    first, last = capfd.readouterr().err.splitlines()
    assert "logging to mlflow failed" in first and f"dist-mnist log {run_dir} --to mlflow, or the next" in last


def test_follower_of_a_run_that_another_process_took_over_sends_nothing(run_dir, follow, capfd):
    def check_owner() -> None:
        raise TakenOver("the other one follows it")

    service = Service()
    write(run_dir, "train", [1])
    follow(service, check_owner).on_end(RunEnd(outcome="failed", step=1))
    assert service.requests == 0 and capfd.readouterr().err == ""
