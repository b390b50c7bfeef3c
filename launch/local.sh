#!/usr/bin/env bash
# Trains on this machine: bash launch/local.sh [--dry-run] --config=FILE --workdir=FOLDER [--config.field=value ...]
#
#   PROCESSES=2   as many processes, which find each other on the loopback; each has one GPU where there are GPUs.
#                 One process (the default) trains on all devices as well, and is simpler.
#   PORT=8476     at which they do; one that is likely to be free by default
#   EXTRA=hf      what is installed into .venv at the first start, beside report and what the accelerator needs
#
# Goes on by itself after exit status 75: SIGTERM came to the training and the step is saved. SIGTERM or SIGUSR1 to this
# script ends it with that status when the step is saved, Ctrl-C with 130. Paths count from the repository root.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

RESTART=75 # pit_jax.interrupts.RESTART
help_if_asked "$@"
[ "${1:-}" = --dry-run ] && { DRY_RUN=1; shift; }
check_dry_run "$@"
[ $# -gt 0 ] ||
  fail "What is to be run? bash launch/local.sh --config=configs/pit_synthetic.py:smoke --workdir=runs/smoke"
PROCESSES="${PROCESSES:-1}"
[[ "$PROCESSES" =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES=$PROCESSES is not a number of processes."
check_run launch/local.sh "$@"
GPUS="$(compgen -G '/dev/nvidia[0-9]*' || true)"

extras() {
  local found=report
  if [ -n "$GPUS" ]; then
    found+=,cuda
  elif compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
    found+=,tpu
  fi
  echo "$found${EXTRA:+,$EXTRA}"
}

# Process $1 of all, in the background.
start() {
  local command=("$VENV/bin/python" -m pit_jax.train "${@:2}")
  if [ "$PROCESSES" -gt 1 ]; then
    local found=(PIT_JAX_COORDINATOR="127.0.0.1:$port" PIT_JAX_NUM_PROCESSES="$PROCESSES" PIT_JAX_PROCESS_ID="$1")
    [ -z "$GPUS" ] || found+=(CUDA_VISIBLE_DEVICES="$1")
    command=(env "${found[@]}" "${command[@]}")
  fi
  if [ -n "${DRY_RUN:-}" ]; then
    call "${command[@]}"
  else
    "${command[@]}" &
    children+=("$!")
  fi
}

# Waits for all processes. The status is that of the first that fails; where that is no request to start again, the
# others are asked to end.
finish() {
  local status=0 code pid left
  while [ ${#children[@]} -gt 0 ]; do
    left=()
    for pid in "${children[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        left+=("$pid")
        continue
      fi
      code=0
      wait "$pid" || code=$?
      if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
        status=$code
        [ "$code" -eq "$RESTART" ] || pass_on
      fi
    done
    children=(${left[@]+"${left[@]}"})
    if [ -n "$pass_on_at" ] && [ "$SECONDS" -ge "$pass_on_at" ]; then
      pass_on_at=
      pass_on
    fi
    [ ${#children[@]} -eq 0 ] || sleep "${POLL:-0.5}" # wait would end with a signal, as if a process had
  done
  return "$status"
}

pass_on() {
  kill -TERM ${children[@]+"${children[@]}"} 2>/dev/null || true
}

children=()
stopped=
pass_on_at=
trap 'stopped=$RESTART; pass_on' USR1
trap 'stopped=130; pass_on' INT # which what runs in the background does not hear
# A machine that shuts down tells everyone, and a second SIGTERM ends a training that is still saving.
trap 'stopped=$RESTART; pass_on_at=$((SECONDS + ${GRACE:-30}))' TERM
[ -z "${STATUS_FILE:-}" ] || trap 'echo "$?" >"$STATUS_FILE"' EXIT

[ -n "${DRY_RUN:-}" ] || install "$(extras)"
cd "$ROOT"
while true; do
  [ -z "$stopped" ] || exit "$stopped"
  port="${PORT:-$((20000 + RANDOM % 10000))}"
  for ((process = 0; process < PROCESSES; process++)); do
    start "$process" "$@"
  done
  status=0
  finish || status=$?
  if [ -n "$stopped" ] && [ "$status" -eq "$RESTART" ]; then
    exit "$stopped"
  elif [ "$status" -ne "$RESTART" ]; then
    exit "$status"
  fi
  echo "Exit status $RESTART: starting again." >&2
done
