// The ink in a photograph or another picture of a digit.

const MIN_CONTRAST = 12; // grey levels by which ink must differ from its background

// Return the ink of a picture, from 0 to 255 at most of the stroke, or null if the picture is blank.
function separate(pixels, w, h) {
  const grey = Float32Array.from({ length: w * h }, (_, i) =>
    0.299 * pixels[4 * i] + 0.587 * pixels[4 * i + 1] + 0.114 * pixels[4 * i + 2]);
  const paper = background(grey, w, h), difference = grey.map((value, i) => value - paper[i]);
  const sign = Math.sign(difference.reduce((sum, value) => sum + value ** 3, 0));
  const ink = difference.map((value) => Math.max(0, sign * value)), level = Math.max(MIN_CONTRAST, otsu(ink));
  const strokes = withoutSpecks(ink, level, w, h), strong = ink.filter((_, i) => strokes[i]);
  if (!strong.length) return null;
  const full = median(strong), data = new Float32Array(w * h);
  // Each pixel beside a stroke is part of its grey rim.
  strokes.forEach((kept, i) => {
    if (kept) for (const k of [i, ...neighbours(i, w, h)]) data[k] = Math.min(255, (255 * ink[k]) / full);
  });
  return withMinimalPen({ width: w, height: h, data }, penOf(strokes, w));
}

function neighbours(i, w, h) {
  const x = i % w, y = Math.floor(i / w), result = [];
  for (let row = Math.max(0, y - 1); row <= Math.min(h - 1, y + 1); row++) {
    for (let column = Math.max(0, x - 1); column <= Math.min(w - 1, x + 1); column++) {
      if (row !== y || column !== x) result.push(row * w + column);
    }
  }
  return result;
}

// Mark the pixels above `level`, except connected ones that have less than 5 % of the largest stroke's ink.
function withoutSpecks(ink, level, w, h) {
  const seen = new Uint8Array(ink.length), parts = [];
  for (let first = 0; first < ink.length; first++) {
    if (ink[first] <= level || seen[first]) continue;
    const part = [first];
    seen[first] = 1;
    for (let next = 0; next < part.length; next++) {
      for (const k of neighbours(part[next], w, h)) if (ink[k] > level && !seen[k]) { seen[k] = 1; part.push(k); }
    }
    parts.push({ part, amount: part.reduce((sum, k) => sum + ink[k], 0) });
  }
  const least = 0.05 * parts.reduce((most, { amount }) => Math.max(most, amount), 0), kept = new Uint8Array(ink.length);
  for (const { part, amount } of parts) if (amount >= least) for (const k of part) kept[k] = 1;
  return kept;
}

// Return the threshold that best divides values from 0 on into two classes (Otsu 1979).
function otsu(values) {
  const width = (values.reduce((a, b) => Math.max(a, b), 0) || 1) / 256, counts = new Float64Array(256);
  for (const value of values) counts[Math.min(255, Math.floor(value / width))]++;
  const mean = counts.reduce((sum, n, bin) => sum + n * bin, 0) / values.length;
  let [below, moment, best, threshold] = [0, 0, -1, 0];
  counts.forEach((n, bin) => {
    below += n / values.length;
    moment += (n * bin) / values.length;
    const variance = (mean * below - moment) ** 2 / Math.max(below * (1 - below), 1e-12);
    if (variance > best) [best, threshold] = [variance, (bin + 1) * width];
  });
  return threshold;
}

// Return the mean width of strokes from their area and the length of their edges, which steps make 4/π times as long.
function penOf(strokes, w) {
  let area = 0, edges = 0;
  for (let i = 0; i < strokes.length; i++) {
    area += strokes[i];
    edges += (i % w > 0 && strokes[i] !== strokes[i - 1]) + (i >= w && strokes[i] !== strokes[i - w]);
  }
  return edges ? (2 * area * 4) / (Math.PI * edges) : 0;
}

const median = (values) => values.slice().sort()[values.length >> 1];

// Fit a polynomial of degree 2 to the border, which follows uneven lighting; leave out what differs from it, such as ink.
function background(grey, w, h) {
  const terms = (i) => {
    const x = (2 * (i % w)) / w - 1, y = (2 * Math.floor(i / w)) / h - 1;
    return [1, x, y, x * x, x * y, y * y];
  };
  const dot = (a, b) => a.reduce((sum, value, k) => sum + value * b[k], 0);
  const border = [...grey.keys()].filter((i) => i % w === 0 || i % w === w - 1 || i < w || i >= w * (h - 1));
  let coefficients = [median(Float32Array.from(border, (i) => grey[i])), 0, 0, 0, 0, 0];
  for (const used of [1, 3, 3, 6, 6, 6]) { // terms: a curve, from the start, would bend to the ink
    const residuals = Float32Array.from(border, (i) => Math.abs(grey[i] - dot(terms(i), coefficients)));
    const limit = Math.max(2, 4.5 * median(residuals)), kept = border.filter((_, k) => residuals[k] <= limit);
    const points = kept.map((i) => [...terms(i).slice(0, used), grey[i]]);
    coefficients = [...leastSquares(points, used), 0, 0, 0, 0, 0].slice(0, 6);
  }
  return grey.map((_, i) => dot(terms(i), coefficients));
}

// Return the coefficients that fit the last value of each point to the others: the normal equations, by elimination.
function leastSquares(points, n) {
  const rows = Array.from({ length: n }, (_, i) => Array.from({ length: n + 1 }, (_, j) =>
    points.reduce((sum, point) => sum + point[i] * point[j], i === j ? 1e-6 : 0)));
  for (let i = 0; i < n; i++) {
    for (let k = 0; k < n; k++) {
      const factor = rows[k][i] / rows[i][i];
      if (k !== i) for (let j = i; j <= n; j++) rows[k][j] -= factor * rows[i][j];
    }
  }
  return rows.map((row, i) => row[n] / row[i]);
}
