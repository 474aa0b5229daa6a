"""A quick look at memory that should not have changed: hashes of what some CPU tensors hold.

torch counts in-place writes in a tensor's version, but not those through `p.data`, numpy views or raw pointers (a soft update
`target.data.copy_(...)`, a padding row `p.data[0] = 0`, pruning with `p.data[mask] = 0`). So the values are looked at too, natively:

- of a tensor of up to `WHOLE` bytes, every byte: any change is seen;
- of a larger one, one word of every row (of every stretch between two elements of its outermost dimension), at another place in each row; at
  most `ROWS` in all, evenly spread. A write to a whole row is seen, and one to a share f of all elements but with probability (1 - f) ** rows.

A write to a few elements of a large tensor that bypasses torch's counter can still go unseen.

Behind the kernels of a model none of it is in a core's caches, and reading takes longer than the rest of entering a call. So tensors are looked at
in parts, which the threads of a call share (`team.py`) where there are many lines of memory to read. The call begins when all parts are as they were.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import torch
from llvmlite import binding

from .loader import NativeLibrary, initialize, load_object

__all__ = ["ROWS", "WHOLE", "Fingerprint", "look_address"]

WHOLE = 1 << 16
ROWS = 1 << 10
LINE = 64
PART, SHARED = 1 << 9, 1 << 12
"""Lines of memory per part, but for one tensor that has more; and how many in all are worth several threads: some 30 microseconds from memory."""

_LANES = "<8 x i32>"
_PRIME = f"{_LANES} <{', '.join(['i32 16777619'] * 8)}>"
_MOVED = ", ".join(f"i32 {half + (i + 3) % 16}" for half in (0, 16) for i in range(16))
"""Bytes within each half of a register."""
_HALF = f"{_LANES} <{', '.join(['i32 15'] * 8)}>"


def _ir() -> str:
    """`i64 fingerprint(ptr ranges, i64 count)`: a range is four i64: address, bytes, stride between the rows to read (0: all bytes), width of a row.

    Every step is a bijection of the hash for a given word and of the word for a given hash: one changed word always shows. A product carries
    differences upwards only, and one of the top bit (a sign) not at all, so that two of them would cancel: bits move down before the next product.
    """
    wide = [f"""
  %at{i} = getelementptr i8, ptr %place, i64 {32 * i}
  %words{i} = load {_LANES}, ptr %at{i}, align 1
  %xored{i} = xor {_LANES} %lanes{i}, %words{i}
  %bytes{i} = bitcast {_LANES} %xored{i} to <32 x i8>
  %moved{i} = shufflevector <32 x i8> %bytes{i}, <32 x i8> undef, <32 x i32> <{_MOVED}>
  %turned{i} = bitcast <32 x i8> %moved{i} to {_LANES}
  %mixed{i} = mul {_LANES} %turned{i}, {_PRIME[len(_LANES) + 1:]}""" for i in range(4)]
    carried = [f"  %lanes{i} = phi {_LANES} [ zeroinitializer, %all ], [ %mixed{i}, %wide ]\n"
               f"  %last{i} = phi {_LANES} [ zeroinitializer, %all ], [ %mixed{i}, %wide ]" for i in range(4)]
    joined, name = [], "%last0"
    for i in range(1, 4):
        joined.append(f"  %xjoin{i} = xor {_LANES} {name}, %last{i}\n  %mjoin{i} = mul {_LANES} %xjoin{i}, {_PRIME[len(_LANES) + 1:]}\n"
                      f"  %hjoin{i} = lshr {_LANES} %mjoin{i}, {_HALF[len(_LANES) + 1:]}\n  %join{i} = xor {_LANES} %mjoin{i}, %hjoin{i}")
        name = f"%join{i}"
    joined.append(f"  %quarters = bitcast {_LANES} {name} to <4 x i64>")
    hashed = "%hash"
    for i in range(4):
        joined.append(f"  %quarter{i} = extractelement <4 x i64> %quarters, i32 {i}\n  %q{i} = xor i64 {hashed}, %quarter{i}\n"
                      f"  %m{i} = mul i64 %q{i}, 1099511628211\n  %h{i} = lshr i64 %m{i}, 32\n  %r{i} = xor i64 %m{i}, %h{i}")
        hashed = f"%r{i}"
    lines = "".join(wide)
    return f"""
declare i64 @llvm.fshl.i64(i64, i64, i64)

