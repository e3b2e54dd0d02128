"""Pictures from a request's body: within limits, and on the disk where they are large."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from tempfile import SpooledTemporaryFile
from typing import BinaryIO, NamedTuple, cast

import python_multipart  # noqa: F401  # starlette imports it late, and then asserts that it is there
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

MOST_BYTES = 16 << 20  # of a request's body
MOST_PICTURES = 64  # of a request
MOST_FIELDS = 16  # parts of a form that hold no file, of which the first is named
FIELD_BYTES = 1 << 16  # of such a part
KEPT_IN_MEMORY = 1 << 20  # bytes of a picture; larger ones go to a temporary file, as starlette's forms do
RAW = "request body"  # what a picture is called that comes without a name


class Upload(NamedTuple):
    """A picture as it was sent: its name there, and its bytes."""

    name: str
    file: BinaryIO


@asynccontextmanager
async def uploads(request: Request) -> AsyncIterator[list[Upload]]:
    """The pictures of a request, for a `with` block: one as the body itself, or several as files of a form.

    Raises:
        HTTPException: there is none, or there are too many; the body is of another type, malformed or too large.
        ClientDisconnect: the client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=MOST_PICTURES, max_fields=MOST_FIELDS, max_part_size=FIELD_BYTES) as form:
            yield _files(form.multi_items())
    elif kind.startswith("image/") or kind == "application/octet-stream":
        with SpooledTemporaryFile(KEPT_IN_MEMORY) as spooled:
            file = UploadFile(cast(BinaryIO, spooled))
            async for chunk in request.stream():
                await file.write(chunk)
            await file.seek(0)
            yield [Upload(RAW, file.file)]
    else:
        raise HTTPException(415, f"expected pictures as files of multipart/form-data or one as image/*; got {kind!r}")


def _files(parts: list[tuple[str, UploadFile | str]]) -> list[Upload]:
    if not parts:
        raise HTTPException(400, "the form is empty: send pictures as its files, such as curl -F picture=@seven.png")
    for name, part in parts:
        if isinstance(part, str):
            raise HTTPException(400, f"part {name!r} of the form is no file, such as curl -F picture=@seven.png sends")
    return [Upload(part.filename or name, part.file) for name, part in parts if isinstance(part, UploadFile)]
