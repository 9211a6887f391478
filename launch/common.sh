# shellcheck shell=bash disable=SC2034,SC2154 # `options` is the launcher's, `dry_run` is for it
# Sourced by the launchers: their options, and what is set for each platform.

fail() {
  echo "error: $*" >&2
  exit 2
}

# parse_options "$@": --name=value for the variables that the launcher has set to their defaults, --module, --dry_run,
# and after -- the arguments of the module, in the array `program`. `workdir` is the folder that it writes.
parse_options() {
  dry_run=0 module=m2m_jax.train program=()
  while (($#)); do
    case $1 in
      --dry_run) dry_run=1 ;;
      --help) usage && exit 0 ;;
      --) shift && program=("$@") && break ;;
      --*=*)
        local option=${1%%=*}
        option=${option#--}
        [[ " $options module " == *" $option "* ]] || fail "unknown option --$option; there are: $options module"
        printf -v "$option" '%s' "${1#*=}"
        ;;
      *) fail "unexpected argument $1: options are --name=value, and those of $module follow --" ;;
    esac
    shift
  done
  workdir=
  local i
  for ((i = 0; i < ${#program[@]}; i++)); do
    case ${program[i]} in
      --workdir=* | --output=*) workdir=${program[i]#*=} ;;
      --workdir | --output) workdir=${program[i + 1]-} ;;
    esac
  done
  [[ $workdir ]] || fail "no --workdir or --output among the arguments of $module: $0 [options] -- ... --workdir=DIR"
}

# whole NAME...: each is a whole number of at least 1 (restarts: at least 0).
whole() {
  local option
  for option; do
    if ! [[ ${!option} =~ ^[0-9]+$ ]] || { ((${!option} == 0)) && [[ $option != restarts ]]; }; then
      fail "--$option=${!option} must be a whole number"
    fi
  done
}

# environment cpu|cuda|tpu: NAME=value, a line each. What XLA is told of a platform every program sets for itself
# (m2m_jax/core/runtime.py), however it is started.
environment() {
  # Compiled programs outlive the process, beside the workdir on shared storage: a restart compiles nothing.
  echo "JAX_COMPILATION_CACHE_DIR=$(dirname "$workdir")/compilation_cache"
  case $1 in
    # Named, so that a missing driver is an error and not a week on the CPU.
    cpu) echo JAX_PLATFORMS=cpu ;;
    cuda)
      echo JAX_PLATFORMS=cuda,cpu
      # Jobs do not get the environment of who submits them.
      [[ -z ${XLA_FLAGS-} ]] || echo "XLA_FLAGS=$XLA_FLAGS"
      ;;
    tpu) echo JAX_PLATFORMS=tpu,cpu ;;
  esac
}

# A command as one line that a shell reads back.
quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# passing_on COMMAND...: `code` is what it ends with. Signals to this shell are passed on, a second Ctrl-C, too, and the
# command is waited for; `told` is the last of them.
passing_on() {
  local pid='' interrupted
  told=''
  # Before it starts: a signal that comes sooner than its number is known is passed on when it is.
  trap 'told=TERM interrupted=1; [[ -z $pid ]] || kill -TERM -- "-$pid" 2>/dev/null || true' TERM HUP
  trap 'told=INT interrupted=1; [[ -z $pid ]] || kill -INT -- "-$pid" 2>/dev/null || true' INT
  # A process group of its own: Ctrl-C on a terminal reaches it through this shell alone, and once.
  set -m
  "$@" &
  pid=$!
  set +m
  [[ -z $told ]] || kill "-$told" -- "-$pid" 2>/dev/null || true
  while true; do
    interrupted='' code=0
    wait "$pid" || code=$?
    [[ $interrupted ]] || break
  done
  trap - TERM HUP INT
}

# restarting RESTARTS COMMAND...: again while it ends badly, as a crashed run does, so often, and as often as it likes
# where it was preempted (75) and has saved what it did: it resumes from its last checkpoint. The exit codes are told in
# m2m_jax/train.py. Not again where this shell was told to end.
restarting() {
  local left=$1 code told before after
  shift
  before=$(saved "$workdir")
  while true; do
    passing_on "$@"
    if [[ $told ]]; then return "$code"; fi
    after=$(saved "$workdir")
    case $code in
      0 | 2 | 130) return "$code" ;;
      75)
        if [[ $after != "$before" ]]; then
          echo "preempted: starting again" >&2
        else
          # What says that it was told to stop, and comes no further, would be started for ever.
          ((left-- > 0)) || return "$code"
          echo "preempted before it saved anything: restarting, $left restarts left" >&2
        fi
        ;;
      *)
        ((left-- > 0)) || return "$code"
        echo "exit code $code: restarting, $left restarts left" >&2
        ;;
    esac
    before=$after
    sleep 2
  done
}

# saved WORKDIR: how far it has come: its checkpoints, or of a program that saves none its files, but for unfinished ones.
# A start that made headway makes another text of it.
saved() {
  if [[ -d $1/checkpoints ]]; then
    find "$1/checkpoints" -maxdepth 1 -regex '.*/[0-9]+' | LC_ALL=C sort
  elif [[ -d $1 ]]; then
    find "$1" -type f ! -name '*.partial' | LC_ALL=C sort
  fi
}

# recording FOLDER COMMAND...: one task of SLURM's, whose exit code is left as the name of a file, FOLDER/CODE.TASK: a
# full disk has no room for what is in one.
recording() {
  local folder=$1 code told
  shift
  passing_on "$@"
  : >"$folder/$code.$SLURM_PROCID"
  return "$code"
}

# ending_earlier FILE: ends the shell of an earlier launch, with `restarting` in it, whose number is in FILE, if it is
# still there. Told by SIGTERM its run saves; one that takes over five minutes hangs, and is killed.
ending_earlier() {
  local pid children child i
  pid=$(pgrep -F "$1" -f restarting 2>/dev/null) || return 0
  echo "$HOSTNAME: an earlier run is told to save and end" >&2
  kill -TERM "$pid"
  for ((i = 0; i < 300; i++)); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 1
  done
  children=$(pgrep -P "$pid") || true
  kill -KILL "$pid"
  for child in $children; do kill -KILL -- "-$child"; done
}
