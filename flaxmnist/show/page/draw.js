const page = JSON.parse(document.getElementById("model").textContent);
const decode = (text) => new Float32Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
const members = page.members.map((weights) => withConstants(page.nodes, decode(weights)));
const [height, width, channels] = page.shape;
const element = (id) => document.getElementById(id);
const pad = element("pad"), SIDE = pad.width;

// A drawing: strokes are lists of points, with the width of the pen; a picture is ink from an image file.
let strokes = [], picture = null, answer = null, explained = 0;

// --- The image that the model sees ---------------------------------------------------------------------------------

function drawStrokes(context, colour) {
  Object.assign(context, { lineCap: "round", lineJoin: "round", strokeStyle: colour });
  for (const { points, pen } of strokes) {
    context.lineWidth = pen;
    context.beginPath();
    context.moveTo(...points[0]);
    for (const point of points.length > 1 ? points.slice(1) : points) context.lineTo(...point);
    context.stroke();
  }
}

const canvas = (w, h) => Object.assign(document.createElement("canvas"), { width: w, height: h });
const scratch = canvas(1, 1).getContext("2d", { willReadFrequently: true });

// Return the ink at each pixel of a rectangle that holds all strokes, from 0 to 255. Fine strokes are thickened.
function inkOf() {
  if (picture || !strokes.length) return picture || { width: 0, height: 0, data: new Float32Array(0) };
  return withMinimalPen(cover(), Math.min(...strokes.map((stroke) => stroke.pen)));
}

// Return how much of each pixel of the pad the strokes cover, around them.
function cover() {
  const points = strokes.flatMap((stroke) => stroke.points), margin = 1 + Math.max(...strokes.map((stroke) => stroke.pen)) / 2;
  const [left, right, top, bottom] = [0, 0, 1, 1].map((axis, side) => {
    const places = points.map((point) => point[axis]);
    const place = side % 2 ? Math.ceil(Math.max(...places) + margin) : Math.floor(Math.min(...places) - margin);
    return Math.min(SIDE, Math.max(0, place));
  });
  const width = Math.max(1, right - left), height = Math.max(1, bottom - top);
  Object.assign(scratch.canvas, { width, height });
  scratch.translate(-left, -top);
  drawStrokes(scratch, "#000");
  const { data } = scratch.getImageData(0, 0, width, height), ink = new Float32Array(width * height);
  for (let i = 0; i < ink.length; i++) ink[i] = data[4 * i + 3];
  return { width, height, data: ink };
}

function modelInput() {
  if (channels === 3) return colours();
  const digit = toDigit(inkOf());
  return width === DIGIT && height === DIGIT ? digit.data : resize(digit, width, height).data;
}

// The drawing on white paper, or the picture, for models of colour images.
function colours() {
  const whole = picture ? picture.canvas : canvas(SIDE, SIDE), small = canvas(width, height).getContext("2d");
  if (!picture) paintDrawing(whole.getContext("2d"), "#fff", "#000");
  small.drawImage(whole, 0, 0, width, height);
  const { data } = small.getImageData(0, 0, width, height);
  return Float32Array.from({ length: width * height * 3 }, (_, i) => data[4 * Math.floor(i / 3) + (i % 3)]);
}

// --- The answer ----------------------------------------------------------------------------------------------------

function compute() {
  if (answer) return answer;
  const image = modelInput(), values = members.map((nodes) => run(nodes, image));
  const each = values.map((nodes) => softmax(nodes[nodes.length - 1].data));
  const probabilities = page.names.map((_, k) => each.reduce((sum, one) => sum + one[k], 0) / each.length);
  answer = { image, each, probabilities, values: values[0], best: probabilities.indexOf(Math.max(...probabilities)) };
  return answer;
}

const blank = () => !strokes.length && !picture;

const bars = page.names.map((name) => {
  const item = document.createElement("li");
  item.innerHTML = '<span class="name"></span><span class="bar"><span class="fill"></span></span><span class="percent"></span>';
  item.querySelector(".name").textContent = item.title = name;
  const dots = members.length > 1 ? members.map(() => Object.assign(document.createElement("span"), { className: "dot" })) : [];
  item.querySelector(".bar").append(...dots);
  element("bars").append(item);
  element("class").append(new Option(name));
  return { item, fill: item.querySelector(".fill"), percent: item.querySelector(".percent"), dots };
});
element("bars").classList.toggle("named", page.names.some((name) => name.length > 2));

function showAnswer() {
  const { each, probabilities, best } = compute();
  bars.forEach(({ item, fill, percent, dots }, k) => {
    const value = blank() ? 0 : 100 * probabilities[k];
    fill.style.width = `${value}%`;
    percent.textContent = blank() ? "" : `${value.toFixed(1)} %`;
    item.classList.toggle("best", !blank() && k === best);
    dots.forEach((dot, member) => { dot.hidden = blank(); dot.style.left = `${100 * each[member][k]}%`; });
  });
  const text = blank() ? "Draw something" : `${page.names[best]}, ${(100 * probabilities[best]).toFixed(0)} %`;
  if (element("prediction").textContent !== text) element("prediction").textContent = text;
}

