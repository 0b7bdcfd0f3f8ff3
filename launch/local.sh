#!/usr/bin/env bash
# One run as N processes on this machine: launch/local.sh N EXPERIMENT.py [OPTION …]
#
# With GPUs each process takes one of them; on CPU, JAX_NUM_CPU_DEVICES is how many devices each makes of it.
set -u
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { echo "usage: launch/local.sh N EXPERIMENT.py [OPTION …]" >&2; exit 2; }
count=$1
shift

here=$(dirname "$0")
# A port that nothing listens on.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

processes=()
for ((i = 0; i < count; i++)); do
    JAX_LOCAL_DEVICE_IDS=$i python "$here/train.py" "$@" \
        --coordinator "127.0.0.1:$port" --processes "$count" --process-id "$i" &
    processes+=($!)
done

# Who tells this script to stop, means the run. (A terminal's Ctrl-C reaches all by itself.)
trap 'kill -TERM "${processes[@]}" 2>/dev/null' TERM
trap 'kill -USR1 "${processes[@]}" 2>/dev/null' USR1
trap : INT

# A signal ends a wait early, so each process is waited for until it is gone. 75, "to be resumed", tells more than the
# way a lost process ended.
code=0
for process in "${processes[@]}"; do
    until wait "$process"; ended=$?; ! kill -0 "$process" 2>/dev/null; do :; done
    ((ended == 75 || (ended != 0 && code == 0))) && code=$ended
done
exit "$code"
