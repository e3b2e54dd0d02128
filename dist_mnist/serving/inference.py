"""Inference for the server: one thread decodes and computes for all requests; the queue is bounded."""

import asyncio
import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from msgspec import Struct
from msgspec.structs import replace
from PIL import Image

from dist_mnist.evaluation.choices import Fit
from dist_mnist.evaluation.evaluate import probabilities
from dist_mnist.evaluation.predict import Ensemble, InputImage, Prediction
from dist_mnist.serving.uploads import Upload
from dist_mnist.utils.errors import UserError

MOST_PIXELS = 25_000_000  # per picture: more than a phone's, but a small file may decode to any number
MOST_REQUESTS = 64  # being read, waiting or being computed


class Busy(Exception):
    """The server has its maximum number of concurrent requests."""


class Unreadable(Struct, frozen=True, kw_only=True):
    """A picture that cannot be converted to an image for the network, and why."""

    file: str
    error: str


class Answer(Struct, frozen=True, kw_only=True):
    """The predictions for a request's pictures, in the same order."""

    predictions: tuple[Prediction | Unreadable, ...]


class Inference:
    """An ensemble, and the thread that computes with it.

    The pictures of a request are one batch, computed with one torch thread, as in `dist-mnist predict`. The answer has
    the same bits, independent of concurrent requests.
    """

    def __init__(self, ensemble: Ensemble, device: torch.device):
        self.ensemble = ensemble
        self._device, self._num_requests = device, 0
        self._thread = ThreadPoolExecutor(1, "inference", torch.set_num_threads, (1,))

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Context manager: count a request as being served. Enter it before the body is read.

        Raises:
            Busy: there are already `MOST_REQUESTS`.
        """
        if self._num_requests >= MOST_REQUESTS:
            raise Busy
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1

    async def answer(self, pictures: Sequence[Upload], fit: Fit, with_seen: bool) -> Answer:
        """The classes of pictures, at most as many as in one batch; see `as_network_sees` for `fit`.

        Between two pictures, which may take a second each, other requests and the server's end have their turn.
        """
        in_thread = partial(asyncio.get_running_loop().run_in_executor, self._thread)
        read = [await in_thread(self._read, picture, fit) for picture in pictures]
        return await in_thread(self._answer, read, with_seen)

    def warm_up(self) -> None:
        """Compute one batch: the first is slower, and shows whether the models work."""
        channels, height, width = self.ensemble.facts.image_shape
        blank = InputImage("", None, np.zeros((height, width, channels), np.uint8))
        self._thread.submit(self._predict, [blank]).result()

    def close(self) -> None:
        """Stop the thread after the picture or batch at hand."""
        self._thread.shutdown(cancel_futures=True)

    def _answer(self, read: Sequence[InputImage | Unreadable], with_seen: bool) -> Answer:
        inputs = [one for one in read if isinstance(one, InputImage)]
        found = iter(self._predict(inputs) if inputs else [])
        predictions = [
            replace(next(found), **({"seen": _as_url(one.image)} if with_seen else {}))
            if isinstance(one, InputImage)
            else one
            for one in read
        ]
        return Answer(predictions=tuple(predictions))

    def _read(self, picture: Upload, fit: Fit) -> InputImage | Unreadable:
        try:
            return self.ensemble.fitted(fit).read(picture.file, picture.name, MOST_PIXELS)
        except UserError as error:
            return Unreadable(file=picture.name, error=str(error).removeprefix(f"{picture.name}: "))

    @torch.inference_mode()
    def _predict(self, inputs: Sequence[InputImage]) -> list[Prediction]:
        images = torch.from_numpy(np.stack([one.image for one in inputs])).to(self._device)  # (B, H, W, C)
        found = probabilities(self.ensemble.networks, images.permute(0, 3, 1, 2))
        return self.ensemble.predictions(inputs, found.cpu().numpy())


def _as_url(image: np.ndarray) -> str:
    """Return an image (H, W, C) uint8 as a data: URL of a PNG file."""
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file := io.BytesIO(), "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
