"""Threads of our own for compiled parallel regions (`options={"own_threads": True}`): a region never waits for a thread that has not come.

    pool = make_pool(symbols)               # once per process; None where there are no futexes
    pool.parallel                           # address of  void parallel(body, data, threads, 0), as GOMP_parallel
    pool.forget()                           # in a forked child, which has none of the threads

OpenMP's regions begin and end together: where a core has a busy neighbour, the thread that should run there is put aside for a whole slice of the
scheduler (3 to 8 ms), and every region of every launch waits for it. Here `body` takes pieces of the work from a counter until there are none
left, whoever calls it, so a region is done when its pieces are: the caller opens it, works, closes it, and then waits only for threads that came
in meanwhile. Closed regions cannot be entered: the state that threads enter by (one atomic word) holds the region's number.

Waiting is active for a short time, then in the kernel (a futex). The caller waits actively for a quarter of what its own part took, about two
pieces, for a thread that takes longer is not running, and gets the caller's core if that sleeps. Threads wait for the next region as long, and a
little longer. So they neither use up their share of a core that others want, nor sleep between the launches of one program.

One region at a time: a region inside a region is run by the calling thread alone, and one of another thread of the program by OpenMP. With fewer
threads than before (`torch.set_num_threads`), those too many end.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import llvmlite.binding as llvm

__all__ = ["NEEDED", "Pool", "make_pool"]

NEEDED = ("syscall", "pthread_create", "pthread_detach", "pthread_self", "clock_gettime", "omp_set_num_threads", "GOMP_parallel")
"""What the pool calls: addresses that `make_pool` needs."""
_MACHINES = {"x86_64": ("call void @llvm.x86.sse2.pause()", "declare void @llvm.x86.sse2.pause()", 202),
             "aarch64": ("call void @llvm.aarch64.hint(i32 1)", "declare void @llvm.aarch64.hint(i32)", 98)}
"""How to pause in a loop, and the number of the system call futex."""
CALLER_SPINS, THREAD_SPINS, MOST = 10_000, 50_000, 200_000
"""Nanoseconds of active waiting: at least, of the caller and of the others, and at most beside that."""


@dataclass(frozen=True)
class Pool:
    """`parallel` is the address of the function that runs a region, `reset` that of the one that forgets all threads."""

    parallel: int
    reset: int

    def forget(self) -> None:
        """For a forked child: there are no threads, and no region is running."""
        ctypes.CFUNCTYPE(None)(self.reset)()


def make_pool(symbols: Mapping[str, int]) -> Pool | None:
    """Compiles the pool, which then stays for the life of the process; None where the machine is not known or one of `NEEDED` is missing."""
    machine = _MACHINES.get(platform.machine())
    if machine is None or not sys.platform.startswith("linux") or any(not symbols.get(name) for name in NEEDED):
        return None
    pause, declaration, futex = machine
    text = _CODE.replace("PAUSE", pause).replace("FUTEX", str(futex)).replace("MOST", str(MOST))
    text = text.replace("CALLER_SPINS", str(CALLER_SPINS)).replace("THREAD_SPINS", str(THREAD_SPINS)) + declaration
    target = llvm.Target.from_default_triple().create_target_machine(reloc="pic", codemodel="small")
    module = llvm.parse_assembly(text, llvm.create_context())
    module.triple = target.triple
    builder = llvm.JITLibraryBuilder().add_object_img(target.emit_object(module))
    for name in NEEDED:
        builder.import_symbol(name, symbols[name])
    for name in ("aicc_parallel", "aicc_reset"):
        builder.export_symbol(name)
    jit = llvm.create_lljit_compiler(target, use_jit_link=True, suppress_errors=True)
    tracker = builder.link(jit, "aicc.pool")
    pool = Pool(int(tracker["aicc_parallel"]), int(tracker["aicc_reset"]))
    tracker.detach()  # threads sleep in this code until the process ends: it is never unmapped
    jit.detach()
    return pool


# `state`: the region's number in the upper half (the futex of waiting threads), then open (1 bit), seats (15), and how many have come (16).
_CODE = """
@state = internal global i64 0, align 128
@sleepers = internal global i32 0, align 128
@left = internal global i32 0, align 128
@waiting = internal global i32 0, align 128
@busy = internal global i32 0, align 128
@owner = internal global i64 0, align 128
@started = internal global i32 0
@excess = internal global i32 0
@body = internal global ptr null, align 128
@data = internal global ptr null

declare i64 @syscall(i64, ...)
declare i32 @pthread_create(ptr, ptr, ptr, ptr)
declare i32 @pthread_detach(i64)
declare i64 @pthread_self()
declare i32 @clock_gettime(i32, ptr)
declare void @omp_set_num_threads(i32)
declare void @GOMP_parallel(ptr, ptr, i32, i32)

