"""Which hazards of racecheck are Triton's own dispatch of warps, and which are not:

    python tests/gpu/dispatch_word.py LOG FOLDER       # what compute-sanitizer said; where the cubins of its kernels are

`gl.warp_specialize` tells the warps of other partitions what to do through a byte each in shared memory. In SASS (Triton 3.6 and 3.9, sm_90):

    first partition                     other warps, in a loop
    STS    [S], numbers of partitions
    BAR.SYNC 1                    (a)   BAR.SYNC 1
                                        LDS.U8 [S + warp - 4]
    BAR.SYNC 1                    (b)   BAR.SYNC 1, after a branch by what was read
    its work                            its work
    BAR.SYNC 1                    (c)   BAR.SYNC 1
    STS    [S], "leave"
    BAR.SYNC 1                    (d)   BAR.SYNC 1, and from the beginning: LDS.U8, leaves

Each BAR.SYNC 1 waits for all threads of the block, so the read lies between the two writes, with a barrier on either side. Racecheck does not follow
that (see NOTES.md for the minimal kernel that shows it), and names one read and two writes. This file recognises a hazard as that one by the
instructions at its offsets and the barriers about them: one read, which is the only load of one byte, right behind a barrier 1 of all threads and
before another or the jump table (its targets begin with one); writes to the address that it starts from, from one uniform register, with such a
barrier as the next one. Prints a line for each hazard; the exit code is 1 if one of them is anything else.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import triton

__all__ = ["Hazard", "hazards", "instructions", "is_dispatch", "others"]

_ACCESS = re.compile(r"(Read|Write) access at (\S+?)\+(0x[0-9a-f]+)")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_FUNCTION = re.compile(r"^\.text\.(\S+):")
_ALL_THREADS = re.compile(r"^BAR\.SYNC(?:\.DEFER_BLOCKING)? 0x1$")
_SYNC = re.compile(r"\b(?:BAR|SYNCS|WARPSYNC|EXIT|BRX)\b")
_SYNC_OR_BRANCH = re.compile(rf"{_SYNC.pattern}|\bBRA\b")
_READ = re.compile(r"^LDS\.U8 R\d+, \[.*?(?:\+(-?)0x([0-9a-f]+))?\]$")
_WRITE = re.compile(r"^STS(?:\.64|\.128|\.U16|\.U8)? \[UR\d+(?:\+(-?)0x([0-9a-f]+))?\], \w+$")
DEFAULT_WARPS = 4


@dataclass(frozen=True)
class Hazard:
    """One report of racecheck: the kernel, and the offsets of its instructions that read and that write."""

    kernel: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]


def hazards(log: str) -> list[Hazard]:
    """Reports of `--racecheck-report analysis`: "Race reported between Read access at K+0x1 ... and Write access at K+0x2 ..."."""
    found: list[list[tuple[str, str, int]]] = []
    for line in log.splitlines():
        accesses = [(kind, kernel, int(offset, 16)) for kind, kernel, offset in _ACCESS.findall(line)]
        if "Race reported between" in line:
            found.append(accesses)
        elif accesses and found:
            found[-1].extend(accesses)
    return [Hazard(h[0][1], tuple(o for k, _, o in h if k == "Read"), tuple(o for k, _, o in h if k == "Write")) for h in found if h]


def instructions(cubin: Path) -> dict[str, dict[int, str]]:
    """Of each function: its instructions by offset."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    text = subprocess.run([str(tool), "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    found: dict[str, dict[int, str]] = {}
    code: dict[int, str] = {}
    for line in text.splitlines():
        if (start := _FUNCTION.match(line)) is not None:
            code = found.setdefault(start[1], {})
        elif (made := _LINE.match(line)) is not None:
            code[int(made[1], 16)] = made[2]
    return found


def is_dispatch(hazard: Hazard, code: Mapping[int, str]) -> bool:
    """See the module docstring."""
    offsets = sorted(code)
    place = {offset: k for k, offset in enumerate(offsets)}
    if len(set(hazard.reads)) != 1 or not hazard.writes or not {*hazard.reads, *hazard.writes} <= place.keys():
        return False

    def nearest(at: int, step: int, kind: re.Pattern[str]) -> str:
        """The nearest instruction of a kind before or behind."""
        k = place[at] + step
        while 0 <= k < len(offsets) and not kind.search(code[offsets[k]]):
            k += step
        return code[offsets[k]] if 0 <= k < len(offsets) else ""

    at = hazard.reads[0]
    read = _READ.match(code[at])
    lone = sum(text.startswith("LDS.U8") for text in code.values()) == 1
    behind = re.sub(r"^@!?P\d ", "", nearest(at, 1, _SYNC))
    if read is None or not lone or not _ALL_THREADS.match(nearest(at, -1, _SYNC_OR_BRANCH)) or not (_ALL_THREADS.match(behind) or behind.startswith("BRX")):
        return False
    for w in set(hazard.writes):
        write = _WRITE.match(code[w])
        if write is None or _number(write) != _number(read) + DEFAULT_WARPS or not _ALL_THREADS.match(nearest(w, 1, _SYNC_OR_BRANCH)):
            return False
    return True


def _number(found: re.Match[str]) -> int:
    return int(f"{found[1] or ''}{found[2] or 0}", 16)


def others(found: Iterable[Hazard], cubins: Iterable[Path]) -> list[Hazard]:
    """The hazards that are not the dispatch in every cubin that may be theirs: those of a kernel of that name with instructions on shared memory at all
    the offsets."""
    codes: dict[str, list[dict[int, str]]] = {}
    for cubin in cubins:
        for kernel, code in instructions(cubin).items():
            codes.setdefault(kernel, []).append(code)

    def known(hazard: Hazard) -> bool:
        may = [c for c in codes.get(hazard.kernel, ()) if all(re.search(r"\b(?:LDS|STS|LDSM|STSM|ATOMS|SYNCS)\b", c.get(o, ""))
                                                               for o in (*hazard.reads, *hazard.writes))]
        return bool(may) and all(is_dispatch(hazard, c) for c in may)

    return [h for h in found if not known(h)]


def main() -> int:
    log = Path(sys.argv[1]).read_text(errors="replace")
    found = hazards(log)
    kernels = {h.kernel for h in found}
    cubins = {p.read_bytes(): p for p in Path(sys.argv[2]).rglob("*.cubin") if p.stem in kernels}.values()
    strange = others(found, cubins)
    for h in found:
        offsets = f"reads at {', '.join(map(hex, h.reads)) or '-'}, writes at {', '.join(map(hex, h.writes)) or '-'}"
        print(f"{h.kernel}: {'NOT KNOWN' if h in strange else 'dispatch of warps by Triton'}: {offsets}")
    counted = sum(int(n) for n in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", log))
    if counted > len(found):
        print(f"{counted - len(found)} more that this does not read")
    return 1 if strange or counted > len(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
