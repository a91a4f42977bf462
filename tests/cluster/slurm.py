"""A real Slurm on this machine: munged, slurmctld and two slurmd, in a folder and on ports of its own.

Nothing of the system is used but the programs: no /etc/slurm, no /run/munge, no service. `start_cluster` yields when
both nodes are idle; when it is left no daemon, no step and no rank is there any more. Both nodes share this host's name
and address, so whatever takes a rank's place from the host name instead of Slurm's variables is wrong here.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from launcher.processes import die_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel", "unshare")
NODES = ("node1", "node2")
CPUS_PER_NODE = 8  # declared, not counted: several small jobs run at once
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
TIMEOUT_S = 300.0
NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
KILL_WAIT_S = 10
GRACE_S = 30
# Debian keeps the daemons in /usr/sbin; jobs find this Python as `python`.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])

# cred_expire: a requeued job begins ten seconds later instead of two minutes. KillWait: between SIGTERM and SIGKILL.
# `low` is preempted at once, `grace` after a time in which its tasks may end by themselves.
CONFIG = """\
ClusterName=sft{first_job}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=8
KillWait={kill_wait}
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] \
Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{cpus} State=UNKNOWN
PartitionName=low Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace Nodes=node[1-2] MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=node[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@dataclass
class Cluster:
    """Two nodes at work. `env` is what commands of Slurm, and the jobs they start, are given."""

    folder: Path
    env: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *argv: str, cwd: Path | None = None, check: bool = True, **env: str) -> str:
        """Run a command of Slurm to its end; what it printed."""
        done = subprocess.run(
            argv, cwd=cwd or self.folder, env=self.env | env, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert not check or done.returncode == 0, f"{' '.join(argv)}: exit {done.returncode}\n{done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of one element of an array (ARRAY_INDEX)."""
        return dict(
            word.split("=", 1) for word in self.run("scontrol", "show", "job", "-o", job).split() if "=" in word
        )

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s:g} s for this: {what}\n{self.log_ends()}"
            time.sleep(0.1)

    def end_of(self, job: str, timeout_s: float = TIMEOUT_S) -> dict[str, str]:
        """The job once it has ended for good; by then no process of it is left."""
        self.wait(lambda: self.job(job)["JobState"] in ENDED, f"the end of job {job}", timeout_s)
        self.wait(lambda: not self.processes_of(job), f"no process of job {job} is left", KILL_WAIT_S)
        return self.job(job)

    def processes_of(self, job: str, *marks: str) -> list[int]:
        """Living processes of a job, the batch script and its children included; with VARIABLE=VALUE, only those."""
        wanted = {f"SLURM_JOB_ID={self.job(job)['JobId']}", *marks}
        return [pid for pid, environment in self.processes().items() if wanted <= environment]

    def processes(self) -> dict[int, set[str]]:
        """Everything that belongs to this cluster, except the test itself: environments by process id."""
        mark = f"SLURM_CONF={self.env['SLURM_CONF']}"
        found = {}
        for process in Path("/proc").iterdir():
            if process.name.isdecimal():
                try:
                    environment = set((process / "environ").read_text(errors="replace").split("\0"))
                except OSError:
                    continue  # it ended between the two looks
                if mark in environment:  # that of a zombie reads empty
                    found[int(process.name)] = environment
        return found

    def start_node(self, name: str) -> None:
        # In a namespace of its own every process of the node ends with the daemon, and it with the tests.
        self.start(name, *NAMESPACE, "slurmd", "-D", "-N", name, "-f", self.env["SLURM_CONF"])

    def kill_node(self, name: str) -> None:
        """What a power cut does: the daemon, the steps and the ranks of one node are gone without a word."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def start(self, name: str, *argv: str) -> None:
        launcher = os.getpid()
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                argv,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(launcher),
            )

    def idle_nodes(self) -> int:
        return self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False).split().count("idle")

    def stop(self) -> None:
        """End every job and every daemon. Raises AssertionError where something outlives that, after killing it."""
        for job in self.run("squeue", "-h", "-o", "%A", check=False).split():
            self.run("scancel", job, check=False)
        for name in [name for name in self.daemons if name in NODES]:
            self.kill_node(name)
        for daemon in reversed(self.daemons.values()):  # munged goes last: the others need it to say good-bye
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        deadline = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)  # slurmctld has a child that leaves after it
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not left, f"outlived the cluster: {sorted(left)}"

    def log_ends(self) -> str:
        logs = [self.folder / "slurmctld.log", *sorted(self.folder.glob("slurmd-*.log"))]
        return "\n".join(f"{log.name}: ...{log.read_text(errors='replace')[-1500:]}" for log in logs if log.exists())


def missing_programs() -> str | None:
    """What a machine lacks to run these tests, and how to get it."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge"
    if subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0:
        return "a Slurm node needs root and a process namespace here (unshare --pid)"
    return None


@contextmanager
def start_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster in `folder`; leave nothing of it running."""
    ports = _free_ports(3)
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    for number in range(CPUS_PER_NODE):
        (folder / f"gpu{number}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{CPUS_PER_NODE - 1}]\n")
    config = folder / "slurm.conf"
    # Job ids of its own, for the port of rank 0 follows from them.
    config.write_text(
        CONFIG.format(
            folder=folder,
            ports=ports,
            first_job=os.getpid() % 9000 + 1000,
            kill_wait=KILL_WAIT_S,
            grace=GRACE_S,
            cpus=CPUS_PER_NODE,
        )
    )
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "RANK", "WORLD_SIZE", "MASTER"))
    }
    cluster = Cluster(folder, kept | {"SLURM_CONF": str(config), "PATH": PATH})
    try:
        files = {
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munged.seed",
        }
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        cluster.start("munged", "munged", "--foreground", "--force", f"--key-file={key}", *options)
        cluster.wait((folder / "munge.socket").exists, "munged is up", 20)
        cluster.start("slurmctld", "slurmctld", "-D", "-c", "-f", str(config))
        for node in NODES:
            cluster.start_node(node)
        cluster.wait(lambda: cluster.idle_nodes() == len(NODES), "both nodes are idle", 30)
        yield cluster
    finally:
        cluster.stop()


def _free_ports(number: int) -> list[int]:
    """Neighbouring ports below those that jobs take for rank 0 and the kernel for connections."""
    for first in range(10_000 + os.getpid() % 900 * 10, 20_000, 10):
        with ExitStack() as stack:
            try:
                for port in range(first, first + number):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return list(range(first, first + number))
    raise AssertionError("no free ports")
