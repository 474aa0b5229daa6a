"""What the compiler hands to the runtime: a JSON manifest and named blobs (object code, constants), in one file.

    data = Artifact({"name": "main"}, {"code": b"..."}).to_bytes()
    Artifact.from_bytes(data)

Layout, all integers little-endian:

    offset  size
    0       8      magic "AICCART\\0"
    8       4      format version
    12      8      header length H
    20      32     SHA-256 of the header
    52      H      header: JSON {"manifest": ..., "blobs": [[name, size, sha256 in hex], ...]}
    52+H    ...    the blobs, one after the other, in that order; nothing after the last

Every byte is covered: by a comparison (magic, version), by a hash, or by the exact total length; so any damage raises
ArtifactError. The reader allocates no more than the file's own size, whatever lengths the file claims, and runs nothing (no
pickle, no eval). Hashes guard against accidents, not against an enemy who can write the file: object code is code.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["FORMAT_VERSION", "Artifact", "ArtifactError", "archive", "members"]

MAGIC = b"AICCART\0"
FORMAT_VERSION = 1
_PREFIX = struct.Struct("<8sIQ32s")


class ArtifactError(Exception):
    """An artifact that cannot be used: damaged, of another format version, or inconsistent."""


@dataclass(frozen=True)
class Artifact:
    """`manifest` is JSON data (dicts with string keys, lists, strings, ints, floats, bools, None); `blobs` bytes by name."""

    manifest: dict[str, Any]
    blobs: dict[str, bytes] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file's contents; TypeError or ValueError if the manifest is not JSON data. Equal artifacts give equal bytes."""
        index = [[name, len(data), hashlib.sha256(data).hexdigest()] for name, data in self.blobs.items()]
        header = json.dumps({"manifest": self.manifest, "blobs": index}, separators=(",", ":"), allow_nan=False).encode()
        prefix = _PREFIX.pack(MAGIC, FORMAT_VERSION, len(header), hashlib.sha256(header).digest())
        return b"".join([prefix, header, *self.blobs.values()])

    @staticmethod
    def from_bytes(data: bytes) -> Artifact:
        """Reads what `to_bytes` wrote; ArtifactError on any difference from that."""
        if len(data) < _PREFIX.size:
            raise ArtifactError(f"the file has {len(data)} bytes, fewer than the {_PREFIX.size} of an artifact's prefix")
        magic, version, length, digest = _PREFIX.unpack_from(data)
        if magic != MAGIC:
            raise ArtifactError("not an aicc artifact (wrong magic number)")
        if version != FORMAT_VERSION:
            raise ArtifactError(f"format version {version}; this aicc reads version {FORMAT_VERSION}")
        view = memoryview(data)
        if length > len(data) - _PREFIX.size:
            raise ArtifactError(f"truncated: the header claims {length} bytes of {len(data) - _PREFIX.size}")
        header = view[_PREFIX.size:_PREFIX.size + length]
        if hashlib.sha256(header).digest() != digest:
            raise ArtifactError("the header does not match its checksum")
        manifest, index = _parse_header(bytes(header))
        rest = view[_PREFIX.size + length:]
        if sum(size for _, size, _ in index) != len(rest):
            raise ArtifactError(f"the blobs take {sum(size for _, size, _ in index)} bytes, the file has {len(rest)}")
        blobs: dict[str, bytes] = {}
        at = 0
        for name, size, checksum in index:
            blob = bytes(rest[at:at + size])
            if hashlib.sha256(blob).hexdigest() != checksum:
                raise ArtifactError(f"blob '{name}' does not match its checksum")
            blobs[name] = blob
            at += size
        if len(blobs) != len(index):
            raise ArtifactError("two blobs have the same name")
        return Artifact(manifest, blobs)

    @staticmethod
    def read(path: Path) -> Artifact:
        """The artifact in the file `path`; OSError if it cannot be read, ArtifactError if it is damaged."""
        return Artifact.from_bytes(path.read_bytes())

    def write(self, path: Path) -> None:
        """Writes the file in place; `cache.py` has the atomic form."""
        path.write_bytes(self.to_bytes())


def _reject(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _parse_header(text: bytes) -> tuple[dict[str, Any], list[tuple[str, int, str]]]:
    try:
        header = json.loads(text, parse_constant=_reject)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict) or header.keys() != {"manifest", "blobs"} or not isinstance(header["manifest"], dict) or (
            not isinstance(header["blobs"], list)):
        raise ArtifactError("the header has other fields than 'manifest' and 'blobs'")
    index = []
    for row in header["blobs"]:
        if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and type(row[1]) is int and row[1] >= 0
                and isinstance(row[2], str)):
            raise ArtifactError(f"malformed blob entry {str(row)[:100]}")
        index.append((row[0], row[1], row[2]))
    return header["manifest"], index


_ARCHIVE = b"!<arch>\n"
_MEMBER = struct.Struct("=16s12s6s6s8s10s2s")  # name, time, owner, group, mode, size, mark: as text, padded with blanks (ar(5))


def archive(objects: Sequence[bytes]) -> bytes:
    """Object files as one blob: the file itself if there is one, else a Unix archive, which `objdump` reads. Equal objects give equal bytes."""
    if len(objects) == 1:
        return objects[0]
    parts = [_ARCHIVE]
    for n, code in enumerate(objects):
        fields = (f"{n}.o/", "0", "0", "0", "644", str(len(code)))
        parts += [_MEMBER.pack(*(f.encode().ljust(16) for f in fields), b"`\n"), code, b"\n" * (len(code) % 2)]
    return b"".join(parts)


def members(code: bytes) -> list[bytes]:
    """The object files of what `archive` made. ArtifactError for an archive that is cut off or has other fields."""
    if not code.startswith(_ARCHIVE):
        return [code]
    found: list[bytes] = []
    at = len(_ARCHIVE)
    while at < len(code):
        if len(code) < at + _MEMBER.size:
            raise ArtifactError(f"the archive of object files ends within the header of file {len(found)}")
        *_, size, mark = _MEMBER.unpack_from(code, at)
        at += _MEMBER.size
        digits = size.strip(b" ")
        if mark != b"`\n" or not digits.isdigit() or at + int(digits) > len(code):
            raise ArtifactError(f"the header of file {len(found)} in the archive of object files makes no sense")
        found.append(code[at:at + int(digits)])
        at += int(digits) + int(digits) % 2
    return found
