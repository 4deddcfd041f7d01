"""A small proxy in front of an S3 server, which can be made to fail.

Requests keep their headers, so signatures hold. Before a request is passed on, `rule` may answer it with an error, or
hold it up.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}
Rule = Callable[[str, str], int | None]  # method, path -> status of an error, or None: pass it on

ERROR = b"<Error><Code>InternalError</Code><Message>chaos</Message></Error>"


class Proxy:
    def __init__(self, target_port: int, rule: Rule) -> None:
        self.target_port, self.rule = target_port, rule
        proxy = self

        class Bound(Handler):
            def rule(self, method: str, path: str) -> int | None:
                return proxy.rule(method, path)

        Bound.target_port = target_port
        self.server = Server(("127.0.0.1", 0), Bound)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    target_port = 0

    def rule(self, method: str, path: str) -> int | None:
        raise NotImplementedError

    def handle_any(self) -> None:
        body = self.body()
        status = self.rule(self.command, self.path)
        if status is not None:
            self.answer(status, {"Content-Type": "application/xml"}, ERROR, len(ERROR))
            return
        target = http.client.HTTPConnection("127.0.0.1", self.target_port, timeout=60)
        try:
            headers = {key: value for key, value in self.headers.items() if key.lower() not in ("expect", *HOP)}
            target.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for key, value in headers.items():
                target.putheader(key, value)
            if body or self.command in ("PUT", "POST"):
                target.putheader("Content-Length", str(len(body)))
            target.endheaders(body or None)
            answer = target.getresponse()
            content = answer.read()
            size = int(answer.getheader("Content-Length") or len(content))
            self.answer(answer.status, dict(answer.getheaders()), content, size)
        except (OSError, http.client.HTTPException):
            self.close_connection = True
        finally:
            target.close()

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def answer(self, status: int, headers: dict[str, str], content: bytes, size: int) -> None:
        self.send_response_only(status)
        for key, value in headers.items():
            if key.lower() not in HOP:
                self.send_header(key, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815 - names that http.server calls

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass


def one_in(number: int, seed: int) -> Rule:
    """Refuse one request in `number`, from a seeded schedule."""
    rng, lock = random.Random(seed), threading.Lock()

    def rule(_method: str, _path: str) -> int | None:
        with lock:
            return 500 if rng.randrange(number) == 0 else None

    return rule


class HoldUpload:
    """Holds back the PUT of a file of a state after some others; says when one is held."""

    def __init__(self, name: str, after: int) -> None:
        self.name, self.left = name, after
        self.held, self.go = threading.Event(), threading.Event()

    def __call__(self, method: str, path: str) -> int | None:
        if method in ("PUT", "POST") and "/checkpoints/" in path and self.name in path and not self.go.is_set():
            self.left -= 1
            if self.left < 0:
                self.held.set()
                self.go.wait(60)
                time.sleep(0.1)
        return None
