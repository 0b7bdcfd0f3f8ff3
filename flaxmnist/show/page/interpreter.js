// Computes a model from its operations, which have the names and the meaning of JAX's primitives.
// An array is {shape, data}: data is a Float32Array in row-major order. Truth values are 1 and 0.

const count = (shape) => shape.reduce((a, b) => a * b, 1);

function strides(shape) {
  const result = new Array(shape.length);
  for (let axis = shape.length - 1, step = 1; axis >= 0; step *= shape[axis--]) result[axis] = step;
  return result;
}

const empty = (shape) => ({ shape, data: new Float32Array(count(shape)) });

// Call visit(i, j) for each index i of an array of this shape in order, where j starts at `start` and moves by `steps`.
function walk(shape, steps, start, visit) {
  const index = new Array(shape.length).fill(0), total = count(shape);
  for (let i = 0, j = start; i < total; i++) {
    visit(i, j);
    for (let axis = shape.length - 1; axis >= 0; axis--) {
      j += steps[axis];
      if (++index[axis] < shape[axis]) break;
      j -= steps[axis] * shape[axis];
      index[axis] = 0;
    }
  }
}

// Return an array of this shape whose values are read from `x` with the given steps.
function gather(x, shape, steps, start = 0) {
  const y = empty(shape);
  walk(shape, steps, start, (i, j) => { y.data[i] = x.data[j]; });
  return y;
}

// Return `x` broadcast to a shape, as in NumPy.
function broadcast(x, shape) {
  if (x.data.length === count(shape)) return x;
  const missing = shape.length - x.shape.length, steps = strides(x.shape);
  return gather(x, shape, shape.map((_, axis) => (axis < missing || x.shape[axis - missing] === 1 ? 0 : steps[axis - missing])));
}

function erf(x) { // Abramowitz and Stegun 7.1.26, accurate to 1.5e-7
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - series * Math.exp(-x * x));
}

const UNARY = {
  neg: (x) => -x, abs: Math.abs, sign: Math.sign, square: (x) => x * x, sqrt: Math.sqrt, rsqrt: (x) => 1 / Math.sqrt(x),
  exp: Math.exp, expm1: Math.expm1, log: Math.log, log1p: Math.log1p, tanh: Math.tanh,
  logistic: (x) => 1 / (1 + Math.exp(-x)), erf, erfc: (x) => 1 - erf(x),
};

const BINARY = {
  add: (x, y) => x + y, sub: (x, y) => x - y, mul: (x, y) => x * y, div: (x, y) => x / y, max: Math.max, min: Math.min,
  pow: Math.pow, eq: (x, y) => x === y, ne: (x, y) => x !== y, gt: (x, y) => x > y, ge: (x, y) => x >= y,
  lt: (x, y) => x < y, le: (x, y) => x <= y,
};

const TYPES = { bool: (x) => x !== 0 }; // to all others but those with a point, numbers are truncated

const REDUCTIONS = {
  reduce_sum: [0, (x, y) => x + y], reduce_max: [-Infinity, Math.max], reduce_min: [Infinity, Math.min],
};

function elementwise(shape, f, x, y) {
  const result = empty(shape), data = result.data, a = broadcast(x, shape).data;
  if (y.data.length === 1) {
    const value = y.data[0];
    for (let i = 0; i < data.length; i++) data[i] = f(a[i], value);
  } else {
    const b = broadcast(y, shape).data;
    for (let i = 0; i < data.length; i++) data[i] = f(a[i], b[i]);
  }
  return result;
}

function reduce(x, shape, axes, [initial, f]) {
  const kept = strides(shape);
  let next = 0;
  const steps = x.shape.map((_, axis) => (axes.includes(axis) ? 0 : kept[next++]));
  const sums = new Float64Array(count(shape)).fill(initial);
  walk(x.shape, steps, 0, (i, j) => { sums[j] = f(sums[j], x.data[i]); });
  return { shape, data: Float32Array.from(sums) };
}

// A sum over the contracted axes, at each index of the batch axes.
function product(x, y, shape, { contracted, batch }) {
  const [rows, columns] = [x, y].map((z, side) => {
    const free = z.shape.map((_, axis) => axis).filter((axis) => !batch[side].includes(axis) && !contracted[side].includes(axis));
    const order = side ? [...batch[1], ...contracted[1], ...free] : [...batch[0], ...free, ...contracted[0]];
    const steps = strides(z.shape), sorted = order.every((axis, place) => axis === place);
    const sizes = order.map((axis) => z.shape[axis]);
    return { data: sorted ? z.data : gather(z, sizes, order.map((axis) => steps[axis])).data, free: count(free.map((axis) => z.shape[axis])) };
  });
  const batches = count(batch[0].map((axis) => x.shape[axis])), inner = count(contracted[0].map((axis) => x.shape[axis]));
  const result = empty(shape), width = columns.free;
  for (let b = 0; b < batches; b++) {
    for (let row = 0; row < rows.free; row++) {
      const out = result.data.subarray((b * rows.free + row) * width, (b * rows.free + row + 1) * width);
      for (let k = 0; k < inner; k++) {
        const value = rows.data[(b * rows.free + row) * inner + k];
        if (value === 0) continue;
        const start = (b * inner + k) * width;
        for (let column = 0; column < width; column++) out[column] += value * columns.data[start + column];
      }
    }
  }
  return result;
}

// Call visit(output pixel, input pixel, kernel pixel) for each pixel of each window that lies in the image.
function windows([, height, width], [, rows, columns], [kernelRows, kernelColumns], { strides, padding }, visit) {
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      for (let i = 0; i < kernelRows; i++) {
        const y = row * strides[0] - padding[0][0] + i;
        if (y < 0 || y >= height) continue;
        for (let j = 0; j < kernelColumns; j++) {
          const x = column * strides[1] - padding[1][0] + j;
          if (x >= 0 && x < width) visit(row * columns + column, y * width + x, i * kernelColumns + j);
        }
      }
    }
  }
}

