#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster: bash launch/slurm.sh [--dry-run] --config=FILE --workdir=FOLDER [...]
#
#   NODES=1 GPUS=8      nodes, and GPUs of each (0: nodes without)
#   CPUS=8              cores for each GPU, where the cluster's default is too few
#   EXTRA=hf            what is installed into .venv beside report and cuda, on the machine that this is typed on
#
# sbatch's own options are variables too: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT=12:00:00, SBATCH_QOS. A job
# that is preempted, or comes to its time limit, saves its step and queues again, until the run has ended. .venv and
# --workdir lie where all nodes see them; paths count from the repository root. `sbatch launch/slurm.sh ...` from there
# does the same, once .venv is made.
#SBATCH --job-name=pit_jax
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[ -f "$HERE/env.sh" ] || HERE="$PWD/launch" # sbatch runs a copy, in the folder of --chdir
[ -f "$HERE/env.sh" ] || { echo "Start sbatch in the root of the repository." >&2; exit 1; }
GIVEN_JAX_PLATFORMS="${JAX_PLATFORMS:-}"
source "$HERE/env.sh"

RESTART=75 # pit_jax.interrupts.RESTART
help_if_asked "$@"
[ "${1:-}" = --dry-run ] && { DRY_RUN=1; shift; }
check_dry_run "$@"
[ $# -gt 0 ] || fail "What is to be run? bash launch/slurm.sh --config=FILE --workdir=FOLDER"
NODES="${NODES:-1}" GPUS="${GPUS:-8}"
[[ "$NODES $GPUS" =~ ^[1-9][0-9]*\ [0-9]+$ ]] || fail "NODES=$NODES GPUS=$GPUS are not numbers of nodes and of GPUs."
check_number CPUS 1
check_run launch/slurm.sh "$@"

submit() {
  local tasks="$GPUS" found=report command
  if [ "$GPUS" -eq 0 ]; then tasks=1; else found+=,cuda; fi
  command=(sbatch --chdir="$ROOT" --nodes="$NODES" --ntasks-per-node="$tasks")
  [ "$GPUS" -eq 0 ] || command+=(--gpus-per-node="$GPUS")
  [ -z "${CPUS:-}" ] || command+=(--cpus-per-task="$CPUS")
  [ -n "${DRY_RUN:-}" ] || install "$found${EXTRA:+,$EXTRA}"
  # What env.sh has found out about this machine is not true of the nodes.
  if [ -z "$GIVEN_JAX_PLATFORMS" ]; then unset JAX_PLATFORMS; fi
  call "${command[@]}" "$HERE/slurm.sh" "$@"
}

# One process for each GPU; jax finds the others, and which GPU is its own, by SLURM's variables.
train() {
  local status=0
  trap : TERM # which may come to this shell as well
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not take that over
  # Where one process ends, the others have ten minutes to save, or to notice that they are alone.
  call srun --kill-on-bad-exit=0 --wait=600 "$VENV/bin/python" -m pit_jax.train "$@" || status=$?
  if [ "$status" -eq "$RESTART" ] || [ -n "${DRY_RUN:-}" ]; then
    call scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
}

if [ -n "${SLURM_JOB_ID:-}" ]; then
  cd "$ROOT"
  train "$@"
else
  submit "$@"
  if [ -n "${DRY_RUN:-}" ]; then
    SLURM_JOB_ID=JOB
    train "$@"
  fi
fi
