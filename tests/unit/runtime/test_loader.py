from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aicc.runtime.artifact import ArtifactError, archive
from aicc.runtime.loader import load_object, openmp_library, runtime_symbols

BIG = 8 << 20


def source(size: int = 64) -> str:
    return f"""
@table = private constant [{size} x i8] c"{'A' * size}"
declare i32 @omp_get_max_threads()
declare float @expf(float)
define i32 @main_0(ptr %table, ptr %symbols) {{
  %p = getelementptr i8, ptr @table, i64 5
  %v = load i8, ptr %p
  %w = zext i8 %v to i32
  %n = call i32 @omp_get_max_threads()
  %e = call float @expf(float 0.0)
  %i = fptosi float %e to i32
  %a = mul i32 %n, 1000
  %b = add i32 %w, %a
  %r = add i32 %b, %i
  ret i32 %r
}}
"""


def test_calls_reach_libm_and_the_openmp_of_torch(compile_ir: Callable[..., bytes]) -> None:
    main = load_object(compile_ir(source()), ["main_0"]).function("main_0")
    before = torch.get_num_threads()
    try:
        for n in (1, 3, 2):
            torch.set_num_threads(n)
            assert main(0, 0) == ord("A") + 1000 * n + 1
    finally:
        torch.set_num_threads(before)


def test_the_openmp_library_is_the_one_beside_torch() -> None:
    library = Path(openmp_library()._name)
    assert library.parent.parent in (Path(torch.__file__).parent, Path(torch.__file__).parent.parent)
    assert {"aicc_region", "aicc_launch", "GOMP_parallel", "omp_get_thread_num", "expf", "memcpy"} <= runtime_symbols().keys()


@pytest.mark.parametrize("options", [{}, {"codemodel": "default"}, {"codemodel": "jitdefault", "reloc": "default"},
                                     {"codemodel": "large"}])
def test_code_models(compile_ir: Callable[..., bytes], options: dict[str, str]) -> None:
    main = load_object(compile_ir(source(BIG), **options), ["main_0"]).function("main_0")
    assert main(0, 0) == ord("A") + 1000 * torch.get_num_threads() + 1


@pytest.mark.parametrize("high", [0x10_0000_0000, 0x7E00_0000_0000, 0x100_0000])
def test_calls_reach_any_address(compile_ir: Callable[..., bytes], high: int) -> None:
    """A function far away (beyond a 32-bit displacement), as libgomp may be."""
    if b"x86" not in __import__("platform").machine().encode():
        pytest.skip("machine code of x86-64")
    libc = ctypes.CDLL(None)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3,
                                                              ctypes.c_long]
    at = libc.mmap(high, 4096, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    ctypes.memmove(at, b"\xb8\x2a\x00\x00\x00\xc3", 6)  # mov eax, 42; ret
    code = compile_ir("declare i32 @distant()\n"
                      "define i32 @main_0(ptr %t, ptr %s) {\n  %r = call i32 @distant()\n  ret i32 %r\n}")
    assert load_object(code, ["main_0"], {"distant": at}).function("main_0")(0, 0) == 42


def test_memory_is_released_with_the_last_function(compile_ir: Callable[..., bytes]) -> None:
    code = compile_ir(source(BIG))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    def once() -> None:
        main = load_object(code, ["main_0"]).function("main_0")
        gc.collect()
        assert main(0, 0) > 0  # the library lives as long as the function

    for _ in range(3):
        once()
    before = resident()
    for _ in range(20):
        once()
    gc.collect()
    assert resident() - before < 4 * BIG


def test_errors(compile_ir: Callable[..., bytes]) -> None:
    with pytest.raises(ArtifactError, match="nowhere_to_be_found"):
        load_object(compile_ir("declare i32 @nowhere_to_be_found()\ndefine i32 @main_0(ptr %t, ptr %s) {\n"
                               "  %r = call i32 @nowhere_to_be_found()\n  ret i32 %r\n}"), ["main_0"])
    with pytest.raises(ArtifactError, match="main_7"):
        load_object(compile_ir(source()), ["main_0", "main_7"])
    for junk in (b"", b"\x7fELF", b"\x7fELF" + bytes(200), b"MZ" * 100, compile_ir(source())[:300]):
        with pytest.raises(ArtifactError):
            load_object(junk, ["main_0"])


def test_several_objects_call_each_other(compile_ir: Callable[..., bytes]) -> None:
    calls = "define i32 @main_0(ptr %t, ptr %s) {\n  %r = call i32 @other()\n  ret i32 %r\n}\ndeclare i32 @other()\n"
    code = archive([compile_ir(calls), compile_ir("define i32 @other() {\n  ret i32 42\n}")])
    assert load_object(code, ["main_0"]).function("main_0")(0, 0) == 42
    with pytest.raises(ArtifactError, match="does not provide: nowhere$"):
        load_object(archive([compile_ir(calls), compile_ir("define i32 @other() {\n  %r = call i32 @nowhere()\n  ret i32 %r\n}\n"
                                                           "declare i32 @nowhere()")]), ["main_0"])
    with pytest.raises(ArtifactError):
        load_object(archive([compile_ir(calls), b"x" * 100]), ["main_0"])


@pytest.mark.parametrize("name", ["", "\0", "main\0_0", "é", "../../etc", "9", "a" * 10_000, 7])
def test_names_that_llvm_aborts_on(name: Any, compile_ir: Callable[..., bytes]) -> None:
    """An empty name ended the process: an assertion of LLVM's. The fuzzer of damaged manifests found it."""
    with pytest.raises(ArtifactError, match="no name of a function"):
        load_object(compile_ir(source()), [name])
