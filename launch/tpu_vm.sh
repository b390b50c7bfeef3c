#!/usr/bin/env bash
# A slice of TPU VMs of Google Cloud, from nothing to a finished run:
#
#   bash launch/tpu_vm.sh create        asks for the slice and waits until it is there
#   bash launch/tpu_vm.sh install       brings the last commit of this checkout to all workers, with what it needs
#   bash launch/tpu_vm.sh run --config=... --workdir=/mnt/pit/runs/NAME
#                                       trains on all workers, in the background
#   bash launch/tpu_vm.sh logs          follows what all workers print; Ctrl-C ends the following alone
#   bash launch/tpu_vm.sh status        how the slice and the training are
#   bash launch/tpu_vm.sh stop          ends the training on all workers when the step that runs is saved
#   bash launch/tpu_vm.sh send LOCAL REMOTE
#   bash launch/tpu_vm.sh fetch REMOTE LOCAL
#                                       copies a file or folder to worker 0, or from there
#   bash launch/tpu_vm.sh on WORKER [COMMAND ...]
#                                       a command in the checkout of a worker (0, 1, ... or all); without one, a shell
#   bash launch/tpu_vm.sh keep --config=... --workdir=/mnt/pit/runs/NAME
#                                       create, install and run, and again whenever the slice was taken away, until the
#                                       run has ended; it may itself be stopped and started again
#   bash launch/tpu_vm.sh delete        deletes the slice, and all that is on its disks
#
# --dry-run behind the command prints what would run. Variables say which slice:
#
#   NAME=pit ZONE=us-central2-b TYPE=v4-64     as Cloud TPU names it: v4-64 has 32 chips
#   SPOT=1                one that costs less and may be taken away at any time
#   SHARE=10.0.0.2:/pit   NFS (Filestore), mounted at /mnt/pit by install: all workers need to see --workdir. None is
#                         needed for --workdir=gs://BUCKET/runs/NAME, which the service account of the slice must be
#                         allowed to write to, and which lies near the slice
#   VERSION=tpu-ubuntu2204-base   the runtime; by default that of v4, v2-alpha-tpuv5 of v5p, v2-alpha-tpuv5-lite of
#                         v5litepod, v2-alpha-tpuv6e of v6e
#   PROJECT=... CREATE_FLAGS="--reserved --network=..."
#   RETRIES=3             how often keep starts again what failed on a slice that is well
#
# `gcloud auth login` comes first. Nothing of the environment is sent to the workers: a key that a run needs (HF_TOKEN)
# you set there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

COMMAND="${1:-help}"
shift || true
if [ "$COMMAND" = --dry-run ]; then # also before the command
  DRY_RUN=1
  COMMAND="${1:-help}"
  shift || true
fi
[ "${1:-}" = --dry-run ] && { DRY_RUN=1; shift; }
check_dry_run "$@"

case "$COMMAND" in
  create | install | logs | status | stop | delete)
    [ $# -eq 0 ] || fail "bash launch/tpu_vm.sh $COMMAND takes no arguments, but there is $1." ;;
  run | keep)
    for needed in --config= --workdir=; do
      [[ "$(quoted "$@")" == *" $needed"* ]] ||
        fail "$needed is missing: bash launch/tpu_vm.sh $COMMAND --config=FILE --workdir=/mnt/pit/runs/NAME"
    done ;;
  send | fetch)
    [[ " $* " != *" gs://"* ]] || fail "A bucket is within reach from here: gcloud storage cp --recursive FROM TO" ;;&
  send) [ $# -eq 2 ] || fail "bash launch/tpu_vm.sh send LOCAL REMOTE, as in: send pairs /mnt/pit/pairs" ;;
  fetch) [ $# -eq 2 ] || fail "bash launch/tpu_vm.sh fetch REMOTE LOCAL, as in: fetch /mnt/pit/runs/NAME/report ." ;;
  on) [ $# -gt 0 ] || fail "bash launch/tpu_vm.sh on WORKER [COMMAND ...], as in: on all df -h /mnt/pit" ;;
  -h | --help | help) print_head "${BASH_SOURCE[0]}"; exit 0 ;;
  *) fail "There is no command $COMMAND. bash launch/tpu_vm.sh --help lists them." ;;
