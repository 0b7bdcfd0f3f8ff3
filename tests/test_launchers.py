"""Cluster launchers: SLURM and Open MPI on one machine, the schema of the Kubernetes job, a dry run for TPU pods."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

SMALL = """
from flaxmnist.config import *
config = Config(
    name="small",
    model=CNNConfig(features=(8,), kernel=(3,), dense=32, dropout=0.5),
    optimizer=Adam(learning_rate=1e-3),
    data=Data(name="digits"),
    train=Train(batch_size=64, steps=STEPS, log_every=100, evaluate_every=1000, checkpoint_every=500),
)
"""


def why_no_slurm() -> str | None:
    """Return the reason why SLURM cannot be started here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)} (Debian's slurm-wlm and munge)" if absent else None


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Environment variables for SLURM's commands, with a cluster of one node on this machine."""
    reason = why_no_slurm()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run(["bash", ROOT / "tests/slurm.sh", "start", folder], check=True, timeout=60)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "JAX_NUM_CPU_DEVICES": "1", "PATH": path}
    finally:
        subprocess.run(["bash", ROOT / "tests/slurm.sh", "stop", folder], check=True)


def submit(slurm: dict[str, str], output: Path, options: list[str], arguments: list[Any]) -> str:
    """Submit launch/slurm.sbatch and return the number of the job."""
    command = ["sbatch", "--parsable", "--output", output, *options, "launch/slurm.sbatch", *arguments]
    submitted = subprocess.run(list(map(str, command)), env=slurm, cwd=ROOT, capture_output=True, text=True, check=True)
    return submitted.stdout.strip()


def wait_until(reached: Callable[[], Any], seconds: float, output: Path) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(1)


def has_ended(slurm: dict[str, str], job: str) -> bool:
    return not subprocess.run(["squeue", "-h", "-j", job], env=slurm, capture_output=True, check=False).stdout


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_slurm_requeues_a_job_that_its_signal_stopped(slurm, tmp_path):
    """The resumed run is bitwise identical to an uninterrupted one."""
    experiment, output = tmp_path / "small.py", tmp_path / "output"
    experiment.write_text(SMALL.replace("STEPS", "1000"))
    options = ["--nodes", "1", "--ntasks-per-node", "2"]
    job = submit(slurm, output, options, [tmp_path / "run", experiment])
    # SLURM would send this signal before the time limit of the job, but it checks time limits only every 30 s.
    wait_until(lambda: output.exists() and "step 200," in output.read_text(), 300, output)
    subprocess.run(["scancel", "--signal", "USR1", job], env=slurm, check=True)
    wait_until(lambda: has_ended(slurm, job), 300, output)
    printed = output.read_text()
    assert "stopped at step" in printed
    assert "exit code 75; the job is requeued" in printed
    assert "resuming from the checkpoint at step" in printed
    assert printed.count("test accuracy") == 1
    described = json.loads((tmp_path / "run/config.json").read_text())["devices"]
    assert (described["processes"], described["count"]) == (2, 2)

    command = ["bash", ROOT / "launch/local.sh", "2", experiment, "--workdir", tmp_path / "uninterrupted"]
    subprocess.run(list(map(str, command)), env=slurm, check=True, capture_output=True, timeout=300)
    assert result(tmp_path / "run")["params_sha256"] == result(tmp_path / "uninterrupted")["params_sha256"]
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "uninterrupted/metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_slurm_array_trains_one_run_per_seed(slurm, tmp_path):
    experiment = tmp_path / "small.py"
    experiment.write_text(SMALL.replace("STEPS", "5"))
    options = ["--array", "3-4", "--nodes", "1", "--ntasks-per-node", "1"]
    job = submit(slurm, tmp_path / "output-%a", options, [tmp_path / "runs", experiment])
    wait_until(lambda: has_ended(slurm, job), 300, tmp_path / "output-3")
    printed = "".join((tmp_path / f"output-{seed}").read_text() for seed in (3, 4))
    assert printed.count("test accuracy") == 2, printed
    assert [result(tmp_path / f"runs/seed-{seed}")["seed"] for seed in (3, 4)] == [3, 4]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="not installed: mpirun (Debian's openmpi-bin)")
