"""The thread that decodes and computes for all requests, and what it does at the server's end; where the server is."""

import asyncio
import io
import socket
from urllib.parse import urlsplit

import pytest
import torch
from starlette.exceptions import HTTPException
from starlette.requests import Request

from dist_mnist.evaluation.choices import Fit
from dist_mnist.serving import app
from dist_mnist.serving.inference import Inference
from dist_mnist.serving.server import listen, url
from dist_mnist.serving.uploads import Upload
from dist_mnist.utils.errors import UserError
from helpers import HANGS_AFTER_S

PICTURE = (b"content-type", b"image/png")


class Reads:
    """In an ensemble's place: notes which pictures are read, and finds all of them unreadable."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def fitted(self, fit: Fit) -> "Reads":
        return self

    def read(self, file: io.BytesIO, name: str, most_pixels: int) -> None:
        self.order.append(name)
        raise UserError(f"{name}: no")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_url_of_a_server_leads_to_it(host):
    with listen(host, 0) as listener:
        address = urlsplit(url(listener))
        socket.create_connection((address.hostname, address.port), HANGS_AFTER_S).close()


def test_request_that_the_servers_end_cuts_short_is_told_so():
    inference = Inference(Reads(), torch.device("cpu"))  # type: ignore[arg-type]
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": [PICTURE]}

    async def end() -> None:
        body_never_comes = Request(scope, asyncio.Event().wait)  # type: ignore[arg-type]
        task = asyncio.create_task(app._predict(inference, Fit.AUTO, body_never_comes))
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(HTTPException) as refused:
        asyncio.run(end())
    assert (refused.value.status_code, refused.value.detail) == (503, "the server ends")
    with inference.admitted():
        assert inference._num_requests == 1
    inference.close()


def test_inference_request_of_many_pictures_lets_others_have_their_turn():
    inference = Inference(reads := Reads(), torch.device("cpu"))  # type: ignore[arg-type]

    async def ask(*names: str) -> list[str]:
        answer = await inference.answer([Upload(name, io.BytesIO()) for name in names], Fit.AUTO, False)
        return [one.file for one in answer.predictions]

    async def ask_both() -> list[list[str]]:
        return await asyncio.gather(ask("a1", "a2", "a3", "a4"), ask("b"))

    answers = asyncio.run(ask_both())
    inference.close()
    assert answers == [["a1", "a2", "a3", "a4"], ["b"]]
    assert reads.order == ["a1", "b", "a2", "a3", "a4"]
