"""What takes minutes to prove: python tests/stress.py kill [--minutes 10] | stop EXPERIMENT.py | long

``kill`` starts runs, kills them with SIGKILL at random moments, resumes them until they are finished, and compares what
they end with to runs that were never killed: parameters, optimizer state and records must be the same to the bit, and
TensorBoard must find each record once.
``stop`` sends SIGTERM to an experiment at random moments, and tells how many seconds later it ended.
``long`` trains 200,000 steps and looks at memory, speed and records. All exit with 1 where it is not as it should be.
"""

import argparse
import collections
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

import flaxmnist as fm
from flaxmnist import logs
from flaxmnist.config import SGD, Config, Data, Softmax, Train

ROOT = Path(__file__).parent.parent

# Runs of a few seconds, which save all the time and carry all that a state may hold. The last is of two processes.
RUNS = {
    "softmax": """
        model=Softmax(), optimizer=SGD(learning_rate=0.1),
        train=Train(batch_size=20, steps=6000, log_every=50, evaluate_every=500, checkpoint_every=100),
    """,
    "mlp": """
        model=MLP(hidden=(256, 256), dropout=0.5), optimizer=SGD(learning_rate=0.1, momentum=0.9, accumulate=3),
        train=Train(batch_size=100, steps=1500, log_every=7, evaluate_every=100, checkpoint_every=40, skip_nonfinite=3),
    """,
    "cnn": """
        model=CNN(features=(8, 16), kernel=(3,), dense=64, dropout=0.4), optimizer=Adam(learning_rate=1e-3),
        train=Train(batch_size=50, steps=500, log_every=1, evaluate_every=50, checkpoint_every=10, ema_decay=0.99),
    """,
    "two": """
        model=MLP(hidden=(64,), dropout=0.5), optimizer=Adam(learning_rate=1e-3),
        train=Train(batch_size=50, steps=300, log_every=5, evaluate_every=50, checkpoint_every=10),
    """,
}


def command(folder: Path, name: str, workdir: Path) -> list[str]:
    """What trains the run called ``name`` of RUNS: one process, or two."""
    start = (
        ["bash", str(ROOT / "launch/local.sh"), "2"]
        if name == "two"
        else [sys.executable, str(ROOT / "launch/train.py")]
    )
    return [*start, str(folder / f"{name}.py"), "--resume", "--workdir", str(workdir)]


def moment(workdir: Path, began: float, told: str) -> str:
    """Where in its life a run was killed."""
    if (workdir / "result.json").exists():
        return "after the result"
    if list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")):
        return "while a checkpoint was written"
    if "step " in told.replace("at step", ""):
        return "in training"
    config = workdir / "config.json"
    if config.exists() and config.stat().st_mtime > began:
        return "while compiling"
    return "while starting"


