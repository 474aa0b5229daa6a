"""The threads of one call of a compiled program: one OpenMP region per call, whose threads serve all of its launches.

    team = make_team(symbols)     # once per process
    team.region                   # i32 aicc_region(steps, table, symbols, threads, memory): steps(table, symbols, team) with a team; its error word
    team.launch                   # void aicc_launch(team, body, data): body(data, thread) on the caller and on every thread that comes

An OpenMP region per launch would begin and end with all threads: where a core has a busy neighbour, the thread that should run there is put aside
for a whole slice of the scheduler (3 to 8 ms), and every launch would wait for it. Here `body` takes pieces of the work until there are none left,
whoever calls it, so a launch is done when its pieces are: the caller opens it, works, closes it, and then waits only for threads that came in
meanwhile. A closed launch cannot be entered: the word that threads enter by (`state`) holds its number. The threads are OpenMP's, that is torch's:
a second set would find those of the last eager operator spinning on its cores.

Threads wait actively for a time, then in the kernel (a futex; where there are none, by yielding). Only the end of a call waits for all: its last
launch is one that every thread has to enter.

A call that is over in less than a slice of the scheduler may take less time without its threads: it waits for one that is put aside in the middle of
a piece, and no other can take that piece over, for its thread writes to the results when it goes on. `memory`, 24 bytes per compiled function that
begin as zeros, is what the calls before have seen. One that waited long (LATE) is followed by some on the caller's thread alone. If they
take less time by an eighth, the next 8 calls are alone too, then 16 after the next look at the threads, up to 64; if they do not, as many calls do
not try again.

A team lives on the caller's stack as long as its region. So calls from several Python threads have teams of their own, and a fork inherits none.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import llvmlite.binding as llvm

__all__ = ["NEEDED", "Team", "make_team"]

NEEDED = ("clock_gettime", "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "syscall", "sched_yield")
"""What the code calls: addresses that `make_team` needs."""
_PAUSES = {"x86_64": ("call void @llvm.x86.sse2.pause()", "declare void @llvm.x86.sse2.pause()"),
           "aarch64": ("call void @llvm.aarch64.isb(i32 15)", "declare void @llvm.aarch64.isb(i32)")}
"""How to pause in a loop."""
_FUTEXES = {"x86_64": 202, "aarch64": 98}
"""The number of Linux's system call."""
JOIN, IDLE, CROWDED = 6e-3, 1e-3, 20e-6
"""Seconds of active waiting. Of the caller for the end of a launch: longer than a slice of the scheduler, as OpenMP (libgomp) waits, for a thread
that took its core meanwhile would keep it, waiting actively for OpenMP's next region. Of the others for the next launch: so short that who waits for
a caller that is put aside gives it the core. Of all where there are more threads than cores. A pause is 65 cycles on AMD's Zen 3 and 140 on Intel
since Skylake, so how many fill these times is measured when the code is loaded."""
LATE = 500_000
"""Nanoseconds, and a quarter of the call, that a call waits for threads before it is suspected to be quicker alone: waking one takes a tenth of
that. Alone it takes four times as long at most, or is not tried."""
FEW, MANY, FIRST = 8, 64, 3
"""Calls between two looks at whether the threads are better than the caller alone, at first and at last; and how many alone are not judged: the
threads of the call before spin in OpenMP for some milliseconds, on whatever core."""
SAMPLE, ROUNDS = 4_000, 5


@dataclass(frozen=True)
class Team:
    """Addresses of the two functions, and the seconds of one look at a word that a thread waits for, with its pause."""

    region: int
    launch: int
    spin: float


