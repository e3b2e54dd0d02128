"""MLflow and W&B, from the separate folder where launch/setup.sh installs them; an MLflow server on SQLite."""

import importlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from helpers import HANGS_AFTER_S

FOLDER = Path(sys.prefix) / "trackers"
NO_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # jobs of agents and judges need further packages
LIBRARIES = ("mlflow", "wandb")


def find_trackers() -> dict[str, str]:
    """Make both importable, and return the variables that do so in other processes. Skip the test without them."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    importlib.invalidate_caches()
    if missing := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {missing[0]}, which tests/run.sh installs")
    ours = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {"PYTHONPATH": os.pathsep.join([*ours, str(FOLDER)]), "MLFLOW_DISABLE_TELEMETRY": "true"} | NO_JOBS


def free_port() -> int:
    """Return a free port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def mlflow_server(folder: Path, port: int, env: dict[str, str]) -> Iterator[str]:
    """Context manager: a server with its database and files in `folder`; yields its URI once it answers."""
    words = ["server", f"--port={port}", "--workers=1", f"--backend-store-uri=sqlite:///{folder}/mlflow.db"]
    command = [sys.executable, "-m", "mlflow", *words, f"--artifacts-destination={folder}/artifacts"]
    uri, began = f"http://127.0.0.1:{port}", time.monotonic()
    with open(folder / "server.log", "a") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | env, start_new_session=True, cwd=folder
        )
    try:
        while not _answers(uri):
            assert server.poll() is None and time.monotonic() - began < HANGS_AFTER_S, (
                folder / "server.log"
            ).read_text()
            time.sleep(0.2)
        yield uri
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def _answers(uri: str) -> bool:
    try:
        return requests.get(f"{uri}/health", timeout=1).ok
    except requests.RequestException:
        return False