def same(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs."""
    # Not above: it has JAX make eight devices, here and in processes that are started.
    from test_events import recorded, scalars

    differs = []
    if (one / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes():
        differs.append("metrics.jsonl")
    if scalars(other) != recorded(other):
        differs.append("tensorboard")
    states = [fm.load_run(folder).state for folder in (one, other)]
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(states[0]), jax.tree.leaves(states[1]), strict=True):
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            differs.append(jax.tree_util.keystr(path))
    hashes = [json.loads((folder / "result.json").read_text())["params_sha256"] for folder in (one, other)]
    return differs if hashes[0] == hashes[1] else [*differs, "params_sha256"]


def kill(minutes: float, seed: int) -> bool:
    """Whether all killed runs ended as if they had not been."""
    scratch = Path(tempfile.mkdtemp(prefix="stress-"))
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    whole = {}
    for name, fields in RUNS.items():
        (scratch / f"{name}.py").write_text(
            f"from flaxmnist.config import *\nconfig = Config(name={name!r}, data=Data(name='digits'), {fields})\n"
        )
        began = time.monotonic()
        subprocess.run(command(scratch, name, scratch / name), env=environment, check=True, capture_output=True)
        whole[name] = time.monotonic() - began
        print(f"{name}: {whole[name]:.1f} s without being killed", flush=True)
    moments: collections.Counter[str] = collections.Counter()
    troubles: list[str] = []
    finished: collections.Counter[str] = collections.Counter()
    deadline = time.monotonic() + 60 * minutes

    def work(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        while time.monotonic() < deadline:
            name = chance.choice(list(RUNS))
            workdir = scratch / f"{name}-{number}-{sum(finished.values())}-{chance.random()}"
            lives = 0
            while True:
                lives += 1
                began, patience = time.time(), chance.uniform(0, 1.5 * whole[name])
                with subprocess.Popen(
                    command(scratch, name, workdir), env=environment, stderr=subprocess.PIPE, text=True,
                    stdout=subprocess.DEVNULL, start_new_session=True,
                ) as process:  # fmt: skip
                    # After the time of the whole is up, a run is let finish.
                    alarm = threading.Timer(patience, os.killpg, [process.pid, signal.SIGKILL])
                    if time.monotonic() < deadline:
                        alarm.start()
                    assert process.stderr is not None
                    told = process.stderr.read()
                    alarm.cancel()
                if process.returncode == -9:
                    moments[moment(workdir, began, told)] += 1
                    continue
                if process.returncode != 0:
                    troubles.append(f"{name} ended with {process.returncode}: {told[-2000:]}")
                elif differs := same(scratch / name, workdir):
                    troubles.append(f"{name} differs after {lives - 1} kills in {', '.join(differs)}")
                else:
                    finished[name] += 1
                break
            shutil.rmtree(workdir, ignore_errors=True)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(os.cpu_count() or 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    where = ", ".join(f"{count} {name}" for name, count in moments.most_common())
    print(f"{sum(moments.values())} kills: {where}")
    print(f"{sum(finished.values())} runs finished as if they had not been killed, {len(troubles)} did not")
    for trouble in troubles:
        print(trouble)
    shutil.rmtree(scratch)
    return not troubles


def stop(experiment: str, data_dir: str | None, times: int, seed: int) -> bool:
    """Whether an experiment ended with 75 and within 30 s, however soon after its start it was told to."""
    chance = random.Random(seed)
    waits = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "launch/train.py"), experiment, "--workdir", f"{folder}/run"]
            command += ["--data-dir", data_dir] if data_dir else ["--data.name", "digits"]
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
                time.sleep(chance.uniform(0.5, 15))
                began = time.monotonic()
                process.send_signal(signal.SIGTERM)
                code = process.wait()
                waits.append(time.monotonic() - began)
        if code != 75:
            print(f"ended with {code}")
            return False
    print(f"{times} times, seconds from signal to end: mean {statistics.mean(waits):.1f}, longest {max(waits):.1f}")
    return max(waits) < 30


def memory() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def long(steps: int, data_dir: str | None) -> bool:
    """Whether a long run ends with the memory it had, and whole records."""
    seen: list[tuple[int, float, int]] = []
    show = logs.Progress.show

    def watch(progress, step, *values):
        seen.append((step, time.perf_counter(), memory()))
        show(progress, step, *values)

    logs.Progress.show = watch
    config = Config(
        name="long",
        model=Softmax(),
        optimizer=SGD(learning_rate=0.1),
        data=Data(name="mnist" if data_dir else "digits"),
        train=Train(
            batch_size=100, steps=steps, log_every=100, evaluate_every=steps // 100, checkpoint_every=steps // 20
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        fm.fit(config, fm.load_data(config.data, data_dir), Path(folder) / "run", devices=1)
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in lines if line["split"] == "train"]
    whole = logged == list(range(0, steps, 100))
    # What is in use goes up and down with every checkpoint: the second tenth's median, and the last's.
    before, after = (
        statistics.median(size for step, _, size in seen if first < step <= first + steps // 10)
        for first in (steps // 10, steps - steps // 10)
    )
    growth = after / before - 1
    speeds = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in itertools.pairwise(seen)]
    tenth = len(speeds) // 10
    first, last = statistics.median(speeds[:tenth]), statistics.median(speeds[-tenth:])
    print(f"memory {before / 1e6:.1f} MB from step {steps // 10} on, {after / 1e6:.1f} MB at the end: {growth:+.2%}")
    print(
        f"{first:,.0f} steps/s in the first tenth, {last:,.0f} in the last: {last / first - 1:+.1%} (medians of chunks)"
    )
    print(f"{len(lines)} records, {'whole' if whole else 'NOT WHOLE'}")
    return whole and growth < 0.01


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill", "stop", "long"])
    parser.add_argument("experiment", nargs="?", default="experiments/cnn_experts.py", help="which one to stop")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to kill (default: 10)")
    parser.add_argument("--times", type=int, default=20, help="how often to stop (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--steps", type=int, default=200_000, help="of the long run (default: 200000)")
    parser.add_argument("--data-dir", help="stop, and train long, on MNIST from here (default: on the digits)")
    given = parser.parse_args()
    match given.what:
        case "kill":
            well = kill(given.minutes, given.seed)
        case "stop":
            well = stop(given.experiment, given.data_dir, given.times, given.seed)
        case _:
            well = long(given.steps, given.data_dir)
    sys.exit(0 if well else 1)
