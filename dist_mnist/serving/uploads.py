"""Pictures from a request's body: within limits, and spooled to disk if large."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from tempfile import SpooledTemporaryFile
from typing import BinaryIO, NamedTuple, cast

import python_multipart  # noqa: F401  # else starlette fails only on the first request, by an assert
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

MOST_BYTES = 16 << 20  # per request body
MOST_PICTURES = 64  # per request
MOST_FIELDS = 16  # form parts that are not files; the error names the first
FIELD_BYTES = 1 << 16  # per form part that is not a file
KEPT_IN_MEMORY = 1 << 20  # bytes of a picture; larger ones go to a temporary file, as in starlette's forms
RAW = "request body"  # name of a picture that was sent without one


class Upload(NamedTuple):
    """An uploaded picture: its name in the request, and its bytes."""

    name: str
    file: BinaryIO


@asynccontextmanager
async def uploads(request: Request) -> AsyncIterator[list[Upload]]:
    """Context manager: the pictures of a request, one as the body itself or several as files of a form.

    Raises:
        HTTPException: there is no picture, or too many; the body has another type, is malformed or too large.
        ClientDisconnect: the client disconnected.
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
        raise HTTPException(400, "the form is empty: expected pictures as files, as by curl -F picture=@seven.png")
    for name, part in parts:
        if isinstance(part, str):
            raise HTTPException(400, f"form part {name!r} is not a file: send files, as by curl -F picture=@seven.png")
    return [Upload(part.filename or name, part.file) for name, part in parts if isinstance(part, UploadFile)]
