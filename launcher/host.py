"""Facts of the machine the launcher runs on: GPUs, CPUs, free ports. Reads the environment, /proc and
`nvidia-smi`; changes nothing and starts no rank."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from launcher.job import EXIT_CLUSTER, LaunchError

NVIDIA_SMI_TIMEOUT_S = 30.0
_SIOCGIFADDR = 0x8915  # netdevice(7): the address of an interface


def visible_devices(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """Entries of CUDA_VISIBLE_DEVICES up to the first "-1", as CUDA reads them; None when it is not set."""
    value = environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    devices = [entry.strip() for entry in value.split(",") if entry.strip()]
    return tuple(devices[: devices.index("-1")] if "-1" in devices else devices)


def count_gpus(environ: Mapping[str, str]) -> int:
    """GPUs a rank started here would see; 0 without a driver installed."""
    devices = visible_devices(environ)
    if devices is not None:
        return len(devices)
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return 0
    return sum(line.startswith("GPU ") for line in _list_gpus(program).splitlines())


def _list_gpus(program: str) -> str:
    # A driver that does not answer is an error: a silent "no GPUs" would train on one CPU process.
    try:
        answer = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        problem = f"did not answer within {NVIDIA_SMI_TIMEOUT_S:.0f} s"
    except OSError as error:
        problem = f"could not be run ({error.strerror})"
    else:
        if answer.returncode == 0:
            return answer.stdout
        problem = f"ended with exit status {answer.returncode}"
    raise LaunchError(
        f"{program} -L {problem}, so the GPUs cannot be counted; mend the driver, or give --nproc",
        exit_code=EXIT_CLUSTER,
    )


def count_cpus() -> int:
    """CPUs this process may use, which in a container is less than the machine has."""
    return len(os.sched_getaffinity(0))


def first_ephemeral_port() -> int:
    """Where the ports begin that the kernel gives to outgoing connections."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768


def master_ports(first_ephemeral: int) -> range:
    """Ports to choose from: below the ephemeral ones, where no outgoing connection can take it first."""
    return range(20_000, first_ephemeral) if first_ephemeral > 20_000 else range(1_024, 20_000)


def port_problem(port: int) -> str | None:
    """Why rank 0 could not listen on `port` of all addresses, or None when it could."""
    dual = socket.has_dualstack_ipv6()
    try:
        with socket.create_server(("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual):
            return None
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)


def address_towards(host: str) -> str:
    """The address of ours from which `host` is reached, and at which it reaches us. Raises LaunchError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except (OSError, UnicodeError) as error:
        raise LaunchError(
            f"{host} cannot be reached from here ({error}); name hosts as every one of them can resolve, or by address",
            exit_code=EXIT_CLUSTER,
        ) from error


def own_addresses(hosts: Iterable[str]) -> tuple[str, ...]:
    """Addresses at which `hosts` reach this machine; 127.0.0.1 alone when they are none but itself."""
    found = dict.fromkeys(map(address_towards, hosts))
    others = tuple(address for address in found if not ipaddress.ip_address(address).is_loopback)
    return others or ("127.0.0.1",)


def every_address() -> tuple[str, ...]:
    """IPv4 addresses of this machine, the one towards the world first; 127.0.0.1 alone where it has no network."""
    found: dict[str, None] = {}
    with suppress(LaunchError):  # no default route
        found[address_towards("192.0.2.1")] = None  # RFC 5737: an address of nobody; nothing is sent
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[socket.inet_ntoa(answer[20:24])] = None
    others = tuple(address for address in found if not ipaddress.ip_address(address).is_loopback)
    return others or ("127.0.0.1",)


def is_own(host: str) -> bool:
    """Whether `host` is this machine: what it resolves to is an address that can be listened on here."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except (OSError, UnicodeError):
        return False
    return True


def require_port(port: int) -> None:
    """Refuse a port that rank 0 could not listen on, before any rank starts."""
    problem = port_problem(port)
    if problem is not None:
        raise LaunchError(
            f"port {port} cannot be used ({problem}): end the program that holds it "
            f"(ss -ltnp 'sport = :{port}' names it), give another with --master-port, or leave that out",
            exit_code=EXIT_CLUSTER,
        )


def free_port(ports: range, *, seed: int) -> int:
    """The first free one of `ports`, searched from a place set by `seed`.

    Launches that start at the same moment have other seeds, so they do not meet on one port.
    """
    for i in range(len(ports)):
        port = ports[(seed + i) % len(ports)]
        if port_problem(port) is None:
            return port
    raise LaunchError(
        f"no free port in {ports.start}..{ports.stop - 1}; give one with --master-port",
        exit_code=EXIT_CLUSTER,
    )
