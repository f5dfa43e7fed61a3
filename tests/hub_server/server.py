"""Two HTTP servers on two ports: the API, and the storage for LFS files."""

import re
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .api import Api, Storage
from .faulty import Fault
from .repos import Repos

USERS = {
    "hf_alice": ["alice", "acme"],
    "hf_bob": ["bob", "acme"],
    "hf_carol": ["carol"],
}  # namespaces with write access, by token


class HubServer:
    """Hub server; `requests` records (server, method, path, token)."""

    def __init__(self, folder: Path, *, multipart_size: int = 5 << 20, page_size: int = 50):
        self.repos = Repos(folder)
        self.multipart_size, self.page_size = multipart_size, page_size
        self.users = {token: list(names) for token, names in USERS.items()}
        self.requests: list[tuple[str, str, str, str | None]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.is_stopped = False
        self.url = self.storage_url = ""
        self._servers: list[ThreadingHTTPServer] = []

    def __enter__(self) -> "HubServer":
        for handler in (Api, Storage):
            bound: Any = type("Bound", (handler,), {"hub": self})
            server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            self._servers.append(server)
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop both servers; open connections get no response."""
        self.is_stopped = True
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers.clear()

    def fault(self, pattern: str, kind: str, value: int = 0, *, times: int = 1, **headers: str) -> None:
        """Inject a fault into the next matching requests; see `Fault`."""
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        self.faults.append(Fault(pattern, kind, value, times, named))

    def take_fault(self, request: str) -> Fault | None:
        """Return the fault of this request, and count it down."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None
