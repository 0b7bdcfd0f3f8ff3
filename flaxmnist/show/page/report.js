// A click on a column's title sorts the table by it: numbers by value, largest first, everything else as text.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const value = (row) => row.cells[column].textContent, number = (row) => Number(value(row).replaceAll(",", ""));
    const filled = [...body.rows].filter(value), blank = [...body.rows].filter((row) => !value(row));
    const numeric = filled.every((row) => !Number.isNaN(number(row)));
    const before = head.getAttribute("aria-sort");
    const order = (before || (numeric ? "ascending" : "descending")) === "ascending" ? "descending" : "ascending";
    const rows = filled.sort((a, b) => (numeric ? number(a) - number(b) : value(a).localeCompare(value(b))));
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    body.append(...(order === "ascending" ? rows : rows.reverse()), ...blank);
  }));
}

// Curves that show values under the pointer. Dragging zooms, a double click shows everything again. Without this script,
// the picture is there.
const WIDTH = 700, HEIGHT = 210, LEFT = 64, RIGHT = 12, TOP = 10, BOTTOM = 40;

function svg(parent, name, attributes = {}, text = "") {
  const element = document.createElementNS(parent.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return parent.appendChild(element);
}

const short = (value) => (value === null ? "–" : Number(value.toPrecision(4)).toString());

// Round numbers that divide a range into about `count` parts.
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
}

function extent(values) {
  const finite = values.filter(Number.isFinite);
  const [low, high] = [finite.reduce((a, b) => Math.min(a, b), Infinity), finite.reduce((a, b) => Math.max(a, b), -Infinity)];
  return low < high ? [low, high] : [low - 0.5, low + 0.5];
}