def make_team(symbols: Mapping[str, int]) -> Team:
    """Compiles the code, which then stays for the life of the process: threads may wait in it."""
    machine = platform.machine()
    pause, declaration = _PAUSES.get(machine, ("", ""))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    futex = _FUTEXES.get(machine) if sys.platform.startswith("linux") else None
    words = {**_WORDS, "PAUSE": pause, "CORES": cores, "FUTEX": futex, "CLOCK": getattr(time, "CLOCK_MONOTONIC", 1),
             "LATE": LATE, "FEW": FEW, "MANY": MANY, "FIRST": FIRST}
    text = _CODE + declaration + (_YIELDING if futex is None else _FUTEX)
    for word, value in words.items():
        text = text.replace(word, str(value))
    target = llvm.Target.from_default_triple().create_target_machine(reloc="pic", codemodel="small")
    module = llvm.parse_assembly(text, llvm.create_context())
    module.triple = target.triple
    builder = llvm.JITLibraryBuilder().add_object_img(target.emit_object(module))
    for name in NEEDED:
        builder.import_symbol(name, symbols[name])
    for name in ("aicc_region", "aicc_launch", "aicc_spin", "aicc_patience"):
        builder.export_symbol(name)
    jit = llvm.create_lljit_compiler(target, use_jit_link=True, suppress_errors=True)
    tracker = builder.link(jit, "aicc.team")
    team = Team(int(tracker["aicc_region"]), int(tracker["aicc_launch"]), seconds_of_spin(int(tracker["aicc_spin"])))
    patience = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(int(tracker["aicc_patience"]))
    patience(*(max(1, round(t / team.spin)) for t in (JOIN, IDLE, CROWDED)))
    tracker.detach()
    jit.detach()
    return team


def seconds_of_spin(address: int) -> float:
    """Of one trip of a waiting loop. `address`: of a function that does so many of them as it is told. The quickest round counts: a thread may be put
    aside within one."""
    spin = ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        spin(SAMPLE)
        rounds.append(time.perf_counter() - start)
    return max(min(rounds) / SAMPLE, 1e-10)


def _fields(**numbers: int) -> str:
    """Addresses of a team's fields."""
    return "\n".join(f"  %{name} = getelementptr %team, ptr %team, i32 0, i32 {n}" for name, n in numbers.items()).strip()


_WORDS = {"LAUNCH": _fields(state=7, bodyp=10, datap=11, left=13) + "\n  %number = getelementptr i8, ptr %state, i64 4",
          "CALL": _fields(stepsp=2, tablep=3, symbolsp=4)}