def test_open_mpi_trains_with_two_processes(tmp_path):
    experiment = tmp_path / "small.py"
    experiment.write_text(SMALL.replace("STEPS", "5"))
    command = ["mpirun", "-n", "2", "--allow-run-as-root", "--oversubscribe", sys.executable, "launch/train.py"]
    completed = subprocess.run(
        list(map(str, [*command, experiment, "--workdir", tmp_path / "run"])),
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.count("test accuracy") == 1
    assert json.loads((tmp_path / "run/config.json").read_text())["devices"]["processes"] == 2


def forbid_unknown_fields(schema: Any) -> Any:
    """Return a Kubernetes schema that forbids unknown fields, as ``kubectl --validate=strict`` does."""
    if isinstance(schema, list):
        return [forbid_unknown_fields(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: forbid_unknown_fields(value) for key, value in schema.items()}
    if schema.get("type") == "object" and "properties" in schema and "additionalProperties" not in schema:
        schema["additionalProperties"] = schema.get("x-kubernetes-preserve-unknown-fields", False)
    return schema


def test_the_kubernetes_job_is_valid():
    import jsonschema
    import yaml

    path = Path(os.environ.get("FLAXMNIST_SCHEMAS", "nowhere"), "jobset.x-k8s.io_jobsets.yaml")
    if not path.exists():
        pytest.skip("FLAXMNIST_SCHEMAS is not a folder with the definition of JobSet")
    definition = yaml.safe_load(path.read_text())
    job, *others = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    (version,) = (item for item in definition["spec"]["versions"] if job["apiVersion"].endswith("/" + item["name"]))
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}
    validator = jsonschema.Draft202012Validator(forbid_unknown_fields(schema))
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(job)] == []
    assert job["kind"] == definition["spec"]["names"]["kind"]

    replicated = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = replicated["template"]["spec"]
    (container,) = pod["containers"]
    assert replicated["parallelism"] == replicated["completions"]
    assert all((ROOT / name).exists() for name in container["command"][1:])
    assert "--resume" in container["args"]
    names = {item["kind"]: item["metadata"]["name"] for item in others}
    assert names["ServiceAccount"] == pod["serviceAccountName"]
    assert names["PersistentVolumeClaim"] == pod["volumes"][0]["persistentVolumeClaim"]["claimName"]

    container["comand"] = ["typo"]
    assert list(validator.iter_errors(job)), "the schema rejects unknown fields"


def test_dry_run_for_a_tpu_pod(tmp_path):
    """It prints commands of git and gcloud, which pass the options of the experiment on unchanged."""
    script = ["bash", ROOT / "launch/tpu_pod.sh", "--dry-run", "pod", "us-central2-b"]
    options = ["experiments/record.py", "--workdir", "/mnt/my runs/a", "--train.steps", "10"]
    completed = subprocess.run(script + options, capture_output=True, text=True, check=True)
    archive, copy, install, train = (line for line in completed.stdout.replace("\\n", " ").splitlines())
    assert archive.startswith("git archive")
    assert copy.startswith("gcloud compute tpus tpu-vm scp")
    assert "--worker all" in install
    assert "[tpu]" in install
    echoed = subprocess.run(
        ["bash", "-c", f"gcloud() {{ printf '%s' \"${{@: -1}}\"; }}; {train}"], capture_output=True, text=True
    )
    assert echoed.stdout == (
        "cd flaxmnist && .venv/bin/python launch/train.py experiments/record.py --workdir /mnt/my\\ runs/a "
        "--train.steps 10 --resume"
    )


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_pod.sh", ["pod"], "usage: launch/tpu_pod.sh"),
        ("tpu_pod.sh", ["pod", "zone", "experiments/record.py"], "pass a --workdir that all workers share"),
        ("local.sh", ["experiments/record.py"], "usage: launch/local.sh"),
        ("slurm.sbatch", [], "usage: sbatch"),
    ],
)
def test_a_launcher_with_invalid_arguments_exits_with_2(script, arguments, message):
    completed = subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments], capture_output=True, text=True, check=False
    )
    assert completed.returncode == 2
    assert message in completed.stderr
    assert len(completed.stderr.splitlines()) == 1