function chart(figure) {
  const { x: xTitle, panels } = JSON.parse(figure.querySelector("script").textContent);
  for (const line of panels.flatMap((panel) => [...panel.lines, ...panel.bands])) if (line.colour === "#000000") line.colour = "var(--ink)";
  const lines = panels.flatMap((panel) => panel.lines), places = [...new Set(lines.flatMap((line) => line.x))];
  const height = panels.length * (HEIGHT + TOP) + BOTTOM, whole = extent(places);
  const image = figure.querySelector("img");
  image.insertAdjacentHTML("afterend", `<svg viewBox="0 0 ${WIDTH} ${height}" role="img"></svg>`);
  const root = image.nextElementSibling;
  root.setAttribute("aria-label", image.alt);
  const values = document.createElement("p");
  values.className = "values";
  root.after(values);
  image.remove();
  let [low, high] = whole, start = null;
  const toX = (value) => LEFT + ((value - low) / (high - low)) * (WIDTH - LEFT - RIGHT);
  const fromX = (place) => low + ((place - LEFT) / (WIDTH - LEFT - RIGHT)) * (high - low);

  function show() {
    root.replaceChildren();
    panels.forEach((panel, number) => {
      const top = TOP + number * (HEIGHT + TOP), scale = panel.log ? Math.log10 : (value) => value;
      const seen = [...panel.lines, ...panel.bands].flatMap(({ x, y }) => y.filter((_, i) => x[i] >= low && x[i] <= high && (!panel.log || y[i] > 0)));
      let [bottom, best] = extent(seen.filter((value) => value !== null).map(scale));
      [bottom, best] = [bottom - 0.04 * (best - bottom), best + 0.04 * (best - bottom)];
      const toY = (value) => top + HEIGHT - ((scale(value) - bottom) / (best - bottom)) * HEIGHT;
      svg(root, "rect", { x: LEFT, y: top, width: WIDTH - LEFT - RIGHT, height: HEIGHT, class: "frame" });
      const box = svg(root, "svg", { x: LEFT, y: top, width: WIDTH - LEFT - RIGHT, height: HEIGHT, viewBox: `${LEFT} ${top} ${WIDTH - LEFT - RIGHT} ${HEIGHT}` });
      for (const tick of ticks(bottom, best, 4)) {
        const y = top + HEIGHT - ((tick - bottom) / (best - bottom)) * HEIGHT;
        svg(root, "line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y, class: "grid" });
        svg(root, "text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, short(panel.log ? 10 ** tick : tick));
      }
      for (const tick of ticks(low, high, 6)) {
        svg(root, "line", { x1: toX(tick), x2: toX(tick), y1: top, y2: top + HEIGHT, class: "grid" });
        if (number === panels.length - 1) {
          svg(root, "text", { x: toX(tick), y: top + HEIGHT + 16, "text-anchor": "middle" }, short(tick));
        }
      }
      const middle = top + HEIGHT / 2;
      svg(root, "text", { x: 12, y: middle, transform: `rotate(-90 12 ${middle})`, "text-anchor": "middle" }, panel.y);
      for (const { x, y, colour } of panel.bands) {
        const points = x.map((value, i) => `${toX(value).toFixed(1)},${toY(y[i]).toFixed(1)}`).join(" ");
        svg(box, "polygon", { points, fill: colour, opacity: 0.2 });
      }
      for (const { x, y, colour, dashes } of panel.lines) {
        const points = x.map((value, i) => [value, y[i]]).filter(([, value]) => value !== null && (!panel.log || value > 0));
        const path = points.map(([a, b]) => `${toX(a).toFixed(1)},${toY(b).toFixed(1)}`).join(" ");
        svg(box, "polyline", { points: path, stroke: colour, "stroke-dasharray": dashes });
        const near = points.filter(([a]) => a >= low && a <= high);
        if (near.length <= 40) near.forEach(([a, b]) => svg(box, "circle", { cx: toX(a), cy: toY(b), r: 2.5, fill: colour }));
      }
    });
    svg(root, "text", { x: (LEFT + WIDTH - RIGHT) / 2, y: height - 6, "text-anchor": "middle" }, xTitle);
    pointer = svg(root, "rect", { y: TOP, height: height - BOTTOM - TOP, width: 1, x: -9, class: "pointer" });
    describe(null);
  }
  let pointer = null;

  // List the values at a place, or the names of the curves.
  function describe(place) {
    values.replaceChildren();
    panels.forEach((panel) => panel.lines.forEach(({ name, x, y, colour, dashes }) => {
      const index = place === null ? -1 : x.indexOf(place), item = document.createElement("span");
      if (place !== null ? index < 0 : !name || panel !== panels[0]) return;
      item.style.setProperty("--colour", colour);
      item.classList.toggle("dashed", dashes !== "");
      item.textContent = place === null ? name : `${name} ${panel.y} ${short(y[index])}`.trim();
      values.append(item);
    }));
    if (place !== null) values.prepend(`${xTitle} ${short(place)}: `);
  }

  const inside = (event) => {
    const box = root.getBoundingClientRect();
    return Math.min(WIDTH - RIGHT, Math.max(LEFT, ((event.clientX - box.left) * WIDTH) / box.width));
  };
  root.addEventListener("pointermove", (event) => {
    const at = inside(event), value = fromX(at);
    if (start !== null) {
      pointer.setAttribute("x", Math.min(start, at));
      pointer.setAttribute("width", Math.abs(at - start) || 1);
      return;
    }
    const nearest = places.reduce((best, place) => (Math.abs(place - value) < Math.abs(best - value) ? place : best));
    pointer.setAttribute("x", toX(nearest));
    describe(nearest);
  });
  root.addEventListener("pointerleave", () => { if (start === null) { pointer.setAttribute("x", -9); describe(null); } });
  root.addEventListener("pointerdown", (event) => { if (event.button === 0) start = inside(event); });
  addEventListener("pointercancel", () => { start = null; });
  addEventListener("pointerup", (event) => {
    if (start === null) return;
    const [first, last] = [start, inside(event)].sort((a, b) => a - b).map(fromX);
    start = null;
    const some = places.some((place) => place >= first && place <= last);
    if (some && toX(last) - toX(first) > 8) [low, high] = [first, last];
    show();
  });
  root.addEventListener("dblclick", () => { [low, high] = whole; show(); });
  show();
}

document.querySelectorAll("figure:has(script)").forEach(chart);
