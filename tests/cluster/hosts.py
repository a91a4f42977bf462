"""Two hosts on one machine: network namespaces with addresses of their own on one bridge, an sshd in each.

Each has its own host name too (a UTS namespace), which, as on many clusters, does not lead to its address: gloo and
NCCL left to themselves would go astray here. Needs root, iproute2, openssh-server and, for deepspeed, pdsh.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tests.helpers.worlds import ROOT

PROGRAMS = {"ip": "iproute2", "/usr/sbin/sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
SSH_CONFIG = Path("/etc/ssh/ssh_config.d")


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    holder: "subprocess.Popen[bytes]"  # keeps the namespaces

    def command(self, *arguments: str, cwd: Path = ROOT) -> list[str]:
        """`arguments` as a command on this host."""
        return ["nsenter", f"--target={self.holder.pid}", "--net", "--uts", f"--wd={cwd}", *arguments]

    def cut_off(self) -> None:
        """From one moment to the next nothing reaches this host any more, and nothing leaves it."""
        subprocess.run(["ip", "link", "set", f"v-{self.name}", "down"], check=True)

    def come_back(self) -> None:
        subprocess.run(["ip", "link", "set", f"v-{self.name}", "up"], check=True)


def missing() -> str | None:
    """What to install before such hosts can be made, or None."""
    packages = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if packages:
        return f"apt-get install {' '.join(packages)}"
    if os.getuid() != 0:
        return "run the tests as root (network namespaces)"
    probe = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"a machine that allows network namespaces ({probe.stderr.strip()})"


@contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    """Hosts that reach each other by ssh without being asked anything; nothing is left of them afterwards."""
    number = os.getpid() % 200 + 20
    bridge, network = f"br-{number}", f"10.77.{number}"
    names = (f"n1-{number}", f"n2-{number}")
    config = SSH_CONFIG / f"sft-dist-test-{number}.conf"
    hosts: list[Host] = []
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "link", "set", bridge, "up")
        for name, last in zip(names, (11, 12), strict=True):
            hosts.append(_make_host(name, f"{network}.{last}", bridge))
        _make_keys(folder)
        SSH_CONFIG.mkdir(parents=True, exist_ok=True)
        config.write_text(_client_config(network, folder))
        Path("/run/sshd").mkdir(exist_ok=True)
        for host in hosts:
            (folder / f"sshd-{host.name}").write_text(_server_config(host.address, folder))
            daemons.append(
                subprocess.Popen(host.command("/usr/sbin/sshd", "-D", "-e", "-f", str(folder / f"sshd-{host.name}")))
            )
        for host in hosts:
            _wait_for_ssh(hosts[0], host)
        yield hosts
    finally:
        config.unlink(missing_ok=True)
        for host in hosts:
            for pid in processes_of(host):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in (*daemons, *(host.holder for host in hosts)):
            process.kill()
            process.wait()
        for device in (*(f"v-{name}" for name in names), bridge):
            subprocess.run(["ip", "link", "del", device], capture_output=True)


def processes_of(host: Host) -> list[int]:
    """Living processes on a host, without the one that keeps it and its sshd."""
    try:
        network = os.readlink(f"/proc/{host.holder.pid}/ns/net")
    except OSError:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and os.readlink(entry / "ns" / "net") == network:
                words = (entry / "cmdline").read_bytes()
                if words and int(entry.name) != host.holder.pid and not words.startswith((b"sshd", b"/usr/sbin/sshd")):
                    found.append(int(entry.name))
    return found


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _make_host(name: str, address: str, bridge: str) -> Host:
    holder = subprocess.Popen(["unshare", "--net", "--uts", "sh", "-c", f"hostname {name} && exec sleep infinity"])
    host = Host(name, address, holder)
    own = os.readlink("/proc/self/ns/net")
    deadline = time.monotonic() + 10
    while os.readlink(f"/proc/{holder.pid}/ns/net") == own or b"sleep" not in _words(holder.pid):
        assert time.monotonic() < deadline, f"no namespaces for {name}"
        time.sleep(0.01)
    run("ip", "link", "add", f"v-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
    run("ip", "link", "set", f"v-{name}", "master", bridge, "up")
    for command in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
        run(*host.command("ip", *command.split()))
    return host


def _words(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _make_keys(folder: Path) -> None:
    for name in ("host", "user"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    shutil.copy(folder / "user.pub", folder / "authorized")


def _server_config(address: str, folder: Path) -> str:
    return (
        f"ListenAddress {address}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\nStrictModes no\n"
        "UsePAM no\nPermitRootLogin yes\nPidFile none\nMaxStartups 100\nLogLevel ERROR\n"
    )


def _client_config(network: str, folder: Path) -> str:
    return (
        f"Host {network}.*\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n  BatchMode yes\n"
    )


def _wait_for_ssh(here: Host, there: Host) -> None:
    deadline = time.monotonic() + 20
    while True:
        done = subprocess.run(here.command("ssh", there.address, "hostname"), capture_output=True, text=True)
        if done.returncode == 0:
            assert done.stdout.strip() == there.name
            return
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.1)


def launch(
    host: Host, arguments: Sequence[str], *, cwd: Path, environ: Mapping[str, str] = MappingProxyType({})
) -> "subprocess.Popen[str]":
    """sft-launch with `arguments` on `host`, no variable set that tells of networks; packages in `cwd` come first."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GLOO", "NCCL", "MASTER"))}
    return subprocess.Popen(
        host.command(sys.executable, "-m", "launcher", *arguments, cwd=cwd),
        env=inherited
        | {
            "PYTHONPATH": f"{cwd}{os.pathsep}{ROOT}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "DS_ACCELERATOR": "cpu",
        }
        | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