// --- Pictures ------------------------------------------------------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)");

// Draw values as blue above 0 and orange below; the largest absolute value is opaque.
function paint(target, w, h, at, largest) {
  if (target.width !== w || target.height !== h) Object.assign(target, { width: w, height: h });
  const [above, below] = dark.matches ? [[86, 180, 233], [230, 159, 0]] : [[0, 114, 178], [213, 94, 0]];
  const context = target.getContext("2d"), pixels = context.createImageData(w, h);
  for (let i = 0; i < w * h; i++) {
    const value = at(i);
    pixels.data.set(value > 0 ? above : below, 4 * i);
    pixels.data[4 * i + 3] = 255 * Math.min(1, Math.abs(value) / (largest || 1));
  }
  context.putImageData(pixels, 0, 0);
}

function showInput() {
  const { image } = compute(), target = element("input");
  Object.assign(target, { width, height });
  const context = target.getContext("2d"), pixels = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const grey = [0, 1, 2].map((channel) => image[i * channels + (channel % channels)]);
    pixels.data.set([...grey, 255], 4 * i);
  }
  context.putImageData(pixels, 0, 0);
}

const layers = page.layers.map((index) => {
  const shape = page.nodes[index].shape, box = document.createElement("div"), target = document.createElement("canvas");
  const title = document.createElement("h3"), maps = shape.length === 4;
  title.textContent = maps ? `${shape[3]} feature maps of ${shape[1]}×${shape[2]}` : `${count(shape)} values`;
  target.setAttribute("role", "img");
  target.setAttribute("aria-label", title.textContent);
  box.append(title, target);
  element("layers").append(box);
  return { index, shape, target, maps };
});
element("layers-section").hidden = !layers.length;
if (members.length > 1) element("layers-title").textContent = "Inside the first network";

function showLayers() {
  const { values } = compute();
  for (const { index, shape, target, maps } of layers) {
    const { data } = values[index], largest = data.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    if (maps) {
      const [, h, w, depth] = shape, columns = Math.min(depth, Math.max(8, Math.round(Math.sqrt(2 * depth))));
      const wide = columns * (w + 1) - 1, high = Math.ceil(depth / columns) * (h + 1) - 1;
      paint(target, wide, high, (i) => {
        const x = i % wide, y = Math.floor(i / wide), column = Math.floor(x / (w + 1)), row = Math.floor(y / (h + 1));
        const inside = x % (w + 1) < w && y % (h + 1) < h, map = row * columns + column;
        return inside && map < depth ? data[((y % (h + 1)) * w + (x % (w + 1))) * depth + map] : 0;
      }, largest);
      target.style.width = `${wide * Math.max(1, Math.min(6, Math.floor(1000 / wide)))}px`;
    } else {
      const columns = Math.min(data.length, 64);
      paint(target, columns, Math.ceil(data.length / columns), (i) => data[i] || 0, largest);
      target.style.width = `${columns * 12}px`;
    }
  }
}

// --- Evidence: which pixels speak for a class ----------------------------------------------------------------------

const logOdds = (logits, k) => {
  const others = Array.from(logits).filter((_, i) => i !== k), largest = Math.max(...others);
  return logits[k] - largest - Math.log(others.reduce((sum, value) => sum + Math.exp(value - largest), 0));
};

// The weights of a linear model are drawn behind the digit; otherwise blocks of pixels are erased one at a time.
function* evidence(k) {
  const { image } = compute(), result = new Float32Array(width * height);
  if (page.weights) {
    const weights = decode(page.weights).subarray(k * image.length, (k + 1) * image.length);
    for (let i = 0; i < image.length; i++) result[Math.floor(i / channels)] += weights[i] * (0.25 + image[i] / 255);
    yield result;
    return;
  }
  const odds = (pixels) => members.reduce((sum, nodes) => sum + logOdds(run(nodes, pixels).pop().data, k), 0) / members.length;
  const all = odds(image), side = Math.max(2, Math.round(width / 14)), paper = channels === 3 ? 255 : 0;
  for (let top = 0; top < height; top += side) {
    for (let left = 0; left < width; left += side) {
      const erased = image.slice(), places = [];
      for (let y = top; y < Math.min(height, top + side); y++) {
        for (let x = left; x < Math.min(width, left + side); x++) places.push(y * width + x);
      }
      for (const place of places) erased.fill(paper, place * channels, (place + 1) * channels);
      if (erased.every((value, i) => value === image[i])) continue;
      const change = all - odds(erased);
      for (const place of places) result[place] = change;
      yield result;
    }
  }
  yield result;
}

function explain() {
  const turn = ++explained, target = element("evidence"), choice = element("class");
  if (blank()) return paint(target, width, height, () => 0, 1);
  if (!choice.dataset.chosen) choice.selectedIndex = compute().best;
  const steps = evidence(choice.selectedIndex);
  (function slice() {
    if (turn !== explained) return;
    const end = performance.now() + 12;
    let step, result;
    while (!(step = steps.next()).done && performance.now() < end) result = step.value;
    result = step.value || result;
    if (result) paint(target, width, height, (i) => result[i], result.reduce((most, value) => Math.max(most, Math.abs(value)), 0));
    if (!step.done) requestAnimationFrame(slice);
  })();
}

