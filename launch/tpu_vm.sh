#!/usr/bin/env bash
# A run on all hosts of a TPU VM slice that exists, through gcloud.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

usage() {
  cat <<'HELP'
launch/tpu_vm.sh --name=TPU --zone=ZONE [--project=P] [--source=m2m_jax] [--restarts=100]
                 [--module=m2m_jax.train] [--dry_run] -- ARGUMENTS OF THE MODULE

  --source     folder of this repository on every host, with an environment in .venv: see docs/scaling.md
The workdir must be a folder that all hosts see. The run goes on when this shell ends; its output is in /tmp/m2m_jax.log.
HELP
}

options="name zone project source restarts"
name='' zone='' project='' source=m2m_jax restarts=100
parse_options "$@"
whole restarts
[[ $name && $zone ]] || fail "--name and --zone are missing: which TPU VM is it?"

# What every host does: restarting itself, for a host that was maintained comes back without its processes.
mapfile -t variables < <(environment tpu)
run=$(quoted env "${variables[@]}" M2M_PROCESSES=auto .venv/bin/python -m "$module" "${program[@]}")
# shellcheck disable=SC2016 # expanded on the host
host='cd '$(quoted "$source")' && source launch/common.sh && restarting '$restarts' '$run
command=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone")
[[ $project ]] && command+=(--project="$project")
command+=(--worker=all --command="nohup bash -c $(quoted "$host") > /tmp/m2m_jax.log 2>&1 &")

if ((dry_run)); then quoted "${command[@]}"; else "${command[@]}"; fi
