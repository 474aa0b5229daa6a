"""Pipeline schedules run by the simulator: published bubble and memory formulas come out, not in."""

import pytest
from aicc.passes.shard.schedules import SCHEDULES, Op, Schedule, build_schedule, schedule_problem
from aicc.passes.shard.simulator import PipelineCosts, pipeline_time, simulate

CASES = [(1.0, 1.0, 1.0), (1.0, 1.1, 0.9), (2.0, 2.0, 1.0)]  # seconds of F, B, W of one rank's share of the model


def parts_of(name: str, ranks: int, interleave: int) -> int:
    return ranks * (SCHEDULES[name].parts_per_rank or interleave)


def even_costs(name: str, ranks: int, fbw: tuple[float, float, float], interleave: int = 1, **more) -> PipelineCosts:
    parts = parts_of(name, ranks, interleave)
    per = parts // ranks
    f, b, w = ((x / per,) * parts for x in fbw)
    return PipelineCosts(f, b, w, (1.0 / per,) * parts, **more)


def bubble_seconds(name: str, ranks: int, micro_batches: int, fbw: tuple[float, float, float], interleave: int = 1) -> float:
    run = simulate(build_schedule(name, ranks, micro_batches, interleave), even_costs(name, ranks, fbw, interleave))
    return run.seconds - micro_batches * sum(fbw)


# Idle seconds of a rank in one step; p ranks, v interleave.
FORMULAS = {
    "gpipe": lambda p, v, f, b, w: (p - 1) * (f + b + w),
    "1f1b": lambda p, v, f, b, w: (p - 1) * (f + b + w),
    "interleaved": lambda p, v, f, b, w: (p - 1) * (f + b + w) / v,
    "zb-h1": lambda p, v, f, b, w: (p - 1) * (f + b - w),
    # DeepSeek-V3's table, with F&B = F + (B + W) and B there being the full backward: (PP/2 - 1)(F&B + B - 3W).
    "dualpipe": lambda p, v, f, b, w: (p / 2 - 1) * ((f + b + w) + (b + w) - 3 * w),
    # The same with half the ranks: PP counts stages, each half a rank's share.
    "dualpipe-v": lambda p, v, f, b, w: (p - 1) * ((f + b + w) + (b + w) - 3 * w) / 2,
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("fbw", CASES)
def test_bubble_formulas(name, ranks, fbw):
    interleave = 3 if name == "interleaved" else 1
    expected = FORMULAS[name](ranks, interleave, *fbw)
    found = bubble_seconds(name, ranks, 4 * ranks, fbw, interleave)
    if name.startswith("dualpipe") and fbw[0] != fbw[1]:
        assert 0.9 * expected <= found <= expected  # the published figure takes F and B to be equal
    else:
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zb_v_has_no_bubble_between_first_and_last_operation(ranks):
    schedule = build_schedule("zb-v", ranks, 3 * ranks)
    run = simulate(schedule, even_costs("zb-v", ranks, (1.0, 1.0, 1.0)))
    for rank in range(ranks):
        span = run.timeline[rank][-1].end - run.timeline[rank][0].start
        assert span == pytest.approx(run.busy[rank])


# Part-activations in units of one rank's share of one micro-batch, at the worst rank.
MEMORY = {"gpipe": lambda p, m, v: m, "1f1b": lambda p, m, v: p, "zb-h1": lambda p, m, v: p, "zb-v": lambda p, m, v: p,
          "interleaved": lambda p, m, v: p + (p - 1) / v, "dualpipe": lambda p, m, v: p + 1,
          "dualpipe-v": lambda p, m, v: p + 0.5}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_peak_memory(name, ranks):
    interleave = 3 if name == "interleaved" else 1
    m = 4 * ranks
    costs = even_costs(name, ranks, (1.0, 1.0, 1.0), interleave)
    run = simulate(build_schedule(name, ranks, m, interleave), costs)
    assert max(run.peak_bytes) == pytest.approx(MEMORY[name](ranks, m, interleave))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 4), (2, 8), (4, 8), (4, 12), (6, 24)])
def test_every_operation_runs_once_and_in_order(name, ranks, micro_batches):
    interleave = 2 if name == "interleaved" else 1
    if schedule_problem(name, ranks, micro_batches, interleave):
        with pytest.raises(ValueError, match=name):
            build_schedule(name, ranks, micro_batches, interleave)
        return
    schedule = build_schedule(name, ranks, micro_batches, interleave)
    run = simulate(schedule, even_costs(name, ranks, (1.0, 1.0, 1.0), interleave, p2p=(0.1,) * (schedule.parts - 1)))
    end: dict[tuple[str, int, int], float] = {}
    for rank, items in enumerate(run.timeline):
        for item in items:
            assert schedule.rank_of[item.op.stage] == rank
            for kind in item.op.kind:
                assert (kind, item.op.stage, item.op.micro_batch) not in end
                end[kind, item.op.stage, item.op.micro_batch] = item.end
    # Each part sees each micro-batch exactly once in F, B and W.
    for part in range(schedule.parts):
        stages = [s for s, p in enumerate(schedule.part_of) if p == part]
        for kind in "FBW":
            seen = sorted(i for k, s, i in end if k == kind and s in stages)
            assert seen == list(range(micro_batches))
    for (kind, stage, i), finish in end.items():
        before = schedule.previous[stage]
        if kind == "F" and before >= 0:
            assert end["F", before, i] < finish
        if kind == "B":
            assert end["F", stage, i] < finish
            if before >= 0:
                assert finish < end["B", before, i]
        if kind == "W":
            assert end["B", stage, i] <= finish


