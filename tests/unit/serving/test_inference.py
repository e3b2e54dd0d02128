"""The thread that decodes and computes for all requests."""

import asyncio
import io

import torch

from dist_mnist.evaluation.choices import Fit
from dist_mnist.serving.inference import Inference
from dist_mnist.serving.uploads import Upload
from dist_mnist.utils.errors import UserError


class Reads:
    """In an ensemble's place: notes which pictures are read, and finds all of them unreadable."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def fitted(self, fit: Fit) -> "Reads":
        return self

    def read(self, file: io.BytesIO, name: str, most_pixels: int) -> None:
        self.order.append(name)
        raise UserError(f"{name}: no")


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