define internal i64 @now() nounwind {
  %at = alloca { i64, i64 }
  %r = call i32 @clock_gettime(i32 1, ptr %at)
  %s = load i64, ptr %at
  %second = getelementptr { i64, i64 }, ptr %at, i32 0, i32 1
  %ns = load i64, ptr %second
  %s9 = mul i64 %s, 1000000000
  %t = add i64 %s9, %ns
  ret i64 %t
}

; how long to wait actively after work that took so long: a quarter of it, and not less than `least`
define internal i64 @patience(i64 %took, i64 %least) nounwind {
  %quarter = ashr i64 %took, 3
  %over = icmp sgt i64 %quarter, MOST
  %part = select i1 %over, i64 MOST, i64 %quarter
  %all = add i64 %part, %least
  ret i64 %all
}

define internal ptr @thread(ptr %born) nounwind {
entry:
  call void @omp_set_num_threads(i32 1)
  %b64 = ptrtoint ptr %born to i64
  %first = trunc i64 %b64 to i32
  %number = getelementptr i8, ptr @state, i64 4
  br label %wait
wait:
  %seen = phi i32 [ %first, %entry ], [ %gen, %rest ], [ %gen, %done ]
  %budget = phi i64 [ THREAD_SPINS, %entry ], [ THREAD_SPINS, %rest ], [ %longer, %done ]
  %since = call i64 @now()
  br label %spin
spin:
  %n = phi i32 [ 0, %wait ], [ %n1, %again ], [ 0, %clock ]
  PAUSE
  %g = load atomic i32, ptr %number monotonic, align 4
  %new = icmp ne i32 %g, %seen
  br i1 %new, label %join, label %again
again:
  %n1 = add i32 %n, 1
  %full = icmp uge i32 %n1, 32
  br i1 %full, label %clock, label %spin
clock:
  %t = call i64 @now()
  %spent = sub i64 %t, %since
  %late = icmp sgt i64 %spent, %budget
  br i1 %late, label %sleep, label %spin
sleep:
  %in = atomicrmw add ptr @sleepers, i32 1 seq_cst
  br label %doze
doze:
  %g2 = load atomic i32, ptr %number seq_cst, align 4
  %new2 = icmp ne i32 %g2, %seen
  br i1 %new2, label %awake, label %kernel
kernel:
  %seen64 = zext i32 %seen to i64
  %slept = call i64 (i64, ...) @syscall(i64 FUTEX, ptr %number, i64 128, i64 %seen64, i64 0, i64 0, i64 0)
  br label %doze
awake:
  %out = atomicrmw sub ptr @sleepers, i32 1 seq_cst
  br label %join
join:
  %e = load atomic i32, ptr @excess monotonic, align 4
  %many = icmp sgt i32 %e, 0
  br i1 %many, label %leave, label %look
leave:
  %e1 = sub i32 %e, 1
  %cut = cmpxchg ptr @excess, i32 %e, i32 %e1 monotonic monotonic
  %gone = extractvalue { i32, i1 } %cut, 1
  br i1 %gone, label %end, label %join
end:
  ret ptr null
look:
  %s = load atomic i64, ptr @state acquire, align 8
  %high = lshr i64 %s, 32
  %gen = trunc i64 %high to i32
  %open = and i64 %s, 2147483648
  %closed = icmp eq i64 %open, 0
  br i1 %closed, label %rest, label %seat
seat:
  %come = and i64 %s, 65535
  %s16 = lshr i64 %s, 16
  %seats = and i64 %s16, 32767
  %free = icmp ult i64 %come, %seats
  br i1 %free, label %take, label %rest
take:
  %s1 = add i64 %s, 1
  %try = cmpxchg ptr @state, i64 %s, i64 %s1 acq_rel acquire
  %taken = extractvalue { i64, i1 } %try, 1
  br i1 %taken, label %run, label %look
rest:
  br label %wait
run:
  %f = load ptr, ptr @body
  %d = load ptr, ptr @data
  %t0 = call i64 @now()
  call void %f(ptr %d)
  %t1 = call i64 @now()
  %l = atomicrmw add ptr @left, i32 1 seq_cst
  %w = load atomic i32, ptr @waiting seq_cst, align 4
  %awaited = icmp ne i32 %w, 0
  br i1 %awaited, label %wake, label %done
wake:
  %woken = call i64 (i64, ...) @syscall(i64 FUTEX, ptr @left, i64 129, i64 1, i64 0, i64 0, i64 0)
  br label %done
done:
  %took = sub i64 %t1, %t0
  %longer = call i64 @patience(i64 %took, i64 THREAD_SPINS)
  br label %wait
}

