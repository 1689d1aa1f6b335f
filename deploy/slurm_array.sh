#!/bin/bash
# One member of an ablation, a sweep or a cross-validation for each task of a Slurm job array:
#
#     dlfer sweep experiments/backbones.yaml --dry-run                      # lists the members with their numbers
#     sbatch --array=0-111 --export=ALL,VERB=sweep,EXPERIMENT=experiments/backbones.yaml,OUT=/shared/runs deploy/slurm_array.sh
#     dlfer sweep experiments/backbones.yaml --out /shared/runs --collect   # table and report of what has finished
#
# VERB is sweep, ablate or crossval. OUT is on a file system that all nodes see: EF-FER1 is trained once for all members that
# share it.
# ARGUMENTS are further options, e.g. "--seeds 0,1,2"; give --collect the same ones (without --max-hours). Two minutes before the time is up Slurm
# sends SIGTERM; dlfer writes a checkpoint and ends. A task that is submitted again, or requeued, continues from there, and one
# whose member has finished ends at once.
#SBATCH --job-name=dlfer-members
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --output=dlfer-%A-%a.log
set -euo pipefail

: "${VERB:=sweep}"
: "${EXPERIMENT:=experiments/backbones.yaml}"
: "${OUT:=$PWD/saved_models/runs}"
read -ra further <<< "${ARGUMENTS:-}"
# exec: so that Slurm's SIGTERM reaches dlfer itself.
exec dlfer "$VERB" "$EXPERIMENT" --out "$OUT" --member auto --require-gpu ${further[@]+"${further[@]}"}
