"""The cluster: devices, links per level, nodes. Facts only; costs are in `collectives.py` and `kernels.py`.

Entry points: `load_cluster("h100-sxm", nodes=16)` for a preset or a TOML file, `Mesh.parse("2x8")`.

A cluster is a tower of levels, innermost first: level 0 joins the devices of one node (NVLink, PCIe), level 1 joins nodes
(InfiniBand, Ethernet), further levels join pods. Ranks count through level 0 first. Invariants: every number is positive,
the innermost level's size is the devices per node, and the outermost level may be open (size 0: as many nodes as asked
for). A mixed cluster is a list of node groups in rank order with the same number of devices per node.

Units: seconds, bytes, bytes/s in one direction, FLOP/s without sparsity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .curves import Curve
from .hashing import hash_once
from .tables import ConfigError, TableReader, nearest

__all__ = ["Cluster", "Device", "Efficiency", "Level", "Mesh", "NodeGroup", "load_cluster", "preset_names"]

PRESETS = Path(__file__).parent / "clusters"
DTYPES = ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "int8")
TOPOLOGIES = ("switch", "bus", "ring")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "p2p")


@dataclass(frozen=True)
class Efficiency:
    """How much of a device's peak real kernels reach. These are the calibration constants of a device.

    gemm: fraction of peak FLOP/s that a large GEMM reaches in a full wave of tiles with long K.
    gemm_half_k: the K at which a tile's prologue and epilogue cost as much as its main loop.
    attention: fraction of peak FLOP/s of a fused (flash) attention kernel at long sequence.
    memory: fraction of memory bandwidth that element-wise kernels and reductions reach.
    kernel_overhead_s: the device time lost per kernel (launch gap, ramp up, tail).
    attention_backward: the rate of that kernel's backward pass over its forward pass.
    memory_curve: measured seconds of element-wise kernels by bytes moved (caches make small ones fast), instead of `memory`.
    """

    gemm: float = 0.80
    gemm_half_k: float = 128.0
    attention: float = 0.55
    memory: float = 0.80
    kernel_overhead_s: float = 4e-6
    attention_backward: float = 0.85
    memory_curve: Curve = ()


@hash_once
@dataclass(frozen=True)
class Device:
    """One accelerator (or CPU). `cores` is the number of streaming multiprocessors: GEMM tiles come in waves of this many.

    `reserved_bytes` is what the driver, the collective library and fragmentation keep from the model. overlap_loss: the share of hidden
    communication that compute loses at least, 1 where collectives run on the very cores that compute (CPUs).
    """

    name: str
    peak_flops: MappingProxyType[str, float] = field(hash=False)
    memory_bytes: float
    memory_bandwidth: float
    cores: int
    reserved_bytes: float = 0.0
    host_bandwidth: float = 20e9
    overlap_loss: float = 0.0
    efficiency: Efficiency = Efficiency()

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s for `dtype`. Raises ConfigError, naming the dtypes that this device has."""
        if dtype not in self.peak_flops:
            raise ConfigError(f"device {self.name}: no peak FLOP/s for dtype '{dtype}'; {nearest(dtype, self.peak_flops)}")
        return self.peak_flops[dtype]


@dataclass(frozen=True)
class Level:
    """Links that join `size` children (devices at level 0, else units of the level below).

    alpha: seconds per message. bandwidth: bytes/s of one port, one way. ports: how many ports one child has (level 0: one
    per device; above: NICs of a node). efficiency: the fraction of line rate that long messages reach. topology: `switch`
    is non-blocking; `bus` is one medium that all children share; `ring` has neighbour links only. oversubscription: how
    many times less than the sum of the ports the level can carry when all talk at once.
    """

    name: str
    size: int
    alpha: float
    bandwidth: float
    ports: int = 1
    efficiency: float = 1.0
    topology: str = "switch"
    oversubscription: float = 1.0
    curves: tuple[tuple[str, Curve], ...] = ()

    @property
    def port_rate(self) -> float:
        """Bytes/s that one port really moves, one way."""
        return self.bandwidth * self.efficiency


