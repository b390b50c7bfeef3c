#!/usr/bin/env bash
# Runs ruff and the tests: bash launch/test.sh [--parity] [--slow] [arguments of pytest]
#
# Installs into .venv at the first start; with --parity also torch and transformers, without which the tests that need
# them are skipped; with --slow also the tests that are marked slow. Without arguments of pytest two processes share
# the files of tests.
# Paths in arguments count from the repository root.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

help_if_asked "$@"
use_test_environment
extra=test slow=
while true; do
  case "${1:-}" in
    --parity) extra=test,parity ;;
    --slow) slow=1 ;;
    --dry-run) fail "bash launch/test.sh has no --dry-run; --help says what it does." ;;
    *) break ;;
  esac
  shift
done
install "$extra"
[ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile
cd "$ROOT"
status=0
"$VENV/bin/python" -m ruff check . || {
  status=$?
  echo "ruff found faults (above): this run fails, whatever the tests say."
}
"$VENV/bin/python" -m pytest -q ${slow:+--slow} "$@" || status=$?
exit "$status"
