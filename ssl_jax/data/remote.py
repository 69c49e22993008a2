"""Files by address, on this machine or on a server that fsspec reaches: what is there, and the bytes of a range.

A server may be slow, may answer with errors for a while, or may cut a reply short: such a read is tried again
(config.data.retries). What remains becomes a UserError of one line with the address. All functions may be called from
several threads: fsspec runs the requests of all of them in one thread of its own.
"""

import fnmatch
import io
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from ssl_jax.config import Data
from ssl_jax.errors import UserError, first_line

log = logging.getLogger("ssl_jax")
T = TypeVar("T")
FIRST_WAIT = 0.25  # s before the first retry; each wait is twice as long as the one before
NOTED_WAIT = 1.0  # s; a retry after a longer wait is told
LATER = (408, 425, 429)  # statuses of HTTP that mean "try again later", beside those from 500 on
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
NO_FILE, NO_PERMISSION = "no such file", "no permission to read it"
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws/credentials; for a public bucket FSSPEC_S3_ANON=1",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS or run `gcloud auth application-default login`; for a public bucket "
    "FSSPEC_GS_TOKEN=anon",
    "hf": "set HF_TOKEN or run `hf auth login`",
}
MARKS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "updated", "Last-Modified", "created")


class MissingError(UserError):
    """There is no such file, or none that may be read: some servers do not tell the difference."""


class Stamp(NamedTuple):
    """What changes when a file does."""

    size: int  # bytes
    mark: str  # its tag or its time of last change; "" if the server tells neither


def is_url(path: str) -> bool:
    """Whether a path is the address of a file system of fsspec, such as s3://bucket/folder."""
    return "://" in path


def shown(path: str) -> str:
    """An address without passwords and signatures, for messages."""
    if not is_url(path):
        return path
    parts = urlsplit(path)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def base_name(path: str) -> str:
    """The last name of a path or address."""
    return unquote(urlsplit(path).path).rstrip("/").rpartition("/")[2] if is_url(path) else Path(path).name


def relative_names(folder: str, path: str) -> tuple[str, ...]:
    """The names on the way from one address to another below it."""
    below = unquote(urlsplit(path).path).removeprefix(unquote(urlsplit(folder).path).rstrip("/"))
    return tuple(below.strip("/").split("/"))


def has_magic(path: str) -> bool:
    """Whether a path is a pattern. In an address, ? begins a query."""
    return bool(re.search(r"[*\[]" if is_url(path) else r"[*?\[]", path))


