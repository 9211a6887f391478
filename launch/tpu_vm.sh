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
The workdir must be a folder that all hosts see. The run goes on when this shell ends, with its output in
/tmp/m2m_jax.log. After a reboot of a host run the same command again: what still runs is first told to save and end.
To save and stop, let all workers run: pkill -TERM -F /dev/shm/m2m_jax.pid -f restarting
HELP
}

options="name zone project source restarts"
name='' zone='' project='' source=m2m_jax restarts=100
parse_options "$@"
whole restarts
[[ $name && $zone ]] || fail "--name and --zone are missing: which TPU VM is it?"
[[ $workdir == /* ]] || fail "$workdir is another folder on every host: give the path of one that all see, from /"

# What every host does: it restarts its process by itself. The number of the shell that does so is in /dev/shm, which a
# reboot empties.
mapfile -t variables < <(environment tpu)
run=$(quoted env "${variables[@]}" M2M_PROCESSES=auto .venv/bin/python -m "$module" "${program[@]}")
# shellcheck disable=SC2016 # expanded on the host
loop='source launch/common.sh && workdir='$(quoted "$workdir")' && echo $$ > /dev/shm/m2m_jax.pid && restarting '$restarts' '$run
host='cd '$(quoted "$source")' && source launch/common.sh && ending_earlier /dev/shm/m2m_jax.pid && '
host+='{ nohup bash -c '$(quoted "$loop")' > /tmp/m2m_jax.log 2>&1 < /dev/null & }'
command=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone")
[[ $project ]] && command+=(--project="$project")
command+=(--worker=all --command="bash -c $(quoted "$host")")

if ((dry_run)); then quoted "${command[@]}"; else "${command[@]}"; fi