def test_memory_over_time_ends_empty_and_peaks_where_the_run_says():
    schedule = build_schedule("zb-v", 4, 12)
    costs = even_costs("zb-v", 4, (1.0, 1.0, 1.0))
    run = simulate(schedule, costs)
    for rank in range(4):
        points = run.memory(rank, costs, schedule)
        assert max(held for _, held in points) == pytest.approx(run.peak_bytes[rank])
        assert points[-1][1] == pytest.approx(0.0)
        assert [t for t, _ in points] == sorted(t for t, _ in points)


def test_p2p_costs_and_channels():
    # Two ranks, one micro-batch: F, send, F+BW, send, BW.
    costs = PipelineCosts((1.0, 1.0), (1.0, 1.0), (1.0, 1.0), p2p=(0.25,))
    assert simulate(build_schedule("1f1b", 2, 1), costs).seconds == pytest.approx(1 + 0.25 + 3 + 0.25 + 2)
    # A boundary slower than the stage: four forward messages queue on one channel.
    slow = PipelineCosts((0.1, 0.1), (0.1, 0.1), (0.0, 0.0), p2p=(1.0,))
    assert simulate(build_schedule("gpipe", 2, 4), slow).seconds >= 0.1 + 4 * 1.0 + 0.1
    free = PipelineCosts((1.0,) * 4, (1.0,) * 4, (1.0,) * 4, p2p=(0.1,) * 3)
    blocked = PipelineCosts((1.0,) * 4, (1.0,) * 4, (1.0,) * 4, p2p=(0.1,) * 3, blocking=True)
    schedule = build_schedule("1f1b", 4, 16)
    assert simulate(schedule, blocked).seconds > simulate(schedule, free).seconds


def test_a_straggler_sets_the_pace():
    schedule = build_schedule("1f1b", 4, 64)
    nominal = simulate(schedule, even_costs("1f1b", 4, (1.0, 1.0, 1.0)))
    slow = simulate(schedule, even_costs("1f1b", 4, (1.0, 1.0, 1.0), slowdown=(1.0, 1.5, 1.0, 1.0)))
    assert slow.seconds / nominal.seconds == pytest.approx(1.5, rel=0.05)


def test_a_contradictory_order_is_a_named_deadlock():
    bad = Schedule("bad", 2, 1, 2, (0, 1), (0, 1), (-1, 0),
                   ((Op("F", 0, 0), Op("BW", 0, 0)), (Op("BW", 1, 0), Op("F", 1, 0))))
    ok = build_schedule("1f1b", 2, 1)
    costs = PipelineCosts((1.0, 1.0), (1.0, 1.0), (1.0, 1.0))
    assert simulate(ok, costs).seconds == 6.0
    with pytest.raises(RuntimeError, match=r"schedule bad deadlocks; ranks wait at .*'BW', 1, 0"):
        simulate(bad, costs)


@pytest.mark.parametrize(("name", "micro_batches"), [("gpipe", 200), ("1f1b", 203), ("interleaved", 200), ("zb-h1", 202),
                                                     ("zb-v", 200), ("dualpipe", 200), ("dualpipe-v", 201)])
@pytest.mark.parametrize("uneven", [False, True])
def test_extrapolation_equals_the_full_run(name, micro_batches, uneven):
    ranks, v = 4, 2 if name == "interleaved" else 1
    parts = parts_of(name, ranks, v)
    tilt = [1.0 + (0.3 * (i == parts - 1) + 0.05 * i if uneven else 0.0) for i in range(parts)]
    costs = PipelineCosts(tuple(tilt), tuple(1.1 * t for t in tilt), tuple(0.9 * t for t in tilt), (1.0,) * parts,
                          (0.07,) * (parts - 1))
    full = simulate(build_schedule(name, ranks, micro_batches, v), costs)
    short = pipeline_time(name, ranks, micro_batches, v, costs)
    assert short.seconds == pytest.approx(full.seconds, rel=1e-9)
    assert short.busy == pytest.approx(sum(full.busy) / ranks, rel=1e-9)
    assert short.peak_bytes == pytest.approx(full.peak_bytes)


def test_problems_are_named():
    assert schedule_problem("1f2b", 2, 4) == f"schedule '1f2b' is unknown; allowed: {', '.join(SCHEDULES)}"
    assert "multiples of the 4 ranks" in (schedule_problem("interleaved", 4, 6, 2) or "")
    assert "takes no interleave" in (schedule_problem("1f1b", 4, 8, 2) or "")
    assert "at least 7 micro-batches" in (schedule_problem("zb-v", 4, 6) or "")
    with pytest.raises(ValueError, match="entries"):
        simulate(build_schedule("1f1b", 2, 2), PipelineCosts((1.0,), (1.0,), (1.0,)))
