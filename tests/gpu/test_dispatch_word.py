"""What `sanitize.sh` takes for Triton's dispatch of warps is that, and nothing else: on the SASS that the installed Triton makes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from .dispatch_word import Hazard, hazards, instructions, is_dispatch, others

LOG = """========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at {kernel}+{read:#x}
=========     and Write access at {kernel}+{first:#x} [165 hazards]
=========     and Write access at {kernel}+{last:#x} in file.py:12 [267 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@gluon.jit
def _work(p, who: gl.constexpr):
    """Numbers of four warps through shared memory, and back in another order: loads, stores and barriers of a partition's own."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    tile = gl.allocate_shared_memory(gl.int32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    at = gl.program_id(0) * 256 + who * 128 + gl.arange(0, 128, layout=layout)
    tile.store(gl.load(p + at))
    other: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    gl.store(p + at, gl.convert_layout(tile.load(other), layout) + who)


@gluon.jit
def partitions(p):
    gl.warp_specialize([(_work, (p, gl.constexpr(0))), (_work, (p, gl.constexpr(1)))], [4], [128])


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = triton.compile(GluonASTSource(partitions, {"p": "*i32"}, {}, {}), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    path = tmp_path_factory.mktemp("cubins") / "partitions.cubin"
    path.write_bytes(made.asm["cubin"])
    return path


def test_dispatch_is_told_from_all_else(cubin: Path) -> None:
    code = instructions(cubin)["partitions"]
    read, = (o for o, text in code.items() if text.startswith("LDS.U8"))
    writes = [o for o, text in code.items() if re.match(r"STS\S* \[UR", text)]
    rest = [o for o, text in code.items() if re.match(r"(?:LDS|STS)", text) and o not in (read, *writes)]
    assert len(writes) == 2 and len(rest) >= 4, "the word at the beginning and at the end; tiles of two partitions"
    log = LOG.format(kernel="partitions", read=read, first=writes[0], last=writes[1])
    found = hazards(log)
    assert found == [Hazard("partitions", (read,), tuple(writes))] and is_dispatch(found[0], code) and others(found, [cubin]) == []
    for o in rest:
        loads = code[o].startswith("LDS")
        changed = Hazard("partitions", (o,) if loads else (read,), tuple(writes) if loads else (writes[0], o))
        assert not is_dispatch(changed, code) and others([changed], [cubin]) == [changed]
    assert not is_dispatch(Hazard("partitions", (), tuple(writes)), code), "two writes and no read are something else"
    assert not is_dispatch(Hazard("partitions", (read,), ()), code)
    assert others([Hazard("another", (read,), tuple(writes))], [cubin]), "a kernel that nobody has is not known"


def test_dispatch_without_its_barriers_is_not_that(cubin: Path) -> None:
    code = dict(instructions(cubin)["partitions"])
    read, = (o for o, text in code.items() if text.startswith("LDS.U8"))
    writes = tuple(o for o, text in code.items() if re.match(r"STS\S* \[UR", text))
    before = max(o for o, text in code.items() if text.startswith("BAR") and o < read)
    for at in (before, *(min(o for o, text in code.items() if text.startswith("BAR") and o > w) for w in writes)):
        for weaker in ("NOP", "BAR.SYNC.DEFER_BLOCKING 0x2, 0x80", "BAR.ARV 0x1, 0x180"):
            assert not is_dispatch(Hazard("partitions", (read,), writes), {**code, at: weaker})
