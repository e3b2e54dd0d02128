"""Progress of a TrainJob, posted to the status server of Kubeflow Trainer (v2.2, alpha).

https://www.kubeflow.org/docs/components/trainer/ : the operator sets three environment variables: the server's URL, and
the paths of its certificate and of a token that is rotated.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from datetime import UTC, datetime
from pathlib import Path

import requests

from dist_mnist.reporting.listener import Listener, RunEnd, RunStart, Validation
from dist_mnist.run.records import MetricsRecord
from dist_mnist.utils.errors import short, warn

URL, CA_CERT, TOKEN = (f"KUBEFLOW_TRAINER_SERVER_{what}" for what in ("URL", "CA_CERT", "TOKEN"))
EVERY_S = 5.0  # least time between posts; the last post is immediate
TIMEOUT_S = 5.0
NAMES = ("loss", "accuracy", "learning_rate", "images_per_s")


def from_environment() -> Iterator["Progress"]:
    """Yield a listener if the operator has set the variables."""
    if url := os.environ.get(URL):
        yield Progress(url, os.environ.get(CA_CERT), os.environ.get(TOKEN))


class Progress(Listener):
    """Posts the progress and latest metrics of a run from a separate thread; a failed post is not retried.

    Args:
        url: URL of the status server.
        ca_cert: file of the CA certificate that signed the server's; None for the system's certificates.
        token: file of the bearer token; read for each post.
    """

    def __init__(self, url: str, ca_cert: str | None, token: str | None):
        self.url, self.ca_cert, self.token = url, ca_cert, token
        self.metrics: dict[str, float] = {}
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kubeflow")
        self.posting: Future[None] | None = None
        self.told = False

    def on_start(self, start: RunStart) -> None:
        """Post for the first time."""
        self.start_step, self.total_steps = start.step, start.total_steps
        self.began = time.monotonic()
        self._post_soon(start.step)

    def on_step(self, step: int) -> None:
        """Post, if the last post is old enough and has been answered."""
        if time.monotonic() >= self.next_at and self.posting and self.posting.done():
            self._post_soon(step)

    def on_log(self, record: MetricsRecord) -> None:
        """Keep the metrics for the next post."""
        self._keep_metrics("", record)

    def on_validation(self, validation: Validation) -> None:
        """Keep the metrics for the next post."""
        self._keep_metrics("validation_", validation.record)

    def on_end(self, end: RunEnd) -> None:
        """Post for the last time, and wait for the answer."""
        if end.result:
            self.metrics |= {"test_accuracy": end.result.accuracy}
        self._post_soon(end.step)
        assert self.posting
        wait_for([self.posting], TIMEOUT_S)
        self.thread.shutdown(wait=False)

    def _keep_metrics(self, prefix: str, record: MetricsRecord) -> None:
        values = {f"{prefix}{name}": getattr(record, name) for name in NAMES}
        self.metrics |= {name: value for name, value in values.items() if value is not None}

    def _post_soon(self, step: int) -> None:
        self.next_at = time.monotonic() + EVERY_S
        self.posting = self.thread.submit(self._post, self._status(step))

    def _status(self, step: int) -> dict[str, object]:
        metrics = [{"name": name, "value": f"{value:.6g}"} for name, value in self.metrics.items()]
        status = {
            "progressPercentage": 100 * step // self.total_steps,
            "metrics": metrics,
            "lastUpdatedTime": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        }
        if step > self.start_step:
            per_step_s = (time.monotonic() - self.began) / (step - self.start_step)
            status["estimatedRemainingSeconds"] = round(per_step_s * (self.total_steps - step))
        return {"trainerStatus": status}

    def _post(self, body: dict[str, object]) -> None:
        try:
            headers = {"Authorization": f"Bearer {Path(self.token).read_text().strip()}"} if self.token else {}
            answer = requests.post(self.url, json=body, headers=headers, verify=self.ca_cert or True, timeout=TIMEOUT_S)
            answer.raise_for_status()
        except (OSError, ValueError) as error:  # such as requests' own, and of a token that is no text
            if not self.told:
                self.told = True
                bad_token = isinstance(error, requests.exceptions.InvalidHeader | UnicodeError)  # which these repeat
                why = f"{self.token} holds no token" if bad_token else short(error, 200)
                warn(f"{URL}: progress cannot be posted ({why}); training goes on without it")
