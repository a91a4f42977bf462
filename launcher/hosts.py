"""Read a hostfile: which hosts, and how many ranks each. Text in, Hosts out; every mistake is told with its line."""

from __future__ import annotations

import re
from pathlib import Path

from launcher.job import EXIT_USAGE, Host, LaunchError

_LINE = re.compile(r"(?P<name>[A-Za-z0-9][\w.:-]*)\s+slots=(?P<slots>\d+)(\s+max[-_]slots=\d+)?")


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a file, in its order. Raises LaunchError for a file that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise LaunchError(f"--hostfile {path} cannot be read: {reason}", exit_code=EXIT_USAGE) from error
    return parse_hostfile(text, name=str(path))


def parse_hostfile(text: str, *, name: str) -> tuple[Host, ...]:
    """The hosts of lines `HOST slots=N`; blank lines and those that begin with # are passed over. Pure.

    Raises LaunchError, naming every line that is wrong and not the first alone.
    """
    hosts: dict[str, int] = {}
    first_seen: dict[str, int] = {}
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            problems.append(f"{name}:{number}: {line!r} is not `HOST slots=N`")
        elif int(match["slots"]) == 0:
            problems.append(f"{name}:{number}: {match['name']} has no slots; leave the line out")
        elif match["name"] in hosts:
            problems.append(f"{name}:{number}: {match['name']} is there already, in line {first_seen[match['name']]}")
        else:
            hosts[match["name"]] = int(match["slots"])
            first_seen[match["name"]] = number
    if problems:
        raise LaunchError("; ".join(problems), exit_code=EXIT_USAGE)
    if not hosts:
        raise LaunchError(f"{name}: no host in it; a line is `HOST slots=N`", exit_code=EXIT_USAGE)
    return tuple(Host(host, slots) for host, slots in hosts.items())


def chosen_hosts(hosts: tuple[Host, ...], *, num_nodes: int | None, num_processes: int | None) -> tuple[Host, ...]:
    """The first `num_nodes` hosts, each with `num_processes` of its slots; None takes all. Pure. Raises LaunchError."""
    if not hosts:
        return ()
    if num_nodes is not None and num_nodes > len(hosts):
        raise LaunchError(f"--nodes {num_nodes}, but the hostfile has {len(hosts)} hosts", exit_code=EXIT_USAGE)
    chosen = hosts[:num_nodes]
    if num_processes is None:
        return chosen
    if short := [host for host in chosen if host.slots < num_processes]:
        lacking = ", ".join(f"{host.name} slots={host.slots}" for host in short)
        raise LaunchError(f"--nproc {num_processes} is more than the hostfile has: {lacking}", exit_code=EXIT_USAGE)
    return tuple(Host(host.name, num_processes) for host in chosen)