@dataclass(frozen=True)
class NodeGroup:
    """`nodes` equal nodes of one kind of device."""

    device: Device
    nodes: int


@hash_once
@dataclass(frozen=True)
class Cluster:
    """Node groups in rank order and the tower of levels that joins them (level 0 inside a node)."""

    name: str
    groups: tuple[NodeGroup, ...]
    levels: tuple[Level, ...]

    @property
    def node_size(self) -> int:
        return self.levels[0].size

    @property
    def nodes(self) -> int:
        return sum(g.nodes for g in self.groups)

    @property
    def size(self) -> int:
        return self.nodes * self.node_size

    @property
    def device(self) -> Device:
        """The slowest device (by bf16, then fp16, then fp32 peak): what a bulk-synchronous group waits for."""
        return min((g.device for g in self.groups), key=_speed)

    @property
    def uniform(self) -> bool:
        return len({g.device for g in self.groups}) == 1

    def level_sizes(self) -> tuple[int, ...]:
        """Children per level, the open outermost level closed with the number of nodes."""
        sizes = [level.size for level in self.levels]
        if len(sizes) == 1:
            return (self.node_size,)
        inner = prod(sizes[1:-1])
        return (*sizes[:-1], max(1, -(-self.nodes // inner)))

    def device_of_range(self, start: int, count: int) -> Device:
        """The slowest device among ranks [start, start + count)."""
        found, first = [], 0
        for group in self.groups:
            last = first + group.nodes * self.node_size
            if first < start + count and start < last:
                found.append(group.device)
            first = last
        if not found:
            raise ConfigError(f"cluster {self.name}: ranks {start}..{start + count - 1} lie outside 0..{self.size - 1}")
        return min(found, key=_speed)

    def with_nodes(self, nodes: int) -> Cluster:
        """The same kind of cluster with `nodes` nodes. Only a uniform cluster can be resized."""
        if nodes < 1:
            raise ConfigError(f"cluster {self.name}: nodes = {nodes}: must be an integer of at least 1")
        if len(self.groups) > 1:
            if nodes == self.nodes:
                return self
            raise ConfigError(f"cluster {self.name}: mixes {len(self.groups)} kinds of node and has {self.nodes} nodes; "
                              f"it cannot be resized to {nodes}")
        return replace(self, groups=(replace(self.groups[0], nodes=nodes),))

    def with_node_size(self, devices: int) -> Cluster:
        """The same cluster with `devices` used per node (at most the node's size)."""
        if not 1 <= devices <= self.node_size:
            raise ConfigError(f"cluster {self.name}: {devices} devices per node; must be from 1 to {self.node_size}")
        return replace(self, levels=(replace(self.levels[0], size=devices), *self.levels[1:]))


@dataclass(frozen=True)
class Mesh:
    """A device mesh: its shape (outermost first) and, optionally, axis names."""

    shape: tuple[int, ...]
    names: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nodes(self) -> int:
        """Everything but the innermost axis: `2x8` is two nodes of eight devices. One number is one node."""
        return prod(self.shape[:-1])

    @staticmethod
    def parse(text: str) -> Mesh:
        """Parse `8`, `2x8`, `4x2x8` or `dp=2,tp=8`. Raises ConfigError for anything else."""
        parts = text.strip().split(",") if "=" in text else text.strip().lower().split("x")
        names, shape = [], []
        for part in parts:
            name, _, extent = part.rpartition("=")
            if not re.fullmatch(r"[1-9][0-9]*", extent.strip()) or ("=" in text and not name.strip().isidentifier()):
                raise ConfigError(f"mesh '{text}': '{part.strip()}' is not an extent; write positive integers joined by 'x' "
                                  "(nodes x devices per node, such as 2x8) or named ones (dp=2,tp=8)")
            shape.append(int(extent))
            names.append(name.strip())
        if "=" in text and len(set(names)) != len(names):
            raise ConfigError(f"mesh '{text}': an axis name appears twice")
        return Mesh(tuple(shape), tuple(names) if "=" in text else ())

    def __str__(self) -> str:
        if self.names:
            return ",".join(f"{n}={s}" for n, s in zip(self.names, self.shape, strict=True))
        return "x".join(map(str, self.shape))


def _speed(device: Device) -> float:
    return max(device.peak_flops.get(d, 0.0) for d in ("bf16", "fp16", "fp32"))


def preset_names() -> tuple[str, ...]:
    """Names that `load_cluster` knows, sorted."""
    return tuple(sorted(p.stem for p in PRESETS.glob("*.toml")))


def load_cluster(name: str | Path, nodes: int | None = None, mesh: Mesh | None = None) -> Cluster:
    """A cluster from a preset's name or from a TOML file (a path ending in `.toml`).

    `nodes` sets the number of nodes; `mesh` sets nodes and devices per node (`2x8`), where a one-axis mesh larger than a
    node fills as many nodes as it needs. Raises ConfigError with file, line, key and what is allowed.
    """
    path = Path(name)
    if path.suffix != ".toml":
        if str(name) not in preset_names():
            raise ConfigError(f"hardware '{name}' is unknown; {nearest(str(name), preset_names())}; or a path to a .toml file")
        path = PRESETS / f"{name}.toml"
    cluster = parse_cluster(TableReader.from_file(path))
    if mesh is not None:
        cluster = _fit_mesh(cluster, mesh)
    elif nodes is not None:
        cluster = cluster.with_nodes(nodes)
    return cluster


def _fit_mesh(cluster: Cluster, mesh: Mesh) -> Cluster:
    inner = mesh.shape[-1]
    if len(mesh.shape) == 1 or mesh.names:
        if mesh.size <= cluster.node_size:
            return cluster.with_node_size(mesh.size).with_nodes(1)
        if mesh.size % cluster.node_size:
            raise ConfigError(f"mesh {mesh}: {mesh.size} devices do not fill nodes of {cluster.node_size} ({cluster.name}); "
                              "write nodes x devices")
        return cluster.with_nodes(mesh.size // cluster.node_size)
    if inner > cluster.node_size:
        raise ConfigError(f"mesh {mesh}: {inner} devices per node, but a node of {cluster.name} has {cluster.node_size}")
    return cluster.with_node_size(inner).with_nodes(mesh.nodes)


def parse_cluster(reader: TableReader) -> Cluster:
    """Read a cluster table: one `[device]` with `[[levels]]`, or `[[groups]]` of presets with the `[[levels]]` above a
    node.
    """
    name = reader.text("name")
    reader.text("description", "")
    if "groups" in reader.table:
        cluster = _parse_groups(reader, name)
    else:
        nodes = reader.integer("nodes", "number of nodes", 1)
        device = _parse_device(reader.child("device"))
        levels = _parse_levels(reader.children("levels"))
        cluster = Cluster(name, (NodeGroup(device, nodes),), levels)
    reader.finish()
    return cluster


def _parse_groups(reader: TableReader, name: str) -> Cluster:
    groups, inner = [], []
    for table in reader.children("groups"):
        base = load_cluster(table.text("preset", choices=[p for p in preset_names() if p != name]))
        groups.append(NodeGroup(base.groups[0].device, table.integer("nodes", "number of nodes")))
        inner.append(base.levels[0])
        table.finish()
    if len({level.size for level in inner}) > 1:
        raise reader.error("groups", f"must have equal devices per node, not {', '.join(str(level.size) for level in inner)}")
    slowest = min(inner, key=lambda level: level.port_rate)
    return Cluster(name, tuple(groups), (slowest, *_parse_levels(reader.children("levels"), above_node=True)))


def _parse_device(table: TableReader) -> Device:
    peaks = table.child("peak_flops")
    peak_flops = {d: peaks.number(d, "FLOP/s") for d in DTYPES if d in peaks.table}
    peaks.seen.update(DTYPES)
    peaks.finish()
    if not peak_flops:
        raise table.error("peak_flops", f"names no dtype; {nearest('', DTYPES)}")
    efficiency = Efficiency()
    if "efficiency" in table.table:
        sub = table.child("efficiency")
        efficiency = Efficiency(
            gemm=sub.number("gemm", "fraction of peak FLOP/s", efficiency.gemm, high=1.0),
            gemm_half_k=sub.number("gemm_half_k", "elements of K", efficiency.gemm_half_k, open_low=False),
            attention=sub.number("attention", "fraction of peak FLOP/s", efficiency.attention, high=1.0),
            memory=sub.number("memory", "fraction of memory bandwidth", efficiency.memory, high=1.0),
            kernel_overhead_s=sub.number("kernel_overhead_s", "seconds", efficiency.kernel_overhead_s, open_low=False),
            attention_backward=sub.number("attention_backward", "times the forward rate", efficiency.attention_backward),
            memory_curve=_parse_curve(sub, "memory_curve"))
        sub.finish()
    device = Device(
        name=table.text("name"), peak_flops=MappingProxyType(peak_flops), memory_bytes=table.number("memory_bytes", "bytes"),
        memory_bandwidth=table.number("memory_bandwidth", "bytes/s"), cores=table.integer("cores", "multiprocessors or cores"),
        reserved_bytes=table.number("reserved_bytes", "bytes", 0.0, open_low=False),
        host_bandwidth=table.number("host_bandwidth", "bytes/s", 20e9),
        overlap_loss=table.number("overlap_loss", "share of hidden communication", 0.0, high=1.0, open_low=False), efficiency=efficiency)
    table.finish()
    return device


def _parse_levels(tables: list[TableReader], above_node: bool = False) -> tuple[Level, ...]:
    levels = []
    for i, table in enumerate(tables):
        is_open = i == len(tables) - 1 and (above_node or len(tables) > 1)
        levels.append(Level(
            name=table.text("name"), size=table.integer("size", "children", 0 if is_open else None, low=0 if is_open else 1),
            alpha=table.number("alpha", "seconds", open_low=False), bandwidth=table.number("bandwidth", "bytes/s, one way"),
            ports=table.integer("ports", "ports per child", 1),
            efficiency=table.number("efficiency", "fraction of line rate", 1.0, high=1.0),
            topology=table.text("topology", "switch", choices=TOPOLOGIES),
            oversubscription=table.number("oversubscription", "times", 1.0, low=1.0, open_low=False), curves=_parse_curves(table)))
        table.finish()
    return tuple(levels)


def _parse_curves(table: TableReader) -> tuple[tuple[str, Curve], ...]:
    if "curves" not in table.table:
        return ()
    sub = table.child("curves")
    found = tuple((kind, _parse_curve(sub, kind)) for kind in COLLECTIVES if kind in sub.table)
    sub.finish()
    return found


def _parse_curve(table: TableReader, key: str) -> Curve:
    """((bytes, seconds), ...) from a list of pairs; () if the key is not there."""
    if key not in table.table:
        return ()
    table.seen.add(key)
    value = table.table[key]
    pairs = isinstance(value, list) and len(value) > 1 and all(isinstance(p, list) and len(p) == 2 for p in value)
    numbers = pairs and all(isinstance(x, int | float) and not isinstance(x, bool) and x > 0 for pair in value for x in pair)
    if not numbers or any(b[0] <= a[0] for a, b in pairwise(value)):
        raise table.error(key, "must be a list of two or more [bytes, seconds] pairs, both positive, bytes ascending")
    return tuple((float(a), float(b)) for a, b in value)


def describe(cluster: Cluster) -> dict[str, Any]:
    """A plain dictionary of the cluster's facts, for reports."""
    return {"name": cluster.name, "devices": cluster.size, "nodes": cluster.nodes,
            "device": [f"{g.nodes} x {g.device.name}" for g in cluster.groups],
            "levels": [f"{v.name}: {v.ports} x {v.bandwidth / 1e9:g} GB/s, {v.alpha * 1e6:g} us" for v in cluster.levels]}
