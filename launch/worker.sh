#!/usr/bin/env bash
# What tpu_vm.sh runs on each worker of a slice, in the checkout there:
#
#   bash launch/worker.sh install [HOST:/PATH]   .venv, and a share of NFS at /mnt/pit
#   bash launch/worker.sh start --config=... --workdir=...
#                                                trains in the background by local.sh, after what runs has been stopped
#   bash launch/worker.sh stop                   waits until the step that runs is saved
#   bash launch/worker.sh status                 one line: idle, running, or ended and the exit status
#   bash launch/worker.sh log                    follows what the training prints, with the worker's number before it
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "${1:-}"
cd "$ROOT"
COMMAND="${1:-}"
shift || true

mount_share() {
  ! mountpoint --quiet /mnt/pit || return 0
  if ! command -v mount.nfs >/dev/null; then
    sudo apt-get update --quiet || true
    # A new machine updates itself, which holds the lock.
    sudo apt-get -o DPkg::Lock::Timeout=600 install --yes --quiet nfs-common
  fi
  sudo mkdir -p /mnt/pit
  sudo mount -t nfs "$1" /mnt/pit
  sudo chmod 777 /mnt/pit
}

# Python of the images is 3.10: uv brings another one.
find_python() {
  local python
  for python in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if command -v "$python" >/dev/null && check_version "$python"; then
      echo "$python"
      return
    fi
  done
  python3 -m pip install --user --quiet uv >&2
  python3 -m uv python install --quiet 3.11 >&2
  python3 -m uv python find 3.11
}

running() {
  local pid
  pid="$(cat train.pid 2>/dev/null)" && grep -qs launch/local.sh "/proc/$pid/cmdline"
}

stop() {
  running || return 0
  kill -USR1 "$(cat train.pid)"
  for ((second = 0; second < ${PATIENCE:-600}; second++)); do
    running || return 0
    sleep "${POLL:-1}"
  done
  kill -KILL -- "-$(cat train.pid)" # all of its session
}

case "$COMMAND" in
  install)
    [ -z "${1:-}" ] || mount_share "$1"
    PYTHON="$(find_python)"
    install report,tpu,hf
    ;;
  start)
    stop
    rm -f exit_status
    extra=hf
    [[ "$(quoted "$@")" != *" --workdir=gs://"* ]] || extra=hf,gcs # local.sh installs what is not there yet
    # A session of its own outlives the connection.
    EXTRA="$extra" STATUS_FILE="$ROOT/exit_status" setsid bash launch/local.sh "$@" >>train.log 2>&1 </dev/null &
    echo "$!" >train.pid
    echo "pit_jax: started"
    ;;
  stop) stop ;;
  status)
    if running; then
      echo "pit_jax: running"
    elif [ -f exit_status ]; then
      echo "pit_jax: ended $(cat exit_status)"
    else
      echo "pit_jax: idle"
    fi
    ;;
  log)
    name="$(hostname)" # ...-w-3 is worker 3
    touch train.log
    tail -n "${LINES_BEFORE:-100}" -F train.log | sed -u "s/^/[${name##*-w-}] /"
    ;;
  *) fail "There is no command $COMMAND: install, start, stop, status, log." ;;
esac