define void @aicc_parallel(ptr %body, ptr %data, i32 %threads, i32 %flags) nounwind {
entry:
  %handle = alloca i64
  %self = call i64 @pthread_self()
  %got = cmpxchg ptr @busy, i32 0, i32 1 acquire monotonic
  %mine = extractvalue { i32, i1 } %got, 1
  br i1 %mine, label %own, label %taken
taken:
  %who = load atomic i64, ptr @owner monotonic, align 8
  %inside = icmp eq i64 %who, %self
  br i1 %inside, label %alone, label %other
alone:
  call void %body(ptr %data)
  ret void
other:
  call void @GOMP_parallel(ptr %body, ptr %data, i32 0, i32 0)
  ret void
own:
  store atomic i64 %self, ptr @owner monotonic, align 8
  %most = call i32 @llvm.umin.i32(i32 %threads, i32 32767)
  %need = sub i32 %most, 1
  %before = load i64, ptr @state
  %high = lshr i64 %before, 32
  %born = inttoptr i64 %high to ptr
  br label %grow
grow:
  %have = load i32, ptr @started
  %few = icmp slt i32 %have, %need
  br i1 %few, label %create, label %enough
create:
  %r = call i32 @pthread_create(ptr %handle, ptr null, ptr @thread, ptr %born)
  %made = icmp eq i32 %r, 0
  br i1 %made, label %created, label %open
created:
  %h = load i64, ptr %handle
  %r2 = call i32 @pthread_detach(i64 %h)
  %more = add i32 %have, 1
  store i32 %more, ptr @started
  br label %grow
enough:
  %over = sub i32 %have, %need
  %some = icmp sgt i32 %over, 0
  br i1 %some, label %shrink, label %open
shrink:
  %x = atomicrmw add ptr @excess, i32 %over monotonic
  store i32 %need, ptr @started
  br label %open
open:
  %seats = load i32, ptr @started
  store ptr %body, ptr @body
  store ptr %data, ptr @data
  store atomic i32 0, ptr @left monotonic, align 4
  %next = add i64 %high, 1
  %n32 = shl i64 %next, 32
  %seats64 = zext i32 %seats to i64
  %s16 = shl i64 %seats64, 16
  %o1 = or i64 %n32, %s16
  %o2 = or i64 %o1, 2147483648
  store atomic i64 %o2, ptr @state seq_cst, align 8
  %asleep = load atomic i32, ptr @sleepers seq_cst, align 4
  %any = icmp sgt i32 %asleep, 0
  br i1 %any, label %rouse, label %work
rouse:
  %number = getelementptr i8, ptr @state, i64 4
  %ex = load atomic i32, ptr @excess monotonic, align 4
  %ending = icmp sgt i32 %ex, 0
  %count = select i1 %ending, i64 2147483647, i64 %seats64
  %woken = call i64 (i64, ...) @syscall(i64 FUTEX, ptr %number, i64 129, i64 %count, i64 0, i64 0, i64 0)
  br label %work
work:
  %t0 = call i64 @now()
  call void %body(ptr %data)
  %t1 = call i64 @now()
  %last = atomicrmw and ptr @state, i64 -2147483649 seq_cst
  %came = and i64 %last, 65535
  %all = trunc i64 %came to i32
  %took = sub i64 %t1, %t0
  %budget = call i64 @patience(i64 %took, i64 CALLER_SPINS)
  br label %spin
spin:
  %n = phi i32 [ 0, %work ], [ %n1, %again ], [ 0, %clock ]
  %l = load atomic i32, ptr @left acquire, align 4
  %ready = icmp eq i32 %l, %all
  br i1 %ready, label %done, label %again
again:
  PAUSE
  %n1 = add i32 %n, 1
  %full = icmp uge i32 %n1, 32
  br i1 %full, label %clock, label %spin
clock:
  %t = call i64 @now()
  %spent = sub i64 %t, %t1
  %late = icmp sgt i64 %spent, %budget
  br i1 %late, label %sleep, label %spin
sleep:
  store atomic i32 1, ptr @waiting seq_cst, align 4
  br label %doze
doze:
  %l2 = load atomic i32, ptr @left seq_cst, align 4
  %ready2 = icmp eq i32 %l2, %all
  br i1 %ready2, label %awake, label %kernel
kernel:
  %l64 = zext i32 %l2 to i64
  %slept = call i64 (i64, ...) @syscall(i64 FUTEX, ptr @left, i64 128, i64 %l64, i64 0, i64 0, i64 0)
  br label %doze
awake:
  store atomic i32 0, ptr @waiting seq_cst, align 4
  br label %done
done:
  store atomic i64 0, ptr @owner monotonic, align 8
  store atomic i32 0, ptr @busy release, align 4
  ret void
}

define void @aicc_reset() nounwind {
  store i64 0, ptr @state
  store i32 0, ptr @sleepers
  store i32 0, ptr @left
  store i32 0, ptr @waiting
  store i32 0, ptr @started
  store i32 0, ptr @excess
  store i64 0, ptr @owner
  store atomic i32 0, ptr @busy release, align 4
  ret void
}

declare i32 @llvm.umin.i32(i32, i32)
"""
