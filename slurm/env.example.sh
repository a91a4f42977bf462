# Copy to slurm/env.sh and change it to suit the cluster; train.sbatch reads it on the first node before anything
# else, and srun hands the environment on to every rank. Another place: export SFT_ENV_FILE=/path/to/env.sh

# The Python that has sft-dist, on a file system that all nodes see.
source /shared/venvs/sft-dist/bin/activate
# module load cuda/12.8

# Models and data sets are fetched once, to a place all nodes see; compute nodes often have no way out.
export HF_HOME=/shared/cache/huggingface
# export HF_HUB_OFFLINE=1

# Kernels that PyTorch compiles: on a local disk, for a build killed on a shared one can leave a lock that stops all.
export TORCH_EXTENSIONS_DIR=/tmp/torch_extensions-$USER

# The network between nodes. Names of interfaces: ip -br addr. Wrong ones cost a minute and end in "Connection refused"
# (gloo) or in TCP where InfiniBand was meant (NCCL_DEBUG=INFO shows what it took).
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=INFO

# The port at which ranks meet, where a firewall between nodes leaves no choice; by default each job has its own.
# export MASTER_PORT=29400

# A container instead of an environment on disk: an image, and folders of the host that it is to see.
# export SFT_CONTAINER=apptainer:/shared/images/sft-dist.sif
# export SFT_CONTAINER=pyxis:registry.example.org#sft-dist:1
# export SFT_CONTAINER_MOUNTS=/shared,/scratch

# When to give up: restarts in all, and starts in a row that bring no new checkpoint. Exit codes to try again beside 75.
# export SFT_MAX_RESTARTS=20
# export SFT_MAX_FRUITLESS=3
# export SFT_REQUEUE_CODES="1 70"
# export SFT_SLURM_PATIENCE_S=60  # with a controller that does not answer
