"""The command lines of a Job, word by word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.commands import Command, Facts, commands, forwarded, shown
from launcher.hosts import chosen_hosts, parse_hostfile, read_hostfile
from launcher.job import Host, Job, LaunchError, Via
from launcher.mpi import Mpiexec, choose, family_of
from launcher.parcel import Contact, Parcel, decode, encode

PYTHON = "/opt/env/bin/python"
FACTS = Facts(python=PYTHON, num_cpus=9, environ={})
PROGRAM = ("sft_dist", "train", "runs/my run.yaml", "optimizer.lr=1e-5")
TWO_HOSTS = (Host("n1", 2), Host("n2", 1))
CONTACT = Contact(addresses=("10.0.0.1",), port=4321, word="w")
MPICH, OPENMPI = Mpiexec("/m/bin/mpiexec", "mpich"), Mpiexec("/o/bin/mpiexec", "openmpi")


def job(*, via: Via = "local", num_processes: int = 2, verb_args: tuple[str, ...] = ()) -> Job:
    return Job(
        run_file="runs/my run.yaml",
        overrides=("optimizer.lr=1e-5",),
        verb_args=verb_args,
        via=via,
        num_processes=num_processes,
        master_port=23456,
    )


def two_hosts(via: Via) -> Job:
    return replace(job(via=via), hosts=TWO_HOSTS, num_nodes=2, hostfile="hosts file")


def test_local_starts_one_command_a_rank() -> None:
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "23456",
        "SFT_DIST_LAUNCHER": "local",
        "OMP_NUM_THREADS": "4",
    }
    argv = (PYTHON, "-m", *PROGRAM, "--out", "x")
    assert commands(job(verb_args=("--out", "x")), FACTS) == (
        Command(name="rank 0", argv=argv, env={"RANK": "0", "LOCAL_RANK": "0", **shared}, to_terminal=True),
        Command(name="rank 1", argv=argv, env={"RANK": "1", "LOCAL_RANK": "1", **shared}),
    )


def test_deepspeed_starts_the_runner_beside_the_interpreter(tmp_path: Path) -> None:
    (tmp_path / "deepspeed").touch()
    facts = replace(FACTS, python=str(tmp_path / "python"), environ={"OMP_NUM_THREADS": "1"})
    (command,) = commands(job(via="deepspeed"), facts)
    assert command.argv == (
        *(str(tmp_path / "deepspeed"), "--num_gpus", "2", "--master_addr", "127.0.0.1", "--master_port", "23456"),
        *("--no_local_rank", "--module", *PROGRAM),
    )
    assert command.env == {"SFT_DIST_LAUNCHER": "deepspeed"}


def test_deepspeed_without_a_script_is_run_as_a_module() -> None:
    (command,) = commands(job(via="deepspeed"), FACTS)
    assert command.argv[:3] == (PYTHON, "-m", "deepspeed.launcher.runner")


def test_deepspeed_over_hosts_carries_environment_and_arguments_in_one_word() -> None:
    environ = {"HF_HOME": "/a b/$c", "HF_TOKEN": "secret", "GLOO_SOCKET_IFNAME": "ib0", "HOSTNAME": "n9"}
    (command,) = commands(two_hosts("deepspeed"), replace(FACTS, environ=environ, contact=CONTACT))
    assert command.argv[3:-1] == (
        *("--hostfile", "hosts file", "--include", "n1:0,1@n2:0", "--force_multi", "--no_ssh_check"),
        *("--master_addr", "n1", "--master_port", "23456", "--no_local_rank", "--module", "launcher.keeper"),
    )
    env = {"SFT_DIST_LAUNCHER": "deepspeed", "HF_HOME": "/a b/$c", "GLOO_SOCKET_IFNAME": "ib0"}
    assert decode(command.argv[-1]) == Parcel(program=PROGRAM, env=env, contact=CONTACT)
    assert command.argv[-1].replace("-", "").replace("_", "").isalnum()


def test_torchrun_is_told_its_place_among_the_nodes() -> None:
    second = replace(job(via="torchrun"), num_nodes=2, node_rank=1, master_addr="n1", is_port_asked=True)
    (command,) = commands(second, FACTS)
    assert command.argv == (
        *(PYTHON, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--node-rank=1"),
        *("--rdzv-backend=static", "--master-addr=n1", "--master-port=23456", "--max-restarts=0", "-m", *PROGRAM),
    )
    (kept,) = commands(second, replace(FACTS, contact=CONTACT))
    assert kept.argv[-2] == "launcher.keeper" and decode(kept.argv[-1]).program == PROGRAM


@pytest.mark.parametrize(
    ("mpiexec", "hosts", "how"),
    [
        (MPICH, False, ("-n", "2")),
        (OPENMPI, False, ("--host", "localhost:2", "--bind-to", "none", "-n", "2")),
        (MPICH, True, ("-localhost", "10.0.0.1", "-hosts", "n1:2,n2:1", "-n", "3")),
        (
            OPENMPI,
            True,
            ("--host", "n1:2,n2:1", "--bind-to", "none", "-x", "HF_HOME", "-x", "SFT_DIST_LAUNCHER", "-n", "3"),
        ),
    ],
)
def test_mpirun_speaks_the_dialect_of_its_mpi(mpiexec: Mpiexec, hosts: bool, how: tuple[str, ...]) -> None:
    facts = replace(FACTS, environ={"HF_HOME": "/a b"}, mpiexec=mpiexec, own_address="10.0.0.1")
    (command,) = commands(two_hosts("mpirun") if hosts else job(via="mpirun"), facts)
    assert command.argv == (mpiexec.path, *how, PYTHON, "-m", *PROGRAM)
    assert "MASTER_ADDR" not in command.env  # the ranks find out where they meet


def test_srun_starts_a_task_a_rank() -> None:
    (command,) = commands(replace(job(via="srun"), num_nodes=4), replace(FACTS, environ={"SLURM_CPUS_PER_TASK": "12"}))
    assert command.argv == (
        *("srun", "--nodes=4", "--ntasks-per-node=2", "--ntasks=8", "--kill-on-bad-exit=1", "--wait=60"),
        *(PYTHON, "-m", *PROGRAM),
    )
    assert command.env == {"SFT_DIST_LAUNCHER": "srun", "SRUN_CPUS_PER_TASK": "12"}
    (kept,) = commands(job(via="srun"), replace(FACTS, contact=CONTACT, log_dir="/logs"))
    assert kept.argv[-3:-1] == ("-m", "launcher.keeper")
    assert decode(kept.argv[-1]) == Parcel(PROGRAM, {}, CONTACT, "/logs")  # srun hands on the environment by itself


@pytest.mark.parametrize("via", ["mpirun", "srun"])
@pytest.mark.parametrize("address", [None, "n1"])
@pytest.mark.parametrize("asked", [False, True])
def test_what_the_command_line_says_of_rank_0_reaches_the_ranks(via: Via, address: str | None, asked: bool) -> None:
    (command,) = commands(
        replace(job(via=via), master_addr=address, is_port_asked=asked), replace(FACTS, mpiexec=MPICH)
    )
    told = {name: value for name, value in command.env.items() if name.startswith("MASTER_")}
    assert told == ({"MASTER_ADDR": "n1"} if address else {}) | ({"MASTER_PORT": "23456"} if asked else {})


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("", ("--num_gpus", "2")),
        ("0,1,2", ("--num_gpus", "2")),
        ("4,6", ("--include", "localhost:4,6")),
        ("4,6,7", ("--include", "localhost:4,6")),
    ],
)
def test_deepspeed_is_held_to_the_visible_gpus(visible: str, expected: tuple[str, ...]) -> None:
    (command,) = commands(job(via="deepspeed"), replace(FACTS, environ={"CUDA_VISIBLE_DEVICES": visible}))
    assert command.argv[3:5] == expected


@pytest.mark.parametrize("visible", ["4", "GPU-1b2c,GPU-3d4e"])
def test_deepspeed_refuses_visible_gpus_it_cannot_be_told(visible: str) -> None:
    with pytest.raises(LaunchError, match="CUDA_VISIBLE_DEVICES") as caught:
        commands(job(via="deepspeed"), replace(FACTS, environ={"CUDA_VISIBLE_DEVICES": visible}))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("num_cpus", "expected"), [(2, "1"), (3, "1"), (8, "4")])
def test_the_cpus_are_shared_out_as_threads(num_cpus: int, expected: str) -> None:
    assert commands(job(), replace(FACTS, num_cpus=num_cpus))[0].env["OMP_NUM_THREADS"] == expected


def test_secrets_and_facts_of_one_host_are_not_forwarded() -> None:
    environ = dict.fromkeys(
        ("HF_HOME", "NCCL_DEBUG", "PATH", "PYTHONPATH", "TOKENIZERS_PARALLELISM", "https_proxy")
        + ("HF_TOKEN", "SFT_API_KEY", "CUDA_VISIBLE_DEVICES", "HOSTNAME", "SSH_AUTH_SOCK", "FIREFOX", "RANK"),
        "x",
    )
    assert sorted(forwarded(environ)) == sorted(list(environ)[:6])
    assert forwarded({"HTTPS_PROXY": "http://me:secret@proxy:3128", "I_MPI_FABRICS": "ofi"}) == {"I_MPI_FABRICS": "ofi"}


@pytest.mark.parametrize("text", ["a b", "$HOME `id`", "'\"\\", "ü\n"])
def test_a_parcel_arrives_as_it_was_sent(text: str) -> None:
    parcel = Parcel(program=("sft_dist", text), env={"A": text}, contact=None)
    assert decode(encode(parcel)) == parcel


def test_a_hostfile_is_read_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# the cluster\n\nn2 slots=4  \n  n1.example.org slots=8 max_slots=8\n10.0.0.1 slots=1\n")
    hosts = read_hostfile(path)
    assert hosts == (Host("n2", 4), Host("n1.example.org", 8), Host("10.0.0.1", 1))
    assert chosen_hosts(hosts, num_nodes=2, num_processes=3) == (Host("n2", 3), Host("n1.example.org", 3))
    with pytest.raises(LaunchError, match=r"--nproc 5.*: n2 slots=4, 10\.0\.0\.1 slots=1"):
        chosen_hosts(hosts, num_nodes=None, num_processes=5)
    with pytest.raises(LaunchError, match="the hostfile has 3 hosts"):
        chosen_hosts(hosts, num_nodes=4, num_processes=None)


def test_every_wrong_line_of_a_hostfile_is_told() -> None:
    text = "n1 slots=2\nn1 slots=4\nn2\nn3 slots=x\nn4 slots=0\n-oProxyCommand=id slots=1\n"
    with pytest.raises(LaunchError) as caught:
        parse_hostfile(text, name="hosts")
    assert caught.value.exit_code == 2
    told = str(caught.value).split("; ")
    assert [line.split(" ")[0] for line in told[:3]] == ["hosts:2:", "hosts:3:", "hosts:4:"]
    assert "in line 1" in told[0] and "hosts:5: n4 has no slots" in told[3] and told[-1].startswith("hosts:6:")


def test_a_hostfile_without_hosts_or_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="hosts: no host in it"):
        parse_hostfile("# none\n", name="hosts")
    with pytest.raises(LaunchError, match="No such file"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"via": "local", "num_nodes": 2}, "on this machine alone"),
        ({"via": "deepspeed", "num_nodes": 2}, "needs --hostfile"),
        ({"via": "mpirun", "num_nodes": 2}, "needs --hostfile"),
        ({"via": "torchrun", "num_nodes": 2}, "--master-addr"),
        (
            {"via": "torchrun", "num_nodes": 2, "master_addr": "n1"},
            "and --master-port",
        ),
        ({"via": "srun", "hosts": TWO_HOSTS, "num_nodes": 2}, "not for --via srun"),
        ({"via": "deepspeed", "node_rank": 1}, "--node-rank"),
        ({"num_nodes": 0}, "--nodes must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict, complaint: str) -> None:
    with pytest.raises(LaunchError, match=complaint) as caught:
        replace(job(), **changes)
    assert caught.value.exit_code == 2


def test_an_mpiexec_of_another_mpi_is_passed_over() -> None:
    kinds = {"/usr/bin/mpiexec": "openmpi", "/env/bin/mpiexec": "mpich"}
    assert choose(iter(kinds), "mpich", "MPICH 5", ask=kinds.__getitem__) == Mpiexec("/env/bin/mpiexec", "mpich")
    with pytest.raises(LaunchError, match=r"/usr/bin/mpiexec \(openmpi\)") as caught:
        choose(iter(["/usr/bin/mpiexec"]), "mpich", "MPICH 5", ask=kinds.__getitem__)
    assert caught.value.exit_code == 69


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("Open MPI v4.1.4, package: Debian OpenMPI", "openmpi"),
        ("mpiexec (OpenRTE) 4.1.4", "openmpi"),
        ("mpirun (prrte) 3.0", "openmpi"),
        ("MPICH Version:      5.0.2", "mpich"),
        ("HYDRA build details:", "mpich"),
        ("Intel(R) MPI Library for Linux", "mpich"),
        ("something else", None),
    ],
)
def test_an_mpi_is_known_by_what_it_says(text: str, family: str | None) -> None:
    assert family_of(text) == family


def test_a_command_is_shown_as_a_line_for_the_shell() -> None:
    command = Command(name="rank 0", argv=(PYTHON, "run me.yaml", "a=$b"), env={"KEY": "x y"})
    assert shown(command) == "KEY='x y' /opt/env/bin/python 'run me.yaml' 'a=$b'"


@pytest.mark.parametrize("override", ["lr", "=3", "--lr=3"])
def test_an_override_that_is_not_key_value_is_refused(override: str) -> None:
    with pytest.raises(LaunchError, match="not key=value") as caught:
        Job(run_file="run.yaml", overrides=(override,), num_processes=1, master_port=23456)
    assert caught.value.exit_code == 2
