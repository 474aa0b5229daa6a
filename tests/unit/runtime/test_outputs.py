"""Memory of large results is used again only when nobody can see it."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from aicc.runtime import outputs
from aicc.runtime.outputs import LARGE, OutputPool

SHAPE, STRIDES = (LARGE // 4, 2), (2, 1)


def make(pool: OutputPool) -> torch.Tensor:
    return pool.empty(SHAPE, STRIDES, torch.float32)


def test_a_dropped_result_is_used_again() -> None:
    pool = OutputPool()
    address = make(pool).data_ptr()
    assert make(pool).data_ptr() == address
    assert pool.reused == 1
    again = pool.empty((2, LARGE // 4), (1, 2), torch.int32)
    assert (again.data_ptr(), again.stride(), again.dtype) == (address, (1, 2), torch.int32)


def test_views_arrays_and_storages_keep_it() -> None:
    for keep in (lambda t: t[3:], lambda t: t.numpy(), lambda t: t.untyped_storage(), lambda t: t.detach(), lambda t: torch.utils.dlpack.to_dlpack(t)):
        pool = OutputPool()
        first = make(pool)
        address, held = first.data_ptr(), keep(first)
        del first
        assert make(pool).data_ptr() != address
        del held
        assert {make(pool).data_ptr() for _ in range(2)} >= {address} or pool.reused


def test_saved_for_backward_keeps_it() -> None:
    pool = OutputPool()
    first = make(pool).normal_()
    x = torch.ones(SHAPE, requires_grad=True)
    y = (x * first).sum()
    address, value = first.data_ptr(), first.clone()
    del first
    assert make(pool).data_ptr() != address
    y.backward()
    assert torch.equal(x.grad, value)


def test_shared_and_resized_storages_are_left_alone() -> None:
    pool = OutputPool()
    t = make(pool).zero_()
    t.share_memory_()
    address = t.data_ptr()
    del t
    assert make(pool).data_ptr() != address
    t = make(pool)
    t.untyped_storage().resize_(16)
    del t
    assert make(pool).untyped_storage().nbytes() >= 4 * SHAPE[0] * SHAPE[1]


def test_the_limit_holds() -> None:
    pool = OutputPool(keep_bytes=3 * LARGE)
    held = [make(pool) for _ in range(5)]
    assert pool.bytes <= 3 * LARGE
    assert len({t.data_ptr() for t in held}) == 5


def test_small_results_are_not_remembered() -> None:
    pool = OutputPool()
    pool.empty((4,), (1,), torch.float32)
    pool.empty((0, 5), (5, 1), torch.float32)
    assert pool.bytes == 0


def test_a_result_is_like_one_of_torch() -> None:
    """Of every type that its memory had, with a version counter of its own, and of inference mode where that is on, whatever the one before was."""
    pool, versions = OutputPool(), set()
    for inference in (False, True, False):
        for dtype in (torch.float32, torch.int64, torch.bfloat16, torch.float32):
            with torch.inference_mode(inference):
                t = pool.empty((LARGE // dtype.itemsize,), (1,), dtype)
                like = torch.empty(3, dtype=dtype)
            assert (t.dtype, t.is_inference(), t.is_leaf, t.requires_grad, t._base) == (dtype, inference, True, False, None)
            assert torch._C._dispatch_keys(t) == torch._C._dispatch_keys(like)
            if not inference:
                versions.add(t._version)
                t.add_(0)
            del t
    assert len(versions) == 1  # however often it was written to before
    assert pool.reused == 11 and pool.bytes == LARGE
    t = pool.empty((LARGE,), (1,), torch.uint8)
    t.resize_(2 * LARGE)
    assert len(t) == 2 * LARGE
    assert pool.empty((LARGE,), (1,), torch.uint8).untyped_storage().nbytes() == LARGE


def test_without_torchs_shortcuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_in_storage", outputs._set_in_storage)
    test_a_result_is_like_one_of_torch()
    test_a_dropped_result_is_used_again()


def test_another_default_device() -> None:
    """Results are made on the CPU whatever device the user has named, before the first compilation or after it."""
    for first in ('torch.set_default_device("meta")', "f(x)"):
        subprocess.run([sys.executable, "-c", f"""if True:
            import torch
            f, x = torch.compile(lambda x: x + 1, backend="aicc", options={{"strict": True}}), torch.zeros(256, 256)
            {first}
            torch.set_default_device("meta")
            assert f(x).device.type == "cpu"
        """], check=True, timeout=120)


def test_threads_never_share_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between taking memory and making a tensor in it, another thread looks for memory too."""
    pool, found = OutputPool(), []
    make(pool)

    def slowly(holder: torch.Tensor, *args: object) -> torch.Tensor:
        if not found:
            found.append(holder)
            other = threading.Thread(target=lambda: found.append(make(pool)))
            other.start()
            other.join()
        return outputs._set_in_storage(holder, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(outputs, "_in_storage", slowly)
    mine = make(pool)
    assert found[1].data_ptr() != mine.data_ptr()
