#!/usr/bin/env bash
# One run on all workers of a Cloud TPU pod: launch/tpu_pod.sh [--dry-run] NAME ZONE EXPERIMENT.py --workdir DIR [OPTION …]
#
# DIR must lie where all workers see it: a Filestore mount, or a bucket by gcsfuse. The workers find each other through
# their metadata. After a preemption, the same command goes on. With --dry-run, prints what it would do.
set -eu

run() { "$@"; }
if [ "${1:-}" = --dry-run ]; then
    run() { printf '%q ' "$@" && echo; }
    shift
fi
[ $# -ge 3 ] || { echo "usage: launch/tpu_pod.sh [--dry-run] NAME ZONE EXPERIMENT.py --workdir DIR [OPTION …]" >&2; exit 2; }
name=$1 zone=$2
shift 2
[[ " $* " = *" --workdir"[\ =]* ]] || { echo "tpu_pod.sh: give a --workdir that all workers see" >&2; exit 2; }

cd "$(dirname "$0")/.."
on_all() { run gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "$1"; }

# The project as last committed, in a folder and a virtual environment of its own.
archive=$(mktemp -d)/flaxmnist.tar
trap 'rm -r "$(dirname "$archive")"' EXIT
run git archive --output "$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name:" --zone "$zone" --worker all
on_all "mkdir -p flaxmnist && tar -xf flaxmnist.tar -C flaxmnist && cd flaxmnist && python3 -m venv .venv &&
    .venv/bin/pip install -q -c constraints.txt '.[tpu]'"

on_all "cd flaxmnist && .venv/bin/python launch/train.py$(printf ' %q' "$@") --resume"
