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
