#!/usr/bin/env bash
# A job on GPU nodes under SLURM: one process a GPU, requeued when it is preempted, fails or runs out of time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

usage() {
  cat <<'HELP'
launch/slurm.sh [--nodes=2] [--gpus=8] [--time=24:00:00] [--partition=] [--python=.venv/bin/python] [--restarts=3]
                [--module=m2m_jax.train] [--dry_run] -- ARGUMENTS OF THE MODULE

Submits with sbatch; --dry_run prints the job instead. The checkout and the workdir must be on storage that all nodes
see. Beside the workdir are slurm-JOB.log and slurm-JOB/: what the tasks of each start ended with, and the crashes.
To save and stop: scancel --signal=INT JOB. A plain scancel sends SIGTERM, after which the job asks to be requeued.
HELP
}

options="nodes gpus time partition python restarts"
nodes=2 gpus=8 time=24:00:00 partition='' python=.venv/bin/python restarts=3
parse_options "$@"
whole nodes gpus restarts

beside=$(dirname "$workdir")
mapfile -t variables < <(environment cuda)

job() {
  cat <<JOB
#!/usr/bin/env bash
#SBATCH --job-name=m2m_jax
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=$time
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=$(quoted "$beside")/slurm-%j.log
JOB
  [[ $partition ]] && echo "#SBATCH --partition=$partition"
  cat <<JOB

cd $(quoted "$PWD") || exit
# JAX reads hosts and ranks from SLURM's variables.
export M2M_PROCESSES=auto
# The lock of a start that was killed, perhaps on another node, is this job's own: m2m_jax/checkpoints/workdir_lock.py.
export M2M_LAUNCH=slurm-\$SLURM_JOB_ID
$(printf 'export %q\n' "${variables[@]}")
command=($(quoted "$python" -m "$module" "${program[@]}"))
tasks=$((nodes * gpus)) restarts=$restarts
workdir=$(quoted "$workdir")
folder=$(quoted "$beside")/slurm-\$SLURM_JOB_ID
JOB
  cat <<'JOB'
start=$folder/${SLURM_RESTART_COUNT:-0}
mkdir -p "$start"
# shellcheck source=/dev/null
source launch/common.sh
before=$(saved "$workdir")

# Unbound: where a site binds tasks, each would have one core to read and decode its data with. The node is all ours.
code=0
srun --kill-on-bad-exit=1 --cpu-bind=none \
  bash -c 'source launch/common.sh && recording "$@"' task "$start" "${command[@]}" || code=$?

# When one task ends badly, srun kills the others and returns what these die of: what a task said itself decides. The
# exit codes are told in m2m_jax/train.py.
shopt -s nullglob
for said in 2 130 75; do
  those=("$start/$said".*)
  if ((${#those[@]})); then code=$said && break; fi
done
# SIGTERM found all of them before they could listen: no task ended badly first.
those=("$start/143".*)
if ((${#those[@]} == tasks)); then code=75; fi

# As often as it likes where it was preempted and has saved what it did; what says so and comes no further has crashed.
outcome=$code
if [[ $outcome == 75 && $(saved "$workdir") == "$before" ]]; then outcome=no_headway; fi
case $outcome in
  0 | 2 | 130) ;;
  75) scontrol requeue "$SLURM_JOB_ID" ;;
  *)
    # SLURM's own count is of preemptions and the end of the time, too. Where this one cannot be written, it ends.
    echo "$outcome" >>"$folder/crashes" && (($(wc -l <"$folder/crashes") <= restarts)) &&
      scontrol requeue "$SLURM_JOB_ID"
    ;;
esac
exit "$code"
JOB
}

if ((dry_run)); then
  job
else
  mkdir -p "$beside" # or SLURM has no place for the log, and fails the job without one
  job | sbatch
fi
