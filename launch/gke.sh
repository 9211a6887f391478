#!/usr/bin/env bash
# One or several TPU slices on Google Kubernetes Engine, as a JobSet: one job a slice, one pod a host.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

usage() {
  cat <<'HELP'
launch/gke.sh --image=IMAGE --accelerator=tpu-v5p-slice --topology=4x4x4 --hosts=16 [--slices=1] [--chips=4]
              [--claim=m2m-data] [--name=] [--restarts=100] [--module=m2m_jax.train] [--dry_run]
              -- ARGUMENTS OF THE MODULE

  --image      with this repository in its working directory and requirements-tpu.txt installed
  --hosts      of a slice: its chips divided by --chips, those of a host
  --claim      persistent volume claim, mounted at /data: data sets and the workdir (--workdir=/data/runs/x)
  --name       of the JobSet; made from the workdir where it is not given
  --restarts   JobSet counts every restart, those after a preemption, too
Creates it with kubectl; --dry_run prints it instead. One of that name that has ended is deleted first, and one that
runs is left alone. To save and stop: kubectl delete jobset NAME --cascade=foreground
Several slices need --config.mesh.slice=SLICES.
HELP
}

options="image accelerator topology hosts slices chips claim name restarts"
image='' accelerator='' topology='' hosts='' slices=1 chips=4 claim=m2m-data name='' restarts=100
parse_options "$@"
[[ $image && $accelerator && $topology && $hosts ]] || fail "--image, --accelerator, --topology and --hosts are needed"
whole hosts slices chips restarts
[[ $workdir == /data/* ]] || fail "$workdir is not below /data, where --claim is mounted: it would go with its pod"
((slices == 1)) || [[ $module != m2m_jax.train || " ${program[*]} " == *"--config.mesh.slice=$slices "* ]] ||
  fail "--slices=$slices needs --config.mesh.slice=$slices among the arguments of m2m_jax.train"

# Always the same for a workdir, so that the run is found again, and another for any other: a word for people, and a
# checksum. Short, for the names of the pods begin with it.
if [[ -z $name ]]; then
  label=$(basename "$workdir")
  label=${label,,}
  name=m2m-${label//[^a-z0-9]/-}
  name=${name:0:24}-$(echo "${workdir%/}" | cksum | cut -d ' ' -f 1)
fi

# A string that YAML and JSON read alike.
string() {
  local text=${1//\\/\\\\}
  echo "\"${text//\"/\\\"}\""
}

jobset() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    # A slice's pods share no slice with another job's.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    # Preempted or crashed: all slices start again, from the last checkpoint. Not where a pod says that it is of no use.
    maxRestarts: $restarts
    rules:
      - name: ofNoUse
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              # The exit codes are told in m2m_jax/train.py.
              - action: FailJob
                onExitCodes: {containerName: m2m, operator: In, values: [2, 130]}
          template:
            spec:
              restartPolicy: Never
              # To save in, after SIGTERM; spot VMs give less.
              terminationGracePeriodSeconds: 300
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology
              containers:
                - name: m2m
                  image: $(string "$image")
                  command: ["python", "-m", $(string "$module")]
                  args:
YAML
  local argument
  for argument in "${program[@]}"; do echo "                    - $(string "$argument")"; done
  echo "                  env:"
  while IFS= read -r line; do
    printf '                    - {name: %s, value: %s}\n' "${line%%=*}" "$(string "${line#*=}")"
  done < <(environment tpu && echo M2M_PROCESSES=auto && echo "M2M_LAUNCH=gke-$name")
  cat <<YAML
                  resources:
                    limits:
                      google.com/tpu: $chips
                  volumeMounts:
                    - {name: data, mountPath: /data}
              volumes:
                - name: data
                  persistentVolumeClaim: {claimName: $claim}
YAML
}

if ((dry_run)); then
  jobset
  exit
fi
# Its name and the conditions that hold, or nothing. A JobSet stays when it has ended, and what is in it cannot change.
found=$(kubectl get jobset "$name" --ignore-not-found \
  -o jsonpath='{.metadata.name} {.status.conditions[?(@.status=="True")].type} ')
case $found in
  '') ;;
  # In the foreground: its pods are gone when this returns.
  *" Completed "* | *" Failed "*) kubectl delete jobset "$name" --cascade=foreground ;;
  *) fail "the JobSet $name runs: kubectl delete jobset $name --cascade=foreground stops it, --name=OTHER avoids it" ;;
esac
jobset | kubectl create -f -
