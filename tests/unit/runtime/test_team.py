"""The threads of a call: each launch runs its body on threads that come while it is open, and on no thread afterwards.

In processes of their own: the number of threads is that of the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

PRELUDE = """
    import ctypes, os, threading, time
    from aicc.runtime.loader import runtime_symbols
    POINTER, BODY = ctypes.c_void_p, ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)
    STEPS = ctypes.CFUNCTYPE(None, POINTER, POINTER, POINTER)
    enter = ctypes.CFUNCTYPE(ctypes.c_int, STEPS, POINTER, POINTER, ctypes.c_int, POINTER)(runtime_symbols()["aicc_region"])
    launch = ctypes.CFUNCTYPE(None, POINTER, BODY, POINTER)(runtime_symbols()["aicc_launch"])
    def call(steps, threads):
        return enter(STEPS(lambda table, symbols, team: steps(team)), None, None, threads, (ctypes.c_int64 * 3)())
"""


def run(script: str) -> str:
    """The output of a script."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(script)], env={**os.environ, "OMP_NUM_THREADS": "2"},
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_body_runs_for_its_own_launch_only() -> None:
    """Long bodies are run by several threads at once, each of them once per launch; a launch that has ended is not entered, however short it was."""
    run("""
        current, seen, wrong = [0], [], []
        def work(data, thread):
            if data != current[0]:
                wrong.append(data)
            seen.append((data, thread, threading.get_ident()))
            if data % 50 == 0:
                time.sleep(0.02)
        body = BODY(work)
        def steps(team):
            for number in range(1, 401):
                current[0] += 1
                launch(team, body, current[0])
        for _ in range(5):
            call(steps, 3)
        assert not wrong, wrong
        assert len(set(seen)) == len(seen)
        assert all((number, 0, threading.get_ident()) in seen for number in range(1, 2001))
        assert max(sum(n == number for n, _, _ in seen) for number in range(50, 2001, 50)) == 3
        assert {thread for _, thread, _ in seen} == {0, 1, 2}
    """)


def test_threads_sleep_and_wake_within_a_call() -> None:
    """A caller that works alone for long finds its threads again, which do not use their cores meanwhile."""
    run("""
        seen = []
        def work(data, thread):
            seen.append((data, thread))
            time.sleep(0.01)
        body = BODY(work)
        def steps(team):
            for number in range(4):
                before = time.process_time()
                time.sleep(0.2)
                assert time.process_time() - before < 0.1
                launch(team, body, number)
        call(steps, 2)
        assert {thread for _, thread in seen} == {0, 1}, seen
    """)


def test_arguments_and_the_error_word() -> None:
    run("""
        def steps(table, symbols, team):
            threads = ctypes.c_int.from_address(team + 4)
            assert (table, symbols, threads.value) == (16, 32, expected), threads.value
            ctypes.c_int.from_address(team).value = 7
        steps = STEPS(steps)
        for expected in (1, 2, 3, 2):
            assert enter(steps, 16, 32, expected, (ctypes.c_int64 * 3)()) == 7
        assert call(lambda team: None, 2) == 0
    """)


def test_a_call_inside_a_launch_has_one_thread() -> None:
    run("""
        inner = []
        inside = BODY(lambda data, thread: inner.append((data, thread)))
        def work(data, thread):
            call(lambda team: launch(team, inside, thread + 10), 2)
            time.sleep(0.02)
        body = BODY(work)
        call(lambda team: launch(team, body, None), 2)
        assert sorted(inner) == [(10, 0), (11, 0)], inner
    """)


def test_two_threads_of_a_program() -> None:
    """Each has a team of its own; both get all of their work done."""
    run("""
        import itertools
        def program(results, k):
            for _ in range(100):
                counter, done = itertools.count(), []
                def work(data, thread):
                    while (i := next(counter)) < 20:
                        done.append(i)
                body = BODY(work)
                call(lambda team: launch(team, body, None), 2)
                results[k] += sorted(done) == list(range(20))
        results = [0, 0]
        threads = [threading.Thread(target=program, args=(results, k)) for k in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert results == [100, 100], results
    """)


