"""Print hashes of what the experiments train, to compare two commits: diff the outputs.

    python tests/bits.py [CHECKOUT] [--data-dir DIR] > bits.txt

Run the first 300 steps of each experiment and one small sweep with the code in CHECKOUT (default: this one). Print the
SHA-256 of the parameters and of all losses and accuracies of each run, and parameters and test loss of each trial.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--data-dir")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    data = ["--data-dir", arguments.data_dir] if arguments.data_dir else []

    def launch(script: str, *options: str) -> None:
        command = [sys.executable, str(checkout / "launch" / script), *options, *data]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(checkout)})

    with tempfile.TemporaryDirectory() as folder:
        for experiment in sorted((checkout / "experiments").glob("*.py")):
            run = Path(folder, experiment.stem)
            options = ["--train.steps", "300", "--train.checkpoint-every", "150", "--log-level", "error"]
            launch("train.py", str(experiment), "--workdir", str(run), *options)
            result = json.loads((run / "result.json").read_text())
            records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            common = [[record.get(name) for name in ("step", "split", "loss", "accuracy")] for record in records]
            print(
                experiment.stem, result["params_sha256"], hashlib.sha256(repr(common).encode()).hexdigest(), flush=True
            )
        swept = Path(folder, "sweep")
        options = [
            "--seeds",
            "2",
            "--over",
            "optimizer.learning-rate=0.3,0.5",
            "--share-order",
            "--workdir",
            str(swept),
        ]
        launch("sweep.py", str(checkout / "experiments/softmax_beginners.py"), *options)
        for member in json.loads((swept / "result.json").read_text())["members"]:
            print("sweep", member["seed"], member["fields"], member["params_sha256"], member["test_loss"])


if __name__ == "__main__":
    main()
