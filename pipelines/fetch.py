"""Fetches images from the web, many at once, and says why not: whom a list of URLs names is not to be trusted, and may say no.

Addresses are checked where a connection is made, so that neither a redirect nor a name that resolves otherwise the second time
leads into a private network.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import ipaddress
import socket
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

from pipelines.robots import opted_out
from pipelines.source_contract import Reject, Row, Sample, SourceConfig
from pipelines.source_files import utf8

T = TypeVar("T")

MAX_REDIRECTS = 5
BACKOFF_S = 0.5
"""Before the second attempt; twice as long before each further one."""
MAX_HELD_BYTES = 256 << 20
"""Nothing new is begun while images of so many bytes wait for their turn."""
WINDOW = 16
"""Rows looked ahead for each image that is being fetched, so that one slow site does not hold up the others."""
MAX_DETAIL = 300
"""Characters of what a site or an exception says that are kept."""
PRIVATE = "not a public address"


@dataclass(frozen=True)
class Request:
    """An image to fetch."""

    id: str
    url: str
    caption: str
    meta: Mapping[str, Any]
    hashes: Mapping[str, str]
    """What its bytes are known to have, by the algorithm's name (md5, sha256)."""


class Refusal(Exception):
    """Why there is no image: a word to count by, details, and whether another attempt may help."""

    def __init__(self, reason: str, detail: object, again: bool = False) -> None:
        words = " ".join(f"{detail or type(detail).__name__}".split())
        super().__init__(utf8(words[:MAX_DETAIL]))  # headers may be any bytes
        self.reason, self.again = reason, again


def fetch_all(items: Iterable[tuple[T, Row | Request]], source: SourceConfig) -> Iterator[tuple[T, Row]]:
    """The items in their order, requests having become samples or rejects."""
    ahead: deque[tuple[T, Row | Future[Row]]] = deque()
    with Fetcher(source) as fetcher:
        for tag, item in items:
            ahead.append((tag, fetcher.submit(item) if isinstance(item, Request) else item))
            while len(ahead) > WINDOW * source.fetch.concurrency or (ahead and _is_ready(ahead[0][1])):
                yield fetcher.take(*ahead.popleft())
        while ahead:
            yield fetcher.take(*ahead.popleft())


def _is_ready(item: Row | Future[Row]) -> bool:
    return not isinstance(item, Future) or item.done()