define i64 @fingerprint(ptr %ranges, i64 %count) {{
entry:
  %empty = icmp eq i64 %count, 0
  br i1 %empty, label %done, label %range
range:
  %i = phi i64 [ 0, %entry ], [ %next, %ended ]
  %hash = phi i64 [ 1469598103934665603, %entry ], [ %ended_hash, %ended ]
  %slot = mul i64 %i, 4
  %p0 = getelementptr i64, ptr %ranges, i64 %slot
  %p1 = getelementptr i64, ptr %p0, i64 1
  %p2 = getelementptr i64, ptr %p0, i64 2
  %p3 = getelementptr i64, ptr %p0, i64 3
  %address = load i64, ptr %p0
  %bytes = load i64, ptr %p1
  %stride = load i64, ptr %p2
  %width = load i64, ptr %p3
  %base = inttoptr i64 %address to ptr
  %is_whole = icmp eq i64 %stride, 0
  br i1 %is_whole, label %all, label %rows
all:
  %full = and i64 %bytes, -128
  %has_full = icmp ne i64 %full, 0
  br i1 %has_full, label %wide, label %tail_head
wide:
  %offset = phi i64 [ 0, %all ], [ %further, %wide ]
{chr(10).join(c.splitlines()[0] for c in carried)}
  %place = getelementptr i8, ptr %base, i64 %offset{lines}
  %further = add i64 %offset, 128
  %more = icmp ult i64 %further, %full
  br i1 %more, label %wide, label %tail_head
tail_head:
{chr(10).join(c.splitlines()[1] for c in carried)}
{chr(10).join(joined)}
  %has_tail = icmp ult i64 %full, %bytes
  br i1 %has_tail, label %tail, label %ended
tail:
  %byte_at = phi i64 [ %full, %tail_head ], [ %byte_next, %tail ]
  %tail_hash = phi i64 [ {hashed}, %tail_head ], [ %tail_mixed, %tail ]
  %byte_place = getelementptr i8, ptr %base, i64 %byte_at
  %byte = load i8, ptr %byte_place
  %byte_wide = zext i8 %byte to i64
  %tail_xored = xor i64 %tail_hash, %byte_wide
  %tail_mixed = mul i64 %tail_xored, 1099511628211
  %byte_next = add i64 %byte_at, 1
  %tail_more = icmp ult i64 %byte_next, %bytes
  br i1 %tail_more, label %tail, label %ended
rows:
  %row_start = phi i64 [ 0, %range ], [ %row_next, %rows ]
  %turn = phi i32 [ 0, %range ], [ %turn_next, %rows ]
  %row_hash = phi i64 [ %hash, %range ], [ %row_mixed, %rows ]
  %fraction = zext i32 %turn to i64
  %scaled = mul i64 %fraction, %width
  %within = lshr i64 %scaled, 32
  %unaligned = add i64 %row_start, %within
  %aligned = and i64 %unaligned, -8
  %final = sub i64 %bytes, 8
  %beyond = icmp ugt i64 %aligned, %final
  %word_at = select i1 %beyond, i64 %final, i64 %aligned
  %word_place = getelementptr i8, ptr %base, i64 %word_at
  %word = load i64, ptr %word_place, align 1
  %row_xored = xor i64 %row_hash, %word
  %row_turned = call i64 @llvm.fshl.i64(i64 %row_xored, i64 %row_xored, i64 29)
  %row_mixed = mul i64 %row_turned, 1099511628211
  %turn_next = add i32 %turn, -1640531527
  %row_next = add i64 %row_start, %stride
  %row_more = icmp ult i64 %row_next, %bytes
  br i1 %row_more, label %rows, label %ended
ended:
  %ended_hash = phi i64 [ {hashed}, %tail_head ], [ %tail_mixed, %tail ], [ %row_mixed, %rows ]
  %next = add i64 %i, 1
  %another = icmp ult i64 %next, %count
  br i1 %another, label %range, label %done
done:
  %result = phi i64 [ 0, %entry ], [ %ended_hash, %ended ]
  ret i64 %result
}}
"""


_LOOK = """
declare i32 @omp_get_max_threads()
declare i32 @aicc_region(ptr, ptr, ptr, i32, ptr)
declare void @aicc_launch(ptr, ptr, ptr)

; 0 parts (three i64 each: address of ranges, their number, hash), 1 number of parts, 2 the next part to look at, 3 how many have changed
%look = type { ptr, i64, i64, i64 }

; takes parts until there are none left or one has changed
define internal void @take_parts(ptr %look, i32 %thread) nounwind {
entry:
  %parts = load ptr, ptr %look
  %countp = getelementptr %look, ptr %look, i32 0, i32 1
  %nextp = getelementptr %look, ptr %look, i32 0, i32 2
  %changedp = getelementptr %look, ptr %look, i32 0, i32 3
  %count = load i64, ptr %countp
  br label %take
take:
  %i = atomicrmw add ptr %nextp, i64 1 monotonic
  %over = icmp uge i64 %i, %count
  br i1 %over, label %done, label %part
part:
  %at = mul i64 %i, 3
  %rangesp = getelementptr ptr, ptr %parts, i64 %at
  %numberp = getelementptr i64, ptr %rangesp, i64 1
  %hashp = getelementptr i64, ptr %rangesp, i64 2
  %ranges = load ptr, ptr %rangesp
  %number = load i64, ptr %numberp
  %hash = load i64, ptr %hashp
  %now = call i64 @fingerprint(ptr %ranges, i64 %number)
  %same = icmp eq i64 %now, %hash
  br i1 %same, label %take, label %changed
changed:
  %more = atomicrmw add ptr %changedp, i64 1 monotonic
  store atomic i64 %count, ptr %nextp monotonic, align 8
  br label %done
done:
  ret void
}

