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


def run(*parts: str) -> str:
    """The output of a script."""
    done = subprocess.run([sys.executable, "-c", "".join(map(textwrap.dedent, (PRELUDE, *parts)))], env={**os.environ, "OMP_NUM_THREADS": "2"},
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


JUDGED = """
    from aicc.runtime import team
    from aicc.runtime.loader import _addresses, openmp_library, _OPENMP

    elapsed, asked = [0], [0]           # nanoseconds, and how often somebody wanted to know
    def clock_gettime(clock, into):
        asked[0] += 1
        into[0], into[1] = divmod(elapsed[0], 10 ** 9)
        return 0
    clock = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int64))(clock_gettime)
    symbols = {**_addresses(ctypes.CDLL(None), team.NEEDED), **_addresses(openmp_library(), _OPENMP)}
    made = team.make_team({**symbols, "clock_gettime": ctypes.cast(clock, POINTER).value})
    enter = ctypes.CFUNCTYPE(ctypes.c_int, STEPS, POINTER, POINTER, ctypes.c_int, POINTER)(made.region)
    launch = ctypes.CFUNCTYPE(None, POINTER, BODY, POINTER)(made.launch)
    memory, threads, came = (ctypes.c_int64 * 3)(), [], threading.Event()
    late, alone = [True], [0]           # whether the other thread is; milliseconds of a call without it

    def work(data, thread):
        if thread:
            before = asked[0]           # the caller works until `came` is set, and does not ask meanwhile
            came.set()
            while late[0] and asked[0] == before:
                time.sleep(0.0001)      # until the caller waits, for which it asks the clock
            elapsed[0] += late[0] * 20_000_000
        else:
            assert came.wait(60)
            elapsed[0] += 10_000
            while not late[0] and left.value < 1:
                time.sleep(0.0001)      # the other one is done before the caller
    body = BODY(work)
    def steps(table, symbols, state):
        global left
        threads.append(ctypes.c_int.from_address(state + 4).value)
        left = ctypes.c_int.from_address(state + 192)
        came.clear()
        if threads[-1] > 1:
            launch(state, body, None)
        else:
            elapsed[0] += alone[0] * 1_000_000
        ctypes.c_int.from_address(state).value = 7
    steps = STEPS(steps)
    def calls(n):
        threads.clear()
        for _ in range(n):
            assert enter(steps, None, None, 2, memory) == 7
        return threads[:]
"""
"""How many threads each call has where a call with threads takes 20 ms, `late`, or none, by a clock that only moves when the test says so."""


def test_calls_that_wait_for_their_threads_are_made_alone() -> None:
    """As long as that is quicker: 8 calls, then 16, and so on; a look at the threads in between. A function whose threads come again has them again."""
    run(JUDGED, """
        alone[0] = 5
        found = calls(27)
        assert found == [2] + 8 * [1] + [2] + 16 * [1] + [2], found
        late[0] = False
        found = calls(40)
        assert found == 32 * [1] + 8 * [2], found
        late[0] = True
        assert calls(10) == [2] + 8 * [1] + [2]     # as at first
    """)


def test_calls_that_are_slower_alone_keep_their_threads() -> None:
    """Also where they win by less than an eighth; as many calls as would have been alone do not try again."""
    run(JUDGED, """
        for alone[0] in (50, 19):
            memory[:] = 0, 0, 0
            found = calls(34)
            assert found == [2] + 4 * [1] + 9 * [2] + 4 * [1] + 16 * [2], (alone, found)
    """)