class Fetcher:
    """A client in an event loop of its own thread."""

    def __init__(self, source: SourceConfig) -> None:
        self.config, self.max_bytes = source.fetch, source.max_image_bytes
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(ThreadPoolExecutor(min(64, self.config.concurrency)))  # names are resolved in it
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.held_bytes = 0

    def __enter__(self) -> Fetcher:
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self.loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _open(self) -> None:
        self.slots, self.room = asyncio.Semaphore(self.config.concurrency), asyncio.Event()
        self.room.set()
        connector = aiohttp.TCPConnector(
            limit=0,  # the slots are the limit; waiting for a connection would count as a site's slowness
            resolver=aiohttp.ThreadedResolver(),
            ttl_dns_cache=300,
            socket_factory=None if self.config.allow_private_addresses else public_socket,
        )
        self.session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=self.config.timeout_s),
            headers={
                "User-Agent": f"Mozilla/5.0 (compatible; {self.config.user_agent})",
                "Accept": "image/*,*/*;q=0.1",
                "Accept-Encoding": "identity",
            },
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a few bytes could become gigabytes
        )

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.session.close()
        await self.loop.shutdown_default_executor()

    def submit(self, request: Request) -> Future[Row]:
        return asyncio.run_coroutine_threadsafe(self._in_turn(request), self.loop)

    def take(self, tag: T, item: Row | Future[Row]) -> tuple[T, Row]:
        """A result, whose bytes are no longer held."""
        if not isinstance(item, Future):
            return tag, item
        row = item.result()
        if isinstance(row, Sample):
            self.loop.call_soon_threadsafe(self._hold, -len(row.image))
        return tag, row

    def _hold(self, num_bytes: int) -> None:
        self.held_bytes += num_bytes
        (self.room.set if self.held_bytes < MAX_HELD_BYTES else self.room.clear)()

    async def _in_turn(self, request: Request) -> Row:
        async with self.slots:  # first come, first served: what the reader waits for is never behind what waits for the reader
            await self.room.wait()
            row = await self._fetch(request)
        if isinstance(row, Sample):
            self._hold(len(row.image))
        return row

    async def _fetch(self, request: Request) -> Row:
        attempt = 0
        while True:
            try:
                return checked(request, await self._get(request.url))
            except Refusal as refusal:
                if not refusal.again or attempt == self.config.retries:
                    return Reject(request.id, "fetch", refusal.reason, f"{request.url}: {refusal}")
            await asyncio.sleep(BACKOFF_S * 2**attempt)
            attempt += 1

    async def _get(self, url: str) -> bytes:
        if not url.strip().lower().startswith(("http://", "https://")):
            raise Refusal("bad-url", "neither http nor https")
        with refusals():
            async with self.session.get(url, max_redirects=MAX_REDIRECTS) as response:
                for answer in (*response.history, response):
                    said_no = opted_out(answer.headers.getall("X-Robots-Tag", []), self.config)
                    if said_no:
                        raise Refusal("opted-out", f"X-Robots-Tag: {said_no}")
                if response.status != 200:
                    again = response.status in (408, 425, 429) or response.status >= 500
                    raise Refusal(f"http-{response.status}", response.reason, again)
                if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                    raise Refusal("content-encoding", response.headers["Content-Encoding"])
                return await self._body(response)

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        announced = response.content_length
        if announced is not None and announced > self.max_bytes:
            raise Refusal("too-large", f"{announced} bytes, more than {self.max_bytes}")
        body = bytearray()
        async for chunk in response.content.iter_chunked(1 << 16):
            body += chunk
            if len(body) > self.max_bytes:
                raise Refusal("too-large", f"more than {self.max_bytes} bytes")
        if not body:
            raise Refusal("empty-response", "no bytes")
        return bytes(body)


def checked(request: Request, image: bytes) -> Sample:
    """Raises Refusal where the bytes are not those that were once seen at the URL."""
    for name, expected in request.hashes.items():
        found = hashlib.new(name, image, usedforsecurity=False).hexdigest()
        if found != expected.strip().lower():
            raise Refusal("hash-mismatch", f"{name} is {found}, not {expected}")
    meta = dict(request.meta) | {"url": request.url, "sha256": hashlib.sha256(image).hexdigest()}
    return Sample(request.id, image, request.caption, meta)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What can go wrong on the web, by name."""
    try:
        yield
    except Refusal:
        raise
    except TimeoutError as error:
        raise Refusal("timeout", "no complete answer in time", again=True) from error
    except aiohttp.TooManyRedirects as error:
        raise Refusal("too-many-redirects", f"more than {MAX_REDIRECTS}") from error
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, ValueError) as error:
        raise Refusal("bad-url", error) from error
    except aiohttp.ClientConnectorDNSError as error:
        raise Refusal("dns", error, again=error.os_error.errno == socket.EAI_AGAIN) from error
    except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as error:
        raise Refusal("tls", error) from error
    except (aiohttp.ClientError, OSError) as error:
        private = PRIVATE in str(error)
        raise Refusal("private-address" if private else "connection", error, again=not private) from error
    except Exception as error:  # one odd URL or answer among millions does not end the job
        raise Refusal("unexpected", f"{type(error).__name__}: {error}") from error


def public_socket(address_info: tuple) -> socket.socket:
    """A socket to connect to an address. Raises OSError where that is not a public one."""
    family, kind, protocol, _, address = address_info
    if not is_public(address[0]):
        raise OSError(errno.EACCES, f"{address[0]} is {PRIVATE}")
    return socket.socket(family, kind, protocol)


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet, also where an IPv4 address is written in an IPv6 one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast
