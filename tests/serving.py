"""A real HTTP server on 127.0.0.1 that speaks as an OpenAI-compatible endpoint, or as badly as a test wants."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """What goes back: a status, headers and a body; or, with `hang`, nothing until the server is closed."""

    body: str | bytes = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False
    drip: bool = False


@dataclass
class Served:
    base_url: str
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)


def completion(text: str | None, reason: str = "stop", **more: object) -> Answer:
    """A chat completion as an OpenAI-compatible server sends it."""
    message = {"role": "assistant", "content": text, **more}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return Answer(json.dumps({"choices": [choice], "usage": {"completion_tokens": 7}}))


@contextlib.contextmanager
def serve(answer: Callable[[dict, int], Answer]) -> Iterator[Served]:
    """`answer(request, number)` says what each request gets; number counts them from 0."""
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            number = len(served.requests)
            served.requests.append({"path": self.path, **asked})
            served.headers.append(dict(self.headers))
            said = answer(asked, number)
            if said.hang:
                closing.wait()
                return
            self.send_response(said.status)
            for name, value in said.headers.items():
                self.send_header(name, value)
            self.end_headers()
            body = said.body if isinstance(said.body, bytes) else said.body.encode()
            with contextlib.suppress(OSError):  # the client may have gone
                while said.drip and not closing.wait(0.02):
                    self.wfile.write(b" ")
                self.wfile.write(body)

        do_GET = do_POST  # noqa: N815 - what a client makes of a redirected POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
