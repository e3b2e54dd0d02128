"""The server as a process: its socket, its patience with slow clients, and its end."""

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
LAST_ANSWERS_S = 5  # for requests that are being served when the server is to end
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
    """Serve predictions by networks that are averaged in their probabilities until a signal comes; prints the URL.

    Args:
        port: to listen on; 0 for any that is free.
        fit: see `as_network_sees`.
        views: as in `load_models`, as is `code`.

    Raises:
        UserError: checkpoints cannot be read, do not go together or are of images that no picture can be; or the
            address cannot be listened on.
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
                warn(f"everybody who can reach {host} can use this server: it asks for no password")
            print(url(listener), flush=True)
            _Server(_config(app)).run([listener])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket at the first address of a host.

    Raises:
        UserError: there is no such address on this machine, or its port is taken or reserved.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is taken: give another --port, or 0 for any that is free") from None
        why = error.strerror if isinstance(error, OSError) else "no host can have this name"
        raise UserError(f"{host}:{port} cannot be listened on ({why}): give another --host or --port") from None


def url(listener: socket.socket) -> str:
    """Where a browser on this machine finds what listens."""
    text, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(text)
    if address.is_unspecified:
        text = "::1" if address.version == 6 else "localhost"
    host = f"[{text}]" if address.version == 6 else text
    return f"http://{host}:{port}/"


def _config(app: ASGIApp) -> uvicorn.Config:
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # whose warnings are answers to clients
    return uvicorn.Config(
        app, http=PatientProtocol, ws="none", loop="asyncio", interface="asgi3", lifespan="off", proxy_headers=False,
        server_header=False, access_log=False, log_config=None, log_level="error",
        limit_concurrency=MOST_CONNECTIONS, timeout_graceful_shutdown=LAST_ANSWERS_S,
    )  # fmt: skip


class _Server(uvicorn.Server):
    """uvicorn's, which ends in order and with exit code 0 when it is asked to."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Listen to signals for a `with` block, but to none that this process was started to ignore."""
        numbers = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
