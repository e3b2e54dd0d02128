"""uvicorn's HTTP protocol plus what it lacks: time limits on clients, and responses to incomplete requests."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dist_mnist.serving.guard import HEADERS
from dist_mnist.utils.files import to_json

PATIENCE_S = 20.0  # for a request to arrive, first byte to last, and for a client to receive what is sent
GOODBYE_S = 2.0  # for a client whose request was refused to stop sending


class PatientProtocol(H11Protocol):
    """A connection that times out after `PATIENCE_S`; between two requests uvicorn waits for 5 s."""

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the first request."""
        super().connection_made(transport)
        self._wait_for("request", self._give_up)

    def data_received(self, data: bytes) -> None:
        """Process data, or drop them after a refusal: unread data would reset the connection and lose the response."""
        if not self._is_refused:
            super().data_received(data)

    def handle_events(self) -> None:
        """Start the timer for an incomplete request, or stop it."""
        super().handle_events()
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._wait_for("request", self._give_up)
        else:
            self._end_wait("request")

    def eof_received(self) -> bool:  # type: ignore[override]
        """Refuse an incomplete request; return True to keep the transport open while a response is pending."""
        if self.conn.their_state is h11.SEND_BODY and not self._is_refused:
            self._refuse(HTTPStatus.BAD_REQUEST, "the request ended before it was complete")
        elif self.cycle and not self.cycle.response_complete and not self._is_refused:
            self.cycle.keep_alive = False
            return True
        return False

    def pause_writing(self) -> None:
        """Start the timer for a client that does not receive."""
        super().pause_writing()
        self._wait_for("client", self.transport.abort)

    def resume_writing(self) -> None:
        """Stop that timer."""
        self._end_wait("client")
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        for what in list(self._timers):
            self._end_wait(what)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, or has more than 64 KiB of headers."""
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _wait_for(self, what: str, otherwise: Callable[[], object], seconds: float | None = None) -> None:
        if what not in self._timers:
            self._timers[what] = self.loop.call_later(seconds or PATIENCE_S, otherwise)

    def _end_wait(self, what: str) -> None:
        if timer := self._timers.pop(what, None):
            timer.cancel()

    def _give_up(self) -> None:
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the request did not arrive within {PATIENCE_S:g} s")
        else:
            self.transport.close()  # no request, such as on a browser's spare connection

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        """Send an error, unless a response has begun, and close the connection: at once, or after the client does."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or self.transport.is_closing():
            self.transport.close()
            return
        self._is_refused = True
        body = to_json({"error": sentence}).encode()
        headers = [*HEADERS.items(), ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        response = h11.Response(status_code=status, headers=[*headers, ("Connection", "close")], reason=status.phrase)
        for event in (response, h11.Data(body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self._wait_for("goodbye", self.transport.close, GOODBYE_S)
