"""Find the mpiexec that belongs to the MPI which mpi4py loads: one of another MPI starts N processes that each believe
to be alone. Asks the interpreter of the run which library that is, and the programs which MPI they are of."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.job import EXIT_CLUSTER, LaunchError

Family = Literal["mpich", "openmpi"]
_TIMEOUT_S = 60.0

# The version can be asked for without MPI_Init, which alone might hang or leave a daemon behind.
_ASK = """
import mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
from mpi4py import MPI
print(MPI.Get_library_version().splitlines()[0])
print(next((line.split()[-1] for line in open("/proc/self/maps") if "/libmpi" in line), ""))
"""


@dataclass(frozen=True)
class Mpiexec:
    """A program that starts the ranks of an MPI, and which MPI that is."""

    path: str
    family: Family


def find_mpiexec(python: str, *, search_path: str | None = None) -> Mpiexec:
    """The mpiexec of the MPI that mpi4py loads in the environment of `python`. Raises LaunchError."""
    version, library = _loaded_mpi(python)
    family = family_of(version)
    if family is None:
        raise LaunchError(
            f"mpi4py loads {version!r}, and sft-launch knows MPICH (and its kin) and Open MPI; start the ranks with "
            f"the mpiexec of that MPI by hand: mpiexec -n N {python} -m sft_dist train RUN_YAML",
            exit_code=EXIT_CLUSTER,
        )
    return choose(candidates(library, python, search_path=search_path), family, version, ask=_family_of_program)


def family_of(text: str) -> Family | None:
    """Which MPI a version text speaks of. Intel MPI and MVAPICH start their ranks as MPICH does, with Hydra."""
    low = text.lower()
    if "open mpi" in low or "openrte" in low or "prrte" in low:
        return "openmpi"
    return "mpich" if any(name in low for name in ("mpich", "hydra", "intel(r) mpi", "mvapich")) else None


def candidates(library: str, python: str, *, search_path: str | None) -> Iterator[str]:
    """Programs to look at: those of the folders above the library, the one beside the interpreter, those of PATH."""
    folders = [parent / "bin" for parent in Path(library).parents] if library else []
    seen: set[str] = set()
    for folder in (*folders, Path(python).parent):
        for name in ("mpiexec", "mpiexec.openmpi", "mpiexec.mpich", "mpiexec.hydra", "mpirun"):
            if (folder / name).is_file() and str(folder / name) not in seen:
                seen.add(str(folder / name))
                yield str(folder / name)
    for name in ("mpiexec", "mpirun", "mpiexec.openmpi", "mpiexec.mpich", "mpiexec.hydra"):
        found = shutil.which(name, path=search_path)
        if found is not None and found not in seen:
            seen.add(found)
            yield found


def choose(programs: Iterator[str], family: Family, version: str, *, ask: Callable[[str], Family | None]) -> Mpiexec:
    """The first program of `family`. Raises LaunchError naming what was found instead."""
    others = []
    for program in programs:
        found = ask(program)
        if found == family:
            return Mpiexec(program, family)
        others.append(f"{program} ({found or 'unknown'})")
    raise LaunchError(
        f"mpi4py loads {version!r}, and no mpiexec of that MPI was found (found: {', '.join(others) or 'none'}); with "
        "another one every rank would be a run of its own. Put its folder on PATH, or pip install mpich",
        exit_code=EXIT_CLUSTER,
    )


def _loaded_mpi(python: str) -> tuple[str, str]:
    try:
        answer = subprocess.run(
            [python, "-c", _ASK],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        lines = answer.stdout.splitlines()
        problem = answer.stderr.strip().splitlines()[-1:]
    except (OSError, subprocess.TimeoutExpired) as error:
        lines, problem = [], [str(error)]
    if len(lines) < 2:
        raise LaunchError(
            f"{python} cannot load MPI through mpi4py ({' '.join(problem) or 'no answer'}); load the module of your "
            "MPI, or pip install mpich",
            exit_code=EXIT_CLUSTER,
        )
    return lines[-2].strip("\0 "), lines[-1]


def _family_of_program(program: str) -> Family | None:
    try:
        answer = subprocess.run(
            [program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return family_of(answer.stdout + answer.stderr)
