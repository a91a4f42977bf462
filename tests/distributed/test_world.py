import pytest

from sft_dist.distributed.world import World, find_world
from sft_dist.errors import ClusterError


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
        (
            {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "8(x2)",
             "SLURM_STEP_ID": "0", "MASTER_ADDR": "n0", "MASTER_PORT": "20001"},
            World(9, 16, 1, 8, "n0", 20001, "slurm"),
        ),
        # srun starts torchrun on each node: the inner launcher's variables win
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n0",
             "MASTER_PORT": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            World(0, 2, 0, 2, "n0", 7, "torchrun-like"),
        ),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, World(0, 1, 0, 1, "127.0.0.1", 0, "nothing")),
    ],
)  # fmt: skip
def test_world_is_read_from_the_launcher(env: dict[str, str], expected: World) -> None:
    assert find_world(env) == expected


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"SLURM_NTASKS": "4"},  # inside sbatch, but not started by srun: would be one of N separate runs
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    ],
)
def test_contradictions_are_cluster_errors(env: dict[str, str]) -> None:
    with pytest.raises(ClusterError):
        find_world(env)
