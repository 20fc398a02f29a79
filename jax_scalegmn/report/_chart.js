// A number in three digits.
function shortNumber(v) {
  if (v === 0) return "0";
  const size = Math.abs(v);
  return size < 1e-3 || size >= 1e5 ? v.toExponential(1).replace("e+", "e") : String(Number(v.toPrecision(3)));
}

// A line chart with bands. The legend shows every line's value at the pointer and picks one line out where many overlap.
// spec: {x, y: labels, log, height, margin: {left, right}, follow, series: [{label, color, dash, x, y, low, high}]}.
// With `follow` the owner moves the cursor by `at`; without, the chart takes the pointer and the arrow keys itself.
function lineChart(figure, spec) {
  const NS = "http://www.w3.org/2000/svg";
  const margin = { left: 56, right: 24, ...spec.margin };
  const top = 12, bottom = 26, height = spec.height || 260;
  const dashes = ["", "7 3", "2 3", "9 3 2 3"];
  const hidden = new Set();
  let series = spec.series, cursor = null, lit = null, scale = null;

  const node = (name, attributes, text) => {
    const made = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const color = (line, i) => line.color || `var(--series-${i % 9})`;
  const dash = (line, i) => line.dash ?? dashes[Math.floor(i / 9) % 4 || (i % 9 > 5 ? 1 : 0)];
  const svg = node("svg", { role: spec.follow ? "img" : "slider", "aria-label": `${spec.y} over ${spec.x}` });
  const legend = document.createElement("ul");
  legend.className = "sg-legend";
  figure.classList.add("sg-chart");
  figure.replaceChildren(legend, svg);
  if (!spec.follow) svg.setAttribute("tabindex", 0);

  function ticks(low, high, log) {
    if (log) {
      const decades = [];
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) decades.push(10 ** e);
      const inside = decades.filter((v) => v >= low * 0.999 && v <= high * 1.001);
      return inside.length > 1 ? inside : [low, high];
    }
    const rough = (high - low) / 4 || 1, unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 2.5, 5, 10].find((m) => m * unit >= rough * 0.999);
    const values = [];
    for (let v = Math.ceil(low / step - 1e-9); v * step <= high + step * 1e-9; v++) values.push(v * step);
    return values;
  }

  // The value of a line at any x, linear between its points.
  function value(line, x) {
    let i = line.x.findIndex((v) => v >= x - 1e-12);
    if (i < 0) return line.y[line.y.length - 1];
    if (i === 0) return line.y[0];
    const share = (x - line.x[i - 1]) / (line.x[i] - line.x[i - 1]);
    return line.y[i - 1] + share * (line.y[i] - line.y[i - 1]);
  }

  function draw() {
    const width = Math.max(240, figure.clientWidth);
    const shown = series.filter((line, i) => !hidden.has(i) && line.y.length);
    const usable = (v) => Number.isFinite(v) && (!spec.log || v > 0);
    const xs = series.flatMap((line) => [...line.x]);
    const ys = shown.flatMap((line) => [...line.y, ...(line.low || []), ...(line.high || [])]).filter(usable);
    let [x0, x1] = [Math.min(...xs), Math.max(...xs)], [y0, y1] = [Math.min(...ys), Math.max(...ys)];
    if (!ys.length) [y0, y1] = spec.log ? [0.1, 1] : [0, 1];
    if (!spec.log) { y0 = Math.min(0, y0); y1 = y1 > y0 ? y1 + 0.06 * (y1 - y0) : y0 + 1; }
    if (spec.log && y0 === y1) [y0, y1] = [y0 / 2, y1 * 2];
    if (!(x1 > x0)) [x0, x1] = [0, 1];
    const warp = spec.log ? Math.log : (v) => v;
    scale = {
      x: (v) => margin.left + ((v - x0) / (x1 - x0)) * (width - margin.left - margin.right),
      y: (v) => top + ((warp(y1) - warp(Math.max(v, spec.log ? y0 : v))) / (warp(y1) - warp(y0))) * (height - top - bottom),
      back: (px) => x0 + ((px - margin.left) / (width - margin.left - margin.right)) * (x1 - x0),
      x0, x1,
    };
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    svg.replaceChildren();
    for (const v of ticks(y0, y1, spec.log)) {
      svg.append(node("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: scale.y(v), y2: scale.y(v) }));
      svg.append(node("text", { x: margin.left - 8, y: scale.y(v) + 4, "text-anchor": "end" }, shortNumber(v)));
    }
    for (const v of ticks(x0, x1, false)) {
      svg.append(node("line", { class: "axis", x1: scale.x(v), x2: scale.x(v), y1: height - bottom, y2: height - bottom + 4 }));
      svg.append(node("text", { x: scale.x(v), y: height - bottom + 17, "text-anchor": "middle" }, shortNumber(v)));
    }
    svg.append(node("line", { class: "axis", x1: margin.left, x2: width - margin.right, y1: height - bottom, y2: height - bottom }));
    svg.append(node("text", { x: width - margin.right + 10, y: height - bottom + 4, "font-style": "italic" }, spec.x));
    svg.append(node("text", { x: 0, y: 0, "text-anchor": "middle", transform: `translate(12 ${(top + height - bottom) / 2}) rotate(-90)` }, spec.y));
    series.forEach((line, i) => {
      if (hidden.has(i) || !line.y.length) return;
      const mark = lit === null ? "" : lit === i ? " lit" : " dim";
      if (line.low) {
        const there = [...line.x].map((x, k) => `${scale.x(x)},${scale.y(line.high[k])}`);
        const back = [...line.x].map((x, k) => `${scale.x(x)},${scale.y(line.low[k])}`).reverse();
        svg.append(node("polygon", { class: "band" + mark, fill: color(line, i), points: [...there, ...back].join(" ") }));
      }
      const points = [...line.x].map((x, k) => `${scale.x(x)},${scale.y(line.y[k])}`).join(" ");
      svg.append(node("polyline", { class: "curve" + mark, stroke: color(line, i), "stroke-dasharray": dash(line, i), points }));
    });
    drawCursor();
  }

  function drawCursor() {
    svg.querySelectorAll(".cursor, circle").forEach((old) => old.remove());
    if (cursor !== null) {
      svg.append(node("line", { class: "cursor", x1: scale.x(cursor), x2: scale.x(cursor), y1: top, y2: height - bottom }));
    }
    series.forEach((line, i) => {
      const output = legend.querySelectorAll("output")[i];
      const known = cursor !== null && line.y.length;
      if (output) output.textContent = known ? shortNumber(value(line, cursor)) : "";
      if (known && !hidden.has(i) && (lit === null || lit === i)) {
        svg.append(node("circle", { cx: scale.x(cursor), cy: scale.y(value(line, cursor)), r: 4, fill: color(line, i), stroke: "var(--panel)", "stroke-width": 1.5 }));
      }
    });
    if (!spec.follow && cursor !== null) {
      const told = series.filter((line, i) => !hidden.has(i)).map((line) => `${line.label} ${shortNumber(value(line, cursor))}`);
      svg.setAttribute("aria-valuemin", scale.x0);
      svg.setAttribute("aria-valuemax", scale.x1);
      svg.setAttribute("aria-valuenow", cursor);
      svg.setAttribute("aria-valuetext", `${spec.x} ${shortNumber(cursor)}: ${told.join(", ")}`);
    }
  }

  function drawLegend() {
    legend.replaceChildren(...series.map((line, i) => {
      const item = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", !hidden.has(i));
      button.title = "Show or hide this line";
      const swatch = node("svg", { viewBox: "0 0 28 10", "aria-hidden": "true" });
      swatch.append(node("line", { x1: 1, x2: 27, y1: 5, y2: 5, stroke: color(line, i), "stroke-width": 3, "stroke-dasharray": dash(line, i) }));
      const label = document.createElement("span");
      label.textContent = line.label;
      button.append(swatch, label, document.createElement("output"));
      button.addEventListener("click", () => {
        if (!hidden.delete(i)) hidden.add(i);
        button.setAttribute("aria-pressed", !hidden.has(i));
        draw();
      });
      const pick = (index) => () => { lit = index; draw(); };
      button.addEventListener("pointerenter", pick(i));
      button.addEventListener("pointerleave", pick(null));
      button.addEventListener("focus", pick(i));
      button.addEventListener("blur", pick(null));
      item.append(button);
      return item;
    }));
  }

  function at(x) {
    cursor = x;
    if (scale) drawCursor();
  }

  const toPointer = (event) => {
    const box = svg.getBoundingClientRect();
    const x = scale.back(event.clientX - box.left);
    return Math.min(scale.x1, Math.max(scale.x0, x));
  };
  svg.addEventListener("pointermove", (event) => (spec.hover ? spec.hover(toPointer(event)) : at(toPointer(event))));
  svg.addEventListener("pointerleave", () => (spec.hover ? spec.hover(null) : at(null)));
  svg.addEventListener("click", (event) => spec.pick && spec.pick(toPointer(event)));
  if (!spec.follow) {
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, Home: -1e9, End: 1e9 }[event.key];
      if (!step) return;
      event.preventDefault();
      const grid = [...series[0].x], here = cursor === null ? -1 : grid.findIndex((x) => x >= cursor - 1e-12);
      at(grid[Math.min(grid.length - 1, Math.max(0, here + step))]);
    });
  }
  drawLegend();
  new ResizeObserver(draw).observe(figure);
  draw();
  return {
    at,
    update(next) { series = next; drawLegend(); draw(); },
  };
}
