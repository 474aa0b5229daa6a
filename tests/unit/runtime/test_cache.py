from __future__ import annotations

import errno
import multiprocessing
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from aicc.runtime.artifact import Artifact
from aicc.runtime.cache import ArtifactCache, cache_key, default_directory

KEY, OTHER = cache_key(["a"]), cache_key(["b"])
ARTIFACT = Artifact({"name": "main"}, {"object": b"code" * 100})


def entry(cache: ArtifactCache, key: str = KEY) -> Path:
    return next(path for _, _, path in cache.entries() if path.name.startswith(key))


def test_put_and_get(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path / "deep" / "cache")
    assert cache.get(KEY) is None
    assert cache.put(KEY, ARTIFACT)
    assert cache.get(KEY) == ARTIFACT and ArtifactCache(tmp_path / "deep" / "cache").get(KEY) == ARTIFACT
    assert cache.get(OTHER) is None
    assert len(cache.entries()) == 1
    cache.discard(KEY)
    assert cache.get(KEY) is None


def test_keys_depend_on_every_part_and_its_boundaries() -> None:
    keys = [cache_key(p) for p in (["ab"], ["a", "b"], ["", "ab"], ["ab", ""], [], [b"ab", b""], ["ba"])]
    assert len(set(keys)) == 6 and keys[3] == keys[5]


@pytest.mark.parametrize("key", ["", "xyz", "../" + KEY, KEY.upper() + "0", KEY[:-1] + "/"])
def test_other_keys_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError):
        ArtifactCache(tmp_path).get(key)


@pytest.mark.parametrize("damage",
                         [lambda d: d[:-1], lambda d: d[:20], lambda d: b"", lambda d: d[:60] + bytes([d[60] ^ 1]) + d[61:],
                                    lambda d: d[:-3] + b"???", lambda d: b"x" * len(d)])
def test_a_damaged_entry_is_dropped_with_one_warning(tmp_path: Path, damage: Any) -> None:
    cache = ArtifactCache(tmp_path)
    for key in (KEY, OTHER):
        cache.put(key, ARTIFACT)
        path = entry(cache, key)
        path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match="damaged") as caught:
        assert cache.get(KEY) is None
        assert cache.get(OTHER) is None
    assert len(caught) == 1
    assert cache.entries() == []
    assert cache.put(KEY, ARTIFACT) and cache.get(KEY) == ARTIFACT


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ArtifactCache(tmp_path / "file" / "cache")
    with pytest.warns(RuntimeWarning, match="cannot be used") as caught:
        assert cache.get(KEY) is None and not cache.put(KEY, ARTIFACT) and cache.get(KEY) is None
    assert len(caught) == 1


def test_a_read_only_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ArtifactCache(tmp_path)
    cache.put(KEY, ARTIFACT)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EROFS, "Read-only file system")

    for function in ("tempfile.mkstemp", "os.utime", "os.unlink"):
        monkeypatch.setattr(function, refuse)
    with pytest.warns(RuntimeWarning, match="cannot be written") as caught:
        assert not cache.put(OTHER, ARTIFACT) and not cache.put(OTHER, ARTIFACT)
    assert len(caught) == 1
    assert cache.get(KEY) == ARTIFACT


def test_permissions_of_the_system(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    cache = ArtifactCache(tmp_path)
    cache.put(KEY, ARTIFACT)
    tmp_path.chmod(0o500)
    try:
        with pytest.warns(RuntimeWarning, match="cannot be written"):
            assert not cache.put(cache_key(["elsewhere"]), ARTIFACT)
        assert cache.get(KEY) == ARTIFACT
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_leaves_no_partial_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ArtifactCache(tmp_path)
    original = os.replace

    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert not cache.put(KEY, ARTIFACT)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    monkeypatch.setattr("os.replace", original)
    assert cache.put(KEY, ARTIFACT) and cache.get(KEY) == ARTIFACT


def test_a_directory_open_to_everybody_is_not_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="writable by everybody"):
        assert not ArtifactCache(tmp_path).put(KEY, ARTIFACT)


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    size = len(ARTIFACT.to_bytes())
    cache = ArtifactCache(tmp_path, max_bytes=10 * size)
    keys = [cache_key([str(i)]) for i in range(10)]
    for i, key in enumerate(keys):
        cache.put(key, ARTIFACT)
        os.utime(entry(cache, key), (1000 + i, 1000 + i))
    assert cache.get(keys[0]) == ARTIFACT  # now the newest
    cache.put(KEY, ARTIFACT)
    left = {path.stem for _, _, path in cache.entries()}
    assert KEY in left and keys[0] in left and keys[1] not in left and keys[2] not in left
    assert sum(n for _, n, _ in cache.entries()) <= 10 * size


def test_partial_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path)
    cache.put(KEY, ARTIFACT)
    old, new = (entry(cache).parent / f"{name}.partial" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("x")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.evict()
    assert not old.exists() and new.exists() and cache.get(KEY) == ARTIFACT


def _hammer(directory: str, seed: int, rounds: int, failures: Any) -> None:
    warnings.simplefilter("error")
    cache = ArtifactCache(directory, max_bytes=40_000)
    for i in range(rounds):
        name = str((seed * 7 + i) % 12)
        artifact = Artifact({"name": name}, {"object": name.encode() * 2000})
        cache.put(cache_key([name]), artifact)
        other = str((seed + i * 5) % 12)
        found = cache.get(cache_key([other]))
        if found is not None and found != Artifact({"name": other}, {"object": other.encode() * 2000}):
            failures.put(other)


def test_processes_share_a_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    workers = [context.Process(target=_hammer, args=(str(tmp_path), seed, 60, failures)) for seed in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert [w.exitcode for w in workers] == [0] * 4 and failures.empty()
    cache = ArtifactCache(tmp_path)
    for _, _, path in cache.entries():
        assert cache.get(path.stem) is not None
    assert not list(tmp_path.rglob("*.partial"))


def test_default_directory() -> None:
    assert default_directory({"XDG_CACHE_HOME": "/x"}) == Path("/x/aicc")
    assert default_directory({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache" / "aicc" == default_directory({})
