// Ink in the form of MNIST's digits, as data/photos.py makes it. An image is {width, height, data}, row by row.

const BOX = 20, DIGIT = 28, CENTRE = 14, MIN_PEN = 2; // pixels: those of MNIST, and the finest pen in the box

// Return an image in which strokes `pen` pixels wide are as wide as the finest pen in the box, if they are finer.
function withMinimalPen(ink, pen) {
  const box = bounds(ink);
  return box ? thicken(ink, roundEven((MIN_PEN * Math.max(box.width, box.height)) / BOX - pen)) : ink;
}

// Return an image in which each pixel spreads over `extra` more pixels, down and to the right.
function thicken(image, extra) {
  if (extra <= 0) return image;
  const width = image.width + extra, height = image.height + extra;
  const rows = new Float32Array(width * image.height), data = new Float32Array(width * height);
  for (let i = 0; i < image.data.length; i++) {
    const place = Math.floor(i / image.width) * width + (i % image.width), value = image.data[i];
    for (let k = place; value && k <= place + extra; k++) rows[k] = Math.max(rows[k], value);
  }
  for (let i = 0; i < rows.length; i++) {
    for (let k = i; rows[i] && k <= i + extra * width; k += width) data[k] = Math.max(data[k], rows[i]);
  }
  return { width, height, data };
}

// Halves are rounded to an even number, as in Python.
function roundEven(value) {
  const rounded = Math.round(value);
  return Math.abs(value % 1) === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}

function bounds({ width: w, height: h, data }) {
  let [left, right, top, bottom] = [w, -1, h, -1];
  for (let i = 0; i < data.length; i++) {
    if (data[i] > 0) {
      const x = i % w, y = (i - x) / w;
      left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = Math.max(bottom, y);
    }
  }
  return right < 0 ? null : { left, top, width: right - left + 1, height: bottom - top + 1 };
}

function crop({ width: w, data }, box) {
  const part = new Float32Array(box.width * box.height);
  for (let y = 0; y < box.height; y++) {
    const start = (box.top + y) * w + box.left;
    part.set(data.subarray(start, start + box.width), y * box.width);
  }
  return { width: box.width, height: box.height, data: part };
}

function cubic(x) {
  x = Math.abs(x);
  return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

// For each output pixel along an axis: its first input pixel and the weights, with a filter widened when scaling down.
function filters(from, to) {
  const scale = from / to, widened = Math.max(1, scale);
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale, first = Math.max(0, Math.floor(centre - 2 * widened + 0.5));
    const last = Math.min(from, Math.floor(centre + 2 * widened + 0.5));
    const weights = Array.from({ length: last - first }, (_, k) => cubic((first + k - centre + 0.5) / widened));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
}

const byte = (value) => Math.min(255, Math.max(0, Math.round(value)));

function resize(image, w, h) {
  const across = filters(image.width, w), down = filters(image.height, h);
  const rows = new Float32Array(w * image.height), data = new Float32Array(w * h);
  for (let y = 0; y < image.height; y++) {
    across.forEach(({ first, weights }, x) => {
      rows[y * w + x] = byte(weights.reduce((sum, weight, k) => sum + weight * image.data[y * image.width + first + k], 0));
    });
  }
  down.forEach(({ first, weights }, y) => {
    for (let x = 0; x < w; x++) {
      data[y * w + x] = byte(weights.reduce((sum, weight, k) => sum + weight * rows[(first + k) * w + x], 0));
    }
  });
  return { width: w, height: h, data };
}

// Return ink in the form of MNIST's digits: in a box of 20×20 pixels, its centre of mass in the middle of 28×28.
function toDigit(ink) {
  const digit = { width: DIGIT, height: DIGIT, data: new Float32Array(DIGIT * DIGIT) }, box = bounds(ink);
  if (!box) return digit;
  const scale = BOX / Math.max(box.width, box.height);
  const [w, h] = [box.width, box.height].map((side) => Math.max(1, roundEven(side * scale)));
  const small = resize(crop(ink, box), w, h);
  const mass = small.data.reduce((a, b) => a + b, 0);
  const mean = (index) => small.data.reduce((sum, value, i) => sum + value * index(i), 0) / mass;
  const place = (centre, size) => Math.min(DIGIT - size, Math.max(0, roundEven(CENTRE - centre)));
  const left = place(mean((i) => i % w), w), top = place(mean((i) => Math.floor(i / w)), h);
  small.data.forEach((value, i) => { digit.data[(top + Math.floor(i / w)) * DIGIT + left + (i % w)] = value; });
  return digit;
}
