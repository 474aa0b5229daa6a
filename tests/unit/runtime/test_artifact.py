from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from aicc.runtime.artifact import Artifact, ArtifactError, archive, members
from hypothesis import given
from hypothesis import strategies as st

SAMPLE = Artifact({"name": "main", "sizes": [1, ["mul", "s0", 4]], "text": "é\n", "none": None, "x": 0.1},
                  {"object": bytes(range(256)) * 3, "empty": b"", "c": b"\0"})
DATA = SAMPLE.to_bytes()


def with_header(header: Any, blobs: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<8sIQ32s", b"AICCART\0", 1, len(text), hashlib.sha256(text).digest()) + text + blobs


def test_round_trip(tmp_path: Path) -> None:
    assert Artifact.from_bytes(DATA) == SAMPLE
    assert SAMPLE.to_bytes() == DATA
    SAMPLE.write(tmp_path / "a")
    assert Artifact.read(tmp_path / "a") == SAMPLE


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_is_noticed(bit: int) -> None:
    for i in range(len(DATA)):
        damaged = bytearray(DATA)
        damaged[i] ^= 1 << bit
        with pytest.raises(ArtifactError):
            Artifact.from_bytes(bytes(damaged))


def test_every_truncation_and_extension_is_noticed() -> None:
    for n in range(len(DATA)):
        with pytest.raises(ArtifactError):
            Artifact.from_bytes(DATA[:n])
    with pytest.raises(ArtifactError):
        Artifact.from_bytes(DATA + b"\0")


@given(st.binary(max_size=300))
def test_noise(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        Artifact.from_bytes(data)


@given(st.binary(max_size=200))
def test_noise_after_a_good_prefix(text: bytes) -> None:
    with pytest.raises(ArtifactError):
        Artifact.from_bytes(with_header(text))


@pytest.mark.parametrize("header", [
    [], 3, {}, {"manifest": {}}, {"manifest": [], "blobs": []}, {"manifest": {}, "blobs": {}}, {"manifest": {}, "blobs": [],
                                                                                                "more": 1},
    {"manifest": {}, "blobs": [["a", 1]]}, {"manifest": {}, "blobs": [["a", -1, ""]]}, {"manifest": {},
                                                                                        "blobs": [["a", True, ""]]},
    {"manifest": {}, "blobs": [[1, 0, ""]]}, {"manifest": {}, "blobs": [["a", 1 << 62, ""]]}, {"manifest": {},
                                                                                               "blobs": [["a", 0, "00"]]},
    {"manifest": {}, "blobs": [["a", 0, hashlib.sha256().hexdigest()]] * 2},
    b'{"manifest": {"x": NaN}, "blobs": []}', b"[" * 200_000, b'{"manifest": {"x": ' + b"9" * 100_000 + b'}, "blobs": []}',
    b"\xff\xfe"])
def test_inconsistent_headers(header: Any) -> None:
    with pytest.raises(ArtifactError):
        Artifact.from_bytes(with_header(header))


def test_claimed_sizes_are_not_allocated() -> None:
    for length in (1 << 40, (1 << 64) - 1):
        with pytest.raises(ArtifactError, match="truncated"):
            Artifact.from_bytes(struct.pack("<8sIQ32s", b"AICCART\0", 1, length, bytes(32)))


def test_other_version_is_named() -> None:
    with pytest.raises(ArtifactError, match="version 7"):
        Artifact.from_bytes(struct.pack("<8sIQ32s", b"AICCART\0", 7, 0, bytes(32)))


def test_a_manifest_that_is_no_json_is_refused_when_writing() -> None:
    with pytest.raises(ValueError):
        Artifact({"x": float("nan")}).to_bytes()
    with pytest.raises(TypeError):
        Artifact({"x": object()}).to_bytes()


@given(st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=5))
def test_archives_round_trip(objects: list[bytes]) -> None:
    objects = [b"\x7fELF" + x for x in objects]
    assert members(archive(objects)) == objects


def test_archives_are_those_of_ar(tmp_path: Path) -> None:
    path = tmp_path / "x.a"
    path.write_bytes(archive([b"one", b"four"]))
    if shutil.which("ar") is None:
        pytest.skip("ar is not installed")
    assert subprocess.run(["ar", "p", str(path)], capture_output=True, check=True).stdout == b"onefour"


def test_damaged_archives() -> None:
    data = archive([b"\x7fELF" + bytes(96), b"\x7fELF" + bytes(196)])
    for n in range(9, len(data)):
        if n != 8 + 60 + 100:  # the end of the first file: it lacks the second, which the loader finds out
            with pytest.raises(ArtifactError, match="archive"):
                members(data[:n])
    with pytest.raises(ArtifactError, match="file 0"):
        members(data.replace(b"100 ", b"-10 ", 1))