define internal void @steps(ptr %look, ptr %symbols, ptr %team) nounwind {
  call void @aicc_launch(ptr %team, ptr @take_parts, ptr %look)
  ret void
}

; how many of the parts have changed, or 1 if it stopped at one; by several threads where there is a `memory` (see team.py)
define i64 @look(ptr %parts, i64 %count, ptr %memory) nounwind {
entry:
  %look = alloca %look
  store %look zeroinitializer, ptr %look
  store ptr %parts, ptr %look
  %countp = getelementptr %look, ptr %look, i32 0, i32 1
  store i64 %count, ptr %countp
  %alone = icmp eq ptr %memory, null
  br i1 %alone, label %one, label %several
several:
  %threads = call i32 @omp_get_max_threads()
  %single = icmp slt i32 %threads, 2
  br i1 %single, label %one, label %region
region:
  %error = call i32 @aicc_region(ptr @steps, ptr %look, ptr null, i32 %threads, ptr %memory)
  br label %done
one:
  call void @take_parts(ptr %look, i32 0)
  br label %done
done:
  %changedp = getelementptr %look, ptr %look, i32 0, i32 3
  %changed = load atomic i64, ptr %changedp acquire, align 8
  ret i64 %changed
}
"""


@cache
def _library() -> NativeLibrary:
    initialize()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=2, reloc="pic", codemodel="default")
    module = binding.parse_assembly(_ir() + _LOOK)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    return load_object(machine.emit_object(module), ["fingerprint", "look"])


def look_address() -> int:
    """The address of `i64 look(ptr parts, i64 count, ptr memory)`: 0 if nothing has changed."""
    return _library().address("look")


@cache
def _function() -> Callable[[int, int], int]:
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)(_library().address("fingerprint"))


@cache
def _look() -> Callable[[int, int, int | None], int]:
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)(look_address())


class Fingerprint:
    """What some tensors hold now (CPU tensors; others are passed over), and whether they still do. The tensors must be alive.

    `each` has the hash of every tensor alone, 0 for those passed over.
    """

    __slots__ = ("_memory", "_parts", "_ranges", "_read", "each", "parts")

    def __init__(self, tensors: Sequence[torch.Tensor]):
        found = [_range(t) if t.device.type == "cpu" else None for t in tensors]
        ranges = [r for r in found if r is not None]
        self._ranges = (ctypes.c_int64 * (4 * len(ranges)))(*[n for r in ranges for n in r])
        self._read = _function()
        at = ctypes.addressof(self._ranges)
        places = iter(range(at, at + 32 * len(ranges), 32))
        self.each = [0 if r is None else int(self._read(next(places), 1)) for r in found]
        rows = [(at + 32 * first, count, int(self._read(at + 32 * first, count))) for first, count in _split([_lines(*r) for r in ranges])]
        self._parts = (ctypes.c_int64 * (3 * len(rows)))(*[n for row in rows for n in row])
        self._memory = (ctypes.c_int64 * 3)()  # what the team's threads were worth
        self.parts = len(rows)

    @property
    def block(self) -> tuple[int, int, int]:
        """What native code needs to look for itself: address and number of parts, and the team's memory, valid while this object is there.

        0 for the memory where one thread is enough."""
        lines = sum(_lines(*self._ranges[i:i + 4]) for i in range(0, len(self._ranges), 4))
        return ctypes.addressof(self._parts), self.parts, ctypes.addressof(self._memory) if lines >= SHARED else 0

    @property
    def hash(self) -> tuple[int, ...]:
        """Of each part, at the time of making."""
        return tuple(self._parts[2::3])

    def unchanged(self) -> bool:
        return not _look()(ctypes.addressof(self._parts), self.parts, None)


def _lines(address: int, size: int, stride: int, width: int) -> int:
    """Lines of memory that are read of a range."""
    return -(-size // (stride or LINE))


def _split(lines: Sequence[int]) -> list[tuple[int, int]]:
    """(first, number) of ranges with these lines, so that each part has about `PART`."""
    parts: list[tuple[int, int]] = []
    first = total = 0
    for i, n in enumerate(lines):
        if total and total + n > PART:
            parts.append((first, i - first))
            first, total = i, 0
        total += n
    return [*parts, (first, len(lines) - first)] if lines else []


def _range(t: torch.Tensor) -> tuple[int, int, int, int]:
    """Address, bytes from the first to behind the last element, bytes between rows to look at (0: everything), bytes of a row."""
    if not t.numel():
        return 0, 0, 0, 0
    width = t.element_size()
    dims = sorted((s, n) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1)
    span = sum((n - 1) * s for s, n in dims) * width + width
    if span <= WHOLE:
        return t.data_ptr(), span, 0, 0
    row = sum((n - 1) * s for s, n in dims[:-1]) * width + width
    stride = dims[-1][0] * width
    fewest = -(-span // ROWS)  # of more rows than `ROWS`, every second, or third, ...
    return t.data_ptr(), span, stride * -(-fewest // stride), row
