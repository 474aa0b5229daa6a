"""What the training table says of processes that ended badly."""

from __future__ import annotations

from .death import describe

SIGNAL = """rank 0 reached its results
rank 1 reached training
rank 1 reached the end of training
Fatal Python error: Segmentation fault

Current thread 0x00007f (most recent call first):
  File "/x/worker.py", line 70 in main
E1127 09:00:00 torch/distributed/elastic/multiprocessing/api.py:1] failed (exitcode: -11) local_rank: 1 (pid: 7) of binary: python
  File "/x/torch/distributed/launcher/api.py", line 300, in launch_agent
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
  exitcode  : -11 (pid: 7)
  traceback : Signal 11 (SIGSEGV) received by PID 7
"""


def test_a_signal_is_told_with_where_each_rank_was() -> None:
    said = describe(SIGNAL)
    assert "Signal 11 (SIGSEGV)" in said and "Fatal Python error: Segmentation fault" in said
    assert "rank 0 reached its results / rank 1 reached the end of training" in said
    assert 'File "/x/worker.py", line 70 in main' in said
    assert "GiB free" in said and "launch_agent" not in said


def test_an_error_is_enough() -> None:
    said = describe("[rank1]: RuntimeError: Connection closed by peer\n[rank0]: AssertionError\n" + SIGNAL)
    assert said.startswith("[rank0]: AssertionError") and "closed by peer" not in said and "GiB free" not in said
    assert describe("[rank1]: RuntimeError: Connection closed by peer\n").startswith("[rank1]: RuntimeError: Connection closed by peer")


def test_the_thread_that_got_the_signal() -> None:
    native = """SIGSEGV(11), PID: 9, Thread 9:
 frame #0: c10::FatalSignalHandler::stacktraceSignalHandler(bool) + 0x8f (0x7f4a in /x/libc10.so)
frame #1: pthread_cond_wait + 0x1e8 (0x7f4b in /lib/libc.so.6)

SIGSEGV(11), PID: 9, Thread 11:
 frame #0: c10::FatalSignalHandler::stacktraceSignalHandler(bool) + 0x8f (0x7f4a in /x/libc10.so)
frame #1: c10::FatalSignalHandler::fatalSignalHandler(int, siginfo_t*) + 0x2da (0x7f4c in /x/libc10.so)
frame #2: <unknown function> + 0x3c050 (0x7f4d in /lib/libc.so.6)
frame #3: gloo::alltoallv(int) + 0x9 (0x7f4e in /x/libtorch_cpu.so)

"""
    assert "gloo::alltoallv(int) + 0x9 in libtorch_cpu.so" in describe(native) and "pthread_cond_wait" not in describe(native)
