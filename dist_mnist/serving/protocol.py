"""HTTP as uvicorn speaks it, with what it lacks: time limits on clients, and answers to requests that are cut short."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dist_mnist.serving.guard import HEADERS
from dist_mnist.utils.files import to_json

PATIENCE_S = 20.0  # for a request to come, first byte to last, and for a client to take what is sent
GOODBYE_S = 2.0  # for a client whose request is refused to stop sending it


class PatientProtocol(H11Protocol):
    """A connection on which nothing takes longer than `PATIENCE_S`; between two requests uvicorn waits for 5 s."""

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._wait_for("request", self._give_up)

    def data_received(self, data: bytes) -> None:
        """Take what comes, or drop it once the request is refused: unread, it would make the answer be lost."""
        if not self._is_refused:
            super().data_received(data)

    def handle_events(self) -> None:
        """Wait for the rest of a request, if there is one."""
        super().handle_events()
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._wait_for("request", self._give_up)
        else:
            self._end_wait("request")

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer a request that ends before it is whole; say whether an answer is still to be sent to one that is."""
        if self.conn.their_state is h11.SEND_BODY and not self._is_refused:
            self._refuse(HTTPStatus.BAD_REQUEST, "the request ended before it was whole")
        elif self.cycle and not self.cycle.response_complete and not self._is_refused:
            self.cycle.keep_alive = False
            return True
        return False

    def pause_writing(self) -> None:
        """Wait for the client to take what is sent."""
        super().pause_writing()
        self._wait_for("client", self.transport.abort)

    def resume_writing(self) -> None:
        """The client has taken most of it."""
        self._end_wait("client")
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        for what in list(self._timers):
            self._end_wait(what)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or has headers of more than 64 KiB."""
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _wait_for(self, what: str, otherwise: Callable[[], object], seconds: float | None = None) -> None:
        if what not in self._timers:
            self._timers[what] = self.loop.call_later(seconds or PATIENCE_S, otherwise)

    def _end_wait(self, what: str) -> None:
        if timer := self._timers.pop(what, None):
            timer.cancel()

    def _give_up(self) -> None:
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the request did not come within {PATIENCE_S:g} s")
        else:
            self.transport.close()  # such as a browser's spare connection

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        """Answer, unless an answer has begun, and close the connection: at once, or when the client has closed it."""
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
