"""`aicc calibrate` measures this machine and writes a cluster file that the planner takes."""

import pytest
from aicc.compiler.cli import app
from aicc.compiler.errors import UserError
from aicc.compiler.planning.calibration import CalibrationRequest, calibrate
from aicc.passes.shard.cluster import load_cluster
from typer.testing import CliRunner


@pytest.mark.slow
def test_two_ranks(tmp_path):
    path = tmp_path / "here.toml"
    result = CliRunner().invoke(app, ["calibrate", "--device", "cpu", "--ranks", "2", "--threads", "1", "--seconds", "3", "--name", "here", "-o", str(path)])
    assert result.exit_code == 0, result.output
    assert "all_reduce" in result.stdout and "GEMM fp32" in result.stdout and "sum of" in result.stdout
    cluster = load_cluster(path)
    assert cluster.name == "here" and cluster.size == 2
    assert 1e8 < cluster.device.flops("fp32") < 1e13
    assert 1e8 < cluster.device.memory_bandwidth < 1e12
    assert 0 < cluster.device.efficiency.gemm <= 1
    assert 0 <= cluster.levels[0].alpha < 1 and cluster.levels[0].port_rate > 1e6


def test_nonsense_is_refused():
    for request, message in ((CalibrationRequest(device="tpu"), "--device tpu"), (CalibrationRequest(ranks=10**6, device="cpu"), "--ranks"),
                             (CalibrationRequest(seconds=0.1, device="cpu"), "--seconds")):
        with pytest.raises(UserError, match=message):
            calibrate(request)
