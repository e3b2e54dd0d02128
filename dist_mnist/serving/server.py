"""The server process: socket, limits on connections, and graceful shutdown."""

import errno
import ipaddress
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from dist_mnist.distributed.world import World
from dist_mnist.evaluation.choices import Fit
from dist_mnist.evaluation.predict import load_ensemble
from dist_mnist.serving.app import make_app
from dist_mnist.serving.inference import Inference
from dist_mnist.serving.protocol import PatientProtocol
from dist_mnist.utils.errors import UserError, warn

MOST_CONNECTIONS = 256
LAST_ANSWERS_S = 5  # for requests in progress when the server is told to end
LOOPBACK = ["localhost", "127.0.0.1", "[::1]"]
ENDING = (signal.SIGINT, signal.SIGTERM)


def serve(
    checkpoints: Sequence[Path],
    host: str,
    port: int,
    fit: Fit,
    world: World,
    views: int | None = None,
    code: Sequence[str] = (),
) -> None:
    """Serve predictions of an ensemble, which averages probabilities, until a signal comes. Prints the URL.

    Args:
        port: port to listen on; 0 for any free port.
        fit: see `as_network_sees`.
        views, code: see `load_models`.

    Raises:
        UserError: the checkpoints cannot be read, do not fit together, or have images of other than 1 or 3 channels; or
            the server cannot listen on the address.
    """
    with listen(host, port) as listener:
        address = ipaddress.ip_address(listener.getsockname()[0])
        ensemble = load_ensemble(checkpoints, world, views, code)
        if (channels := ensemble.facts.image_shape[0]) not in (1, 3):
            raise UserError(f"pictures have 1 or 3 channels; the images of {checkpoints[0]} have {channels}")
        with closing(Inference(ensemble, world.device)) as inference:
            inference.warm_up()
            app = make_app(inference, fit, [*LOOPBACK, host] if address.is_loopback else ["*"])
            if not address.is_loopback:
                warn(f"anyone who can reach {host} can use this server: it asks for no password")
            print(url(listener), flush=True)
            _Server(_config(app)).run([listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket at the first address of a host.

    Raises:
        UserError: this machine does not have the address, or the port is in use or reserved.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use: give another --port, or 0 for any free port") from None
        why = error.strerror if isinstance(error, OSError) else "not a valid host name"
        raise UserError(f"cannot listen on {host}:{port} ({why}): give another --host or --port") from None


def url(listener: socket.socket) -> str:
    """Return the URL of a listening socket for a browser on this machine."""
    text, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(text)
    if address.is_unspecified:
        text = "::1" if address.version == 6 else "localhost"
    host = f"[{text}]" if address.version == 6 else text
    return f"http://{host}:{port}/"


def _config(app: ASGIApp) -> uvicorn.Config:
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # clients get its warnings as responses
    return uvicorn.Config(
        app, http=PatientProtocol, ws="none", loop="asyncio", interface="asgi3", lifespan="off", proxy_headers=False,
        server_header=False, access_log=False, log_config=None, log_level="error",
        limit_concurrency=MOST_CONNECTIONS, timeout_graceful_shutdown=LAST_ANSWERS_S,
    )  # fmt: skip


class _Server(uvicorn.Server):
    """uvicorn's server, with a graceful shutdown and exit code 0 on SIGINT and SIGTERM."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Context manager: handle signals, except those that this process was started to ignore."""
        numbers = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