// --- Drawing -------------------------------------------------------------------------------------------------------

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function paintDrawing(context, paper, ink) {
  context.fillStyle = paper;
  context.fillRect(0, 0, SIDE, SIDE);
  drawStrokes(context, ink);
  if (picture) context.drawImage(picture.canvas, 0, 0);
}

function showPad() {
  const context = pad.getContext("2d");
  paintDrawing(context, colour("--paper"), colour("--ink"));
  if (document.activeElement === pad && cursor.used) {
    context.fillStyle = colour("--accent");
    context.fillRect(cursor.x - 4, cursor.y - 4, 8, 8);
  }
}

let frame = 0, pause = 0;
function changed() {
  answer = null;
  explained++;
  clearTimeout(pause);
  pause = setTimeout(explain, 300);
  if (!frame) frame = requestAnimationFrame(show);
}
function show() {
  frame = 0;
  showPad(); showAnswer(); showInput(); showLayers();
}

const position = (event) => {
  const box = pad.getBoundingClientRect(), scale = SIDE / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
};
const penWidth = () => Number(element("pen").value);
const start = (point) => { picture = null; strokes.push({ points: [point], pen: penWidth() }); changed(); };
const extend = (point) => { strokes[strokes.length - 1].points.push(point); changed(); };

let pointer = null; // the one that draws
pad.addEventListener("pointerdown", (event) => {
  if (pointer !== null || event.button > 0) return;
  pointer = event.pointerId;
  try { pad.setPointerCapture(pointer); } catch { /* synthetic events have no pointer to capture */ }
  cursor.used = cursor.down = false;
  start(position(event));
});
pad.addEventListener("pointermove", (event) => {
  if (event.pointerId !== pointer) return;
  const moves = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
  (moves.length ? moves : [event]).forEach((move) => extend(position(move)));
});
for (const end of ["pointerup", "pointercancel"]) {
  pad.addEventListener(end, (event) => { if (event.pointerId === pointer) pointer = null; });
}

const cursor = { x: SIDE / 2, y: SIDE / 4, down: false, used: false };
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
pad.addEventListener("keydown", (event) => {
  if (event.key in ARROWS) {
    const [x, y] = ARROWS[event.key], step = event.shiftKey ? 32 : 12;
    Object.assign(cursor, { x: cursor.x + step * x, y: cursor.y + step * y, used: true });
    cursor.x = Math.min(SIDE, Math.max(0, cursor.x));
    cursor.y = Math.min(SIDE, Math.max(0, cursor.y));
    if (cursor.down) extend([cursor.x, cursor.y]); else showPad();
  } else if (event.key === " ") {
    cursor.used = true;
    cursor.down = !cursor.down;
    if (cursor.down) start([cursor.x, cursor.y]);
  } else return;
  event.preventDefault();
});

function lift() {
  pointer = null;
  cursor.down = false;
}
function undo() {
  lift();
  if (picture) picture = null; else strokes.pop();
  changed();
}
function clear() {
  lift();
  strokes = []; picture = null;
  delete element("class").dataset.chosen;
  changed();
}
element("undo").addEventListener("click", undo);
element("clear").addEventListener("click", clear);
element("class").addEventListener("change", () => { element("class").dataset.chosen = "yes"; explain(); });
addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z") { event.preventDefault(); undo(); }
  if (event.key === "Delete" || event.key === "Escape") clear();
});
dark.addEventListener("change", () => { show(); explain(); });

// --- Image files ---------------------------------------------------------------------------------------------------

const refuse = (message) => { element("prediction").textContent = message; };

async function open(file) {
  if (!file || !file.type.startsWith("image/")) return;
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) return refuse(`${file.name} cannot be read: save it as PNG or JPEG`);
  const scale = SIDE / Math.max(bitmap.width, bitmap.height);
  const [w, h] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const shown = canvas(w, h), context = shown.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, w, h);
  context.drawImage(bitmap, 0, 0, w, h);
  const ink = separate(context.getImageData(0, 0, w, h).data, w, h);
  if (!ink && channels === 1) return refuse(`${file.name} is blank`);
  lift();
  strokes = [];
  picture = { ...ink, canvas: shown };
  changed();
}

element("file").addEventListener("change", (event) => {
  open(event.target.files[0]);
  event.target.value = ""; // so that the same file can be opened again
});
addEventListener("paste", (event) => open([...event.clipboardData.files][0]));
for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    pad.classList.toggle("drop", name === "dragover");
    if (name === "drop") open([...event.dataTransfer.files][0]);
  });
}

// --- For scripts ---------------------------------------------------------------------------------------------------

window.flaxmnist = {
  clear,
  image: () => Array.from(compute().image),
  probabilities: () => compute().probabilities.slice(),
  logits: (image) => Array.from(run(members[0], Float32Array.from(image)).pop().data),
};
show();
explain();
