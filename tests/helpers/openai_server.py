"""A loopback server that speaks the OpenAI chat API, and fails as told."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CUT, GARBAGE, HALF = "cut", "garbage", "half"  # no answer at all; one that is no JSON; a stream that breaks off


@dataclass
class OpenAIServer:
    """Answers chats by `reply`; use it as a context manager.

    Attributes:
        reply: what is answered to the messages of a request, in pieces where it is streamed.
        models: what it serves.
        key: what a request must carry; None takes any.
        faults: what goes wrong with the next requests for an answer, in order: a status, `CUT`, `GARBAGE`, `HALF`; None
            for nothing.
        refused: settings that it does not take, as OpenAI's reasoning models.
        retry_after: the seconds that it asks to wait for after a fault.
        requests: the bodies of all requests for an answer.
        keys: the keys of all requests.
        most: the largest number of requests at the same time.
    """

    reply: Callable[[list[dict]], list[str]]
    models: tuple[str, ...] = ("only",)
    key: str | None = None
    faults: list[int | str | None] = field(default_factory=list)
    refused: tuple[str, ...] = ()
    retry_after: int | None = None
    requests: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> OpenAIServer:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def enter(self) -> int | str | None:
        """Count a request, and say what goes wrong with it."""
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            return self.faults.pop(0) if self.faults else None

    def leave(self) -> None:
        with self._lock:
            self._now -= 1


def _handler(state: OpenAIServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        retry_after: int | None = None

        def log_message(self, *args) -> None:
            pass

        def send(self, body: bytes, status: int = 200, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if self.retry_after is not None:
                self.send_header("Retry-After", str(self.retry_after))
            self.end_headers()
            self.wfile.write(body)

        def accepted(self) -> bool:
            sent = self.headers.get("Authorization")
            state.keys.append(sent)
            if state.key is None or sent == f"Bearer {state.key}":
                return True
            self.send(json.dumps({"error": {"message": f"Incorrect API key provided: {sent}"}}).encode(), 401)
            return False

        def do_GET(self) -> None:
            if self.accepted():
                self.send(json.dumps({"data": [{"id": name} for name in state.models]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fault = state.enter()
            try:
                if self.accepted():
                    state.requests.append(body)
                    self.answer(body, fault)
            finally:
                state.leave()

        def answer(self, body: dict, fault: int | str | None) -> None:
            if body["model"] not in state.models:
                return self.send(b'{"error": {"message": "no such model"}}', 404)
            wrong = next((name for name in state.refused if name in body), None)
            if wrong is not None:
                said = f"Unsupported parameter: '{wrong}'" + ("; use 'max_completion_tokens'" if "max" in wrong else "")
                return self.send(json.dumps({"error": {"message": said}}).encode(), 400)
            if isinstance(fault, int):
                self.retry_after = state.retry_after
                return self.send(
                    f'{{"error": {{"message": "said {self.headers.get("Authorization")}"}}}}'.encode(), fault
                )
            if fault == CUT:
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            if fault == GARBAGE:
                return self.send(b"<html>bad gateway</html>", kind="text/html")
            pieces = state.reply(body["messages"])
            if not body.get("stream"):
                message = {"role": "assistant", "content": "".join(pieces)}
                return self.send(json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode())
            deltas = [{"role": "assistant"}, *({"content": piece} for piece in pieces)]
            events = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
            ends = [] if fault == HALF else [{"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": []}]
            lines = [f"data: {json.dumps(event)}\n\n" for event in events[: 2 if fault == HALF else None] + ends]
            return self.send(
                "".join([*lines, *([] if fault == HALF else ["data: [DONE]\n\n"])]).encode(), kind="text/event-stream"
            )

    return Handler
