#!/usr/bin/env bash
# Several processes on this machine, joined as those of several hosts are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

usage() {
  cat <<'HELP'
launch/local.sh [--processes=2] [--devices=2] [--restarts=3] [--python=python3] [--module=m2m_jax.train] [--dry_run]
                -- ARGUMENTS OF THE MODULE

  --processes  on this machine
  --devices    CPU devices of each process
  --restarts   how often a run that was killed or failed is taken up again from its last checkpoint
HELP
}

options="processes devices restarts python"
processes=2 devices=2 restarts=3 python=python3
parse_options "$@"
whole processes devices restarts
mapfile -t variables < <(environment cpu)
variables+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
# This machine is the caller's, and so is the folder that he names.
[[ -z ${JAX_COMPILATION_CACHE_DIR-} ]] || variables+=("JAX_COMPILATION_CACHE_DIR=$JAX_COMPILATION_CACHE_DIR")

# All processes until the first ends badly, which ends the others: a collective without them would wait for ever. Those
# that stop because they were told to (75, 130) have all saved, and end by themselves.
together() {
  trap : TERM HUP INT # which `restarting` has sent to the processes, too
  local port i ended one code=0
  local -A running=()
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  for ((i = 0; i < processes; i++)); do
    env "${variables[@]}" "JAX_COORDINATOR_ADDRESS=localhost:$port" "M2M_PROCESSES=$i/$processes" \
      "$python" -m "$module" "${program[@]}" &
    running[$!]=$i
  done
  while ((${#running[@]})); do
    ended='' one=0
    wait -n -p ended "${!running[@]}" || one=$?
    [[ ${ended-} ]] || continue # it was a signal
    unset "running[$ended]"
    ((one == 0 || code != 0)) || code=$one
    [[ $one =~ ^(0|75|130)$ ]] || kill -KILL "${!running[@]}" 2>/dev/null || true
  done
  return "$code"
}

if ((dry_run)); then
  for ((i = 0; i < processes; i++)); do
    quoted env "${variables[@]}" JAX_COORDINATOR_ADDRESS=localhost:PORT "M2M_PROCESSES=$i/$processes" \
      "$python" -m "$module" "${program[@]}"
  done
  exit
fi
restarting "$restarts" together
