// The ink in a photograph or another picture of a digit.

// Return the ink of a picture: what differs from its background, up to the grey level of most of the stroke.
function separate(pixels, w, h) {
  const grey = Float32Array.from({ length: w * h }, (_, i) =>
    0.299 * pixels[4 * i] + 0.587 * pixels[4 * i + 1] + 0.114 * pixels[4 * i + 2]);
  const paper = background(grey, w, h), difference = grey.map((value, i) => value - paper[i]);
  const sign = Math.sign(difference.reduce((sum, value) => sum + value ** 3, 0));
  const ink = difference.map((value) => Math.max(0, sign * value));
  const level = ink.reduce((most, value) => Math.max(most, value), 1) * 0.4;
  const strong = ink.filter((value) => value > level), full = strong.length ? median(strong) : 255;
  const data = ink.map((value) => (value < level / 2 ? 0 : Math.min(255, (255 * value) / full)));
  return withMinimalPen({ width: w, height: h, data }, penOf(ink, level, w));
}

// Return the mean width of strokes from their area and the length of their edges, which steps make 4/π times as long.
function penOf(ink, level, w) {
  const inside = (i) => ink[i] > level;
  let area = 0, edges = 0;
  for (let i = 0; i < ink.length; i++) {
    area += inside(i);
    edges += (i % w > 0 && inside(i) !== inside(i - 1)) + (i >= w && inside(i) !== inside(i - w));
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
