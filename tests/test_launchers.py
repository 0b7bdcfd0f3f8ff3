"""Runs as clusters start them: real SLURM and Open MPI on one machine, Kubernetes by its schema, TPUs in rehearsal."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

# Long enough to be stopped on the way: SLURM looks at its clock every 30 s.
SMALL = """
from flaxmnist.config import *
config = Config(
    name="small",
    model=CNN(features=(8,), kernel=(3,), dense=32, dropout=0.5),
    optimizer=Adam(learning_rate=1e-3),
    data=Data(name="digits"),
    train=Train(batch_size=64, steps=STEPS, log_every=100, evaluate_every=1000, checkpoint_every=500),
)
"""


def missing() -> str | None:
    """Why no SLURM can be started here."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)} (Debian's slurm-wlm and munge)" if absent else None


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which SLURM's commands find a cluster of this one machine."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run(["bash", ROOT / "tests/slurm.sh", "start", folder], check=True, timeout=60)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "JAX_NUM_CPU_DEVICES": "1", "PATH": path}
    finally:
        subprocess.run(["bash", ROOT / "tests/slurm.sh", "stop", folder], check=True)


def submit(slurm: dict[str, str], output: Path, options: list[str], arguments: list[Any], timeout: float) -> str:
    """Runs launch/slurm.sbatch to its end, requeued or not, and returns what the job printed."""
    command = ["sbatch", "--parsable", "--output", output, *options, "launch/slurm.sbatch", *arguments]
    job = subprocess.run(
        list(map(str, command)), env=slurm, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    until = time.monotonic() + timeout
    while subprocess.run(["squeue", "-h", "-j", job], env=slurm, capture_output=True, check=False).stdout:
        assert time.monotonic() < until, f"job {job} did not end: {output.read_text()}"
        time.sleep(1)
    return "".join(path.read_text() for path in output.parent.glob(output.name.replace("%a", "*")))


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_slurm_stops_a_job_before_its_time_and_queues_it_again(slurm, tmp_path):
    """One minute at a time, until it is finished: bitwise as if never stopped."""
    experiment = tmp_path / "small.py"
    experiment.write_text(SMALL.replace("STEPS", "6000"))
    options = ["--nodes", "1", "--ntasks-per-node", "2", "--time", "1", "--signal", "USR1@10"]
    told = submit(slurm, tmp_path / "told", options, [tmp_path / "run", experiment], 400)
    assert "stopped at step" in told
    assert "exit code 75; the job is queued again" in told
    assert "going on from the checkpoint at step" in told
    assert told.count("test accuracy") == 1
    described = json.loads((tmp_path / "run/config.json").read_text())["devices"]
    assert (described["processes"], described["count"]) == (2, 2)

    whole = ["bash", ROOT / "launch/local.sh", "2", experiment, "--workdir", tmp_path / "whole"]
    subprocess.run(list(map(str, whole)), env=slurm, check=True, capture_output=True, timeout=300)
    assert result(tmp_path / "run")["params_sha256"] == result(tmp_path / "whole")["params_sha256"]
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_slurm_array_is_a_run_for_each_seed(slurm, tmp_path):
    experiment = tmp_path / "small.py"
    experiment.write_text(SMALL.replace("STEPS", "5"))
    options = ["--array", "3-4", "--nodes", "1", "--ntasks-per-node", "1"]
    told = submit(slurm, tmp_path / "told-%a", options, [tmp_path / "runs", experiment], 120)
    assert told.count("test accuracy") == 2, told
    assert [result(tmp_path / f"runs/seed-{seed}")["seed"] for seed in (3, 4)] == [3, 4]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="not installed: mpirun (Debian's openmpi-bin)")
def test_open_mpi_starts_a_run_of_two_processes(tmp_path):
    experiment = tmp_path / "small.py"
    experiment.write_text(SMALL.replace("STEPS", "5"))
    command = ["mpirun", "-n", "2", "--allow-run-as-root", "--oversubscribe", sys.executable, "launch/train.py"]
    ended = subprocess.run(
        list(map(str, [*command, experiment, "--workdir", tmp_path / "run"])),
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("test accuracy") == 1
    assert json.loads((tmp_path / "run/config.json").read_text())["devices"]["processes"] == 2


def closed(schema: Any) -> Any:
    """A Kubernetes schema with all fields that it does not name forbidden, as ``kubectl --validate=strict`` does."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if schema.get("type") == "object" and "properties" in schema and "additionalProperties" not in schema:
        schema["additionalProperties"] = schema.get("x-kubernetes-preserve-unknown-fields", False)
    return schema


def test_kubernetes_takes_the_job():
    import jsonschema
    import yaml

    path = Path(os.environ.get("FLAXMNIST_SCHEMAS", "nowhere"), "jobset.x-k8s.io_jobsets.yaml")
    if not path.exists():
        pytest.skip("FLAXMNIST_SCHEMAS names no folder with the definition of JobSet")
    definition = yaml.safe_load(path.read_text())
    job, *others = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    (version,) = (each for each in definition["spec"]["versions"] if job["apiVersion"].endswith("/" + each["name"]))
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}
    validator = jsonschema.Draft202012Validator(closed(schema))
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(job)] == []
    assert job["kind"] == definition["spec"]["names"]["kind"]

    replicated = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = replicated["template"]["spec"]
    (container,) = pod["containers"]
    assert replicated["parallelism"] == replicated["completions"]
    assert all((ROOT / name).exists() for name in container["command"][1:])
    assert "--resume" in container["args"]
    named = {each["kind"]: each["metadata"]["name"] for each in others}
    assert named["ServiceAccount"] == pod["serviceAccountName"]
    assert named["PersistentVolumeClaim"] == pod["volumes"][0]["persistentVolumeClaim"]["claimName"]

    container["comand"] = ["typo"]
    assert list(validator.iter_errors(job)), "the schema notices a field that is none"


def test_a_rehearsal_for_a_tpu_pod(tmp_path):
    """Nothing is called but git's and gcloud's names, and the experiment's options arrive as they were given."""
    script = ["bash", ROOT / "launch/tpu_pod.sh", "--dry-run", "pod", "us-central2-b"]
    options = ["experiments/record.py", "--workdir", "/mnt/my runs/a", "--train.steps", "10"]
    ended = subprocess.run(script + options, capture_output=True, text=True, check=True)
    archive, copy, install, train = (line for line in ended.stdout.replace("\\n", " ").splitlines())
    assert archive.startswith("git archive")
    assert copy.startswith("gcloud compute tpus tpu-vm scp")
    assert "--worker all" in install
    assert "[tpu]" in install
    shown = subprocess.run(
        ["bash", "-c", f"gcloud() {{ printf '%s' \"${{@: -1}}\"; }}; {train}"], capture_output=True, text=True
    )
    assert shown.stdout == (
        "cd flaxmnist && .venv/bin/python launch/train.py experiments/record.py --workdir /mnt/my\\ runs/a "
        "--train.steps 10 --resume"
    )


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_pod.sh", ["pod"], "usage: launch/tpu_pod.sh"),
        ("tpu_pod.sh", ["pod", "zone", "experiments/record.py"], "give a --workdir that all workers see"),
        ("local.sh", ["experiments/record.py"], "usage: launch/local.sh"),
        ("slurm.sbatch", [], "usage: sbatch"),
    ],
)
def test_a_launcher_called_wrongly_exits_with_2(script, arguments, message):
    ended = subprocess.run(["bash", ROOT / "launch" / script, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
