"""A content-addressed store of artifacts on disk, shared by any number of processes.

    cache = ArtifactCache(directory=None, max_bytes=2 << 30)
    found = cache.get(key)                       # Artifact or None
    cache.put(key, artifact)

A key is the SHA-256 (hex) of everything that decides the result (`cache_key`): so an entry is never stale, only absent, whole
or damaged. Rules:
- An entry appears atomically: it is written to a temporary file in its own directory and renamed.
- A damaged entry is removed, with one warning, and counts as absent.
- A directory that cannot be made, read or written, or a full disk, gives one warning; the program goes on without that entry.
- When the files exceed `max_bytes`, the least recently used go first (modification time; `get` refreshes it).
- Entries are native code, so a directory that anybody may write to is not used at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

from .artifact import Artifact, ArtifactError

__all__ = ["ArtifactCache", "cache_key", "default_directory"]

_KEY = re.compile(r"[0-9a-f]{64}")
_SUFFIX, _PARTIAL = ".aicc", ".partial"
_STALE_SECONDS = 3600  # a temporary file this old was left by a process that died
_SCAN_EVERY = 64       # puts between looks at the whole directory: other processes add entries too


def cache_key(parts: Iterable[bytes | str]) -> str:
    """SHA-256 in hex over the parts, each with its length, so that no two lists of parts collide by concatenation."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def default_directory(environ: dict[str, str] | os._Environ[str]) -> Path:
    """`$XDG_CACHE_HOME/aicc`, or `~/.cache/aicc`; the caller hands in the environment."""
    base = environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "aicc"


class ArtifactCache:
    """See the module docstring. Safe for threads and processes; no method raises for what happens on the disk."""

    def __init__(self, directory: Path | str, max_bytes: int = 4 << 30):
        self.directory = Path(directory)
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._total = 0
        self._puts = 0
        self._usable: bool | None = None

    # -- reading

    def get(self, key: str) -> Artifact | None:
        """The entry, or None when it is absent or damaged."""
        if not self._ready():
            return None
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except (OSError, MemoryError) as error:
            self._warn("read", f"the cache entry {path} cannot be read ({error})")
            return None
        try:
            artifact = Artifact.from_bytes(data)
        except ArtifactError as error:
            self._warn("damaged", f"the cache entry {path} is damaged ({error}); it is dropped and compiled anew")
            self.discard(key)
            return None
        with contextlib.suppress(OSError):  # a read-only cache is fine, it just cannot keep the order of use
            os.utime(path)
        return artifact

    # -- writing

    def put(self, key: str, artifact: Artifact) -> bool:
        """Stores the entry; False (and one warning) when that was not possible."""
        if not self._ready():
            return False
        path = self._path(key)
        data = artifact.to_bytes()
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(suffix=_PARTIAL, prefix=f"{key[:16]}.", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            self._warn("write", f"the cache directory {self.directory} cannot be written ({error}); going on without it")
            return False
        self._account(len(data))
        return True

    def discard(self, key: str) -> None:
        """Removes the entry if it is there."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def entries(self) -> list[tuple[float, int, Path]]:
        """(modification time, bytes, path) of all entries, oldest first. Removes temporary files left by dead processes."""
        found = []
        now = time.time()
        for folder in self._scan(self.directory):
            for file in self._scan(Path(folder)):
                try:
                    info = file.stat()
                except OSError:
                    continue
                if file.name.endswith(_SUFFIX):
                    found.append((info.st_mtime, info.st_size, Path(file.path)))
                elif file.name.endswith(_PARTIAL) and now - info.st_mtime > _STALE_SECONDS:
                    with contextlib.suppress(OSError):
                        os.unlink(file.path)
        found.sort()
        return found

    def evict(self) -> int:
        """Removes least recently used entries until the rest fit in 9/10 of `max_bytes`; the bytes that remain."""
        entries = self.entries()
        total = sum(size for _, size, _ in entries)
        if total > self.max_bytes:
            for _, size, path in entries:
                if total <= self.max_bytes * 9 // 10:
                    break
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= size
        return total

    # -- details

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"a cache key is 64 hex digits, got {key!r}")
        return self.directory / key[:2] / f"{key}{_SUFFIX}"

    @staticmethod
    def _scan(path: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(path) as found:
                return list(found)
        except OSError:
            return []

    def _ready(self) -> bool:
        if self._usable is None:
            self._usable = self._check_directory()
        return self._usable

    def _check_directory(self) -> bool:
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            mode = self.directory.stat().st_mode
        except OSError as error:
            self._warn("write", f"the cache directory {self.directory} cannot be used ({error}); going on without it")
            return False
        if mode & stat.S_IWOTH:
            self._warn("open",
                       f"the cache directory {self.directory} is writable by everybody and holds native code; it is not used. "
                               f"chmod o-w it, or choose another")
            return False
        return True

    def _account(self, size: int) -> None:
        with self._lock:
            self._total += size
            self._puts += 1
            due = self._puts % _SCAN_EVERY == 1 or self._total > self.max_bytes
        if due:
            total = self.evict()
            with self._lock:
                self._total = total

    def _warn(self, kind: str, message: str) -> None:
        with self._lock:
            if kind in self._warned:
                return
            self._warned.add(kind)
        warnings.warn(f"aicc: {message}", RuntimeWarning, stacklevel=3)
