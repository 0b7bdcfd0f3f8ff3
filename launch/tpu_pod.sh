#!/usr/bin/env bash
# Train on all workers of a TPU pod: launch/tpu_pod.sh [--dry-run] NAME ZONE EXPERIMENT.py --workdir DIR [OPTION …]
#
# DIR must be on storage that all workers share: a Filestore mount, or a bucket mounted with gcsfuse. The workers find
# each other through the pod's metadata. After a preemption, the same command resumes the run. --dry-run only prints the
# commands.
set -eu

run() { "$@"; }
if [ "${1:-}" = --dry-run ]; then
    run() { printf '%q ' "$@" && echo; }
    shift
fi
[ $# -ge 3 ] || { echo "usage: launch/tpu_pod.sh [--dry-run] NAME ZONE EXPERIMENT.py --workdir DIR [OPTION …]" >&2; exit 2; }
name=$1 zone=$2
shift 2
[[ " $* " = *" --workdir"[\ =]* ]] || { echo "tpu_pod.sh: no run folder: pass a --workdir that all workers share" >&2; exit 2; }

cd "$(dirname "$0")/.."
on_all() { run gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "$1"; }

# Install the last commit in a new folder and virtual environment on each worker.
archive=$(mktemp -d)/flaxmnist.tar
trap 'rm -r "$(dirname "$archive")"' EXIT
run git archive --output "$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name:" --zone "$zone" --worker all
on_all "mkdir -p flaxmnist && tar -xf flaxmnist.tar -C flaxmnist && cd flaxmnist && python3 -m venv .venv &&
    .venv/bin/pip install -q -c constraints.txt '.[tpu]'"

on_all "cd flaxmnist && .venv/bin/python launch/train.py$(printf ' %q' "$@") --resume"
