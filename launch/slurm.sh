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

Submits with sbatch; --dry_run prints the job instead. The checkout and the workdir must be on storage that all nodes see.
HELP
}

options="nodes gpus time partition python restarts"
nodes=2 gpus=8 time=24:00:00 partition='' python=.venv/bin/python restarts=3
parse_options "$@"
whole nodes gpus restarts

job() {
  cat <<JOB
#!/usr/bin/env bash
#SBATCH --job-name=m2m_jax
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --exclusive
#SBATCH --time=$time
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=$(dirname "$workdir")/slurm-%j.log
JOB
  [[ $partition ]] && echo "#SBATCH --partition=$partition"
  cat <<JOB

cd $(quoted "$PWD")
# JAX reads hosts and ranks from SLURM's variables.
export M2M_PROCESSES=auto
JOB
  environment cuda | sed 's/^/export /'
  cat <<JOB
code=0
srun --kill-on-bad-exit=1 $(quoted "$python" -m "$module" "${program[@]}") || code=\$?
# The exit codes are told in m2m_jax/train.py; 143 is a process that SIGTERM found before it could listen.
case \$code in
  0 | 2 | 130) ;;
  75 | 143) scontrol requeue "\$SLURM_JOB_ID" ;;
  *) ((\${SLURM_RESTART_COUNT:-0} >= $restarts)) || scontrol requeue "\$SLURM_JOB_ID" ;;
esac
exit "\$code"
JOB
}

if ((dry_run)); then job; else job | sbatch; fi
