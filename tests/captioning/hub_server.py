"""A server that answers as the Hugging Face hub does, for downloads in tests."""

import contextlib
import hashlib
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = "someone/some-tagger"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Answers as huggingface.co does for the files of repositories: small ones by a redirect within the hub, large ones
    (ONNX) by a redirect to a store elsewhere, with the content's hash and size in X-Linked-* headers."""

    daemon_threads = True

    def __init__(self, folder: Path, cut_short: bool, stall: bool, repositories: Sequence[str]):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder, self.cut_short, self.stall, self.repositories = folder, cut_short, stall, repositories
        self.requests: list[str] = []
        self.stalled, self.closing = threading.Event(), threading.Event()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.server.requests.append(f"{self.command} {self.path}")
        name, repository = self.path.rpartition("/")[2], self.path.partition("/resolve/main/")[0].strip("/")
        file = self.server.folder / name
        content = file.read_bytes() if file.is_file() else b""
        if repository in self.server.repositories and content:
            self.redirect(repository, name, content)
        elif repository in self.server.repositories:
            self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": COMMIT})
        elif self.path == f"/store/{name}" or self.path.startswith("/api/resolve-cache/models/"):
            self.deliver(name, content)
        else:
            self.answer(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def do_GET(self):
        self.do_HEAD()

    def redirect(self, repository: str, name: str, content: bytes):
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": len(content), "X-Linked-ETag": etag_of(name, content)}
        if name.endswith(".onnx"):
            store = f"http://localhost:{self.server.server_port}/store/{name}"
            self.answer(302, headers | {"Location": store})
        else:
            self.answer(307, headers | {"Location": f"/api/resolve-cache/models/{repository}/{COMMIT}/{name}"})

    def deliver(self, name: str, content: bytes):
        headers = {"ETag": etag_of(name, content), "X-Repo-Commit": COMMIT}
        if self.server.cut_short and name.endswith(".onnx"):
            content = content[: len(content) // 2]
        self.answer(200, headers, content)

    def answer(self, status: int, headers: dict, content: bytes = b""):
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD" or not content:
            return
        if self.server.stall and self.path.endswith(".onnx"):
            self.wfile.write(content[: len(content) // 2])
            self.server.stalled.set()
            self.server.closing.wait(timeout=60)
        self.wfile.write(content)

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):
            super().handle()


def etag_of(name: str, content: bytes) -> str:
    return f'"{(hashlib.sha256 if name.endswith(".onnx") else hashlib.sha1)(content).hexdigest()}"'


@contextlib.contextmanager
def hub(folder: Path, cut_short: bool = False, stall: bool = False, repositories: Sequence[str] = (NAME,)):
    """The files in `folder` are those of every repository."""
    server = Hub(folder, cut_short, stall, repositories)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
