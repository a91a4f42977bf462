"""What Slurm's environment variables say: parsing, and a question to scontrol where a name is no address."""

import re
import socket
import subprocess
from collections.abc import Mapping

from sft_dist.errors import ClusterError

# The batch script and an interactive shell of salloc are steps too, with numbers from here on.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


def is_task(env: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of its tasks; a batch script has most of the variables as well."""
    step = env.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in env and step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def first_host(nodelist: str) -> str:
    """The first name of a node list such as "gpu[03-07,11],login1"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if first is None:
        raise ClusterError(f"Slurm's list of nodes, {nodelist!r}, cannot be read; set MASTER_ADDR")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """How many tasks node number `node` of the step has, by a text such as "8(x2),4"."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ClusterError(f"SLURM_TASKS_PER_NODE={tasks_per_node!r} cannot be read")
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise ClusterError(f"SLURM_NODEID={node}, but SLURM_TASKS_PER_NODE={tasks_per_node!r}")
    return counts[node]


def address(host: str) -> str:
    """`host` where its name resolves, else the address that Slurm has for it. Raises ClusterError."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    try:
        answer = subprocess.run(
            ["scontrol", "show", "node", host], capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    found = re.search(r"\bNodeAddr=(\S+)", answer)
    if found is None:
        raise ClusterError(f"the first node, {host}, has no address that {socket.gethostname()} knows; set MASTER_ADDR")
    return found[1]
