#!/bin/bash
# One training over several hosts under Slurm:
#
#     sbatch --export=ALL,EXPERIMENT=experiments/dlfer.yaml,OUT=/shared/runs deploy/slurm.sh
#
# One task a node; each uses all GPUs that Slurm shows it. OUT is on a file system that all nodes see.
# Node names must sort as Slurm lists them (node01, node02, ..., node10).
# Two minutes before the time is up Slurm sends SIGTERM; dlfer writes a checkpoint and ends. Submitted again, or
# requeued, the job continues the newest unfinished run of the same experiment, or starts one if there is none.
#SBATCH --job-name=dlfer
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=dlfer-%j.log
set -euo pipefail

: "${EXPERIMENT:=experiments/dlfer.yaml}"
: "${OUT:=$PWD/saved_models/runs}"
# The variable says that the tasks of this step are one training; Slurm tells them everything else.
export DLFER_CLUSTER=slurm
srun --kill-on-bad-exit=1 dlfer run "$EXPERIMENT" --out "$OUT" --continue --require-gpu