esac
for variable in NAME ZONE TYPE; do
  [ -n "${!variable:-}" ] || fail "Set $variable: NAME=pit ZONE=us-central2-b TYPE=v4-64 bash launch/tpu_vm.sh $COMMAND"
done
check_name NAME
check_type
check_number RETRIES 0
[[ -z "${SHARE:-}" || "$SHARE" =~ ^[^/[:space:]]+:/. ]] || fail "SHARE=$SHARE: ADDRESS:/PATH, as in 10.0.0.2:/pit."
case "$COMMAND ${VERSION:-} $TYPE" in
  'create  '* | 'keep  '*) # tpu-ubuntu2204-base is not for all
    case "$TYPE" in
      v5p-*) VERSION=v2-alpha-tpuv5 ;;
      v5litepod-*) VERSION=v2-alpha-tpuv5-lite ;;
      v6e-*) VERSION=v2-alpha-tpuv6e ;;
      v[234]-*) VERSION=tpu-ubuntu2204-base ;;
      *) fail "Which runtime has $TYPE? Set VERSION (Cloud TPU's page \"TPU software versions\" lists them)." ;;
    esac ;;
esac
for argument in "$@"; do
  case "$COMMAND $argument" in
    'run --workdir=gs://'*/* | 'keep --workdir=gs://'*/*) ;;
    'run --workdir='*://* | 'keep --workdir='*://*) fail "$argument: of buckets take gs://BUCKET/runs/NAME." ;;
    'keep --workdir=/mnt/pit/'*)
      [ -n "${SHARE:-}" ] ||
        fail "$argument is on no share: set SHARE=ADDRESS:/PATH, which is mounted at /mnt/pit of each slice that keep" \
          "makes, or take a workdir in a bucket: --workdir=gs://BUCKET/runs/NAME" ;;
    'run --workdir=/'* | 'keep --workdir=/'*) ;;
    'run --workdir='* | 'keep --workdir='*)
      [ "${TYPE##*-}" -le 8 ] ||
        fail "$argument is another folder on each worker of $TYPE. Set SHARE, and take a workdir below /mnt/pit," \
          "or one in a bucket: --workdir=gs://BUCKET/runs/NAME" ;;
  esac
done

PLACE=(--zone="$ZONE")
[ -z "${PROJECT:-}" ] || PLACE+=(--project="$PROJECT")
QUEUED=(gcloud compute tpus queued-resources)
VM=(gcloud compute tpus tpu-vm)
STATE=("${QUEUED[@]}" list "${PLACE[@]}" --filter="name~\"(^|/)$NAME\$\"" --format="value(state.state)")
POLL="${POLL:-60}"

# A line of shell on a worker or on all.
on() {
  call "${VM[@]}" ssh "$NAME" "${PLACE[@]}" --worker="$1" --command="$2"
}

create() {
  local command=("${QUEUED[@]}" create "$NAME" "${PLACE[@]}" --node-id="$NAME" --accelerator-type="$TYPE"
    --runtime-version="$VERSION")
  [ -z "${SPOT:-}" ] || command+=(--spot)
  for flag in ${CREATE_FLAGS:-}; do command+=("$flag"); done
  call "${command[@]}" || fail "The slice was not asked for (see above): quota, name or zone?"
}

# Until the slice is there. A request waits in a queue, perhaps for hours.
await() {
  local state
  if [ -n "${DRY_RUN:-}" ]; then
    call "${STATE[@]}"
    return
  fi
  while true; do
    state="$("${STATE[@]}")" || fail "The state of $NAME cannot be read (see above)."
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | "") given_up "$state" ;;
    esac
    echo "$NAME: $state" >&2
    sleep "$POLL"
  done
}

given_up() {
  fail "The request for $NAME is ${1:-gone}. Why, says: ${QUEUED[*]} describe $NAME ${PLACE[*]}" \
    "bash launch/tpu_vm.sh delete takes it away."
}

