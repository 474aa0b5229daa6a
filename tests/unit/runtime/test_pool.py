"""Threads of our own: each region runs its body on threads that come while it is open, and on no thread afterwards.

In processes of their own: the pool's threads stay until the process ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from aicc.runtime.loader import runtime_symbols

pytestmark = pytest.mark.skipif(runtime_symbols()["aicc_parallel"] == runtime_symbols()["GOMP_parallel"], reason="no threads of our own on this system")

PRELUDE = """
    import ctypes, os, threading, time
    from aicc.runtime.loader import runtime_symbols
    BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    parallel = ctypes.CFUNCTYPE(None, BODY, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)(runtime_symbols()["aicc_parallel"])
    def tasks():
        return len(os.listdir("/proc/self/task"))
    def settled(number, seconds=20):
        end = time.monotonic() + seconds
        while tasks() != number and time.monotonic() < end:
            time.sleep(0.01)
        return tasks()
"""


def run(script: str) -> str:
    """The output of a script."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(script)], env={**os.environ, "OMP_NUM_THREADS": "2"},
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_body_runs_for_its_own_region_only() -> None:
    """Long bodies are run by several threads at once, each of them once per region; a region that has ended is not entered, however short it was."""
    run("""
        current, seen, wrong = [0], [], []
        def work(data):
            if data != current[0]:
                wrong.append(data)
            seen.append((data, threading.get_ident()))
            if data % 50 == 0:
                time.sleep(0.02)
        body = BODY(work)
        for region in range(1, 2001):
            current[0] = region
            parallel(body, region, 3, 0)
            current[0] = 0
        assert not wrong, wrong
        assert len(set(seen)) == len(seen)
        assert all((region, threading.get_ident()) in seen for region in range(1, 2001))
        assert max(sum(r == region for r, _ in seen) for region in range(50, 2001, 50)) == 3
    """)


def test_threads_come_and_go_with_their_number() -> None:
    run("""
        before = tasks()
        body = BODY(lambda data: time.sleep(0.01))
        for threads in (2, 4, 3, 2, 5, 2):
            parallel(body, None, threads, 0)
            assert settled(before + threads - 1) == before + threads - 1, (threads, tasks() - before)
    """)


def test_a_region_inside_a_region_is_run_by_its_thread_alone() -> None:
    run("""
        me, inner, outer = threading.get_ident(), [], []
        inside = BODY(lambda data: inner.append(threading.get_ident()))
        def work(data):
            outer.append(threading.get_ident())
            if threading.get_ident() == me:
                parallel(inside, None, 2, 0)
            time.sleep(0.02)
        body = BODY(work)
        parallel(body, None, 2, 0)
        assert inner == [me] and len(set(outer)) == 2
    """)


def test_two_threads_of_a_program() -> None:
    """One has the pool, the other OpenMP; both get all of their work done."""
    run("""
        import itertools
        def program(results, k):
            for _ in range(200):
                counter, done = itertools.count(), []
                def work(data):
                    while (i := next(counter)) < 20:
                        done.append(i)
                parallel(BODY(work), None, 2, 0)
                results[k] += sorted(done) == list(range(20))
        results = [0, 0]
        threads = [threading.Thread(target=program, args=(results, k)) for k in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert results == [200, 200], results
    """)


def test_a_forked_child_starts_threads_of_its_own() -> None:
    run("""
        def threads_of_a_region():
            seen = set()
            def work(data):
                seen.add(threading.get_native_id())
                time.sleep(0.05)
            parallel(BODY(work), None, 2, 0)
            return len(seen)
        assert threads_of_a_region() == 2
        child = os.fork()
        if child == 0:
            os._exit(threads_of_a_region())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        assert threads_of_a_region() == 2
    """)
