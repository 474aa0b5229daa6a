"""Collective costs: exact byte and step counts on simple links, the choice of algorithm, and sharing of ports."""

from math import log2

import pytest
from aicc.passes.shard.cluster import load_cluster
from aicc.passes.shard.collectives import Group, Stage, all_times, axis_group, collective_cost, collective_time

A, R = 1e-6, 1e9  # 1 us, 1 GB/s


def flat(n: int, alpha: float = A, rate: float = R, topology: str = "switch") -> Group:
    return Group((Stage(n, alpha, rate, topology),)) if n > 1 else Group(())


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 64])
def test_ring_moves_the_known_bytes(n):
    size = 1e6
    free = flat(n, alpha=0.0)
    assert all_times("all_reduce", size, free)["ring"] == pytest.approx(2 * (n - 1) / n * size / R)
    assert all_times("all_gather", size, free)["ring"] == pytest.approx((n - 1) / n * size / R)
    assert all_times("reduce_scatter", size, free)["ring"] == pytest.approx((n - 1) / n * size / R)
    assert all_times("all_to_all", size, free)["pairwise"] == pytest.approx((n - 1) / n * size / R)


@pytest.mark.parametrize("n", [2, 4, 8, 64])
def test_steps_without_bytes(n):
    group = flat(n)
    reduce_times = all_times("all_reduce", 0.0, group)
    assert reduce_times["ring"] == pytest.approx(2 * (n - 1) * A)
    assert reduce_times["tree"] == pytest.approx(2 * log2(n) * A)
    assert reduce_times["double_tree"] == pytest.approx(2 * log2(n) * A)
    assert all_times("all_gather", 0.0, group)["doubling"] == pytest.approx(log2(n) * A)
    assert all_times("broadcast", 0.0, group)["ring"] == pytest.approx((n - 1) * A)


def test_two_trees_move_two_buffers_and_one_tree_three():
    times = all_times("all_reduce", 1e6, flat(8, alpha=0.0))
    assert times["double_tree"] == pytest.approx(2e6 / R)
    assert times["tree"] == pytest.approx(3e6 / R)
    assert all_times("broadcast", 1e6, flat(8, alpha=0.0)) == pytest.approx({"ring": 1e-3, "tree": 2e-3, "double_tree": 1e-3})


def test_small_messages_take_a_tree_and_large_ones_a_ring():
    group = flat(64)
    assert collective_cost("all_reduce", 1e3, group).algorithm in ("tree", "double_tree")
    assert collective_cost("all_reduce", 1e9, group).algorithm == "ring"
    assert collective_cost("all_gather", 1e3, group).algorithm == "doubling"


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "p2p"])
def test_one_rank_is_free_and_time_grows_with_bytes(kind):
    assert collective_cost(kind, 1e9, Group(())).seconds == 0.0
    group = axis_group(load_cluster("a100-80gb-sxm", nodes=4), 1, 32)
    times = [collective_time(kind, b, group) for b in (0.0, 1e3, 1e6, 1e9)]
    assert times == sorted(times)
    assert times[0] > 0


def test_mistakes():
    with pytest.raises(KeyError):
        collective_time("all_gossip", 1.0, flat(2))
    with pytest.raises(ValueError, match="must not be negative"):
        collective_time("all_reduce", -1.0, flat(2))


def test_axes_lie_on_levels():
    cluster = load_cluster("a100-80gb-sxm", nodes=16)
    extents = [tuple(s.extent for s in axis_group(cluster, stride, size).stages)
               for stride, size in ((1, 8), (1, 16), (8, 16), (4, 8), (2, 4), (1, 1), (4, 32))]
    assert extents == [(8,), (8, 2), (16,), (2, 4), (4,), (), (2, 16)]


def test_rails_and_sharing():
    cluster = load_cluster("a100-80gb-sxm", nodes=16)
    nic = cluster.levels[1].port_rate
    # tp=8 inside: every data-parallel ring has its own rail.
    assert axis_group(cluster, 8, 16).stages[0].rate == pytest.approx(nic)
    # all 8 members of a node in one ring: eight rails.
    assert axis_group(cluster, 1, 128).stages[1].rate == pytest.approx(8 * nic)
    shared = load_cluster("a100-40gb-pcie", nodes=16)  # one NIC a node
    port = shared.levels[1].port_rate
    assert axis_group(shared, 8, 16).stages[0].rate == pytest.approx(port / 8)
    assert axis_group(shared, 8, 16, concurrent=False).stages[0].rate == pytest.approx(port)
    assert axis_group(shared, 1, 128).stages[1].rate == pytest.approx(port)


def test_a_bus_is_shared_by_all():
    box = load_cluster("cpu-box")
    rate = box.levels[0].port_rate
    assert axis_group(box, 1, 2).stages[0].rate == pytest.approx(rate / 2)


def test_hierarchical_all_reduce_is_scatter_reduce_gather():
    inner, outer = Stage(8, 0.0, 100e9), Stage(4, 0.0, 10e9)
    size = 8e9
    expected = 7 / 8 * size / 100e9 + 2 * 3 / 4 * size / 10e9 + 7 / 8 * size / 100e9
    assert all_times("all_reduce", size, Group((inner, outer)))["hierarchical"] == pytest.approx(expected)
    flat_ring = all_times("all_reduce", size, Group((inner, outer)))["ring"]
    assert flat_ring == pytest.approx(2 * 31 / 32 * size / 10e9)


def test_hierarchical_all_to_all_sends_each_byte_over_the_network_once():
    inner, outer = Stage(8, 0.0, 1e15), Stage(4, 0.0, 10e9)
    size = 1e9
    times = all_times("all_to_all", size, Group((inner, outer)))
    assert times["hierarchical"] == pytest.approx(3 / 4 * size * 8 / 10e9, rel=1e-3)
    assert times["pairwise"] == pytest.approx(times["hierarchical"], rel=1e-3)
    latency = all_times("all_to_all", 0.0, Group((Stage(8, A, R), Stage(64, 5 * A, R))))
    assert latency["hierarchical"] < latency["pairwise"]


def test_neighbour_links_have_no_trees_and_pay_for_all_to_all():
    ring = flat(8, alpha=0.0, topology="ring")
    assert set(all_times("all_reduce", 1e6, ring)) == {"ring"}
    assert all_times("all_to_all", 1e6, ring)["pairwise"] == pytest.approx(2 * 7 / 8 * 1e6 / R)


def test_p2p_has_one_ranks_share_of_the_node():
    cluster = load_cluster("a100-80gb-sxm", nodes=4)
    nic = cluster.levels[1]
    assert collective_time("p2p", 1e9, axis_group(cluster, 8, 4)) == pytest.approx(nic.alpha + 1e9 / nic.port_rate)
    assert collective_time("p2p", 1e9, axis_group(cluster, 1, 32)) == pytest.approx(nic.alpha + 1e9 / nic.port_rate)