class Files:
    """The files of one file system: that of `path`, a local path or an address."""

    def __init__(self, path: str, data: Data):
        self.remote, self._path, self._retries, self._timeout = is_url(path), path, data.retries, data.timeout
        self.protocol = re.split("::|:", path)[0] if self.remote else "file"
        self._workers, self._of_thread = max(8, data.workers), threading.local()
        self._shared: Any = None
        if self.remote and getattr(self._fs, "async_impl", False):
            self._shared = self._fs

    @property
    def _fs(self) -> Any:
        """That of fsspec. Those that are not asynchronous need not be safe to share among threads."""
        if self._shared is None and not hasattr(self._of_thread, "fs"):
            self._of_thread.fs = _file_system(self._path, self.protocol)
        return self._of_thread.fs if self._shared is None else self._shared

    def glob(self, pattern: str) -> list[str]:
        """The files that match a pattern with *, sorted."""
        if not self.remote:
            import glob

            return sorted(glob.glob(str(Path(pattern).expanduser())))  # noqa: PTH207 - the pattern may be absolute
        folder, _, name = pattern.rpartition("/")
        if has_magic(folder):
            raise UserError(f"config.data.path={shown(pattern)!r}: * in a folder; allowed: in the last name")
        return [path for path in self.folder(folder) if fnmatch.fnmatchcase(base_name(path), name)]

    def folder(self, path: str) -> list[str]:
        """The files in a folder, not in those below it, sorted. UserError if there is no such folder."""
        if not self.remote:
            root = Path(path).expanduser()
            if not root.is_dir():
                kind = "not a folder" if root.exists() else "no such file or folder"
                raise UserError(f"config.data.path={path!r}: {kind}")
            return sorted(str(each) for each in root.iterdir() if each.is_file())
        return sorted(self._list(path)[0])

    def tree(self, path: str) -> list[str]:
        """The files below a remote folder, at any depth, without hidden ones. Threads list several folders at a time.

        fsspec's own walk leaves out a folder whose listing fails, without a word.
        """
        found, folders = list[str](), [path]
        with ThreadPoolExecutor(self._workers) as pool:
            while folders:
                listed = list(pool.map(self._list, folders))
                found += [name for files, _ in listed for name in files]
                folders = [name for _, below in listed for name in below]
        return found

    def _list(self, path: str) -> tuple[list[str], list[str]]:
        """(files, folders) in a remote folder, without hidden ones."""
        own = self._fs._strip_protocol(path).rstrip("/")  # as fsspec's own functions do
        found = [e for e in self._call("ls", path, detail=True) if e["name"].rstrip("/") != own]
        names = [self._fs.unstrip_protocol(entry["name"]).rstrip("/") for entry in found]
        visible = [(name, e["type"]) for name, e in zip(names, found) if not base_name(name).startswith(".")]
        return [name for name, kind in visible if kind == "file"], [name for name, kind in visible if kind != "file"]

    def stamp(self, path: str) -> Stamp:
        """Raises UserError if there is no such file."""
        if not self.remote:
            try:
                status = Path(path).stat()
            except OSError as error:
                raise _local_error(path, error) from error
            return Stamp(status.st_size, str(status.st_mtime_ns))
        info = self._call("info", path)
        if info.get("size") is None:
            raise UserError(f"{shown(path)!r}: the server does not tell its size; allowed: one that does")
        return Stamp(int(info["size"]), next((str(info[key]) for key in MARKS if info.get(key)), ""))

    def bytes(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from start to stop, fewer if the file ends before; None: all to its end."""
        if not self.remote:
            return _local_bytes(path, start, stop)
        if stop is None:
            return self._call("cat_file", path)
        if stop <= start:
            return b""
        exactly = {"cache_type": "none"} if self._shared is None else {}  # or it would read megabytes for each range
        content = self._call("cat_file", path, start=start, end=stop, **exactly)
        if len(content) > stop - start:
            raise UserError(
                f"{shown(path)!r}: the server sends whole files instead of the bytes asked for; allowed: a server that "
                "answers range requests"
            )
        return content

    def open(self, path: str, size: int, ahead: int = 0) -> io.BufferedIOBase | io.RawIOBase:
        """The file as an object that can be read and sought. ahead: bytes that a request reads at least."""
        if not self.remote:
            return Path(path).open("rb")
        ranges = _Ranges(self, path, size)
        return io.BufferedReader(ranges, ahead) if ahead else ranges

    def _call(self, name: str, path: str, **options: Any) -> Any:
        """A method of the file system on a path, with retries."""
        own = self._fs._strip_protocol(path)  # as fsspec's own functions do

        def request() -> Any:
            if self._shared is None:
                return getattr(self._fs, name)(own, **options)
            from fsspec.asyn import sync

            return sync(self._fs.loop, getattr(self._fs, f"_{name}"), own, timeout=self._timeout, **options)

        return self._retried(request, path)

    def _retried(self, request: Callable[[], T], path: str) -> T:
        wait = FIRST_WAIT
        for attempt in range(self._retries + 1):
            try:
                return request()
            except Exception as error:  # each file system raises errors of its own
                final, reason = self._reason(error)
                if final or attempt == self._retries:
                    tried = f" ({attempt + 1} tries)" * (attempt > 0)
                    kind = MissingError if reason.startswith((NO_FILE, NO_PERMISSION)) else UserError
                    raise kind(f"{shown(path)!r}: {reason}{tried}") from error
            if wait > NOTED_WAIT:
                log.warning("%r: %s; trying again in %.0f s", shown(path), reason, wait)
            time.sleep(wait * random.uniform(0.75, 1.25))  # hosts that were refused together do not come back together
            wait *= 2
        raise AssertionError

    def _reason(self, error: BaseException) -> tuple[bool, str]:
        """(whether trying again is of no use, why in words)."""
        if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # fsspec's for any error of a request
            return self._reason(error.__cause__)
        status = _status(error)
        if status in (401, 403) or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            told = f"status {status}" if status else first_line(error)
            hint = CREDENTIALS.get("gs" if self.protocol == "gcs" else self.protocol)
            return True, f"{NO_PERMISSION} ({told})" + (f"; {hint}" if hint else "")
        if status in (404, 410) or isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            return True, NO_FILE
        if status == 416:
            return True, "shorter than before"
        if status is not None:
            return status < 500 and status not in LATER, f"the server answers with status {status}"
        if isinstance(error, TimeoutError):
            return False, f"no answer within {self._timeout:g} s"
        permanent = isinstance(error, ImportError | NotImplementedError | TypeError | ValueError | MemoryError)
        return permanent, first_line(error) or type(error).__name__


class _Ranges(io.RawIOBase):
    """A remote file that is read by ranges."""

    def __init__(self, files: Files, path: str, size: int):
        self._files, self._path, self._size, self._position = files, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._size)
        content = self._files.bytes(self._path, self._position, stop)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def _local_bytes(path: str, start: int, stop: int | None) -> bytes:
    try:
        with Path(path).open("rb", buffering=0) as file:
            if stop is None:
                return file.read()[start:]
            return os.pread(file.fileno(), stop - start, start)
    except OSError as error:
        raise _local_error(path, error) from error


def _local_error(path: str, error: OSError) -> UserError:
    return (MissingError if isinstance(error, FileNotFoundError) else UserError)(f"{path!r}: {error.strerror}")


def _file_system(path: str, protocol: str) -> Any:
    """The file system of fsspec for an address. UserError if it or its package is missing."""
    where, package = f"config.data.path={shown(path)!r}", PACKAGES.get(protocol, "")
    try:
        import fsspec

        # Its caches would hide that a file changes; an instance of its own belongs to no thread that has ended.
        fs: Any = fsspec.core.url_to_fs(path, use_listings_cache=False, skip_instance_cache=True)[0]
        if protocol in ("s3", "s3a"):  # s3fs and botocore would each try again by themselves: for minutes, all told
            fs.retries, fs.config_kwargs = 1, {"retries": {"total_max_attempts": 1}, **fs.config_kwargs}
        return fs
    except ImportError as error:
        needed = " ".join(dict.fromkeys(("fsspec", package or protocol)))
        raise UserError(f"{where}: {first_line(error)}; pip install {needed}") from error
    except ValueError as error:
        raise UserError(
            f"{where}: {first_line(error)}; allowed: s3://, gs://, hf://, https:// and fsspec's others"
        ) from error
    except Exception as error:  # gcsfs looks for credentials at once
        raise UserError(f"{where}: {first_line(error)}; {CREDENTIALS.get(protocol, '')}".rstrip("; ")) from error


def _status(error: BaseException | None) -> int | None:
    """The status of HTTP in an error of aiohttp, s3fs, gcsfs, requests or httpx; None if there is none."""
    if isinstance(error, OSError) and type(error).__module__ == "builtins" and error.__cause__ is not None:
        error = error.__cause__  # what s3fs translated
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for holder, name in ((response, "status_code"), (error, "status"), (error, "code")):
        if re.fullmatch(r"[1-5]\d\d", value := str(getattr(holder, name, ""))):
            return int(value)
    return None
