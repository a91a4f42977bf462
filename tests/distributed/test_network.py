"""Addresses and interfaces: what is chosen is what the kernel would use, and what every rank can reach."""

import socket

import pytest

from sft_dist.distributed import network, slurm
from sft_dist.errors import ClusterError

HERE = {"lo": ["127.0.0.1", "::1"], "docker0": ["172.17.0.1"], "eth0": ["10.0.0.5", "fd00::5"], "eth1": ["10.1.0.5"]}


@pytest.mark.parametrize(
    ("source", "is_local", "outward", "expected"),
    [
        ("10.1.0.5", False, "10.0.0.5", "eth1"),  # the route to rank 0 counts, not the one to the world
        ("fd00::5", False, None, "eth0"),
        ("127.0.0.1", True, "10.0.0.5", "lo"),
        ("127.0.1.1", False, "10.0.0.5", "eth0"),  # /etc/hosts of rank 0's own host
        ("127.0.0.1", False, None, "docker0"),  # nothing better is known
        ("192.168.1.1", False, "10.0.0.5", None),  # gone since
    ],
)
def test_the_interface_is_the_one_towards_rank_0(
    source: str, is_local: bool, outward: str | None, expected: str | None
) -> None:
    assert network.choose_interface(source, HERE, is_local=is_local, outward=outward) == expected


def test_a_host_with_nothing_but_loopback_uses_it() -> None:
    assert network.choose_interface("127.0.0.1", {"lo": ["127.0.0.1"]}, is_local=False, outward=None) == "lo"


def test_ranks_of_one_host_use_the_loopback_and_leave_nccl_alone() -> None:
    lo = next(name for name, addresses in network.interfaces().items() if "127.0.0.1" in addresses)
    assert network.interface_variables("127.0.0.1", 20_000, {}) == {"GLOO_SOCKET_IFNAME": lo}
    assert network.interface_variables("localhost", 20_000, {"NCCL_SOCKET_IFNAME": "x"}) == {"GLOO_SOCKET_IFNAME": lo}


def test_what_the_user_has_set_stays() -> None:
    assert network.interface_variables("127.0.0.1", 20_000, {"GLOO_SOCKET_IFNAME": "ib0"}) == {}


def test_an_address_that_does_not_resolve_is_named_with_what_to_do() -> None:
    with pytest.raises(ClusterError, match=r"no-such-host\.invalid.*--master-addr"):
        network.interface_variables("no-such-host.invalid", 20_000, {})


def test_a_meeting_point_is_reached_where_it_is_and_nowhere_else() -> None:
    with network.meeting_point(seed=7, is_alone=True) as point:
        assert point.port in network.ports()
        assert "127.0.0.1" in point.reachable()
        stranger = network.MeetingPoint(point.port, ("127.0.0.1",), b"x" * 16)
        assert stranger.reachable() == [], "another process listens there"
        with network.meeting_point(seed=7, is_alone=True) as second:
            assert second.port != point.port
    assert point.reachable() == []
    with socket.create_server(("", point.port)):  # free for rank 0 at once
        pass


@pytest.mark.parametrize(
    ("nodelist", "expected"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-07,11],login1", "gpu03"),
        ("gpu[11,03-07]", "gpu11"),
        ("rack[1-2]-n[04-05]", "rack1-n04"),
        ("a-b.example.org,c", "a-b.example.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist: str, expected: str) -> None:
    assert slurm.first_host(nodelist) == expected


@pytest.mark.parametrize(("text", "expected"), [("8(x2),4", [8, 8, 4]), ("2,1", [2, 1]), ("3", [3])])
def test_tasks_of_each_node(text: str, expected: list[int]) -> None:
    assert [slurm.tasks_on_node(text, node) for node in range(len(expected))] == expected
    with pytest.raises(ClusterError, match="SLURM_NODEID"):
        slurm.tasks_on_node(text, len(expected))


def test_ports_of_jobs_lie_below_the_ephemeral_ones_and_differ() -> None:
    found = [network.job_port(job, step) for job in range(100_000, 100_100) for step in (0,)]
    assert len(set(found)) == 100 and min(found) >= 20_000 and max(found) < 30_000
