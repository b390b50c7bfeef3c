"""A scripted OpenAI-compatible server on loopback, for tests.

    with serve(lambda messages, attempt: "a reply") as server:
        ... server.base_url ...

The script is called in the thread of each request, with its messages and the number of earlier requests of the same
body. It returns the text of a reply, or a `Reply`. The server stops at the end of the `with` block.
"""

import collections
import contextlib
import dataclasses
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROMPT_TOKENS, COMPLETION_TOKENS = 7, 3
"""What every reply claims to have taken."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer of the server.

    Attributes:
      text: of the completion, or the message of an error.
      status: 200 gives a chat completion, other numbers an error.
      headers: further ones.
      body: sent as it is instead of a completion or an error.
      kind: "answer"; "drop" closes the connection without an answer; "half" closes it inside of one; "hang" answers
        when the server stops.
      finish_reason: of the completion.
    """

    text: str = ""
    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: str | None = None
    kind: str = "answer"
    finish_reason: str = "stop"


class Server:
    """What the server saw.

    Attributes:
      base_url: its address.
      bodies: of all requests, in the order of arrival.
      headers: of all requests, with names in lower case.
      most_in_flight: requests that were being answered at the same time.
    """

    def __init__(self):
        self.base_url = ""
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.most_in_flight = 0
        self._in_flight = 0
        self._attempts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def asked(self) -> collections.Counter[str]:
        """How often each last message came."""
        return collections.Counter(body["messages"][-1]["content"] for body in self.bodies)


@contextlib.contextmanager
def serve(script: Callable[[list[dict], int], str | Reply]) -> Iterator[Server]:
    """A running server."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server._lock:
                key = json.dumps(body, sort_keys=True)
                attempt, server._attempts[key] = server._attempts[key], server._attempts[key] + 1
                server.bodies.append(body)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                server._in_flight += 1
                server.most_in_flight = max(server.most_in_flight, server._in_flight)
            try:
                reply = script(body["messages"], attempt)
                reply = Reply(reply) if isinstance(reply, str) else reply
                if reply.kind == "hang":
                    server._stop.wait()
            finally:  # before the answer, after which the client may send the next request
                with server._lock:
                    server._in_flight -= 1
            with contextlib.suppress(OSError):  # the client may have gone
                self._answer(reply, body.get("model"))

        def _answer(self, reply: Reply, model):
            if reply.kind == "drop":
                # Closed by a reset, as by a server that dies.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                return
            data = (_content(reply, model) if reply.body is None else reply.body).encode()
            self.send_response(reply.status)
            for name, value in ({"Content-Type": "application/json"} | dict(reply.headers)).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if reply.kind == "half":
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self.close_connection = True
                return
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    class Listener(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 128

        def handle_error(self, *_):
            pass  # a client that gives up

    with Listener(("127.0.0.1", 0), Handler) as listener:
        server.base_url = f"http://127.0.0.1:{listener.server_port}/v1"
        thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server._stop.set()
            listener.shutdown()
            thread.join()


def clean_environment(monkeypatch) -> None:
    """Neither a proxy nor a key of the user's."""
    for name in list(os.environ):
        if name.startswith("OPENAI_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def _content(reply: Reply, model) -> str:
    if reply.status != 200:
        return json.dumps({"error": {"message": reply.text, "type": "error", "code": None}})
    message = {"role": "assistant", "content": reply.text}
    return json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": model,
            "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason, "logprobs": None}],
            "usage": {
                "prompt_tokens": PROMPT_TOKENS,
                "completion_tokens": COMPLETION_TOKENS,
                "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
            },
        }
    )
