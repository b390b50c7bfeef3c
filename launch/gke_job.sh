#!/usr/bin/env bash
# A run on TPU slices of Google Kubernetes Engine, by xpk (pip install xpk):
#
#   bash launch/gke_job.sh create       makes a cluster with TPUs (CLUSTER, TYPE)
#   bash launch/gke_job.sh storage      makes a Filestore share for it, seen by the run at /mnt/pit
#   bash launch/gke_job.sh run --config=... --workdir=/mnt/pit/runs/NAME
#                                       queues the run, in an image with the last commit of this checkout; it goes on by
#                                       itself after a preemption. --workdir=gs://BUCKET/runs/NAME needs no storage, but
#                                       nodes that may write to the bucket
#   bash launch/gke_job.sh logs         follows what all its workers print; Ctrl-C ends the following alone
#   bash launch/gke_job.sh status       whether it waits, runs, or has ended
#   bash launch/gke_job.sh delete       ends and deletes the run, not the cluster, which costs money until
#                                       `xpk cluster delete --cluster NAME`
#
# --dry-run behind the command prints what would run. Variables:
#
#   CLUSTER=pit TYPE=v4-64      as xpk names both; NAME=pit-7b, the run's name
#   SPOT=1 SLICES=1             for create; several slices are not supported by run yet
#   STORAGE=pit SIZE=2560       name and GB of the share
#   IMAGE=...                   an image in which pit_jax is installed (for a bucket with the extra gcs), instead of one
#                               made from python:3.11
#   RESTARTS=50 PROJECT=... ZONE=... (those of gcloud)
#
# `gcloud auth login` comes first. Nothing of the environment is sent to the workers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

RESTART=75 # pit_jax.interrupts.RESTART
COMMAND="${1:-help}"
shift || true
if [ "$COMMAND" = --dry-run ]; then # also before the command
  DRY_RUN=1
  COMMAND="${1:-help}"
  shift || true
fi
[ "${1:-}" = --dry-run ] && { DRY_RUN=1; shift; }
check_dry_run "$@"

need() {
  local variable
  for variable in "$@"; do
    [ -n "${!variable:-}" ] || fail "Set $variable: CLUSTER=pit TYPE=v4-64 NAME=pit-7b bash launch/gke_job.sh $COMMAND"
  done
}

case "$COMMAND" in
  create) need CLUSTER TYPE ;;
  storage) need CLUSTER ;;
  run) need CLUSTER TYPE NAME ;;
  logs | status | delete) need CLUSTER NAME ;;
  -h | --help | help) print_head "${BASH_SOURCE[0]}"; exit 0 ;;
  *) fail "There is no command $COMMAND. bash launch/gke_job.sh --help lists them." ;;
esac
[ "$COMMAND" = run ] || [ $# -eq 0 ] || fail "bash launch/gke_job.sh $COMMAND takes no arguments, but there is $1."
for variable in CLUSTER NAME; do
  [ -z "${!variable:-}" ] || check_name "$variable"
done
[ -z "${TYPE:-}" ] || check_type
check_number RESTARTS 0
check_number SLICES 1
check_number SIZE 2560 # of the tier BASIC_SSD
PLACE=(--cluster="$CLUSTER")
[ -z "${PROJECT:-}" ] || PLACE+=(--project="$PROJECT")
[ -z "${ZONE:-}" ] || PLACE+=(--zone="$ZONE")
STORAGE="${STORAGE:-pit}"

run() {
  local folder=/tmp/pit_jax.XXXXXX status=0 line argument extras=report,tpu,hf
  for argument in "$@"; do
    case "$argument" in
      --workdir=gs://*/*) extras+=,gcs ;;
      --workdir=/mnt/pit/*) ;;
      --workdir=*)
        fail "$argument is lost when a worker is: take a workdir below /mnt/pit, or gs://BUCKET/runs/NAME." ;;
    esac
  done
  for argument in --config= --workdir=; do
    [[ "$(quoted "$@")" == *" $argument"* ]] ||
      fail "$argument is missing: bash launch/gke_job.sh run --config=FILE --workdir=/mnt/pit/runs/NAME"
  done
  # exec: SIGTERM comes to the shell of the container, and has to reach Python.
  line="exec python -m pit_jax.train$(quoted "$@")"
  command=(xpk workload create "${PLACE[@]}" --workload="$NAME" --tpu-type="$TYPE"
    --env=PIT_JAX_DISTRIBUTED=1 --max-restarts="${RESTARTS:-50}" --restart-on-exit-codes="$RESTART"
    --termination-grace-period-seconds=300)
  [[ "$(quoted "$@")" != *=/mnt/pit/* ]] || command+=(--storage="$STORAGE") # for a workdir there, or pairs
  if [ -n "${IMAGE:-}" ]; then
    call "${command[@]}" --docker-image="$IMAGE" --command="$line"
    return
  fi
  git -C "$ROOT" rev-parse --quiet --verify HEAD >/dev/null || fail "$ROOT is no git checkout: what goes is a commit."
  git -C "$ROOT" diff --quiet HEAD || echo "What is changed and not committed stays here." >&2
  [ -n "${DRY_RUN:-}" ] || folder="$(mktemp -d)"
  line="python -m pip install --quiet --constraint launch/requirements.lock '.[$extras]' && $line"
  call git -C "$ROOT" archive --format=tar --output="$folder/pit_jax.tar" HEAD &&
    call mkdir "$folder/pit_jax" &&
    call tar -xf "$folder/pit_jax.tar" -C "$folder/pit_jax" &&
    call "${command[@]}" --base-docker-image=python:3.11 --script-dir="$folder/pit_jax" --command="$line" || status=$?
  [ -n "${DRY_RUN:-}" ] || rm -rf "$folder"
  return "$status"
}

case "$COMMAND" in
  create)
    kind=--on-demand
    [ -z "${SPOT:-}" ] || kind=--spot
    call xpk cluster create "${PLACE[@]}" --tpu-type="$TYPE" --num-slices="${SLICES:-1}" "$kind"
    ;;
  storage)
    call xpk storage create "$STORAGE" "${PLACE[@]}" --type=gcpfilestore --tier=BASIC_SSD --size="${SIZE:-2560}" \
      --vol=default --mount-point=/mnt/pit --readonly=false --auto-mount=false
    ;;
  run) run "$@" ;;
  logs) call kubectl logs --follow --prefix --max-log-requests=64 --selector="xpk.google.com/workload=$NAME" ;;
  status) call xpk workload list "${PLACE[@]}" --filter-by-job="$NAME" ;;
  delete) call xpk workload delete "${PLACE[@]}" --workload="$NAME" ;;
esac
