"""A server on 127.0.0.1 that speaks as much of the Hugging Face hub's API as `datasets` asks for.

    with Hub("HuggingFaceTB/cosmopedia-100k", {"data/train-00000-of-00001.parquet": content}) as hub:
        ...  # in processes with the environment hub.environment(folder)
        hub.asked  # [(method, path without the repository, Range header or None)]

What it answers was found by logging what datasets 5.2 and huggingface_hub 2.4 ask.
"""
import hashlib
import http.server
import json
import threading
import urllib.parse


class Hub:
    """One data set, {path: bytes}, at one commit. Two habits for tests:

    bad = {end of a path: (status, body)}    is what these paths answer instead
    breaks_after = n                          a file's answer ends after n bytes, the connection with it
    """

    def __init__(self, repository, files):
        self.repository = repository
        self.files = dict(files)
        self.bad = {}
        self.breaks_after = None
        self.asked = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            def do_HEAD(self):
                hub.answer(self)

            def log_message(self, *args):
                pass

            def handle(self):
                try:
                    super().handle()
                except OSError:  # the client gave up
                    pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        serve = self.server.serve_forever
        threading.Thread(target=serve, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, folder):
        """For a process: it asks this server alone and keeps what it downloads in a folder."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(folder), "no_proxy": "127.0.0.1",
                "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"}

    @property
    def commit(self):
        digest = hashlib.sha1()
        for path, content in sorted(self.files.items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()

    def answer(self, request):
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        for part in (f"/api/datasets/{self.repository}", f"/datasets/{self.repository}"):
            path = path.removeprefix(part)
        self.asked.append((request.command, path, request.headers.get("Range")))
        for end, (status, body) in self.bad.items():
            if path.endswith(end):
                return self.send(request, status, body)
        for revision in ("main", self.commit):
            if path.startswith(f"/resolve/{revision}/"):
                return self.send_file(request, path.removeprefix(f"/resolve/{revision}/"))
            if path in ("", f"/revision/{revision}"):
                siblings = [{"rfilename": name} for name in sorted(self.files)]
                return self.send_json(request, {"id": self.repository, "sha": self.commit,
                                                "siblings": siblings, "tags": []})
            if f"{path}/".startswith(f"/tree/{revision}/"):
                folder = path.removeprefix(f"/tree/{revision}").strip("/")
                return self.send_json(request, self.entries(folder))
        self.send(request, 404, b"")

    def entries(self, folder):
        """What is in a folder, as the hub lists it."""
        above = f"{folder}/" if folder else ""
        folders, found = set(), []
        for path, content in sorted(self.files.items()):
            if not path.startswith(above):
                continue
            name, slash, _ = path.removeprefix(above).partition("/")
            if slash:
                folders.add(above + name)
            else:
                found.append({"type": "file", "path": path, "size": len(content),
                              "oid": hashlib.sha1(content).hexdigest()})
        for path in sorted(folders):
            found.append({"type": "directory", "path": path, "size": 0, "oid": "0" * 40})
        return found

    def send_file(self, request, path):
        if path not in self.files:
            return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        content = self.files[path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes",
                   "X-Repo-Commit": self.commit}
        status, wanted = 200, request.headers.get("Range")
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            first = int(first)
            last = min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first:last + 1]
        self.send(request, status, content, headers, self.breaks_after)

    def send_json(self, request, value):
        self.send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, request, status, body, headers={}, breaks_after=None):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "HEAD":
            return
        if breaks_after is not None:
            request.wfile.write(body[:breaks_after])
            request.close_connection = True
        else:
            request.wfile.write(body)