function convolution(x, kernel, shape, options) {
  const result = empty(shape), out = result.data, input = x.data, weights = kernel.data;
  const channels = x.shape[3], outputs = shape[3], perGroup = kernel.shape[2], outputsPerGroup = outputs / options.groups;
  windows(x.shape, shape, kernel.shape, options, (to, from, tap) => {
    for (let channel = 0; channel < channels; channel++) {
      const value = input[from * channels + channel];
      if (value === 0) continue;
      const group = Math.floor(channel / perGroup), first = group * outputsPerGroup;
      const start = (tap * perGroup + (channel % perGroup)) * outputs;
      const target = to * outputs;
      for (let output = first; output < first + outputsPerGroup; output++) {
        out[target + output] += value * weights[start + output];
      }
    }
  });
  return result;
}

function pooling(x, shape, options, [initial, f]) {
  const result = empty(shape), channels = shape[3];
  result.data.fill(initial);
  windows(x.shape, shape, options.window, options, (to, from) => {
    for (let channel = 0; channel < channels; channel++) {
      const place = to * channels + channel;
      result.data[place] = f(result.data[place], x.data[from * channels + channel]);
    }
  });
  return result;
}

function concatenate(arrays, shape, axis) {
  const result = empty(shape), steps = strides(shape);
  let start = 0;
  for (const x of arrays) {
    walk(x.shape, steps, start * steps[axis], (i, j) => { result.data[j] = x.data[i]; });
    start += x.shape[axis];
  }
  return result;
}

function withPadding(x, value, shape, padding) {
  const result = empty(shape), steps = strides(shape);
  result.data.fill(value.data[0]);
  // Negative padding cuts.
  const from = padding.map(([low]) => Math.max(0, -low)), to = padding.map(([low]) => Math.max(0, low));
  const kept = x.shape.map((size, axis) => size + Math.min(0, padding[axis][0]) + Math.min(0, padding[axis][1]));
  const source = strides(x.shape), dot = (a, b) => a.reduce((sum, value, axis) => sum + value * b[axis], 0);
  const part = gather(x, kept, source, dot(from, source));
  walk(kept, steps, dot(to, steps), (i, j) => { result.data[j] = part.data[i]; });
  return result;
}

function apply({ name, shape, options }, inputs) {
  const [x, y, z] = inputs;
  if (name in UNARY) return { shape, data: x.data.map(UNARY[name]) };
  if (name in BINARY) return elementwise(shape, BINARY[name], x, y);
  if (name in REDUCTIONS) return reduce(x, shape, options.axes, REDUCTIONS[name]);
  switch (name) {
    case "reshape": case "squeeze": case "expand_dims": return { shape, data: x.data };
    case "convert_element_type": return { shape, data: options.dtype.includes("float") ? x.data : x.data.map(TYPES[options.dtype] || Math.trunc) };
    case "integer_pow": return { shape, data: x.data.map((value) => value ** options.power) };
    case "select_n": {
      const [condition, no, yes] = [x, y, z].map((array) => broadcast(array, shape).data);
      return { shape, data: no.map((value, i) => (condition[i] ? yes[i] : value)) };
    }
    case "transpose": {
      const steps = strides(x.shape);
      return gather(x, shape, options.permutation.map((axis) => steps[axis]));
    }
    case "broadcast_in_dim": {
      const steps = strides(x.shape), of = (axis) => options.axes.indexOf(axis);
      return gather(x, shape, shape.map((_, axis) => (of(axis) < 0 || x.shape[of(axis)] === 1 ? 0 : steps[of(axis)])));
    }
    case "slice": {
      const steps = strides(x.shape), start = options.starts.reduce((sum, first, axis) => sum + first * steps[axis], 0);
      return gather(x, shape, steps.map((step, axis) => step * options.strides[axis]), start);
    }
    case "concatenate": return concatenate(inputs, shape, options.axis);
    case "stack": {
      const part = shape.map((size, axis) => (axis === options.axis ? 1 : size));
      return concatenate(inputs.map(({ data }) => ({ shape: part, data })), shape, options.axis);
    }
    case "pad": return withPadding(x, y, shape, options.padding);
    case "dot_general": return product(x, y, shape, options);
    case "conv_general_dilated": return convolution(x, y, shape, options);
    case "reduce_window_max": return pooling(x, shape, options, REDUCTIONS.reduce_max);
    case "reduce_window_sum": return pooling(x, shape, options, REDUCTIONS.reduce_sum);
  }
  throw new Error(`unknown operation ${name}`);
}

// Return the value of each node for one image, a Float32Array of grey levels from 0 to 255. The last one is the logits.
function run(nodes, image) {
  const values = [];
  for (const node of nodes) {
    if (node.data) values.push(node); // a constant
    else if (node.name === "images") values.push({ shape: node.shape, data: image });
    else values.push(apply(node, node.inputs.map((index) => values[index])));
  }
  return values;
}

// Return the nodes of a model whose constants are stored one after another in `weights`, a Float32Array.
function withConstants(nodes, weights) {
  let start = 0;
  return nodes.map((node) => {
    if (node.name) return node;
    const size = count(node.shape);
    return { shape: node.shape, data: weights.subarray(start, (start += size)) };
  });
}

function softmax(logits) {
  const largest = Math.max(...logits), exponentials = Array.from(logits, (value) => Math.exp(value - largest));
  const sum = exponentials.reduce((a, b) => a + b, 0);
  return exponentials.map((value) => value / sum);
}
