"""Stress tests that take minutes: python tests/stress.py kill [--minutes 10] | stop EXPERIMENT.py | long

``kill`` kills runs with SIGKILL at random moments, resumes them until they finish, and compares them with runs that
were never killed: parameters, optimizer state and records must be bitwise identical, and TensorBoard must find each
record exactly once.
``stop`` sends SIGTERM to an experiment at random moments, and prints how many seconds later it ended.
``long`` trains 200,000 steps and checks memory, speed and records. Each exits with 1 on failure.
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
from flaxmnist.config import SGD, Config, Data, SoftmaxConfig, Train

ROOT = Path(__file__).parent.parent

# Runs of a few seconds that save often and together use every kind of state. The last one has two processes.
RUNS = {
    "softmax": """
        model=SoftmaxConfig(), optimizer=SGD(learning_rate=0.1),
        train=Train(batch_size=20, steps=6000, log_every=50, evaluate_every=500, checkpoint_every=100),
    """,
    "mlp": """
        model=MLPConfig(hidden=(256, 256), dropout=0.5), optimizer=SGD(learning_rate=0.1, momentum=0.9, accumulate=3),
        train=Train(batch_size=100, steps=1500, log_every=7, evaluate_every=100, checkpoint_every=40, skip_nonfinite=3),
    """,
    "cnn": """
        model=CNNConfig(features=(8, 16), kernel=(3,), dense=64, dropout=0.4), optimizer=Adam(learning_rate=1e-3),
        train=Train(batch_size=50, steps=500, log_every=1, evaluate_every=50, checkpoint_every=10, ema_decay=0.99),
    """,
    "two": """
        model=MLPConfig(hidden=(64,), dropout=0.5), optimizer=Adam(learning_rate=1e-3),
        train=Train(batch_size=50, steps=300, log_every=5, evaluate_every=50, checkpoint_every=10),
    """,
}


def command(folder: Path, name: str, workdir: Path) -> list[str]:
    """Return the command that trains run ``name`` of RUNS, with one process or two."""
    start = (
        ["bash", str(ROOT / "launch/local.sh"), "2"]
        if name == "two"
        else [sys.executable, str(ROOT / "launch/train.py")]
    )
    return [*start, str(folder / f"{name}.py"), "--resume", "--workdir", str(workdir)]


def phase(workdir: Path, start_time: float, output: str) -> str:
    """Return the phase in which a run was killed."""
    if (workdir / "result.json").exists():
        return "after the result"
    if list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")):
        return "while a checkpoint was written"
    if "step " in output.replace("at step", ""):
        return "during training"
    config = workdir / "config.json"
    if config.exists() and config.stat().st_mtime > start_time:
        return "during compilation"
    return "during startup"


def differences(expected: Path, actual: Path) -> list[str]:
    """Return the names of what differs between two finished runs."""
    # Not imported above, because it makes JAX use eight devices, here and in subprocesses.
    from test_tensorboard import recorded, scalars

    names = []
    if (expected / "metrics.jsonl").read_bytes() != (actual / "metrics.jsonl").read_bytes():
        names.append("metrics.jsonl")
    if scalars(actual) != recorded(actual):
        names.append("tensorboard")
    states = [fm.load_run(folder).state for folder in (expected, actual)]
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(states[0]), jax.tree.leaves(states[1]), strict=True):
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            names.append(jax.tree_util.keystr(path))
    hashes = [json.loads((folder / "result.json").read_text())["params_sha256"] for folder in (expected, actual)]
    return names if hashes[0] == hashes[1] else [*names, "params_sha256"]


def kill(minutes: float, seed: int) -> bool:
    """Return True if all killed runs ended like runs that were never killed."""
    scratch = Path(tempfile.mkdtemp(prefix="stress-"))
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    durations = {}
    for name, fields in RUNS.items():
        (scratch / f"{name}.py").write_text(
            f"from flaxmnist.config import *\nconfig = Config(name={name!r}, data=Data(name='digits'), {fields})\n"
        )
        start_time = time.monotonic()
        subprocess.run(command(scratch, name, scratch / name), env=environment, check=True, capture_output=True)
        durations[name] = time.monotonic() - start_time
        print(f"{name}: {durations[name]:.1f} s without kills", flush=True)
    phases: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    finished: collections.Counter[str] = collections.Counter()
    deadline = time.monotonic() + 60 * minutes

    def work(index: int) -> None:
        rng = random.Random(f"{seed} {index}")
        while time.monotonic() < deadline:
            name = rng.choice(list(RUNS))
            workdir = scratch / f"{name}-{index}-{sum(finished.values())}-{rng.random()}"
            for kills in itertools.count():
                start_time, delay = time.time(), rng.uniform(0, 1.5 * durations[name])
                with subprocess.Popen(
                    command(scratch, name, workdir), env=environment, stderr=subprocess.PIPE, text=True,
                    stdout=subprocess.DEVNULL, start_new_session=True,
                ) as process:  # fmt: skip
                    # After the deadline, runs are no longer killed.
                    alarm = threading.Timer(delay, os.killpg, [process.pid, signal.SIGKILL])
                    if time.monotonic() < deadline:
                        alarm.start()
                    assert process.stderr is not None
                    output = process.stderr.read()
                    alarm.cancel()
                if process.returncode == -9:
                    phases[phase(workdir, start_time, output)] += 1
                    continue
                if process.returncode != 0:
                    failures.append(f"{name} ended with {process.returncode}: {output[-2000:]}")
                elif names := differences(scratch / name, workdir):
                    failures.append(f"{name} differs after {kills} kills in {', '.join(names)}")
                else:
                    finished[name] += 1
                break
            shutil.rmtree(workdir, ignore_errors=True)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(os.cpu_count() or 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    counts = ", ".join(f"{count} {name}" for name, count in phases.most_common())
    print(f"{sum(phases.values())} kills: {counts}")
    print(f"{sum(finished.values())} runs finished as if never killed, {len(failures)} did not")
    for failure in failures:
        print(failure)
    shutil.rmtree(scratch)
    return not failures


def stop(experiment: str, data_dir: str | None, times: int, seed: int) -> bool:
    """Return True if an experiment always ends with exit code 75 within 30 s of SIGTERM."""
    rng = random.Random(seed)
    waits = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "launch/train.py"), experiment, "--workdir", f"{folder}/run"]
            command += ["--data-dir", data_dir] if data_dir else ["--data.name", "digits"]
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
                time.sleep(rng.uniform(0.5, 15))
                start_time = time.monotonic()
                process.send_signal(signal.SIGTERM)
                code = process.wait()
                waits.append(time.monotonic() - start_time)
        if code != 75:
            print(f"ended with {code}")
            return False
    print(f"{times} times, seconds from signal to end: mean {statistics.mean(waits):.1f}, longest {max(waits):.1f}")
    return max(waits) < 30


def memory() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def long(steps: int, data_dir: str | None) -> bool:
    """Return True if memory stays constant during a long run and its records are complete."""
    samples: list[tuple[int, float, int]] = []
    sample = {"on_evaluation": lambda step, *_: samples.append((step, time.perf_counter(), memory()))}
    config = Config(
        name="long",
        model=SoftmaxConfig(),
        optimizer=SGD(learning_rate=0.1),
        data=Data(name="mnist" if data_dir else "digits"),
        train=Train(
            batch_size=100, steps=steps, log_every=100, evaluate_every=steps // 100, checkpoint_every=steps // 20
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        fm.fit(config, fm.load_data(config.data, data_dir), Path(folder) / "run", devices=1, **sample)
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in lines if line["split"] == "train"]
    complete = logged == list(range(0, steps, 100))
    # Memory varies with every checkpoint: compare the medians of the second and of the last tenth.
    before, after = (
        statistics.median(size for step, _, size in samples if first < step <= first + steps // 10)
        for first in (steps // 10, steps - steps // 10)
    )
    growth = after / before - 1
    speeds = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in itertools.pairwise(samples)]
    tenth = len(speeds) // 10
    first, last = statistics.median(speeds[:tenth]), statistics.median(speeds[-tenth:])
    print(f"memory {before / 1e6:.1f} MB from step {steps // 10} on, {after / 1e6:.1f} MB at the end: {growth:+.2%}")
    print(f"{first:,.0f} steps/s in the first tenth, {last:,.0f} in the last: {last / first - 1:+.1%} (medians)")
    print(f"{len(lines)} records, {'complete' if complete else 'INCOMPLETE'}")
    return complete and growth < 0.01


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test", choices=["kill", "stop", "long"])
    parser.add_argument("experiment", nargs="?", default="experiments/cnn_experts.py", help="experiment file to stop")
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of killing (default: 10)")
    parser.add_argument("--times", type=int, default=20, help="number of stops (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    parser.add_argument("--steps", type=int, default=200_000, help="steps of the long run (default: 200000)")
    parser.add_argument("--data-dir", help="folder with MNIST for stop and long (default: use the scikit-learn digits)")
    arguments = parser.parse_args()
    match arguments.test:
        case "kill":
            success = kill(arguments.minutes, arguments.seed)
        case "stop":
            success = stop(arguments.experiment, arguments.data_dir, arguments.times, arguments.seed)
        case _:
            success = long(arguments.steps, arguments.data_dir)
    sys.exit(0 if success else 1)