def test_patience_is_a_time() -> None:
    """Whatever a pause takes on this processor: a thread that nobody calls looks for a millisecond, the caller for six, and then they sleep."""
    run("""
        from aicc.runtime import team
        from aicc.runtime.loader import _addresses, openmp_library, _OPENMP
        process = ctypes.CDLL(None)
        made = team.make_team({**_addresses(process, team.NEEDED), **_addresses(openmp_library(), _OPENMP)})
        assert 1e-9 < made.spin < 1e-6, made.spin
        enter = ctypes.CFUNCTYPE(ctypes.c_int, STEPS, POINTER, POINTER, ctypes.c_int, POINTER)(made.region)
        launch = ctypes.CFUNCTYPE(None, POINTER, BODY, POINTER)(made.launch)
        def other(data, thread):
            if thread:
                seen.append(1)
                time.sleep(0.1)        # the caller waits for this one: actively for a while, asleep for the rest
            else:
                while not seen:
                    time.sleep(0.001)
        seen, used, body = [], [], BODY(other)
        def steps(state):
            time.sleep(0.05)           # the other thread waits for a launch
            before = time.process_time()
            launch(state, body, None)
            used.append(time.process_time() - before)
        enter(STEPS(lambda table, symbols, state: steps(state)), None, None, 2, (ctypes.c_int64 * 3)())
        assert used[0] < 0.05, used
    """)


def test_calls_that_wait_for_their_threads_are_made_alone() -> None:
    """As long as that is quicker: 8 calls, then 16, and so on; a look at the threads in between. A function whose threads come again has them again."""
    run("""
        late, seen, memory = [True], [], (ctypes.c_int64 * 3)()
        def work(data, thread):
            came.append(thread)
            if thread and late[0]:
                time.sleep(0.02)        # as one that is put aside
            elif not thread:
                end = time.perf_counter() + 0.05
                while threads[0] > 1 and len(came) < 2 and time.perf_counter() < end:
                    time.sleep(0.0001)
                if threads[0] > 1 and not late[0]:
                    time.sleep(0.05)    # the others have left by then
        body = BODY(work)
        def steps(table, symbols, team):
            threads[0] = ctypes.c_int.from_address(team + 4).value
            if threads[0] > 1:
                launch(team, body, None)
            else:
                work(None, 0)
            ctypes.c_int.from_address(team).value = 7
        steps, threads = STEPS(steps), [0]
        def calls(n):
            found = []
            for _ in range(n):
                came.clear()
                assert enter(steps, None, None, 2, memory) == 7
                found.append(threads[0])
            return found
        came = []
        found = calls(27)
        assert found == [2] + 8 * [1] + [2] + 16 * [1] + [2], found
        late[0] = False
        assert calls(32) == 32 * [1]
        assert any(calls(2) == [2, 2] for _ in range(100))  # the first such call may be late where the machine is busy
    """)


def test_calls_that_are_slower_alone_keep_their_threads() -> None:
    run("""
        memory, threads = (ctypes.c_int64 * 3)(), []
        def work(data, thread):
            came.append(thread)
            while not thread and len(came) < 2:
                pass
            if thread:
                time.sleep(0.01)
        body = BODY(work)
        def steps(table, symbols, team):
            threads.append(ctypes.c_int.from_address(team + 4).value)
            came.clear()
            if threads[-1] > 1:
                launch(team, body, None)
            else:
                time.sleep(0.05)
        steps, came = STEPS(steps), []
        for _ in range(34):
            enter(steps, None, None, 2, memory)
        assert threads == [2] + 4 * [1] + 9 * [2] + 4 * [1] + 16 * [2], threads
    """)
