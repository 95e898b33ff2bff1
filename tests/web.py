"""A web site on this machine, for tests of what is fetched."""

import contextlib
import http.server
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Answer:
    """What the site says at a path; a body of parts is sent in chunks, without its length."""

    body: bytes | list[bytes] = b""
    status: int = 200
    headers: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Site:
    port: int
    pages: dict[str, Answer | Callable[[], Answer]]
    asked: Counter[str] = field(default_factory=Counter)
    agents: set[str] = field(default_factory=set)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@contextlib.contextmanager
def site(pages: dict[str, Answer | Callable[[], Answer]], host: str = "127.0.0.1") -> Iterator[Site]:
    """Serve `pages`, 404 for others, until the block ends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            served.asked[self.path] += 1
            served.agents.add(self.headers["User-Agent"])
            page = pages.get(self.path, Answer(b"no such page", 404))
            answer = page if isinstance(page, Answer) else page()
            with contextlib.suppress(ConnectionError):
                self.send(answer)

        def send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers:
                self.send_header(name, value)
            if isinstance(answer.body, bytes):
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in [*answer.body, b""]:
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:
            """Clients that go away are no news."""

    server = Server((host, 0), Handler)
    served = Site(server.server_port, pages)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
