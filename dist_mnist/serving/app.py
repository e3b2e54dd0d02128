"""The web application: a page of three files, POST /predict, GET /model and GET /healthz."""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path

from msgspec import Struct
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dist_mnist.evaluation.choices import Fit
from dist_mnist.evaluation.predict import Ensemble
from dist_mnist.serving.guard import Guard
from dist_mnist.serving.inference import MOST_PIXELS, Busy, Inference, Unreadable
from dist_mnist.serving.uploads import MOST_BYTES, MOST_PICTURES, uploads
from dist_mnist.utils.errors import short, unknown
from dist_mnist.utils.files import to_json

PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
THERE_IS = "available are GET / (a page), POST /predict, GET /model and GET /healthz"
NOT_THERE = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
RETRY_AFTER_S = 1


class Limits(Struct, frozen=True, kw_only=True):
    """Limits of a request: pictures, bytes, and pixels of each picture."""

    pictures: int = MOST_PICTURES
    bytes: int = MOST_BYTES
    pixels: int = MOST_PIXELS


class ModelFacts(Struct, frozen=True, kw_only=True):
    """Schema of the response to GET /model: the served networks and their images."""

    name: str
    checkpoints: tuple[str, ...]
    checkpoint_sha256: tuple[str, ...]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # channels, height, width
    light_ground: bool  # whether gray images are dark on light
    views: tuple[int, ...]  # test-time augmentation: views per image, for each checkpoint
    fit: Fit  # default for requests
    limits: Limits = Limits()

    @classmethod
    def of(cls, ensemble: Ensemble, fit: Fit) -> "ModelFacts":
        """Build from trained models."""
        models, facts = ensemble.models, ensemble.facts
        return cls(
            name=", ".join(_name(model.path) for model in models),
            checkpoints=tuple(model.path.name for model in models),
            checkpoint_sha256=tuple(model.sha256 for model in models),
            class_names=facts.names,
            image_shape=facts.image_shape,
            light_ground=facts.light_ground,
            views=tuple(network.views for network in ensemble.networks),
            fit=fit,
        )


def _name(checkpoint: Path) -> str:
    """Return the name of the checkpoint's run, or of the file if it is not in a run directory."""
    path = checkpoint.resolve()
    return path.parents[1].name if path.parent.name == "checkpoints" else path.stem


def make_app(inference: Inference, fit: Fit, hosts: Sequence[str]) -> ASGIApp:
    """Build the application.

    Args:
        fit: default for requests; see `as_network_sees`.
        hosts: accepted values of the Host header; "*" for any. This defends against DNS rebinding, in which the name of
            a foreign page resolves to this machine.
    """
    facts = ModelFacts.of(inference.ensemble, fit)
    folder = files("dist_mnist.serving") / "page"
    pages = [
        Route(path, partial(_page, (folder / name).read_bytes(), kind), methods=["GET"])
        for path, (name, kind) in PAGE.items()
    ]
    app = Starlette(
        routes=[
            *pages,
            Route("/predict", partial(_predict, inference, fit), methods=["POST"]),
            Route("/model", partial(_model, facts), methods=["GET"]),
            Route("/healthz", _health, methods=["GET"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)],
        exception_handlers={HTTPException: _refuse, ClientDisconnect: _drop, Busy: _put_off, Exception: _fail},
    )
    app.router.redirect_slashes = False  # a redirect would go to the client's Host header
    return Guard(app)


async def _page(content: bytes, kind: str, _: Request) -> Response:
    return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})


async def _model(facts: ModelFacts, _: Request) -> Response:
    return _json(facts)


async def _health(_: Request) -> Response:
    return _json({"status": "ok"})


async def _predict(inference: Inference, fit: Fit, request: Request) -> Response:
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise HTTPException(HTTPStatus.FORBIDDEN, "a page of another site asks: only this server's own page may")
    wanted = request.query_params.get("fit", fit)
    if wanted not in list(Fit):
        raise HTTPException(HTTPStatus.BAD_REQUEST, unknown("fit", wanted, Fit))
    try:
        with inference.admitted():
            async with uploads(request) as pictures:
                answer = await inference.answer(pictures, Fit(wanted), request.query_params.get("seen", "0") != "0")
    except asyncio.CancelledError:  # by uvicorn, once it has waited long enough for the last answers
        raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "the server ends") from None
    is_unreadable = all(isinstance(one, Unreadable) for one in answer.predictions)
    return _json(answer, HTTPStatus.UNPROCESSABLE_ENTITY if is_unreadable else HTTPStatus.OK)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = short(f"{request.method} {request.scope['path']}")
    sentence = f"{asked}: {error.detail}; {THERE_IS}" if error.status_code in NOT_THERE else error.detail
    return _json({"error": sentence}, error.status_code, error.headers)


async def _drop(_: Request, __: Exception) -> Response:
    return Response(status_code=HTTPStatus.BAD_REQUEST)  # the client has disconnected


async def _put_off(_: Request, __: Exception) -> Response:
    sentence = "too many requests are waiting: try again later"
    return _json({"error": sentence}, HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": str(RETRY_AFTER_S)})


async def _fail(_: Request, __: Exception) -> Response:
    return _json({"error": "internal error; see the server's log"}, HTTPStatus.INTERNAL_SERVER_ERROR)


def _json(value: object, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value) + "\n", status, {"Cache-Control": "no-store", **(headers or {})}, "application/json")
