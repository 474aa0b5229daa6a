"""The simulator against published training runs, and calibration."""

from dataclasses import replace

import pytest
from aicc.passes.shard.calibrate import (
    CONSTANTS,
    GemmSample,
    LinkSample,
    cluster_toml,
    fit_constants,
    fit_gemm,
    fit_link,
    fit_memory,
    with_constants,
)
from aicc.passes.shard.cluster import load_cluster
from aicc.passes.shard.collectives import ALGORITHMS
from aicc.passes.shard.kernels import gemm_time, memory_time
from aicc.passes.shard.published import FITTED, PUBLISHED, format_report, held_out_errors, load_cases, validate

RUNS = PUBLISHED


@pytest.fixture(scope="module")
def rows():
    return validate(RUNS)


def test_every_figure_of_the_file_is_a_case():
    cases = load_cases(RUNS)
    assert len(cases) == 5 + 2 + 2 + 5 + 4
    names = [c.name for c in cases]
    assert len(set(names)) == len(names)
    assert set(names) >= FITTED
    assert sum(not c.fitted for c in cases) == 13
    assert sum(c.fitted for c in CONSTANTS) == 3


def test_held_out_errors_meet_the_goal(rows):
    middle, worst = held_out_errors(rows)
    assert middle <= 0.06
    assert worst <= 0.15


def test_no_row_is_far_off(rows):
    assert {r.case.name: r.error for r in rows if abs(r.error) > 0.15} == {}


def test_published_plans_fit_in_memory_and_their_breakdown_adds_up(rows):
    for row in rows:
        if row.report is not None:
            assert row.report.fits, row.case.name
            assert sum(row.report.breakdown().values()) == pytest.approx(row.report.seconds, rel=1e-9)
            assert all(v >= -1e-9 for v in row.report.breakdown().values()), row.case.name
            assert 0.2 < row.report.mfu < row.report.hfu < 0.7


def test_korthikanti_utilisation(rows):
    thin = next(r for r in rows if r.case.name == "gpt-175B / sp + selective")
    assert thin.report.mfu == pytest.approx(0.514, rel=0.06)
    assert thin.report.hfu == pytest.approx(0.528, rel=0.06)


def test_report_names_fit_and_held_out(rows):
    text = format_report(rows)
    assert sum(" fit  " in line for line in text.splitlines()[1:]) == len(FITTED)
    assert text.splitlines()[-1].startswith("held out: 13 rows, median |error|")


def test_the_presets_constants_are_the_fit():
    # Refitting from a detuned start comes back to what the preset says.
    cases = load_cases(RUNS)
    start = {"gemm": 0.85, "memory": 0.65, "network": 0.75}
    found = fit_constants([replace(c, cluster=with_constants(c.cluster, start)) for c in cases])
    for constant in CONSTANTS:
        if constant.fitted:
            assert found[constant.name] == pytest.approx(constant.read(cases[0].cluster), rel=0.02)


def test_gemm_fit_recovers_a_known_device():
    device = load_cluster("h100-sxm").device
    truth = replace(device, efficiency=replace(device.efficiency, gemm=0.66, gemm_half_k=300.0, kernel_overhead_s=9e-6))
    shapes = [(64, 64, 64), (512, 512, 512), (2048, 2048, 256), (4096, 4096, 4096), (8192, 8192, 1024)]
    samples = [GemmSample(m, n, k, gemm_time(truth, "bf16", 1, m, n, k)) for m, n, k in shapes]
    found = fit_gemm(device, "bf16", samples).efficiency
    assert found.gemm == pytest.approx(0.66, rel=0.03)
    assert found.kernel_overhead_s == pytest.approx(9e-6, rel=0.1)
    with pytest.raises(ValueError, match="at least three"):
        fit_gemm(device, "bf16", samples[:2])


def test_memory_fit_recovers_a_known_device():
    device = load_cluster("h100-sxm").device
    truth = replace(device, efficiency=replace(device.efficiency, memory=0.61))
    samples = [(b, memory_time(truth, b)) for b in (1e6, 1e7, 1e8, 1e9)]
    assert fit_memory(device, samples).efficiency.memory == pytest.approx(0.61, rel=0.01)
    with pytest.raises(ValueError, match="two sizes"):
        fit_memory(device, samples[:1])


def test_link_fit_recovers_alpha_and_rate():
    level = load_cluster("cpu-box").levels[0]
    alpha, rate = 45e-6, 1.1e9
    samples = [LinkSample(kind, "ring", b, n, ALGORITHMS[kind]["ring"](n, b, alpha, rate))
               for kind in ("all_reduce", "all_gather") for n in (2, 4) for b in (1e3, 1e5, 1e7)]
    found = fit_link(level, samples)
    assert found.alpha == pytest.approx(alpha, rel=1e-3)
    assert found.port_rate == pytest.approx(rate, rel=1e-3)
    with pytest.raises(ValueError, match="two sizes"):
        fit_link(level, samples[:1])


def test_cluster_files_round_trip(tmp_path):
    cluster = load_cluster("a100-80gb-sxm", nodes=3)
    path = tmp_path / "copy.toml"
    path.write_text(cluster_toml(cluster))
    assert load_cluster(path) == cluster
    with pytest.raises(ValueError, match="mixes devices"):
        cluster_toml(load_cluster("mixed-a100-v100"))
