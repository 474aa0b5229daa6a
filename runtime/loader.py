"""Object code in, callable functions out.

    library = load_object(code, ["main_0", "main_pack_0"])
    main = library.function("main_0")            # int32 main(void **table, int64 *syms)

The object is linked in memory by LLVM's ORC JIT with JITLink, one JIT per library: JITLink places all sections in one slab, so
that small-code-model references between them always reach, and makes stubs for calls whose target is further than
2 GiB away (libgomp and libm usually are). Dropping the last reference to the library unmaps it.
Symbols come from a table, not from LLVM's process-wide list: the OpenMP entry points of the very libgomp that torch has
loaded (`torch.set_num_threads` obeyed), what shares calls among their threads (`team.py`), libm, and a few of libc.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import platform
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import llvmlite.binding as llvm
import torch

from .artifact import ArtifactError, members
from .forks import Forks
from .team import NEEDED, make_team

__all__ = ["NativeFunction", "NativeLibrary", "load_object", "openmp_library", "runtime_symbols"]

NativeFunction = Callable[[int, int], int]
"""(address of the pointer table, address of the int64 symbols) -> error code, 0 for success. The GIL is released meanwhile."""

_PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
_OPENMP = ("GOMP_parallel", "GOMP_barrier", "omp_get_max_threads", "omp_in_parallel", "omp_get_thread_num",
           "omp_get_num_threads", "omp_set_num_threads")
_OPENMP_NAMES = ("libgomp", "libomp", "libiomp5")
_LIBM = ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh",
         "cosh",
         "tanh", "asinh", "acosh", "atanh", "pow", "fmod", "remainder", "erf", "erfc", "lgamma", "tgamma", "sqrt", "cbrt",
         "floor",
         "ceil", "trunc", "round", "rint", "nearbyint", "fabs", "fma", "fmax", "fmin", "ldexp", "frexp", "hypot", "copysign",
         "nextafter")
_LIBC = ("memcpy", "memmove", "memset", "memcmp", "malloc", "free", "aligned_alloc", "abort")

_lock = threading.Lock()
_serial = itertools.count()
_symbols: dict[str, int] = {}  # name -> address, filled once per process


def _loaded_paths() -> list[str]:
    """Paths of the shared objects mapped into this process, in mapping order (Linux; empty elsewhere)."""
    try:
        text = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return list(dict.fromkeys(line.split(None, 5)[5] for line in text.splitlines() if line.count("/") and ".so" in line))


def openmp_library() -> ctypes.CDLL:
    """The OpenMP runtime that torch uses. RuntimeError if there is none with GOMP entry points."""
    beside_torch = Path(torch.__file__).parent
    folders = [f for f in (beside_torch / "lib", beside_torch.parent / "torch.libs") if f.is_dir()]
    places = [p for folder in folders for p in folder.iterdir()]
    mapped = _loaded_paths()
    # torch's own copy first, as other packages may have loaded another one; then whatever is mapped
    candidates = [str(p) for p in sorted(places) if str(p) in mapped] + mapped
    for stem in _OPENMP_NAMES:
        for path in candidates:
            if Path(path).name.startswith(stem):
                library = ctypes.CDLL(path)
                if all(hasattr(library, name) for name in _OPENMP):
                    return library
    raise RuntimeError(f"torch has loaded no OpenMP runtime with GOMP entry points (looked for {', '.join(_OPENMP_NAMES)}); "
                       "install a torch built with OpenMP, or compile with one thread")


def _addresses(library: ctypes.CDLL, names: Iterable[str]) -> dict[str, int]:
    found = {}
    for name in names:
        function = getattr(library, name, None)
        if function is not None:
            found[name] = ctypes.cast(function, ctypes.c_void_p).value or 0
    return found


def runtime_symbols() -> Mapping[str, int]:
    """Name -> address of everything native code may call."""
    with _lock:
        if not _symbols:
            process = ctypes.CDLL(None)  # libm is among what Python itself has loaded
            _symbols.update(_addresses(process, (*_LIBC, *_LIBM, *(f"{n}f" for n in _LIBM))))
            openmp = openmp_library()
            _symbols.update(_addresses(openmp, _OPENMP))
            initialize()
            team = make_team({**_addresses(process, NEEDED), **_symbols})
            _symbols.update(aicc_region=team.region, aicc_launch=team.launch)
            Forks(openmp).watch()
    return _symbols


@functools.cache
def initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


class NativeLibrary:
    """Linked code. Functions taken from it are valid as long as it is referenced."""

    def __init__(self, jit: llvm.LLJIT, tracker: llvm.ResourceTracker):
        self._jit = jit
        self._tracker = tracker

    def address(self, name: str) -> int:
        """The address of an exported function; KeyError if it was not asked for at load time."""
        return int(self._tracker[name])

    def function(self, name: str) -> NativeFunction:
        """A callable with the host ABI; it keeps this library alive."""
        native = _PROTOTYPE(self.address(name))
        native._library = self  # type: ignore[attr-defined]  # code must not be unmapped while the callable lives
        return native

    def bind(self, symbols: Sequence[str]) -> None:
        """The order of symbol values is compiled into the code: nothing to do."""

    def __del__(self) -> None:
        # The tracker must go before the JIT that owns its memory.
        tracker, jit = self.__dict__.pop("_tracker", None), self.__dict__.pop("_jit", None)
        if tracker is not None:
            tracker.close()
        if jit is not None:
            jit.close()


@functools.cache
def _allow_matrix_unit() -> None:
    """Linux lets a process use AMX's registers once it has asked (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA); a refusal means there are none."""
    if sys.platform.startswith("linux") and platform.machine() == "x86_64":
        ctypes.CDLL(None).syscall(158, 0x1023, 18)