install_on_workers() {
  local folder=/tmp/pit_jax.XXXXXX status=0 unpack
  unpack="mkdir -p pit_jax && tar -xzf pit_jax.tar.gz -C pit_jax && bash pit_jax/launch/worker.sh install"
  git -C "$ROOT" rev-parse --quiet --verify HEAD >/dev/null || fail "$ROOT is no git checkout: what goes is a commit."
  git -C "$ROOT" diff --quiet HEAD || echo "What is changed and not committed stays here." >&2
  [ -n "${DRY_RUN:-}" ] || folder="$(mktemp -d)"
  call git -C "$ROOT" archive --format=tar.gz --output="$folder/pit_jax.tar.gz" HEAD &&
    call "${VM[@]}" scp "$folder/pit_jax.tar.gz" "$NAME:" "${PLACE[@]}" --worker=all &&
    on all "$unpack${SHARE:+$(quoted "$SHARE")}" || status=$?
  [ -n "${DRY_RUN:-}" ] || rm -rf "$folder"
  return "$status"
}

# The same command on every worker: on a TPU VM they find each other.
run() {
  on all "bash pit_jax/launch/worker.sh start$(quoted "$@")"
}

status() {
  on all "bash pit_jax/launch/worker.sh status 2>/dev/null || echo 'pit_jax: absent'"
}

delete() {
  call "${QUEUED[@]}" delete "$NAME" "${PLACE[@]}" --force --quiet
}

# One round of `keep` decides by what is there, not by what it did before.
keep() {
  local state said failures=0 silent=0
  while true; do
    said=
    state="$("${STATE[@]}")" || state=unknown
    case "$state" in
      "") create ;;
      SUSPENDED) delete || failures=$((failures + 1)) ;; # taken away: the next round asks for one like it
      FAILED) given_up "$state" ;;
      ACTIVE) said="$(status)" || true ;;
    esac
    case "$state $said" in
      ACTIVE*pit_jax:*) silent=0 ;;
      ACTIVE* | unknown*) silent=$((silent + 1)) ;;
    esac
    [ "$silent" -le 30 ] || fail "$NAME has not answered 30 times. It may cost money: look at it, or delete it."
    case "$said"$'\n' in
      *"pit_jax: absent"*) install_on_workers && run "$@" || failures=$((failures + 1)) ;;
      *$'pit_jax: ended 2\n'*) fail "The run has a mistake: bash launch/tpu_vm.sh logs shows which." ;;
      *"pit_jax: running"* | $'\n') ;;
      *$'pit_jax: ended 75\n'*) run "$@" || true ;; # told to stop, and not by us: the machines were started anew
      *"pit_jax: idle"* | *"pit_jax: ended "[1-9]*)
        failures=$((failures + 1))
        [ "$failures" -gt "${RETRIES:-3}" ] || run "$@" || true
        ;;
      *)
        echo "The run has ended. The slice costs money until it is deleted: bash launch/tpu_vm.sh delete"
        return
        ;;
    esac
    [ "$failures" -le "${RETRIES:-3}" ] ||
      fail "That failed $failures times on a slice that is well: bash launch/tpu_vm.sh logs shows why."
    sleep "$POLL"
  done
}

case "$COMMAND" in
  create)
    create
    await
    ;;
  install) install_on_workers ;;
  run) run "$@" ;;
  logs) on all "bash pit_jax/launch/worker.sh log" ;;
  status)
    call "${STATE[@]}"
    status
    ;;
  stop) on all "bash pit_jax/launch/worker.sh stop" ;;
  send) call "${VM[@]}" scp --recurse "$1" "$NAME:$2" "${PLACE[@]}" --worker=0 ;;
  fetch) call "${VM[@]}" scp --recurse "$NAME:$1" "$2" "${PLACE[@]}" --worker=0 ;;
  on)
    if [ $# -gt 1 ]; then
      on "$1" "cd pit_jax &&$(quoted "${@:2}")"
    else
      call "${VM[@]}" ssh "$NAME" "${PLACE[@]}" --worker="$1"
    fi
    ;;
  keep)
    if [ -n "${DRY_RUN:-}" ]; then # a first round; the next ones ask for state and status alone
      call "${STATE[@]}"
      create
      await
      install_on_workers
      run "$@"
      status
    else
      keep "$@"
    fi
    ;;
  delete) delete ;;
esac
