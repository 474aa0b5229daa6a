"""Cluster files and meshes: presets load, mistakes are located."""

import pytest
from aicc.passes.shard.cluster import Mesh, load_cluster, parse_cluster, preset_names
from aicc.passes.shard.tables import ConfigError, TableReader

GOOD = """\
name = "lab"
nodes = 2

[device]
name = "Toy"
memory_bytes = 8e9
memory_bandwidth = 1e12
cores = 4

[device.peak_flops]
bf16 = 1e13

[[levels]]
name = "inside"
size = 4
alpha = 1e-6
bandwidth = 1e11

[[levels]]
name = "outside"
alpha = 5e-6
bandwidth = 1e10
ports = 2
"""


def read(text: str):
    return parse_cluster(TableReader.from_text(text, "lab.toml"))


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_are_sane(name):
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.size == cluster.nodes * cluster.node_size
    for group in cluster.groups:
        assert 1e9 < group.device.memory_bytes < 1e12
        assert group.device.reserved_bytes < group.device.memory_bytes / 4
        assert 0 < group.device.efficiency.gemm <= 1
    assert all(level.port_rate <= level.bandwidth for level in cluster.levels)


def test_the_issue_presets_exist():
    assert {"a100-80gb-sxm", "a100-40gb-pcie", "h100-sxm", "h200-sxm", "b200", "v100-32gb", "cpu-box"} <= set(preset_names())


def test_reads_a_file():
    cluster = read(GOOD)
    assert (cluster.size, cluster.node_size, cluster.level_sizes()) == (8, 4, (4, 2))
    assert cluster.device.flops("bf16") == 1e13
    assert cluster.levels[1].ports == 2


@pytest.mark.parametrize(("old", "new", "message"), [
    ("bandwidth = 1e10", "bandwidth = -3",
     r"lab.toml:22: levels\[1\].bandwidth = -3: must be a positive number \(bytes/s, one way\)"),
    ("memory_bandwidth = 1e12", "memory_bandwidth = 0", r"lab.toml:7: device.memory_bandwidth = 0: must be a positive number"),
    ("cores = 4", "cores = 2.5", r"lab.toml:8: device.cores = 2.5: must be an integer of at least 1"),
    ("cores = 4", "corez = 4", r"device.cores: is missing"),
    ("nodes = 2", "nodes = 2\nnode = 3", r"lab.toml:3: node = 3: is not a key of this table; did you mean 'nodes'"),
    ("bf16 = 1e13", "bf17 = 1e13", r"bf17 = .*is not a key of this table; did you mean 'bf16'"),
    ("alpha = 5e-6", "alpha = 5e-6\ntopology = \"torus\"", r"topology = 'torus': is unknown; .*allowed: bus, ring, switch"),
    ("size = 4", "size = 0", r"levels\[0\].size = 0: must be an integer of at least 1"),
    ("[device]", "[device", r"lab.toml: not TOML"),
])
def test_mistakes_are_located(old, new, message):
    assert old in GOOD
    with pytest.raises(ConfigError, match=message):
        read(GOOD.replace(old, new, 1))


def test_unknown_hardware_names_the_nearest():
    with pytest.raises(ConfigError, match=r"hardware 'h100-smx' is unknown; did you mean 'h100-sxm'"):
        load_cluster("h100-smx")
    with pytest.raises(ConfigError, match=r"nowhere/x.toml: cannot be read"):
        load_cluster("nowhere/x.toml")


def test_unknown_dtype_is_named():
    with pytest.raises(ConfigError, match=r"V100.*no peak FLOP/s for dtype 'bf16'"):
        load_cluster("v100-32gb").device.flops("bf16")


@pytest.mark.parametrize(("text", "shape"), [("8", (8,)), ("2x8", (2, 8)), ("4X2x8", (4, 2, 8)), ("dp=2,tp=8", (2, 8))])
def test_mesh_parses(text, shape):
    assert Mesh.parse(text).shape == shape
    assert Mesh.parse(str(Mesh.parse(text))) == Mesh.parse(text)


@pytest.mark.parametrize("text", ["", "0x8", "2x-8", "axb", "2x", "2.5x8", "dp=2,tp=", "dp=2,dp=8", "2 8"])
def test_mesh_mistakes(text):
    with pytest.raises(ConfigError, match="mesh"):
        Mesh.parse(text)


def test_mesh_sets_the_cluster():
    assert load_cluster("h100-sxm", mesh=Mesh.parse("2x8")).level_sizes() == (8, 2)
    assert load_cluster("h100-sxm", mesh=Mesh.parse("4x4")).level_sizes() == (4, 4)
    assert load_cluster("h100-sxm", mesh=Mesh.parse("64")).level_sizes() == (8, 8)
    assert load_cluster("h100-sxm", mesh=Mesh.parse("4")).level_sizes() == (4, 1)
    for bad in ("2x16", "12"):
        with pytest.raises(ConfigError, match=f"mesh {bad}"):
            load_cluster("h100-sxm", mesh=Mesh.parse(bad))


def test_mixed_clusters_know_their_slowest_device():
    mixed = load_cluster("mixed-a100-v100")
    assert mixed.device.name.startswith("V100")
    assert mixed.device_of_range(0, 16).name.startswith("A100")
    assert mixed.device_of_range(8, 16).name.startswith("V100")
    assert not mixed.uniform
    with pytest.raises(ConfigError, match="cannot be resized"):
        mixed.with_nodes(8)
    with pytest.raises(ConfigError, match="lie outside"):
        mixed.device_of_range(32, 1)