def load_object(code: bytes, names: Iterable[str], extra_symbols: Mapping[str, int] | None = None) -> NativeLibrary:
    """Links the object file `code`, or the archive of several (`artifact.archive`), and exports `names`.

    `extra_symbols` adds or overrides imports (name -> address). ArtifactError if the object is no valid object file for this
    machine, lacks one of `names`, or refers to a symbol that is not provided (the message has its name).
    """
    objects = members(code)
    for part in objects:
        if len(part) < 64 or part[:4] not in _OBJECT_MAGICS:
            raise ArtifactError(f"{len(part)} bytes of object code do not start like an object file")
    wanted = list(names)
    for name in wanted:
        if not isinstance(name, str) or not _FUNCTION_NAME.fullmatch(name):
            raise ArtifactError(f"{name!r:.100} is no name of a function")  # LLVM would end the process
    initialize()
    _allow_matrix_unit()
    builder = llvm.JITLibraryBuilder()
    for part in objects:
        builder.add_object_img(part)
    for name, address in {**runtime_symbols(), **(extra_symbols or {})}.items():
        builder.import_symbol(name, address)
    for name in wanted:
        builder.export_symbol(name)
    machine = llvm.Target.from_default_triple().create_target_machine(reloc="pic", codemodel="small")
    jit = llvm.create_lljit_compiler(machine, use_jit_link=True, suppress_errors=True)
    try:
        tracker = builder.link(jit, f"aicc{next(_serial)}")
    except RuntimeError as error:
        jit.close()
        known = {*runtime_symbols(), *(extra_symbols or {})}.union(*(_symbols_of(part, defined=True) for part in objects))
        missing = sorted(set().union(*(_symbols_of(part, defined=False) for part in objects)) - known)
        hint = f"; symbols that the runtime does not provide: {', '.join(missing)}" if missing else ""
        raise ArtifactError(f"the object code does not link: {error}{hint}") from error
    return NativeLibrary(jit, tracker)


_FUNCTION_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.$]{0,999}")
_OBJECT_MAGICS = (b"\x7fELF", b"\xcf\xfa\xed\xfe")
_ELF_SYMBOL = struct.Struct("<IBBHQQ")  # name, info, other, section, value, size
_IMPLICIT = {"_GLOBAL_OFFSET_TABLE_"}   # the linker's own


def _symbols_of(code: bytes, *, defined: bool) -> set[str]:
    """Names that a 64-bit little-endian ELF object defines, or refers to and does not define, for error messages; empty for other data."""
    try:
        sections, = struct.unpack_from("<Q", code, 40)
        size, count, _ = struct.unpack_from("<HHH", code, 58)
        headers = [struct.unpack_from("<IIQQQQII", code, sections + i * size) for i in range(count)]
        found: set[str] = set()
        for header in headers:
            if header[1] != 2:  # SHT_SYMTAB
                continue
            names = headers[header[6]][4]
            for at in range(header[4], header[4] + header[5], _ELF_SYMBOL.size):
                name, _, _, section, _, _ = _ELF_SYMBOL.unpack_from(code, at)
                if name and (section != 0) == defined:
                    found.add(code[names + name:code.index(b"\0", names + name)].decode())
        return found - _IMPLICIT
    except (struct.error, IndexError, ValueError):
        return set()
