"""How large a request's body may be, however it says that it is or comes in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serve.schemas import ApiError

MAX_BODY_BYTES = 64_000_000
Message = MutableMapping[str, Any]


class BodyLimit:
    """ASGI middleware: reading more than MAX_BODY_BYTES raises ApiError, which becomes 413."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Any) -> None:
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY_BYTES:
                raise ApiError(413, "payload_too_large", f"the request has more than {MAX_BODY_BYTES // 1_000_000} MB")
            return message

        await self.app(scope, limited, send)
