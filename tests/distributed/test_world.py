import pytest

from sft_dist.distributed.network import job_port
from sft_dist.distributed.world import World, find_world
from sft_dist.errors import ClusterError

TASK = {
    "SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "8(x2)",
    "SLURM_NODEID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "123456",
}  # fmt: skip
# srun starts one agent of torchrun on each of two nodes, each of which starts two ranks.
AGENTS = {"SLURM_STEP_ID": "3", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n0"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, World(0, 1, 0, 1, "127.0.0.1", 0, "nothing")),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n0",
             "MASTER_PORT": "7"},
            World(3, 4, 1, 2, "n0", 7, "torchrun-like"),
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "n0"},
            World(1, 2, 1, 2, "n0", 29500, "torchrun-like"),
        ),
        (TASK | {"MASTER_ADDR": "n0", "MASTER_PORT": "20001"}, World(9, 16, 1, 8, "n0", 20001, "slurm")),
        # Without help by a script: the first node, and a port of the job's own.
        (
            TASK | {"SLURM_JOB_NODELIST": "127.0.0.[1-2],x"},
            World(9, 16, 1, 8, "127.0.0.1", 20_000 + 3_456, "slurm"),
        ),
        # Nodes with different numbers of tasks.
        (
            TASK | {"SLURM_TASKS_PER_NODE": "14,2", "MASTER_ADDR": "n0", "MASTER_PORT": "1", "SLURM_PROCID": "15"},
            World(15, 16, 1, 2, "n0", 1, "slurm"),
        ),
        # The step is smaller than the job.
        (
            TASK | {"SLURM_STEP_NUM_TASKS": "10", "SLURM_STEP_TASKS_PER_NODE": "8,2", "MASTER_ADDR": "n0"},
            World(9, 10, 1, 2, "n0", job_port(123456, 0), "slurm"),
        ),
        (
            AGENTS | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "7"},
            World(3, 4, 1, 2, "n0", 7, "torchrun-like"),
        ),
        # A wrapper of the tasks sets the variables of torch.
        (
            TASK | {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_PORT": "7"},
            World(9, 16, 1, 8, "127.0.0.1", 7, "torchrun-like"),
        ),
        # Ranks started by a batch script, or from the shell of salloc, which are no tasks.
        (
            {"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "MASTER_PORT": "7"},
            World(0, 2, 0, 2, "127.0.0.1", 7, "torchrun-like"),
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "MASTER_PORT": "7",
             "SLURM_STEP_ID": "4294967290"},
            World(0, 2, 0, 2, "127.0.0.1", 7, "torchrun-like"),
        ),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, World(0, 1, 0, 1, "127.0.0.1", 0, "nothing")),
    ],
)  # fmt: skip
def test_world_is_read_from_the_launcher(env: dict[str, str], expected: World) -> None:
    assert find_world(env) == expected


@pytest.mark.parametrize(
    ("env", "complaint"),
    [
        ({"RANK": "0"}, "WORLD_SIZE not set"),
        ({"WORLD_SIZE": "2"}, "RANK not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "contradict"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' is no number"),
        # Inside sbatch, but not started by srun: would be one of N separate runs.
        ({"SLURM_NTASKS": "4"}, "start it with srun"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "start it with srun"),
        ({"SLURM_NTASKS": "many"}, "SLURM_NTASKS='many'"),
        (TASK | {"SLURM_NODEID": "7"}, "SLURM_NODEID=7"),
        # Each of 16 tasks would be a run of its own ...
        (TASK | {"RANK": "0", "WORLD_SIZE": "1"}, "two launchers"),
        # ... as would each agent that was not told of the others.
        (AGENTS | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "two launchers"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            "OMPI_COMM_WORLD_RANK",
        ),
        # Ranks that are not where the tasks are.
        (TASK | {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, "SLURM_PROCID"),
    ],
)
def test_contradictions_are_cluster_errors(env: dict[str, str], complaint: str) -> None:
    with pytest.raises(ClusterError, match=complaint):
        find_world(env)


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD", "PMI"])
def test_a_singleton_of_mpi_is_an_error(variable: str) -> None:
    # Two processes are promised, and this one, started by nobody, is alone.
    with pytest.raises(ClusterError, match="belong to different MPI installations"):
        find_world({f"{variable}_RANK": "0", f"{variable}_SIZE": "2"})
