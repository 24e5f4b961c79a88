"""A storage in an object store: S3 and what speaks its protocol, Google Cloud Storage, Azure, or this process's memory.

Over obstore, Python's way to the Rust crate ``object_store``, which knows conditional writes, retries what is safe to retry
and tells absent from refused. The environment says whose account it is (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``,
``GOOGLE_SERVICE_ACCOUNT``, ``AZURE_STORAGE_ACCOUNT_KEY``...), or the machine's role does.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError
from obstore.store import MemoryStore, ObjectStore, from_url

from workers.node.storage.contract import StorageFault, check_name

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "memory")
"""Of URLs whose stores have conditional writes."""

RETRY_S = 180
"""Longest wait for one answer: object stores ask to slow down for a minute and more."""

TRIES = 5
"""Times a conditional write is sent of which nobody knows, after all retries, whether it was done."""

_WRITER = "writer"
"""Attribute of an object that says which call wrote it; a name that S3, Google Cloud Storage and Azure take."""

_MEMORY: dict[str, ObjectStore] = {}
"""The buckets of ``memory://bucket/path``, which last as long as the process."""


class ObjectStorage:
    """An object store, whose writes are whole and whose conditional writes decide races."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme, _, rest = self.url.partition("://")
        if scheme not in SCHEMES:
            raise ValueError(
                f"storage {url}: no storage is known for {scheme}://; use a folder, or one of "
                f"{', '.join(s + '://' for s in SCHEMES)}"
            )
        self._prefix = ""
        if scheme == "memory":
            bucket, _, path = rest.partition("/")
            self._store, self._prefix = _MEMORY.setdefault(bucket, MemoryStore()), f"{path}/" if path else ""
            return
        plain = (os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or "").startswith("http://")
        try:
            self._store = from_url(
                self.url,
                client_options={
                    "allow_http": plain,
                    "connect_timeout": timedelta(seconds=10),
                    "timeout": timedelta(seconds=RETRY_S),
                },
                retry_config={
                    "max_retries": 10_000,  # the time is the limit: how often that is, the waits' jitter decides
                    "retry_timeout": timedelta(seconds=RETRY_S),
                    "backoff": {"max_backoff": timedelta(seconds=10)},
                },
            )
        except BaseError as error:
            raise StorageFault(f"storage {url} cannot be used: {_first_line(error)}") from None

    def put_atomic(self, name: str, data: bytes) -> None:
        with self._answers(name):
            obstore.put(self._store, self._key(name), data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        key = self._key(name)
        writer = uuid.uuid4().hex
        for attempt in range(TRIES):
            try:
                obstore.put(self._store, key, data, mode="create", attributes={_WRITER: writer})
                return True
            except (AlreadyExistsError, PreconditionError):
                # Ours, if a request was sent twice and only the second answer came: after a lost connection, or an error 500.
                author = self._author(name)
                if author is not None:
                    return author == writer
            except BaseError as error:  # nobody knows: it may have been written all the same
                author = self._author(name)
                if author is not None:
                    return author == writer
                if attempt == TRIES - 1:
                    raise StorageFault(f"{self.url}/{name}: {_first_line(error)}") from None
            time.sleep(0.1 * 2**attempt)
        raise StorageFault(f"{self.url}/{name}: is there and is not, {TRIES} times; does anything else delete it?")

    def read(self, name: str) -> bytes:
        with self._answers(name):
            return bytes(obstore.get(self._store, self._key(name)).bytes())

    def files(self, prefix: str) -> list[str]:
        found = self._list(prefix)["objects"]
        return sorted(_shown([entry["path"] for entry in found]))

    def folders(self, prefix: str) -> list[str]:
        return sorted(_shown(self._list(prefix)["common_prefixes"]))

    def exists(self, name: str) -> bool:
        try:
            with self._answers(name):
                obstore.head(self._store, self._key(name))
        except FileNotFoundError:
            return False
        return True

    def delete(self, name: str) -> None:
        try:
            with self._answers(name):
                obstore.delete(self._store, self._key(name))
        except FileNotFoundError:  # some stores say so, S3 does not
            return

    def local(self, name: str) -> Path | None:
        return None

    def _key(self, name: str) -> str:
        return self._prefix + check_name(name)

    def _list(self, prefix: str) -> Any:
        with self._answers(prefix):
            return obstore.list_with_delimiter(self._store, self._key(prefix).rstrip("/") or None)

    def _author(self, name: str) -> str | None:
        """Returns the writer of the object ``name``, "" where it has none, None where there is no object."""
        try:
            with self._answers(name):
                return str(obstore.get(self._store, self._key(name)).attributes.get(_WRITER, ""))
        except FileNotFoundError:
            return None

    @contextmanager
    def _answers(self, name: str) -> Iterator[None]:
        """Makes a FileNotFoundError of an absent object, and a StorageFault of everything else that obstore raises."""
        try:
            yield
        except (NotFoundError, FileNotFoundError):
            raise FileNotFoundError(f"{self.url}/{name} does not exist") from None
        except BaseError as error:
            raise StorageFault(f"{self.url}/{name}: {_first_line(error)}") from None


def _shown(paths: list[str]) -> Iterator[str]:
    names = (path.rstrip("/").rsplit("/", 1)[-1] for path in paths)
    return (name for name in names if not name.startswith("."))


def _first_line(error: BaseException) -> str:
    """The first line of obstore's text: what follows is the server's XML and the client's own state."""
    return (str(error).splitlines() or [type(error).__name__])[0].strip()[:500]
