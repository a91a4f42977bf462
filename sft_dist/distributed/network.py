"""Where the ranks of a run meet: the address and port of rank 0, and the network interface towards it.

Nothing here knows torch or MPI. Sockets are opened to ask the kernel for a route and to try whether others get through;
no packet is sent to learn an interface.
"""

import ipaddress
import os
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from sft_dist.errors import ClusterError

Interfaces = Mapping[str, Sequence[str]]  # addresses by interface

_FIRST_PORT = 20_000
_CONNECT_TIMEOUT_S = 3.0


def interfaces() -> dict[str, list[str]]:
    """Addresses of every interface that is up, without link-local ones, which are no addresses for others."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        texts = [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        usable = [text for text in texts if "%" not in text and not ipaddress.ip_address(text).is_link_local]
        if name in up and usable:
            found[name] = usable
    return found


def interface_variables(master_addr: str, master_port: int, env: Mapping[str, str]) -> dict[str, str]:
    """What gloo and NCCL must be told so that they use the network on which rank 0 is reached.

    Left to itself gloo takes the interface that the host's own name stands for, which on many machines is 127.0.0.1.
    Variables that the user has set are left alone. Raises ClusterError when there is no way to rank 0.
    """
    if "GLOO_SOCKET_IFNAME" in env and "NCCL_SOCKET_IFNAME" in env:
        return {}
    here = interfaces()
    source = source_address(master_addr, master_port)
    name = choose_interface(source, here, is_local=is_loopback(master_addr), outward=_outward_address())
    if name is None:
        return {}
    found = {"GLOO_SOCKET_IFNAME": name}
    # NCCL never takes the loopback for itself, and prefers IP over InfiniBand, rightly.
    if not any(map(is_loopback, here[name])) and not any(other.startswith("ib") for other in here):
        found["NCCL_SOCKET_IFNAME"] = f"={name}"  # without "=" it would be the beginning of names
    return {key: value for key, value in found.items() if key not in env}


def choose_interface(source: str, here: Interfaces, *, is_local: bool, outward: str | None) -> str | None:
    """The interface to use, None when it cannot be told. Pure.

    `source` is the address from which this host reaches rank 0, `outward` the one from which it reaches the world, and
    `is_local` says that rank 0 is named by a loopback address, so that all ranks share this host. Otherwise a loopback
    `source` only means that /etc/hosts gives 127.0.1.1 for the name of this host: others must reach it elsewhere.
    """
    by_address = {address: name for name, addresses in here.items() for address in addresses}
    if is_local or not is_loopback(source):
        return by_address.get(source)
    if outward is not None and outward in by_address:
        return by_address[outward]
    return next((name for address, name in by_address.items() if not is_loopback(address)), by_address.get(source))


def source_address(host: str, port: int) -> str:
    """The address of ours from which packets to `host` leave. Sends none. Raises ClusterError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    except (OSError, UnicodeError) as error:
        raise ClusterError(
            f"the address of rank 0, {host!r}, cannot be resolved on {socket.gethostname()} ({error}); give one that "
            "every node can resolve, or a numeric one (MASTER_ADDR, or --master-addr of sft-launch)"
        ) from None
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ClusterError(f"{socket.gethostname()} has no route to rank 0 at {host} ({error.strerror})") from None


def _outward_address() -> str | None:
    try:
        return source_address("192.0.2.1", 9)  # RFC 5737: an address of nobody
    except ClusterError:  # no default route
        return None


def this_host() -> str:
    """The same for processes that reach each other at 127.0.0.1, and for no others: containers may share a name."""
    try:
        namespace = os.stat("/proc/self/ns/net")
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text()} {namespace.st_ino}"
    except OSError:
        return socket.gethostname()


def is_loopback(host: str) -> bool:
    """Whether `host`, as it is written, names the machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def ports() -> range:
    """Ports for rank 0: below the ephemeral ones, where no outgoing connection can take one first."""
    try:
        first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first_ephemeral = 32_768
    return range(_FIRST_PORT, first_ephemeral) if first_ephemeral > _FIRST_PORT else range(1_024, _FIRST_PORT)


def job_port(job_id: int, step_id: int) -> int:
    """The port of a Slurm job step. Every rank derives it, without knowing what is free on the host of rank 0."""
    return _FIRST_PORT + (job_id + step_id) % 10_000


@dataclass(frozen=True)
class MeetingPoint:
    """What rank 0 offers to the others before torch does: a port, its addresses, and a word that only it can answer."""

    port: int
    addresses: tuple[str, ...]
    word: bytes

    def reachable(self) -> list[str]:
        """Those addresses at which this host gets through to that very process, in their order."""
        return [address for address in self.addresses if self._answers(address)]

    def _answers(self, address: str) -> bool:
        # The same private address may belong to another machine here (docker0): the word tells.
        try:
            with socket.create_connection((address, self.port), timeout=_CONNECT_TIMEOUT_S) as connection:
                return connection.recv(len(self.word), socket.MSG_WAITALL) == self.word
        except OSError:
            return False


@contextmanager
def meeting_point(*, seed: int, is_alone: bool) -> Iterator[MeetingPoint]:
    """Listen on a free port of every address of this host while the others try them. Raises ClusterError."""
    listener = _listen(seed)
    outward = _outward_address()
    addresses = [a for group in interfaces().values() for a in group if is_loopback(a) == is_alone]
    addresses.sort(key=lambda address: (":" in address, address != outward))
    word = secrets.token_bytes(16)
    thread = threading.Thread(target=_answer, args=(listener, word), daemon=True)
    thread.start()
    try:
        yield MeetingPoint(listener.getsockname()[1], tuple(addresses), word)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


def _listen(seed: int) -> socket.socket:
    choice = ports()
    dual = socket.has_dualstack_ipv6()
    for number in range(len(choice)):
        port = choice[(seed + number) % len(choice)]
        with suppress(OSError):
            family = socket.AF_INET6 if dual else socket.AF_INET
            return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1_024)
    raise ClusterError(f"no port of {choice.start}..{choice.stop - 1} is free on {socket.gethostname()}")


def _answer(listener: socket.socket, word: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # the listener was shut down
            return
        with connection, suppress(OSError):
            connection.settimeout(_CONNECT_TIMEOUT_S)
            connection.sendall(word)
            connection.recv(1)  # until the other side has closed: who closes first keeps the port busy
