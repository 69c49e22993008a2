"""A server for tests: files of a folder over HTTP with byte ranges, and over as much of S3's protocol as reading needs.

It can be told to fail (`fail`). What it was asked for is in `requests`.
"""

import contextlib
import re
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

LISTING = (
    '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    "<Name>{bucket}</Name><Prefix>{prefix}</Prefix><KeyCount>{count}</KeyCount><MaxKeys>1000</MaxKeys>"
    "<Delimiter>/</Delimiter><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
)
ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
CODES = {403: "AccessDenied", 404: "NoSuchKey", 416: "InvalidRange", 500: "InternalError", 503: "ServiceUnavailable"}


class Server:
    """A context manager. root: the folder that it serves; for S3, each folder in it is a bucket."""

    def __init__(self, root: Path):
        self.root, self.requests = root, []
        self._faults, self._lock, self._released = [], threading.Lock(), threading.Event()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"server_of": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._released.set()
        self._http.shutdown()
        self._http.server_close()

    def fail(self, kind: int | str, times: int = 10**9, where: str = "", after: int = 0, method: str = ""):
        """The next `times` requests for paths that match `where` fail, once `after` have been answered.

        kind: a status; "hang": no answer; "cut": half of what was asked for; "reset": the connection ends; "whole": the
        range is ignored. method: GET or HEAD, if only these fail.
        """
        with self._lock:
            self._faults.append([kind, times, where, after, method])

    def heal(self):
        self._faults.clear()

    def fault(self, method, path):
        with self._lock:
            self.requests.append((method, path))
            for fault in self._faults:
                kind, times, where, after, only = fault
                if re.search(where, path) and method.startswith(only) and times:
                    if after:
                        fault[3] -= 1
                    else:
                        fault[1] -= 1
                        return kind
        return None


class _Handler(BaseHTTPRequestHandler):
    server_of: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms for each answer

    def log_message(self, *_):
        pass

    def do_HEAD(self):  # noqa: N802 - as http.server calls it
        self.answer(body=False)

    def do_GET(self):  # noqa: N802
        self.answer(body=True)

    def answer(self, body):
        url = urlsplit(self.path)
        kind = self.server_of.fault("GET" if body else "HEAD", unquote(url.path))
        if kind == "hang":
            self.server_of._released.wait(60)
            self.close_connection = True
            return
        if kind == "reset":
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)
            return
        if isinstance(kind, int):
            self.send(kind, ERROR.format(code=CODES.get(kind, "Error")).encode(), body)
            return
        path, query = self.server_of.root / unquote(url.path).strip("/"), parse_qs(url.query, keep_blank_values=True)
        if "list-type" in query:
            self.send(200, self.s3_listing(path, query.get("prefix", [""])[0]), body, kind="application/xml")
        elif path.is_dir():
            names = sorted(f"{each.name}/" if each.is_dir() else each.name for each in path.iterdir())
            links = "".join(f'<a href="{quote(name)}">{name}</a>\n' for name in names)
            self.send(200, links.encode(), body, kind="text/html")
        elif path.is_file():
            self.send_file(path, body, kind)
        else:
            self.send(404, ERROR.format(code="NoSuchKey").encode(), body)

    def send_file(self, path, body, fault):
        status, size = path.stat(), path.stat().st_size
        headers = {"ETag": f'"{size}-{status.st_mtime_ns}"', "Last-Modified": formatdate(status.st_mtime, usegmt=True)}
        start, stop, code = 0, size, 200
        if (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and fault != "whole":
            start, stop, code = int(wanted[1]), min(size, int(wanted[2] or size) + 1), 206
            if start >= size:
                self.send(416, ERROR.format(code="InvalidRange").encode(), body)
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        self.send(code, content, body, cut=fault == "cut", **headers)

    def send(self, code, content, body, kind="application/octet-stream", cut=False, **headers):
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            with contextlib.suppress(OSError):
                self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def s3_listing(self, bucket, prefix):
        folder, start = bucket / prefix.rpartition("/")[0], prefix.rpartition("/")[2]
        entries = []
        for each in sorted(folder.iterdir()) if folder.is_dir() else ():
            key = escape(str(each.relative_to(bucket)))
            if not each.name.startswith(start):
                continue
            if each.is_dir():
                entries.append(f"<CommonPrefixes><Prefix>{key}/</Prefix></CommonPrefixes>")
            else:
                size = each.stat().st_size
                entries.append(
                    f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                    f"<ETag>&quot;{size}&quot;</ETag><Size>{size}</Size></Contents>"
                )
        values = {"bucket": bucket.name, "prefix": escape(prefix), "count": len(entries), "entries": "".join(entries)}
        return LISTING.format(**values).encode()
