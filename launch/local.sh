#!/usr/bin/env bash
# Train with N processes on this machine: launch/local.sh N EXPERIMENT.py [OPTION …]
#
# On GPU, each process uses one device; on CPU, each has JAX_NUM_CPU_DEVICES virtual devices.
set -u
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { echo "usage: launch/local.sh N EXPERIMENT.py [OPTION …]" >&2; exit 2; }
count=$1
shift

here=$(dirname "$0")
# A free port.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

processes=()
for ((i = 0; i < count; i++)); do
    JAX_LOCAL_DEVICE_IDS=$i python "$here/train.py" "$@" \
        --coordinator "127.0.0.1:$port" --processes "$count" --process-id "$i" &
    processes+=($!)
done

# Forward signals to the processes. (Ctrl-C in a terminal reaches them directly too, which counts as one signal.)
for signal in TERM USR1 INT; do trap "kill -$signal \"\${processes[@]}\" 2>/dev/null" $signal; done

# A signal interrupts wait, so repeat it until each process has ended. Of several exit codes, 75 (stopped) takes
# precedence over that of a lost process.
code=0
for process in "${processes[@]}"; do
    until wait "$process"; ended=$?; ! kill -0 "$process" 2>/dev/null; do :; done
    ((ended == 75 || (ended != 0 && code == 0))) && code=$ended
done
exit "$code"
