"""A file server on loopback that can be told to misbehave."""

import contextlib
import http.server
import re
import threading
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    """Files, whole or in ranges; no listings."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server = self.server
        with server.lock:
            server.requests.append((self.path, self.headers.get("Range")))
            number = len(server.requests)
        path = server.root / self.path.lstrip("/")
        if server.forbid(self.path):
            return self.send_error(403)
        if server.fail(number):
            return self.send_error(503)
        if not path.is_file():
            return self.send_error(404)
        data = server.content(path)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        first, last = (int(asked[1]), min(int(asked[2]), len(data) - 1)) if asked else (0, len(data) - 1)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if body:
            part = data[first : last + 1]
            self.wfile.write(part[: len(part) // 2] if server.cut(number) else part)
        return None

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Clients that break off are part of the tests."""


@contextlib.contextmanager
def serving(root, fail=lambda n: False, cut=lambda n: False, content=Path.read_bytes, forbid=lambda path: False):
    """A server of a folder; yields it with `url`, and `requests` = [(path, range)].

    fail, cut: whether request n gets a 503, or half of its bytes.
    """
    server = Server(("127.0.0.1", 0), Handler)
    server.root, server.fail, server.cut, server.content, server.forbid = Path(root), fail, cut, content, forbid
    server.requests, server.lock = [], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
