"""Middleware for every request and response: a limit on the body, and security headers for browsers."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dist_mnist.serving.uploads import MOST_BYTES

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """ASGI middleware that refuses bodies larger than `MOST_BYTES` while they arrive, and adds `HEADERS`."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        announced = int(Headers(scope=scope).get("content-length", 0))  # h11 accepts only numbers
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive() if announced <= MOST_BYTES else {}
            received += len(message.get("body", b""))
            if max(announced, received) > MOST_BYTES:
                raise HTTPException(413, f"the request body is larger than the limit of {MOST_BYTES:,} bytes")
            return message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive_within_limit, send_with_headers)
