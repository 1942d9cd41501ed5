"""A fake Hugging Face hub on 127.0.0.1, for tests of downloads: listing, files, redirects, ranges, failures.

Usage: `with Hub() as hub: hub.repos["org/model"] = {"config.json": b"{}"}`, then HF_ENDPOINT=hub.url.
Large files are redirected to a CDN, as on the real hub: here the same server under another host name, localhost.
The protocol: https://huggingface.co/docs/hub/api and the source of huggingface_hub.
"""

import contextlib
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LARGE = 100_000  # bytes; files of at least this size count as stored in LFS


def listing(name: str, data: bytes) -> dict:
    """A file's entry in the listing of its repository."""
    entry = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if len(data) >= LARGE:
        entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
    return entry


class Hub:
    """A running hub: set `repos`, `gated`, `listings` and `faults`, read `requests`.

    `listings[repo]` is what is sent in place of the repository's listing. `faults[name]` says, request by request, what
    goes wrong with a file, or with the listing, whose name is "": `("cut", n)`, `("stall", n)`, `("pause", n)` or
    `("trickle", n)` after n bytes: a stall is cut at last, a pause ends, a trickle is a byte every tenth of a second;
    `("headers", {...})`, with status 302 or 429; `"down"` (status 503), or bytes to serve in place of the file's own.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.listings: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []  # path, headers by their names in lower case
        self.resume = threading.Event()  # ends a stall
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.resume.set()
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> list[str]:
        """The files requested so far, in order; a large one twice, since the redirect is a request too."""
        return [path.split(f"/resolve/{COMMIT}/")[1] for path, _ in self.requests if "/resolve/" in path]

    def headers(self, part: str) -> list[dict[str, str]]:
        """The headers of all requests whose path holds `part`."""
        return [headers for path, headers in self.requests if part in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client has gone
            super().handle()

    def answer(self, status: int, headers: dict | None = None, body: bytes = b"", send: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body[:send])

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((path, {key.lower(): value for key, value in self.headers.items()}))
        if match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            self.do_listing(*match.groups())
        elif match := re.fullmatch(r"/(cdn/)?(.+?)/resolve/(\w+)/(.+)", path):
            cdn, repo, _, name = match.groups()
            data = self.hub.repos[repo][name]
            if repo in self.hub.gated and not cdn and "Authorization" not in self.headers:
                self.answer(401, {"X-Error-Code": "GatedRepo"})
            elif len(data) >= LARGE and not cdn:
                linked = {"X-Linked-Size": len(data), "X-Linked-ETag": listing(name, data)["lfs"]["sha256"]}
                self.answer(302, {"Location": f"http://localhost:{self.hub.port}/cdn{path}", **linked})
            else:
                self.do_file(name, data)
        else:
            self.answer(404)

    def do_listing(self, repo: str, revision: str | None) -> None:
        if repo not in self.hub.repos:  # for an unknown repository the hub answers 401, not 404
            self.answer(401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", "v1", COMMIT):
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            files = [listing(name, data) for name, data in self.hub.repos[repo].items()]
            body = json.dumps({"id": repo, "sha": COMMIT, "siblings": files}).encode()
            self.do_file("", self.hub.listings.get(repo, body))

    def do_file(self, name: str, data: bytes) -> None:
        fault = self.hub.faults[name].pop(0) if self.hub.faults.get(name) else None
        if fault == "down":
            self.answer(503)
            return
        if isinstance(fault, tuple) and fault[0] == "headers":
            self.answer(302 if "Location" in fault[1] else 429, fault[1])
            return
        data = fault if isinstance(fault, bytes) else data
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        ranged = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        stop = fault[1] if isinstance(fault, tuple) else None
        self.answer(206 if start else 200, {"Accept-Ranges": "bytes", **ranged}, data[start:], send=stop)
        if stop is not None:
            if fault[0] in ("stall", "pause"):
                self.hub.resume.wait(20)
            if fault[0] == "pause":
                self.wfile.write(data[start + stop :])
                return
            while fault[0] == "trickle" and not self.hub.resume.wait(0.1):
                self.wfile.write(data[stop : stop + 1])
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
