"""A server on localhost that speaks as much of OpenAI's API as a test needs, and misbehaves as its script says."""

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests import zoo


class FakeServer:
    """`reply(path, body)` answers with a JSON, or a status and a JSON; `script` holds what the next POSTs meet instead.

    Steps of the script: a status; "slow" (no reply until the client has given up and asked again); "broken" (half a JSON); "cut" (the connection
    ends in the middle); a dictionary (that JSON); None (the reply itself).
    """

    def __init__(
        self, reply: Callable[[str, dict], Any], host: str = "127.0.0.1", certificate: Path | None = None
    ) -> None:
        """
        Args:
            certificate: a file with a certificate and its key, for https.
        """
        self.script: list[Any] = []
        self.reply = reply
        self.requests: list[dict] = []
        self.paths: list[str] = []
        self.headers: list[dict] = []
        self.models = ["tiny"]
        self.closed = False
        self.running = self.most_at_once = 0
        self.lock = threading.Lock()
        kind = _IPv6Server if ":" in host else ThreadingHTTPServer
        self.server = kind((host, 0), type("Handler", (_Handler,), {"fake": self}))
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        scheme, shown = "https" if certificate else "http", f"[{host}]" if ":" in host else host
        self.url = f"{scheme}://{shown}:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """End it; requests that wait end, too."""
        self.closed = True
        self.server.shutdown()
        self.server.server_close()


class _IPv6Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def do_GET(self) -> None:
        self.send(200, {"data": [{"id": name} for name in self.fake.models]})

    def do_POST(self) -> None:
        fake, body = self.fake, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with fake.lock:
            fake.requests.append(body)
            fake.paths.append(self.path)
            fake.headers.append(dict(self.headers))
            step = fake.script.pop(0) if fake.script else None
            fake.running += 1
            fake.most_at_once = max(fake.most_at_once, fake.running)
        try:
            self.play(step, body)
        finally:
            with fake.lock:
                fake.running -= 1

    def play(self, step: Any, body: dict) -> None:
        if step == "slow":
            asked = len(self.fake.requests)
            while len(self.fake.requests) == asked and not self.fake.closed:
                time.sleep(0.01)
        if step == "broken":
            self.send(200, b'{"choices": [{"message": {"con')
        elif step == "cut":
            self.send(200, b'{"choices": [', {"Content-Length": "1000"})
        elif isinstance(step, int):
            extra = {"Retry-After": "0.05"} if step == 429 else {}
            extra |= {"Location": f"{self.fake.url}/elsewhere"} if step in (302, 307) else {}
            self.send(step, {"error": {"message": "no"}}, extra)
        else:
            reply = step if isinstance(step, dict) else self.fake.reply(self.path, body)
            self.send(*(reply if isinstance(reply, tuple) else (200, reply)))

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has given up waiting

    def log_message(self, *args: object) -> None:
        pass


def completion(*texts: str, **fields: Any) -> dict:
    """A chat completion with these texts."""
    choices = [
        {"index": n, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        for n, text in enumerate(texts)
    ]
    return {"choices": choices} | fields


def seed_file(folder: Path) -> Path:
    """A file of SEED-Bench with one question of four choices, its picture beside it."""
    zoo.image(3).save(folder / "0", "PNG")
    question = {"question_id": "q", "question": "What is it?", "data_id": "0", "data_type": "image", "answer": "B"}
    choices = ["a red square", "no", "two blue circles", "a dog"]
    question |= {f"choice_{letter}": text for letter, text in zip("abcd", choices, strict=True)}
    file = folder / "seed.json"
    file.write_text(json.dumps({"questions": [question | {"question_type_id": 1}], "question_type": {"Scene": 1}}))
    return file
