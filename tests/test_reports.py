"""Reports on a run, several runs or a sweep contain every applicable picture, in one self-contained file."""

import base64
import json
import re
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
from browser import browse, evaluate, needs_browser
from conftest import fit_on_one, main, small
from PIL import Image

import flaxmnist as fm
from flaxmnist.devices import evaluation
from flaxmnist.errors import Stopped, UserError
from flaxmnist.show import canvas, reports
from flaxmnist.sweeps.plan import Experiment
from flaxmnist.sweeps.runner import run_sweep

# The pictures for a CNN, in the order of the page.
PICTURES = [
    "history", "batch_costs", "step_metrics", "confusion", "mistakes", "calibration", "weights", "feature_maps",
    "examples", "digit", "values",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """A folder with a softmax and a CNN run."""
    folder = tmp_path_factory.mktemp("runs")
    fit_on_one(small(steps=10), digits, folder / "softmax")
    fit_on_one(small("cnn", steps=4), digits, folder / "cnn")
    return folder


@pytest.fixture
def copy(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


def test_a_run_has_every_applicable_picture(copy, capsys):
    folder, page = copy / "cnn", copy / "cnn/report.html"
    assert main("report")([str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [*(f"{folder}/plots/{name}.png" for name in PICTURES), str(page)]
    text = page.read_text()
    embedded = [base64.b64decode(match) for match in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert embedded == [(folder / f"plots/{name}.png").read_bytes() for name in PICTURES]
    assert text.count("<img") == text.count('alt="') == len(PICTURES)
    result = json.loads((folder / "result.json").read_text())
    assert f"test accuracy            {result['test_accuracy']:.4f} of 360 images" in text
    assert "optimizer.learning_rate = 0.1" in text
    # It refers to no other file, neither on disk nor on the network.
    assert not re.search(r"https?://|url\(|@import", text)
    assert set(re.findall(r'(?:src|href)="(data:|#)?', text)) == {"data:", "#"}


def test_only_a_cnn_has_feature_maps(runs, digits):
    run = fm.load_run(runs / "softmax")
    assert [picture.name for picture in reports.model_pictures(run, digits)] == ["weights"]


def test_batches_have_curves_only_if_an_epoch_has_at_least_two(few):
    """The 70 images make five batches per epoch."""
    names = {}
    for log_every in (2, 3):
        run = fit_on_one(small(log_every=log_every), few)
        names[log_every] = [picture.name for picture in reports.training_pictures(run)]
    assert names == {2: ["history", "batch_costs", "step_metrics"], 3: ["history", "step_metrics"]}


def test_an_unfinished_run_is_evaluated_on_validation_images(digits, tmp_path):
    """The test images are used only once, at the end of a run."""
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        fit_on_one(small(steps=20), digits, tmp_path, stop=stop)
    sections = {section.title: section.text for section in reports.run_sections(tmp_path, fm.load_run(tmp_path), None)}
    assert "Predictions on the validation images" in sections
    assert re.search(r"steps +\d+ of 20: not finished", sections["Result"])
    assert sum(int(line.split()[-1]) for line in sections["Scores of each class"].splitlines()[1:]) == 180


def test_several_runs_are_compared(copy):
    page, pictures = reports.write([copy / "cnn", copy / "softmax"])
    assert page == copy / "report.html"
    assert [path.name for path in pictures] == ["history.png", "accuracies.png"]
    text = page.read_text()
    assert "<td>model.kind</td><td>CNN</td><td>Softmax</td>" in text
    assert "data.name" not in text, "only fields that differ"
    results = {name: json.loads((copy / name / "result.json").read_text()) for name in ("cnn", "softmax")}
    for name, result in results.items():
        assert f"<td>{name}</td><td>{result['test_accuracy']:.4g}</td><td>{result['test_loss']:.4g}</td>" in text


def test_a_sweep(few, tmp_path):
    config = small(steps=3)
    settings = [{"optimizer.learning_rate": rate} for rate in (0.1, 1.0)]
    run_sweep([Experiment(config, few)], range(2), settings, workdir=tmp_path, devices=2)
    page, pictures = reports.write([tmp_path])
    assert [path.stem for path in pictures] == ["curves", "distribution", "optimizer.learning_rate"]
    assert "small optimizer.learning_rate=0.1" in page.read_text()
    result = json.loads((tmp_path / "result.json").read_text())
    for name in ("members", "groups", "over", "experiments"):
        (tmp_path / "result.json").write_text(json.dumps({key: value for key, value in result.items() if key != name}))
        with pytest.raises(UserError, match=f"result.json is damaged: the JSON has no field {name!r}"):
            reports.write([tmp_path])
    with pytest.raises(UserError, match="is a sweep: pass only this folder"):
        reports.write([tmp_path, tmp_path / "run"])


def test_an_unfinished_sweep_has_a_report_on_its_finished_trials(few, tmp_path):
    run_sweep([Experiment(small(steps=3), few)], range(3), [{}], workdir=tmp_path, devices=1)
    finished = reports.write([tmp_path])[0].read_text()
    (tmp_path / "result.json").unlink()
    unfinished = reports.write([tmp_path])[0].read_text()
    assert unfinished.replace(" Not finished: --resume continues.", "") == finished != unfinished
    for part in (tmp_path / "parts").iterdir():
        part.unlink()
    assert "no run is finished" in reports.write([tmp_path])[0].read_text()


@pytest.mark.slow
def test_a_run_without_checkpoint_has_a_report_on_its_records(copy):
    """By default the first checkpoint is saved at the end."""
    shutil.rmtree(copy / "cnn/checkpoints")
    (copy / "cnn/result.json").unlink()
    page, pictures = reports.write([copy / "cnn"])
    assert [path.stem for path in pictures] == [name for name in PICTURES if name in WITHOUT_MODEL]
    assert "Step 4 of 4, seed 0. Not finished" in page.read_text()
    (copy / "cnn/metrics.jsonl").unlink()
    assert "Step 0 of 4, seed 0. Not finished" in reports.write([copy / "cnn"])[0].read_text()
    reports.write([copy / "cnn", copy / "softmax"])


WITHOUT_MODEL = {"history", "batch_costs", "step_metrics", "examples", "digit", "values"}


@pytest.mark.slow
def test_a_watched_run_gets_a_new_page_until_it_is_finished(copy, monkeypatch, capsys):
    folder, pages = copy / "softmax", []
    (folder / "result.json").rename(copy / "result.json")

    def sleep(seconds):
        """Read the page; then a record is not written completely; then the run is finished."""
        pages.append((folder / "report.html").read_text())
        if len(pages) == 1:
            (folder / "metrics.jsonl").write_text(records + '{"step"')
        else:
            (folder / "metrics.jsonl").write_text(records)
            (copy / "result.json").rename(folder / "result.json")

    records = (folder / "metrics.jsonl").read_text()
    monkeypatch.setattr("time.sleep", sleep)
    assert main("report")([str(folder), "--watch", "5"]) == 0
    printed = capsys.readouterr()
    assert "metrics.jsonl is damaged" in printed.err
    paths = printed.out.splitlines()
    assert len(set(paths)) == len(paths) and str(folder / "report.html") in paths
    pages.append((folder / "report.html").read_text())
    assert ["location.reload(), 5000" in page for page in pages] == [True, True, False]
    assert ["Not finished" in page for page in pages] == [True, True, False]
    assert main("report")([str(folder), "--watch", "0"]) == 2


def test_names_are_escaped(runs, tmp_path):
    run = fm.load_run(runs / "softmax")
    sections = reports.comparison_sections({"<i>": run, "other": replace(run, result=None)})
    page, _ = reports.save("<b>", "<i>", sections, tmp_path)
    assert not re.search("<[bi]>", page.read_text())


def test_user_errors(copy):
    with pytest.raises(UserError, match="nowhere is not a run folder"):
        reports.write([copy / "nowhere"])
    with pytest.raises(UserError, match="a run is listed twice"):
        reports.write([copy / "cnn", copy / "cnn"])
    (copy / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*: Not a directory; pass another --out"):
        reports.write([copy / "softmax"], copy / "file")
    shutil.copytree(copy / "cnn", copy / "elsewhere/cnn")
    with pytest.raises(UserError, match="the runs are in several folders: pass --out"):
        reports.write([copy / "softmax", copy / "elsewhere/cnn"])
    assert not (copy / "report.html").exists()
    config = json.loads((copy / "softmax/config.json").read_text())
    config["data"]["source"] = "elsewhere"
    (copy / "softmax/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="was trained on elsewhere"):
        reports.write([copy / "softmax"])


def test_a_result_of_another_checkpoint_is_ignored(digits, tmp_path):
    """If the newest checkpoint is lost, the report is about the one before."""
    fit_on_one(small(steps=4, checkpoint_every=2), digits, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/4")
    facts = reports.facts(fm.load_run(tmp_path))
    assert facts["steps"] == "2 of 4: not finished" and "test accuracy" not in facts


def test_a_diverged_model_has_only_a_confusion_matrix(runs, digits):
    logits = np.full((360, 10), np.nan)
    scores = evaluation.score_logits(logits, *digits.test)
    assert [picture.name for picture in reports.prediction_pictures(scores)] == ["confusion"]


CHECK = """<script>
window.addEventListener("load", () => {
  const pictures = [...document.querySelectorAll("figure > img, figure > svg")];
  const drawn = pictures.filter(({ naturalWidth, children }) => naturalWidth > 100 || children.length > 9);
  document.title = `${drawn.length} of ${pictures.length} drawn`;
});
</script>"""


@pytest.mark.slow
@needs_browser
def test_a_browser_displays_every_picture(copy):
    page, pictures = reports.write([copy / "cnn"])
    checked = copy / "checked.html"
    checked.write_text(page.read_text() + CHECK)
    assert f"<title>{len(pictures)} of {len(pictures)} drawn</title>" in browse(checked, "--dump-dom")
    browse(checked, f"--screenshot={copy}/page.png", "--window-size=1000,6000", "--hide-scrollbars")
    with Image.open(copy / "page.png") as screenshot:
        assert screenshot.size == (1000, 6000)
        bands = [screenshot.crop((0, top, 1000, top + 1000)).getcolors(2) for top in range(0, 5000, 1000)]
    assert bands == [None] * 5, "no band of the page has a single colour"


@pytest.mark.slow
@needs_browser
def test_a_table_is_sorted_by_a_click(tmp_path):
    rows = [("run", "loss"), ("b", "0.5"), ("a", "12"), ("c", "3e-3"), ("d", "")]
    page, _ = reports.save("runs", "", [reports.Section("Results", table=rows)], tmp_path)
    names = "[...document.querySelectorAll('tbody tr')].map((row) => row.cells[0].textContent).join('')"
    clicks = "const buttons = document.querySelectorAll('th button');"
    script = f"{clicks} return [0, 0, 1, 1].map((column) => {{ buttons[column].click(); return {names}; }});"
    assert evaluate(page, script) == ["abcd", "dcba", "abcd", "cbad"]


@pytest.mark.slow
@needs_browser
def test_curves_show_their_values_and_can_be_zoomed(tmp_path):
    fig, axes = canvas.plot(xlabel="step", ylabel="cost")
    axes.plot([0, 10, 20, 30], [4, 3, np.nan, 1], label="<b>training")
    picture = reports.Picture("cost", "A curve.", fig, curves=True)
    page, _ = reports.save("run", "", [reports.Section("Training", pictures=[picture])], tmp_path)
    script = """
        const root = document.querySelector("figure > svg"), values = document.querySelector(".values");
        const fire = (type, part) => {
            const { left, width } = root.getBoundingClientRect(), place = 64 + part * (700 - 64 - 12);
            root.dispatchEvent(new PointerEvent(type, { clientX: left + place * width / 700, bubbles: true }));
        };
        const texts = [values.textContent];
        for (const part of [0.02, 0.3, 0.7]) { fire("pointermove", part); texts.push(values.textContent); }
        const points = () => root.querySelectorAll("circle").length, shown = [points()];
        fire("pointerdown", 0.2); fire("pointerup", 0.5); shown.push(points());
        root.dispatchEvent(new MouseEvent("dblclick")); shown.push(points());
        return [texts, shown];
    """
    texts, shown = evaluate(page, script)
    costs = {0: "4", 10: "3", 20: "–"}
    assert texts == ["<b>training", *(f"step {step}: <b>training cost {cost}" for step, cost in costs.items())]
    assert shown == [3, 1, 3]
