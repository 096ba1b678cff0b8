"""The live page of tools/report.py: served to this machine alone, made anew when it is asked for.

A page of somebody else's, open in the same browser, can send requests here too, by a name of its
own that leads to 127.0.0.1. What it asks for is named in the Host header; others than ours are
refused.
"""
import contextlib
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from base.errors import BadInput, printable
from tools.report_page import numbers_of, page, words_of

HERE = "127.0.0.1"
LASTS = 3  # seconds for which what was read is good enough


class Source:
    """The sections, read anew when they are older than LASTS, by one thread at a time."""

    def __init__(self, sections):
        self.read = sections
        self.lock = Lock()
        self.sections = sections()
        self.time = time.monotonic()

    def newest(self):
        with self.lock:
            if time.monotonic() - self.time > LASTS:
                self.sections = self.read()
                self.time = time.monotonic()
            return self.sections


def handler(source, made):
    """The class of a server's requests."""
    class Request(BaseHTTPRequestHandler):
        def do_GET(self):
            port = self.server.server_address[1]
            if self.headers.get("Host") not in (f"{HERE}:{port}", f"localhost:{port}"):
                self.answer(403, "text/plain", b"this page is for this machine alone\n")
            elif self.path == "/":
                self.answer(*front(source, made))
            elif self.path == "/numbers.json":
                self.answer(200, "application/json", json.dumps(news(source)).encode())
            else:
                self.answer(404, "text/plain", b"there is / alone\n")

        def answer(self, status, kind, content):
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            with contextlib.suppress(ConnectionError):  # a reader that has gone
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_):
            pass  # a line for every look would bury what matters

    return Request


def front(source, made):
    """(status, kind, content) of the page itself."""
    try:
        return 200, "text/html", page(source.newest(), made, live=True).encode()
    except BadInput as error:
        return 500, "text/plain", f"{printable(str(error))}; then load this page again\n".encode()


def news(source):
    """What a page that is open replaces, or what is wrong in the files right now."""
    try:
        sections = source.newest()
    except BadInput as error:
        return {"error": str(error)}
    return {"numbers": numbers_of(sections, live=True), "words": words_of(sections)}


def server_of(sections, made, port):
    """A server of the page, to be run. BadInput if the port is taken, or there is nothing to show
    yet."""
    source = Source(sections)
    try:
        return ThreadingHTTPServer((HERE, port), handler(source, made))
    except OSError as error:
        raise BadInput(f"--port={port}: {error.strerror}; choose another, or 0 for any") from error


def serve(sections, made, port):
    """Serves until Ctrl-C, see server_of."""
    with server_of(sections, made, port) as server:
        print(f"http://{HERE}:{server.server_address[1]}/ follows the runs; Ctrl-C ends it",
              flush=True)
        server.serve_forever()