"""What several functions of the code begin with."""
_FUTEX = """
define internal void @sleep(ptr %word, i32 %old) nounwind {
  %old64 = zext i32 %old to i64
  %r = call i64 (i64, ...) @syscall(i64 FUTEX, ptr %word, i64 128, i64 %old64, i64 0, i64 0, i64 0)
  ret void
}
define internal void @rouse(ptr %word) nounwind {
  %r = call i64 (i64, ...) @syscall(i64 FUTEX, ptr %word, i64 129, i64 2147483647, i64 0, i64 0, i64 0)
  ret void
}
"""
_YIELDING = """
define internal void @sleep(ptr %word, i32 %old) nounwind {
  %r = call i32 @sched_yield()
  ret void
}
define internal void @rouse(ptr %word) nounwind {
  ret void
}
"""
# `state`: the launch's number in the upper half (`number`, what threads wait for), then open (1 bit), then how many have come.
# `left`: how many of those have finished. Each waiting word has the number of threads that sleep on it beside it.
_CODE = """
%team = type { i32, i32, ptr, ptr, ptr, i64, [24 x i8],  i64, i32, [52 x i8],  ptr, ptr, [48 x i8],  i32, i32, [56 x i8] }
; 0 error, 1 threads, 2 steps, 3 table, 4 symbols, 5 spins, 6 nanoseconds that the caller waited, and when it ended
; 7 state, 8 sleepers;  10 body, 11 data;  13 left, 14 sleepers

; how often a thread looks at a word before it sleeps: at a launch's end, for the next launch, and both where cores are few
@join_spins = internal global i64 1
@idle_spins = internal global i64 1
@crowded_spins = internal global i64 1

declare i64 @llvm.umin.i64(i64, i64)
declare i32 @llvm.smin.i32(i32, i32)
declare i32 @llvm.smax.i32(i32, i32)
declare i64 @syscall(i64, ...)
declare i32 @sched_yield()
declare i32 @clock_gettime(i32, ptr)
declare void @GOMP_parallel(ptr, ptr, i32, i32)
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()

; looks at the word until it is no longer `old` (true), or that often
define internal i1 @look(ptr %word, i32 %old, i64 %most) nounwind {
entry:
  br label %spin
spin:
  %n = phi i64 [ 0, %entry ], [ %n1, %again ]
  %v = load atomic i32, ptr %word acquire, align 4
  %new = icmp ne i32 %v, %old
  br i1 %new, label %done, label %again
again:
  PAUSE
  %n1 = add i64 %n, 1
  %full = icmp uge i64 %n1, %most
  br i1 %full, label %done, label %spin
done:
  ret i1 %new
}

; returns when the word is no longer `old`
define internal void @await(ptr %word, i32 %old, i64 %most) nounwind {
  %new = call i1 @look(ptr %word, i32 %old, i64 %most)
  br i1 %new, label %done, label %bed
bed:
  %sleepers = getelementptr i32, ptr %word, i32 1
  %in = atomicrmw add ptr %sleepers, i32 1 seq_cst
  br label %doze
doze:
  %v2 = load atomic i32, ptr %word seq_cst, align 4
  %new2 = icmp ne i32 %v2, %old
  br i1 %new2, label %awake, label %kernel
kernel:
  call void @sleep(ptr %word, i32 %old)
  br label %doze
awake:
  %out = atomicrmw sub ptr %sleepers, i32 1 seq_cst
  br label %done
done:
  ret void
}

; after a change of the word
define internal void @tell(ptr %word) nounwind {
  %sleepers = getelementptr i32, ptr %word, i32 1
  %asleep = load atomic i32, ptr %sleepers seq_cst, align 4
  %any = icmp ne i32 %asleep, 0
  br i1 %any, label %wake, label %done
wake:
  call void @rouse(ptr %word)
  br label %done
done:
  ret void
}

; the other threads of a region: each launch that they find open, until the one without a body
define internal void @serve(ptr %team, i32 %me) nounwind {
entry:
  LAUNCH
  %spins = getelementptr %team, ptr %team, i32 0, i32 5
  %own = load i64, ptr %spins
  %idle = load i64, ptr @idle_spins
  %most = call i64 @llvm.umin.i64(i64 %own, i64 %idle)
  br label %wait
wait:
  %seen = phi i32 [ 0, %entry ], [ %gen, %look ], [ %gen, %done ]
  call void @await(ptr %number, i32 %seen, i64 %most)
  br label %look
look:
  %s = load atomic i64, ptr %state acquire, align 8
  %high = lshr i64 %s, 32
  %gen = trunc i64 %high to i32
  %open = and i64 %s, 2147483648
  %closed = icmp eq i64 %open, 0
  br i1 %closed, label %wait, label %take
take:
  %s1 = add i64 %s, 1
  %try = cmpxchg ptr %state, i64 %s, i64 %s1 acq_rel acquire
  %taken = extractvalue { i64, i1 } %try, 1
  br i1 %taken, label %in, label %look
in:
  %body = load ptr, ptr %bodyp
  %data = load ptr, ptr %datap
  %last = icmp eq ptr %body, null
  br i1 %last, label %done, label %run
run:
  call void %body(ptr %data, i32 %me)
  br label %done
done:
  %l = atomicrmw add ptr %left, i32 1 seq_cst
  call void @tell(ptr %left)
  br i1 %last, label %end, label %wait
end:
  ret void
}

define internal void @open(ptr %team, ptr %body, ptr %data) nounwind {
  LAUNCH
  store ptr %body, ptr %bodyp
  store ptr %data, ptr %datap
  store atomic i32 0, ptr %left monotonic, align 4
  %s = load atomic i64, ptr %state monotonic, align 8
  %high = lshr i64 %s, 32
  %next = add i64 %high, 1
  %n32 = shl i64 %next, 32
  %open = or i64 %n32, 2147483648
  store atomic i64 %open, ptr %state seq_cst, align 8
  call void @tell(ptr %number)
  ret void
}

; nanoseconds
define internal i64 @now() nounwind {
  %t = alloca { i64, i64 }
  %r = call i32 @clock_gettime(i32 CLOCK, ptr %t)
  %s = load i64, ptr %t
  %np = getelementptr { i64, i64 }, ptr %t, i32 0, i32 1
  %n = load i64, ptr %np
  %s9 = mul i64 %s, 1000000000
  %all = add i64 %s9, %n
  ret i64 %all
}

; the caller's wait, until so many have left
define internal void @join(ptr %team, i32 %all) nounwind {
entry:
  %left = getelementptr %team, ptr %team, i32 0, i32 13
  %l = load atomic i32, ptr %left acquire, align 4
  %ready = icmp eq i32 %l, %all
  br i1 %ready, label %done, label %late
late:
  %spins = getelementptr %team, ptr %team, i32 0, i32 5
  %most = load i64, ptr %spins
  %start = call i64 @now()
  br label %wait
wait:
  %old = phi i32 [ %l, %late ], [ %l2, %wait ]
  call void @await(ptr %left, i32 %old, i64 %most)
  %l2 = load atomic i32, ptr %left acquire, align 4
  %ready2 = icmp eq i32 %l2, %all
  br i1 %ready2, label %come, label %wait
come:
  %end = call i64 @now()
  %took = sub i64 %end, %start
  %waitedp = getelementptr %team, ptr %team, i32 0, i32 6
  %before = load i64, ptr %waitedp
  %waited = add i64 %before, %took
  store i64 %waited, ptr %waitedp
  br label %done
done:
  ret void
}

define void @aicc_launch(ptr %team, ptr %body, ptr %data) nounwind {
  %state = getelementptr %team, ptr %team, i32 0, i32 7
  call void @open(ptr %team, ptr %body, ptr %data)
  call void %body(ptr %data, i32 0)
  %last = atomicrmw and ptr %state, i64 -2147483649 seq_cst
  %came = and i64 %last, 2147483647
  %all = trunc i64 %came to i32
  call void @join(ptr %team, i32 %all)
  ret void
}

define internal void @enter(ptr %team) nounwind {
  %me = call i32 @omp_get_thread_num()
  %caller = icmp eq i32 %me, 0
  br i1 %caller, label %call, label %other
call:
  %threads = call i32 @omp_get_num_threads()
  %threadsp = getelementptr %team, ptr %team, i32 0, i32 1
  store i32 %threads, ptr %threadsp
  CALL
  %steps = load ptr, ptr %stepsp
  %table = load ptr, ptr %tablep
  %symbols = load ptr, ptr %symbolsp
  call void %steps(ptr %table, ptr %symbols, ptr %team)
  call void @open(ptr %team, ptr null, ptr null)
  %all = sub i32 %threads, 1
  call void @join(ptr %team, i32 %all)
  %end = call i64 @now()
  %endp = getelementptr %team, ptr %team, i32 0, i32 6, i64 8
  store i64 %end, ptr %endp
  ret void
other:
  call void @serve(ptr %team, i32 %me)
  ret void
}

; what a function's calls have seen: calls to make alone, calls until the next trial, their number (both), nanoseconds of calls with threads (the
; last count most)
%memory = type { i32, i32, i32, i32, i64 }

define i32 @aicc_region(ptr %steps, ptr %table, ptr %symbols, i32 %threads, ptr %memory) nounwind {
entry:
  %team = alloca %team, align 64
  store %team zeroinitializer, ptr %team, align 64
  %skipp = getelementptr %memory, ptr %memory, i32 0, i32 1
  %spanp = getelementptr %memory, ptr %memory, i32 0, i32 2
  %nsp = getelementptr %memory, ptr %memory, i32 0, i32 4
  %start = call i64 @now()
  %aloneleft = load atomic i32, ptr %memory monotonic, align 4
  %isalone = icmp sgt i32 %aloneleft, 0
  br i1 %isalone, label %alone, label %together

alone:
  %threadsp = getelementptr %team, ptr %team, i32 0, i32 1
  store i32 1, ptr %threadsp
  call void %steps(ptr %table, ptr %symbols, ptr %team)
  %aloneend = call i64 @now()
  %alonetook = sub i64 %aloneend, %start
  %usual = load atomic i64, ptr %nsp monotonic, align 8
  %eighth = lshr i64 %usual, 3
  %limit = sub i64 %usual, %eighth
  %span = load atomic i32, ptr %spanp monotonic, align 4
  %fewer = sub i32 %aloneleft, 1
  %done1 = sub i32 %span, %fewer
  %early = icmp sle i32 %done1, FIRST
  %quick = icmp slt i64 %alonetook, %limit
  %better = or i1 %early, %quick
  %stay = select i1 %better, i32 %fewer, i32 0
  store atomic i32 %stay, ptr %memory monotonic, align 4
  br i1 %better, label %done, label %worse
worse:
  store atomic i32 %span, ptr %skipp monotonic, align 4
  br label %done

together:
  CALL
  store ptr %steps, ptr %stepsp
  store ptr %table, ptr %tablep
  store ptr %symbols, ptr %symbolsp
  %spinsp = getelementptr %team, ptr %team, i32 0, i32 5
  %crowd = icmp ugt i32 %threads, CORES
  %few = load i64, ptr @crowded_spins
  %many = load i64, ptr @join_spins
  %spins = select i1 %crowd, i64 %few, i64 %many
  store i64 %spins, ptr %spinsp
  call void @GOMP_parallel(ptr @enter, ptr %team, i32 %threads, i32 0)
  %end = call i64 @now()
  %waitedp = getelementptr %team, ptr %team, i32 0, i32 6
  %endedp = getelementptr %team, ptr %team, i32 0, i32 6, i64 8
  %joined = load i64, ptr %waitedp
  %ended = load i64, ptr %endedp
  %barrier = sub i64 %end, %ended
  %waited = add i64 %joined, %barrier
  %took = sub i64 %end, %start
  %waited4 = mul i64 %waited, 4
  %long = icmp sge i64 %waited, LATE
  %much = icmp sge i64 %waited4, %took
  %own = sub i64 %took, %waited
  %threads64 = zext i32 %threads to i64
  %most64 = mul i64 %own, %threads64        ; nanoseconds alone, if all worked as long as the caller
  %took4 = mul i64 %took, 4
  %cheap = icmp sle i64 %most64, %took4
  %waits = and i1 %long, %much
  %late = and i1 %waits, %cheap
  %mean = load atomic i64, ptr %nsp monotonic, align 8
  %new = icmp eq i64 %mean, 0
  %known = select i1 %new, i64 %took, i64 %mean
  %known3 = mul i64 %known, 3
  %sum = add i64 %known3, %took
  %recent = lshr i64 %sum, 2
  store atomic i64 %recent, ptr %nsp monotonic, align 8
  %skip = load atomic i32, ptr %skipp monotonic, align 4
  %wary = icmp sgt i32 %skip, 0
  br i1 %wary, label %pass, label %judge
pass:
  %skip1 = sub i32 %skip, 1
  store atomic i32 %skip1, ptr %skipp monotonic, align 4
  br label %done
judge:
  %before = load atomic i32, ptr %spanp monotonic, align 4
  %twice = shl i32 %before, 1
  %least = call i32 @llvm.smax.i32(i32 %twice, i32 FEW)
  %most = call i32 @llvm.smin.i32(i32 %least, i32 MANY)
  %next = select i1 %late, i32 %most, i32 0
  store atomic i32 %next, ptr %spanp monotonic, align 4
  br i1 %late, label %suspect, label %done
suspect:
  store atomic i32 %next, ptr %memory monotonic, align 4
  br label %done
done:
  %error = load i32, ptr %team
  ret i32 %error
}

define void @aicc_patience(i64 %join, i64 %idle, i64 %crowded) nounwind {
  store i64 %join, ptr @join_spins
  store i64 %idle, ptr @idle_spins
  store i64 %crowded, ptr @crowded_spins
  ret void
}

; waits for a word that nobody writes
define void @aicc_spin(i64 %most) nounwind {
  %word = alloca i32
  store i32 0, ptr %word
  %never = call i1 @look(ptr %word, i32 0, i64 %most)
  ret void
}
"""
