"""Request handler with fault injection."""

import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .server import HubServer


@dataclass
class Fault:
    """Fault of the next `times` requests whose `METHOD /path` matches `pattern`; `kind` is one of:

    status: respond with status `value`. after: handle the request, then respond with status `value`. drop: no response.
    redirect: redirect to itself. cut: close the connection after `value` bytes. short: a complete response of `value`
    bytes. wrong: flip a bit of byte `value`.
    """

    pattern: str
    kind: str
    value: int = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):  # noqa: N818
    """Error response."""

    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    """Base of both servers' handlers; applies faults."""

    hub: "HubServer"
    server_name: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one(self) -> None:
        if self.hub.is_stopped:
            self.close_connection = True
            return
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append((self.server_name, self.command, self.path, token))
        body = self.read_body()
        self.fault = self.hub.take_fault(f"{self.command} {self.path}")
        kind, value = (self.fault.kind, self.fault.value) if self.fault else ("", 0)
        if kind == "drop":
            self.close_connection = True
        elif kind == "status":
            self.answer(value, {"error": f"fault {value}"}, self.fault.headers if self.fault else {})
        elif kind == "redirect":
            self.answer(302, b"", {"Location": self.path})
        else:
            answer: tuple[Any, ...]
            try:
                with self.hub.lock:
                    answer = self.route(token, body)
            except Refused as refused:
                headers = {"X-Error-Message": refused.message} | (
                    {"X-Error-Code": refused.code} if refused.code else {}
                )
                answer = (refused.status, {"error": refused.message}, headers)
            if kind == "after":
                answer = (value, {"error": f"fault {value}"})
            self.answer(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one  # noqa: N815

    def route(self, token: str | None, body: bytes) -> tuple[Any, ...]:
        raise NotImplementedError

    def read_body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind, value = (self.fault.kind, self.fault.value) if self.fault else ("", 0)
        is_body = self.command == "GET" and status in (200, 206) and bool(data)
        if is_body and kind == "wrong":
            data = data[:value] + bytes([data[value] ^ 1]) + data[value + 1 :] if value < len(data) else data[::-1]
        if is_body and kind == "short":
            data = data[:value]
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        for key, text in given.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:value] if is_body and kind == "cut" else data)
        self.close_connection = self.close_connection or (is_body and kind == "cut")

    def part(self, data: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Return the response for a file, with support for open-ended Range headers."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")
        start = int(match[1]) if match else 0
        if not match:
            return 200, data, {"Accept-Ranges": "bytes"}
        return 206, data[start:], {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
