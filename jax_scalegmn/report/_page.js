// The "Same function?" page: two networks of one architecture, moved along their orbits by hand, and what lies between.
//
// An element is {permutation: {layer: [..]}, scale: {layer: [..]}}: neuron i of the moved network is neuron
// permutation[i] of the given one, times scale[i], as in Python's symmetry.act. All arithmetic is in float64.

// --- the symmetry group --------------------------------------------------------------------------------------------

function identityElement(layers) {
  const element = { permutation: {}, scale: {} };
  for (const { name, width } of layers) {
    element.permutation[name] = Array.from({ length: width }, (_, i) => i);
    element.scale[name] = new Array(width).fill(1);
  }
  return element;
}

// The element that does `right` first.
function composeElements(layers, left, right) {
  const element = { permutation: {}, scale: {} };
  for (const { name } of layers) {
    const order = left.permutation[name];
    element.permutation[name] = order.map((i) => right.permutation[name][i]);
    element.scale[name] = order.map((i, k) => left.scale[name][k] * right.scale[name][i]);
  }
  return element;
}

function inverseElement(layers, element) {
  const inverse = { permutation: {}, scale: {} };
  for (const { name } of layers) {
    inverse.permutation[name] = inverseOrder(element.permutation[name]);
    inverse.scale[name] = inverse.permutation[name].map((i) => 1 / element.scale[name][i]);
  }
  return inverse;
}

function inverseOrder(order) {
  const inverse = new Array(order.length);
  order.forEach((from, to) => { inverse[from] = to; });
  return inverse;
}

// For one axis: which entry of the given array is at each place of the moved one, and the factor it gets.
function axisMoves(axis, size, element) {
  const source = Array.from({ length: size }, (_, i) => i), factor = new Array(size).fill(1);
  if (typeof axis === "object" && axis.layer in element.permutation) {
    const order = element.permutation[axis.layer], scale = element.scale[axis.layer];
    for (let i = 0; i < size; i++) {
      const neuron = i % order.length;
      source[i] = i - neuron + order[neuron];
      const q = axis.unsigned ? Math.abs(scale[neuron]) : scale[neuron];
      factor[i] = axis.power === 0 ? 1 : axis.power > 0 ? q : 1 / q;
    }
  }
  return { source, factor };
}

function actOn(arrays, values, element) {
  return arrays.map(({ axes, shape }, number) => {
    const moves = axes.map((axis, i) => axisMoves(axis, shape[i], element));
    const moved = new Float64Array(values[number].length);
    const place = new Array(shape.length).fill(0);
    for (let flat = 0; flat < moved.length; flat++) {
      let from = 0, factor = 1;
      for (let i = 0; i < shape.length; i++) {
        from = from * shape[i] + moves[i].source[place[i]];
        factor *= moves[i].factor[place[i]];
      }
      moved[flat] = factor * values[number][from];
      for (let i = shape.length - 1; i >= 0 && ++place[i] === shape[i]; i--) place[i] = 0;
    }
    return moved;
  });
}

// A small generator with a seed, so that the same clicks lead to the same page.
function seededRandom(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function randomPermutation(layers, random) {
  const element = identityElement(layers);
  for (const { name, width } of layers) {
    const order = element.permutation[name];
    for (let i = width - 1; i > 0; i--) {
      const j = Math.floor(random() * (i + 1));
      [order[i], order[j]] = [order[j], order[i]];
    }
  }
  return element;
}

function randomScales(layers, scaling, random) {
  const element = identityElement(layers);
  const normal = () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  for (const layer of layers) {
    if (layer.scaling !== scaling && layer.scaling !== "nonzero") continue;
    element.scale[layer.name] = element.scale[layer.name].map(() =>
      scaling === "sign" ? (random() < 0.5 ? -1 : 1) : Math.exp(normal()));
  }
  return element;
}

// --- the network's function ----------------------------------------------------------------------------------------

// By the series of Kummer's function, which has no differences that cancel.
function erf(x) {
  if (Math.abs(x) > 5) return Math.sign(x);
  let term = x, sum = x;
  for (let n = 1; Math.abs(term) > 1e-16 * Math.abs(sum); n++) sum += term *= 2 * x * x / (2 * n + 1);
  return 2 / Math.sqrt(Math.PI) * Math.exp(-x * x) * sum;
}

// In the words of jax.nn: gelu is the approximation by tanh.
const ACTIVATIONS = {
  sine: Math.sin,
  tanh: Math.tanh,
  relu: (x) => Math.max(x, 0),
  leaky_relu: (x, slope) => (x >= 0 ? x : slope * x),
  abs: (x) => Math.abs(x),
  relu6: (x) => Math.min(Math.max(x, 0), 6),
  elu: (x) => (x > 0 ? x : Math.expm1(x)),
  gelu: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  gelu_exact: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  silu: (x) => x / (1 + Math.exp(-x)),
  sigmoid: (x) => 1 / (1 + Math.exp(-x)),
  softplus: (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x))),
};

// (column, row) of every pixel in [-1, 1], in float32 as network.coordinates has them.
function pixelCoordinates([height, width]) {
  const along = (i, n) => Math.fround(n === 1 ? -1 : -1 + (2 * i) / (n - 1));
  const places = new Float64Array(2 * height * width);
  for (let i = 0; i < height * width; i++) {
    places[2 * i] = along(i % width, width);
    places[2 * i + 1] = along(Math.floor(i / width), height);
  }
  return places;
}

// act(x @ kernel + bias) + offset, layer by layer, on many inputs at once.
function evaluate(layers, arrays, values, inputs, count) {
  let x = inputs;
  for (const { kernel, bias, activation, offset } of layers) {
    const [rows, columns] = arrays[kernel].shape, weights = values[kernel];
    const y = new Float64Array(count * columns);
    const act = activation && ACTIVATIONS[activation.name];
    const { frequency, slope } = activation || { frequency: 1 };
    for (let p = 0; p < count; p++) {
      const start = p * columns;
      if (bias !== null) y.set(values[bias], start);
      for (let i = 0; i < rows; i++) {
        const input = x[p * rows + i];
        for (let j = 0; j < columns; j++) y[start + j] += input * weights[i * columns + j];
      }
      for (let j = start; j < start + columns; j++) y[j] = (act ? act(frequency * y[j], slope) : y[j]) + offset;
    }
    x = y;
  }
  return x;
}

function mix(a, b, t) {
  return a.map((values, i) => values.map((x, k) => (1 - t) * x + t * b[i][k]));
}

function meanSquare(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += (a[i] - b[i]) ** 2;
  return sum / a.length;
}

// --- reading the data ----------------------------------------------------------------------------------------------

function decodeBytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer;
}

function decodeFloats(text) {
  return Float64Array.from(new Float32Array(decodeBytes(text)));
}

// How an array is laid out as a picture: rows are the neurons that it reads, columns those that it feeds, and the
// spatial axes of a convolution lie inside each cell.
function tableLayout({ axes, shape }) {
  const neurons = axes.flatMap((axis, i) => (typeof axis === "object" ? [i] : []));
  const spatial = axes.flatMap((axis, i) => (typeof axis === "object" ? [] : [i]));
  const column = neurons.length ? neurons[neurons.length - 1] : null, row = neurons.length > 1 ? neurons[0] : null;
  const inner = spatial.slice(-1), outer = spatial.slice(0, -1);
  const size = (parts) => parts.reduce((product, i) => product * shape[i], 1);
  const tile = { rows: size(outer), columns: size(inner) };
  const rows = row === null ? 1 : shape[row], columns = column === null ? 1 : shape[column];
  return { row, column, rows, columns, tile, outer, inner };
}

// --- the page ------------------------------------------------------------------------------------------------------

// Draws the page into `root`. `hooks.onTime(t)` hears of the slider. Returns what notebooks and tests ask of it.
function sameFunction(root, data, hooks = {}) {
  const names = data.names, hidden = data.layers.filter((layer) => layer.scaling !== "fixed");
  const random = seededRandom(1);
  const identity = identityElement(hidden);
  const state = { moves: identity, t: 0.5, neuron: null, cell: null, progress: 1, from: identity };

  // The networks: `given` as it came, `target`, and `aligned` = act(data.element, given), as in Python. Large networks
  // are not stored; of them the page has pictures and numbers of two places, as given and aligned.
  const given = data.stored ? data.arrays.map((array) => decodeFloats(array.params)) : null;
  const target = data.stored ? data.arrays.map((array) => decodeFloats(array.target)) : null;
  const aligned = data.stored ? actOn(data.arrays, given, data.element) : null;
  let current = given;

  const size = data.stored && target.reduce((sum, values) => sum + values.reduce((s, x) => s + x * x, 0), 0);
  function distance() {
    if (!data.stored) return state.moves === data.element ? data.distance.aligned : data.distance.given;
    let sum = 0;
    current.forEach((values, i) => values.forEach((x, k) => { sum += (x - target[i][k]) ** 2; }));
    return sum / (size || 1);
  }

  // --- images and losses

  const image = data.image;
  const places = image && pixelCoordinates(image.size);
  const truth = image && image.truth && decodeFloats(image.truth);
  const draw = (values, at = places) => evaluate(image.layers, data.arrays, values, at, at.length / 2);
  const ends = image && [draw(given), draw(target)];
  if (image) {
    // Black and white: 0 and 1, unless the networks draw on another scale.
    const [low, high] = ends.flatMap((x) => [...x]).reduce(([l, h], x) => [Math.min(l, x), Math.max(h, x)], [Infinity, -Infinity]);
    image.range = (low > -0.25 && high < 1.25) || high === low ? [0, 1] : [low, high];
  }
  const between = (which, t) => mix(which === "naive" ? current : aligned, target, t);
  function loss(which, t) {
    const drawn = draw(between(which, t));
    return meanSquare(drawn, truth || ends[0].map((x, i) => (1 - t) * x + t * ends[1][i]));
  }
  const change = () => (image ? draw(current).reduce((most, x, i) => Math.max(most, Math.abs(x - ends[0][i])), 0) : null);

  // --- building blocks

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (value !== null) element.setAttribute(key, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }
  const heading = (text) => make("h2", {}, text);
  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

  // --- the head

  const count = (scaling) => hidden.filter((layer) => !scaling || layer.scaling === scaling || layer.scaling === "nonzero").reduce((n, layer) => n + layer.width, 0);
  const group = [`permutations of ${count()} hidden neurons in ${hidden.length} ${hidden.length === 1 ? "layer" : "layers"}`];
  if (count("sign")) group.push(`signs of ${count("sign")}`);
  if (count("positive")) group.push(`positive scales of ${count("positive")}`);
  const head = make("header", {},
    make("h1", {}, data.title),
    make("p", { class: "sg-lead" },
      make("b", {}, data.arch), ` · ${data.parameters.toLocaleString("en")} parameters · its symmetries: `,
      hidden.length ? group.join(", ") : "none", ". They change a network’s weights and leave its function as it is. Move ",
      make("b", {}, names.params), " through them, then align it with ", make("b", {}, names.target), "."));

  // --- the buttons

  const status = make("p", { class: "sg-status", role: "status", "aria-live": "polite" });
  const distanceNow = make("dd", {}), changeNow = make("dd", {});
  const button = (label, title, act, kind = "") => make("button", { type: "button", title, class: kind, onclick: act }, label);
  const buttons = [];
  if (data.stored && hidden.length) {
    const kind = count("sign") && count("positive") ? "" : "wide";
    buttons.push(button("Shuffle neurons", "A random permutation of every hidden layer", () =>
      step("Shuffled", randomPermutation(hidden, random)), "wide"));
    if (count("sign")) {
      buttons.push(button("Flip signs", "Random signs of the neurons before odd and even activations", () =>
        step("Signs flipped", randomScales(hidden, "sign", random)), kind));
    }
    if (count("positive")) {
      buttons.push(button("Rescale", "Random positive factors of the neurons around homogeneous activations", () =>
        step("Rescaled", randomScales(hidden, "positive", random)), kind));
    }
  }
  if (hidden.length) {
    // The element that aligns the network as given is known from Python. After moves M the one that is left to do is
    // element M^-1, and (element M^-1) M = element: acting by `element` on the given network is that product without a
    // rounding, so that the result is Python's alignment exactly.
    buttons.push(button("Align", `Bring ${names.params} next to ${names.target}`, () => moveTo("Aligned", data.element), "main"));
    buttons.push(button("Reset", `${names.params} as it was given`, () => moveTo("Reset", identity)));
  }
  const neuronPanel = make("div", { class: "sg-neuron" });
  const panel = make("aside", { class: "sg-card", "aria-label": `Move ${names.params}` },
    make("h3", {}, `Move ${names.params}`),
    make("div", { class: "sg-buttons", role: "group", "aria-label": `Moves of ${names.params}` }, ...buttons),
    make("dl", {},
      make("dt", { title: "Squared distance of the weights, in units of the target’s squared norm" }, "Distance of weights"), distanceNow,
      make("dt", {}, "… once aligned"), make("dd", {}, shortNumber(data.distance.aligned)),
      ...(image ? [make("dt", { title: "The largest difference of a pixel from the network as given" }, "Image changed by"), changeNow] : [])),
    status, neuronPanel);

  function step(word, element) {
    moveTo(word, composeElements(hidden, element, state.moves));
  }

  function moveTo(word, moves) {
    const before = distance();
    state.from = state.moves;
    state.moves = moves;
    if (data.stored) current = moves === data.element ? aligned : actOn(data.arrays, given, moves);
    const same = image ? `, the image by ${shortNumber(change())}` : "";
    status.textContent = `${word}: distance ${shortNumber(before)} → ${shortNumber(distance())}${same}.`;
    showNumbers();
    slide();
    if (image) { drawImages(); drawFilm("naive"); }
    if (image && !data.curve) trace("naive");
  }

  function showNumbers() {
    distanceNow.textContent = shortNumber(distance());
    if (image) changeNow.textContent = shortNumber(change());
    showNeuron();
  }

  // --- partners

  // Where the target's neurons have their partners in the network as it is now, and the scale that is left to apply.
  const left = () => composeElements(hidden, data.element, inverseElement(hidden, state.moves));

  // The picked neuron as {layer, target: its place in the target, params: its partner's place now, scale}.
  function picked() {
    if (!state.neuron) return null;
    const { layer, side, index } = state.neuron, rest = left(), order = rest.permutation[layer];
    const place = side === "target" ? index : order.indexOf(index);
    return { layer, target: place, params: order[place], scale: rest.scale[layer][place], share: data.shares[layer][place] };
  }

  const describeScale = (scale, layer) => {
    if (["positive", "nonzero"].includes(hidden.find(({ name }) => name === layer).scaling)) return `scale ${shortNumber(scale)}`;
    return scale < 0 ? "opposite sign" : "same sign";
  };
  const describeNeuron = (neuron) =>
    `${neuron.layer}, neuron ${neuron.target} of ${names.target}: partner ${neuron.params} of ${names.params}, ` +
    `${describeScale(neuron.scale, neuron.layer)}, ${percent(neuron.share)} of the remaining distance`;

  function showNeuron() {
    const neuron = picked();
    if (!neuron) {
      neuronPanel.replaceChildren(make("h3", {}, "Neuron"),
        make("p", {}, "Point at a weight or a bar, or go to a row of bars with Tab and use the arrow keys."));
      return;
    }
    const cell = state.cell;
    neuronPanel.replaceChildren(make("h3", {}, `Neuron of ${neuron.layer}`), make("dl", {},
      make("dt", {}, names.target), make("dd", {}, String(neuron.target)),
      make("dt", {}, `partner in ${names.params}`), make("dd", {}, String(neuron.params)),
      make("dt", {}, "to align it"), make("dd", {}, describeScale(neuron.scale, neuron.layer)),
      make("dt", {}, "share of the distance"), make("dd", {}, percent(neuron.share)),
      ...(cell ? [make("dt", {}, cell.label), make("dd", {}, shortNumber(cell.value))] : [])));
  }

  // --- heat maps

  const probe = make("span", { hidden: "" });
  const colorOf = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  };
  let palette = null;
  function readPalette() {
    const [negative, zero, positive] = ["negative", "zero", "positive"].map(colorOf);
    const css = (rgb) => `rgb(${rgb.map(Math.round).join(",")})`;
    const ramp = Array.from({ length: 255 }, (_, i) => {
      const end = i < 127 ? negative : positive, share = Math.abs(i - 127) / 127;
      return zero.map((z, k) => z + share * (end[k] - z));
    });
    palette = { ramp, css: ramp.map(css), quiet: css(colorOf("quiet")), line: css(colorOf("strong-line")), accent: css(colorOf("accent")), flip: css(colorOf("positive")) };
  }
  const level = (value, range) => Math.round(127 + 127 * Math.max(-1, Math.min(1, value / (range || 1))));

  const MOST_WIDE = 256, MOST_HIGH = 336;
  const ratio = () => Math.min(3, window.devicePixelRatio || 1);

  function sharpCanvas(width, height, attributes) {
    const canvas = make("canvas", { ...attributes, width: Math.round(width * ratio()), height: Math.round(height * ratio()) });
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.sizes = [width, height];
    return canvas;
  }
  function brush(canvas) {
    const context = canvas.getContext("2d");
    context.setTransform(ratio(), 0, 0, ratio(), 0, 0);
    context.clearRect(0, 0, ...canvas.sizes);
    return context;
  }

  // Where each neuron of a layer is drawn while it slides from its place before a move to the one after it.
  function sliding(layer) {
    const now = state.moves.permutation[layer], back = inverseOrder(state.from.permutation[layer]);
    const eased = 1 - (1 - state.progress) ** 3;
    return now.map((k, j) => back[k] + eased * (j - back[k]));
  }

  // One array of one network. `table(r, c)` is its value, positions are those of the neurons along both axes.
  class WeightMap {
    constructor(array, number, side) {
      Object.assign(this, { array, number, side, layout: tableLayout(array) });
      const { rows, columns, tile } = this.layout;
      this.height = (data.stored ? rows * tile.rows : array.rows);
      this.width = (data.stored ? columns * tile.columns : array.columns);
      this.cell = [Math.min(18, MOST_WIDE / this.width), Math.min(12, MOST_HIGH / this.height)];
      if (tile.rows * tile.columns > 1) this.cell.fill(Math.min(...this.cell, 8));
      if (Math.min(...this.cell) > 2) this.cell = this.cell.map(Math.floor);
      this.canvas = sharpCanvas(this.width * this.cell[0], this.height * this.cell[1], {
        class: "weights", role: "img", "aria-label": `Weights of ${array.label} of ${names[side]}`,
      });
      this.canvas.addEventListener("pointermove", (event) => this.point(event));
      this.canvas.addEventListener("pointerleave", () => unpick());
    }

    level(r, c) {
      if (!data.stored) {
        const kind = this.side === "target" ? "target" : state.moves === data.element ? "aligned" : "params";
        this.bytes ??= { target: 0, params: 0, aligned: 0 };
        this.bytes[kind] ||= new Int8Array(decodeBytes(this.array[kind]));
        return 127 + this.bytes[kind][r * this.width + c];
      }
      return level(this.value(r, c), this.array.range);
    }

    value(r, c) {
      const { row, column, tile, outer, inner } = this.layout, { shape } = this.array;
      const place = new Array(shape.length).fill(0);
      if (row !== null) place[row] = Math.floor(r / tile.rows);
      if (column !== null) place[column] = Math.floor(c / tile.columns);
      let rest = r % tile.rows;
      for (const i of [...outer].reverse()) { place[i] = rest % shape[i]; rest = Math.floor(rest / shape[i]); }
      for (const i of inner) place[i] = c % tile.columns;
      const values = (this.side === "target" ? target : current)[this.number];
      return values[place.reduce((flat, p, i) => flat * shape[i] + p, 0)];
    }

    // The place of every pixel row or column: moved neurons slide.
    places(axisNumber, length, tileLength) {
      const places = Array.from({ length }, (_, i) => i), axis = axisNumber === null ? null : this.array.axes[axisNumber];
      if (this.side === "target" || state.progress === 1 || !data.stored || !axis || !(axis.layer in identity.permutation)) return places;
      const at = sliding(axis.layer), width = at.length;
      return places.map((i) => {
        const cell = Math.floor(i / tileLength), neuron = cell % width;
        return (cell - neuron + at[neuron]) * tileLength + (i % tileLength);
      });
    }

    draw() {
      const context = brush(this.canvas), [w, h] = this.cell, { row, column, tile } = this.layout;
      if (Math.min(w, h) < 2) {
        const pixels = new ImageData(this.width, this.height);
        for (let r = 0; r < this.height; r++) {
          for (let c = 0; c < this.width; c++) pixels.data.set([...palette.ramp[this.level(r, c)], 255], 4 * (r * this.width + c));
        }
        const plain = make("canvas", { width: this.width, height: this.height });
        plain.getContext("2d").putImageData(pixels, 0, 0);
        context.imageSmoothingEnabled = true;
        context.drawImage(plain, 0, 0, this.width * w, this.height * h);
      } else {
        const down = this.places(row, this.height, tile.rows), across = this.places(column, this.width, tile.columns);
        const gap = Math.min(w, h) >= 6 && tile.rows * tile.columns === 1 ? 1 : 0;
        for (let r = 0; r < this.height; r++) {
          for (let c = 0; c < this.width; c++) {
            context.fillStyle = palette.css[this.level(r, c)];
            context.fillRect(across[c] * w, down[r] * h, w - gap, h - gap);
          }
        }
      }
      this.outline(context);
    }

    // A frame around the picked neuron's column or row.
    outline(context) {
      const neuron = picked();
      if (!neuron) return;
      context.strokeStyle = palette.accent;
      context.lineWidth = 2;
      this.array.axes.forEach((axis, i) => {
        if (typeof axis !== "object" || axis.layer !== neuron.layer) return;
        const size = this.array.shape[i], width = size / axis.repeat;
        const [all, along] = i === this.layout.column ? [this.canvas.sizes[0], 0] : [this.canvas.sizes[1], 1];
        const cell = all / size;
        for (let copy = 0; copy < axis.repeat && axis.repeat <= 64; copy++) {
          const start = (copy * width + neuron[this.side]) * cell;
          if (along === 0) context.strokeRect(start + 0.5, 0.5, Math.max(cell - 1.5, 1), this.canvas.sizes[1] - 1.5);
          else context.strokeRect(0.5, start + 0.5, this.canvas.sizes[0] - 1.5, Math.max(cell - 1.5, 1));
        }
      });
    }

    point(event) {
      const box = this.canvas.getBoundingClientRect();
      const share = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((s) => Math.min(0.9999, Math.max(0, s)));
      for (const [number, along] of [[this.layout.column, 0], [this.layout.row, 1]]) {
        const axis = number === null ? null : this.array.axes[number];
        if (!axis || !(axis.layer in identity.permutation)) continue;
        const size = this.array.shape[number], index = Math.floor(share[along] * size) % (size / axis.repeat);
        const [c, r] = [Math.floor(share[0] * this.width), Math.floor(share[1] * this.height)];
        const { tile, row } = this.layout;
        const name = `${this.array.label} [${row === null ? "" : `${Math.floor(r / tile.rows)}, `}${Math.floor(c / tile.columns)}]`;
        pick({ layer: axis.layer, side: this.side, index }, data.stored ? { label: name, value: this.value(r, c) } : null);
        return;
      }
      unpick();
    }
  }

  // A row of bars, one for each neuron of a layer: its share of the remaining distance. It is the keyboard's way to
  // the neurons: one stop of the Tab key, arrow keys inside.
  class Bars {
    constructor(layer, side, width) {
      Object.assign(this, { layer, side, neurons: hidden.find(({ name }) => name === layer).width });
      this.index = 0;
      this.canvas = sharpCanvas(width, 26, {});
      this.root = make("div", {
        class: "bars", tabindex: 0, role: "slider", "aria-label": `Neurons of ${layer} in ${names[side]}`,
        "aria-valuemin": 0, "aria-valuemax": this.neurons - 1, "aria-valuenow": 0, "aria-valuetext": "no neuron picked",
        onfocus: () => this.select(this.index),
        onblur: () => unpick(true),
        onkeydown: (event) => this.key(event),
        onpointermove: (event) => {
          const box = this.canvas.getBoundingClientRect();
          const index = Math.floor(((event.clientX - box.left) / box.width) * this.neurons);
          pick({ layer, side, index: Math.max(0, Math.min(this.neurons - 1, index)) }, null);
        },
        onpointerleave: () => unpick(),
      }, this.canvas);
    }

    key(event) {
      const ends = { Home: 0, End: this.neurons - 1 };
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
      if (event.key === "Escape") { unpick(true); return; }
      if (!step && !(event.key in ends)) return;
      event.preventDefault();
      this.select(event.key in ends ? ends[event.key] : Math.max(0, Math.min(this.neurons - 1, this.index + step)));
    }

    select(index) {
      this.index = index;
      focused = { layer: this.layer, side: this.side, index };
      pick(focused, null);
    }

    describe() {
      this.root.setAttribute("aria-valuenow", this.index);
      const neuron = picked();
      if (neuron && neuron.layer === this.layer) this.root.setAttribute("aria-valuetext", describeNeuron(neuron));
    }

    draw() {
      const context = brush(this.canvas), [width, height] = this.canvas.sizes, cell = width / this.neurons;
      const neuron = picked(), order = left().permutation[this.layer], up = this.side === "target";
      const at = this.side === "params" && state.progress < 1 && data.stored ? sliding(this.layer) : null;
      const most = Math.max(1e-12, ...data.shares[this.layer]);
      const gap = cell >= 6 ? 1 : 0;
      data.shares[this.layer].forEach((share, place) => {
        const index = up ? place : order[place], high = Math.max(1.5, (share / most) * (height - 3));
        context.fillStyle = neuron && neuron.layer === this.layer && neuron.target === place ? palette.accent : palette.quiet;
        context.fillRect((at ? at[index] : index) * cell, up ? height - high : 0, Math.max(1, cell - gap), high);
      });
    }
  }

  // Lines from the target's neurons to their partners below.
  class Links {
    constructor(layer, width) {
      this.layer = layer;
      this.canvas = sharpCanvas(width, 54, { role: "img", "aria-label": `Partners of the neurons of ${layer}` });
    }

    draw() {
      const context = brush(this.canvas), [width, height] = this.canvas.sizes;
      const rest = left(), order = rest.permutation[this.layer], cell = width / order.length, neuron = picked();
      const at = state.progress < 1 && data.stored ? sliding(this.layer) : null;
      const draws = order.map((to, from) => ({ from, to: at ? at[to] : to, flipped: rest.scale[this.layer][from] < 0, on: neuron && neuron.layer === this.layer && neuron.target === from }));
      for (const link of draws.sort((a, b) => Number(Boolean(a.on)) - Number(Boolean(b.on)))) {
        const [x0, x1] = [(link.from + 0.5) * cell - 0.5, (link.to + 0.5) * cell - 0.5];
        context.beginPath();
        context.moveTo(x0, 3);
        context.bezierCurveTo(x0, height * 0.5, x1, height * 0.5, x1, height - 3);
        context.setLineDash(link.flipped ? [4, 3] : []);
        context.strokeStyle = link.on ? palette.accent : link.flipped ? palette.flip : palette.quiet;
        context.globalAlpha = link.on || !neuron ? 0.9 : 0.3;
        context.lineWidth = link.on ? 2.5 : cell < 4 ? 0.6 : 1.4;
        context.stroke();
      }
    }
  }

  let focused = null;
  const drawings = [], bars = [];
  function pick(neuron, cell) {
    const old = state.neuron;
    state.cell = cell;
    state.neuron = neuron;
    if (!old || old.layer !== neuron.layer || old.side !== neuron.side || old.index !== neuron.index) drawMaps();
    showNeuron();
    bars.forEach((row) => row.describe());
  }
  function unpick(leaveFocus = false) {
    if (leaveFocus) focused = null;
    if (focused) { pick(focused, null); return; }
    if (!state.neuron) return;
    state.neuron = state.cell = null;
    drawMaps();
    showNeuron();
  }
  function drawMaps() {
    drawings.forEach((drawing) => drawing.draw());
  }

  // Neurons slide to their new places, unless the reader asked for less motion or there is too much to draw.
  let frame = 0;
  function slide() {
    cancelAnimationFrame(frame);
    const still = !data.stored || data.parameters > 5000 || matchMedia("(prefers-reduced-motion: reduce)").matches;
    const start = performance.now();
    const tick = (now) => {
      state.progress = still ? 1 : Math.min(1, Math.max(0, (now - start) / 600));
      drawMaps();
      if (state.progress < 1) frame = requestAnimationFrame(tick);
    };
    tick(start);
  }

  // One card for each module: bars and weights of the target, links, weights and bars of the other.
  function mapCards() {
    const modules = new Map(), linked = new Set();
    data.arrays.forEach((array, number) => {
      if (!modules.has(array.module)) modules.set(array.module, []);
      modules.get(array.module).push([array, number]);
    });
    return [...modules].map(([module, arrays]) => {
      const maps = ["target", "params"].map((side) => arrays.map(([array, number]) => new WeightMap(array, number, side)));
      const fed = arrays.map(([array]) => tableLayout(array)).map(({ column }, i) => column !== null && arrays[i][0].axes[column])
        .find((axis) => axis && axis.layer in identity.permutation && axis.repeat === 1);
      const width = Math.max(...maps[0].map((map) => map.canvas.sizes[0]));
      let [over, links, under] = [null, null, null];
      if (fed && !linked.has(fed.layer)) {
        linked.add(fed.layer);
        [over, links, under] = [new Bars(fed.layer, "target", width), new Links(fed.layer, width), new Bars(fed.layer, "params", width)];
        bars.push(over, under);
        drawings.push(over, links, under);
      }
      drawings.push(...maps.flat());
      const range = Math.max(...arrays.map(([array]) => array.range));
      return make("section", { class: "sg-map", "aria-label": module },
        make("h3", {}, module, make("span", { title: "Where the colors end: 99 % of the weights are smaller" }, `m = ${shortNumber(Number(range.toPrecision(2)))}`)),
        make("div", { class: "who" }, names.target),
        over && over.root, ...maps[0].map((map) => map.canvas),
        links ? links.canvas : make("div", { style: "height:60px" }),
        ...maps[1].map((map) => map.canvas), under && under.root,
        make("div", { class: "who" }, names.params));
    });
  }

  const cards = mapCards();
  const maps = make("div", { class: "sg-maps", role: "region", "aria-label": "Weights" }, ...cards);
  const weights = make("div", { class: "sg-card" },
    maps,
    make("div", { class: "sg-scale" },
      make("span", {}, "−m", make("b", { class: "ramp" }), "+m, of each module its own"),
      make("span", {}, make("b", { class: "bar" }), "share of the remaining distance"),
      make("span", {}, make("i", {}), "partners"),
      count("sign") ? make("span", {}, make("i", { class: "flipped" }), "of opposite sign") : null));

  // --- the path

  const slider = make("input", { type: "range", min: 0, max: 1, step: 0.01, value: 0.5, "aria-label": `t, from ${names.params} at 0 to ${names.target} at 1` });
  slider.addEventListener("input", () => setTime(Number(slider.value)));
  const methods = ["naive", "aligned"];
  const captions = {}, pictures = {}, films = {};
  const curves = { naive: [], aligned: [] };
  let chart = null;

  function paint(canvas, pixels) {
    const { height, width } = canvas, context = canvas.getContext("2d"), out = new ImageData(width, height);
    const [low, high] = image.range, channels = image.channels;
    for (let i = 0; i < height * width; i++) {
      for (let k = 0; k < 3; k++) {
        out.data[4 * i + k] = (255 * (pixels[i * channels + Math.min(k, channels - 1)] - low)) / (high - low);
      }
      out.data[4 * i + 3] = 255;
    }
    context.putImageData(out, 0, 0);
  }
  // The film's pictures are small: they are drawn on a coarser grid, and fast.
  const thumb = image && image.size.map((n) => Math.max(1, Math.round(n * Math.min(1, 28 / Math.max(...image.size)))));
  const thumbPlaces = image && pixelCoordinates(thumb);
  function picture(side, label, [height, width]) {
    const longest = Math.max(height, width), canvas = make("canvas", { class: "picture", width, height, role: "img", "aria-label": label });
    canvas.style.width = `${(side * width) / longest}px`;
    canvas.style.height = `${(side * height) / longest}px`;
    return canvas;
  }
  const FRAMES = 9, LEFT = 62, RIGHT = 40;

  function imageColumn() {
    return make("div", { class: "sg-now" }, ...methods.map((method) => {
      pictures[method] = picture(172, `Image at t, ${method}`, image.size);
      captions[method] = make("span", {});
      return make("figure", {}, make("figcaption", {}, make("b", { class: method }, method), captions[method]), pictures[method]);
    }));
  }

  function filmStrip(method) {
    films[method] = Array.from({ length: FRAMES }, (_, i) => {
      const canvas = picture(56, `${method}, t = ${i / (FRAMES - 1)}`, thumb);
      canvas.style.left = `calc(${LEFT}px + (100% - ${LEFT + RIGHT}px) * ${i / (FRAMES - 1)})`;
      canvas.addEventListener("click", () => setTime(i / (FRAMES - 1)));
      return canvas;
    });
    const strip = make("div", { class: "sg-film", role: "group", "aria-label": `Images along the path, ${method}` }, ...films[method]);
    strip.style.height = films[method][0].style.height;
    return make("div", {}, make("div", { class: `sg-film-name ${method}`, style: `padding-left:${LEFT - 28}px` }, method), strip);
  }

  function drawImages() {
    for (const method of methods) {
      paint(pictures[method], draw(between(method, state.t)));
      captions[method].textContent = data.curve ? `t = ${state.t.toFixed(2)}` : `t = ${state.t.toFixed(2)} · loss ${shortNumber(loss(method, state.t))}`;
    }
  }
  function drawFilm(method) {
    films[method].forEach((canvas, i) => paint(canvas, draw(between(method, i / (FRAMES - 1)), thumbPlaces)));
  }

  const times = () => (data.curve ? data.curve.ts : Array.from({ length: data.points }, (_, i) => i / (data.points - 1)));
  const barrier = (losses) => Math.max(...losses.map((y, i) => y - (1 - times()[i]) * losses[0] - times()[i] * losses[losses.length - 1]));
  function showCurves() {
    chart.update(methods.map((method) => {
      const whole = curves[method].length === times().length;
      const high = whole ? shortNumber(Math.max(0, barrier(curves[method]))) : "…";
      return { label: `${method} (barrier ${high})`, color: `var(--${method})`, dash: method === "naive" ? "6 4" : "", x: times(), y: whole ? curves[method] : [] };
    }));
    chart.at(state.t);
  }

  // The loss along the path, in slices of time, so that the page answers meanwhile; a newer call takes over.
  const turns = { naive: 0, aligned: 0 };
  async function trace(method) {
    const turn = ++turns[method], losses = [];
    let pause = performance.now() + 12;
    for (const t of times()) {
      if (performance.now() > pause) {
        await new Promise((resolve) => setTimeout(resolve));
        if (turn !== turns[method]) return;
        pause = performance.now() + 12;
      }
      losses.push(loss(method, t));
    }
    curves[method] = losses;
    showCurves();
  }

  function setTime(t, quiet = false) {
    state.t = t;
    slider.value = t;
    slider.setAttribute("aria-valuetext", `t = ${t.toFixed(2)}`);
    if (chart) chart.at(t);
    if (image) drawImages();
    if (!quiet && hooks.onTime) hooks.onTime(t);
  }

  const known = Boolean(image || data.curve);
  function pathCard() {
    const missing = data.notDrawn && make("p", { class: "sg-missing" }, `This page cannot draw the network’s function: ${data.notDrawn}`);
    if (!known) {
      return make("div", { class: "sg-card" }, missing,
        make("p", { class: "sg-missing" }, "There is no barrier curve either: no loss was given. Pass loss=, a function of the params, to same_function."));
    }
    const figure = make("figure", {});
    const right = make("div", {}, ...(image ? methods.map(filmStrip) : []), figure,
      make("div", { class: "sg-slider", style: `padding:0 ${RIGHT - 10}px 0 ${LEFT - 10}px` }, slider),
      make("div", { class: "sg-ends", style: `padding:0 ${RIGHT - 30}px 0 ${LEFT - 30}px` },
        make("span", {}, names.params), make("span", {}, names.target)));
    slider.style.width = "100%";
    const grid = make("div", { class: image ? "sg-path" : "sg-path bare" }, image ? imageColumn() : null, right);
    const card = make("div", { class: "sg-card" }, missing, grid);
    card.chartFigure = figure;
    return card;
  }
  const path = pathCard();

  const meaning = data.curve
    ? `Loss: ${data.curve.label}, computed in Python at ${data.curve.ts.length} points for the networks as given and aligned; moves made here do not change these curves.`
    : image
      ? truth
        ? "Loss: the mean squared difference from the true image, computed in this page."
        : "Loss: the mean squared difference from the two networks’ images, blended at t, computed in this page."
      : "";
  const words = [
    `At t the weights are (1 − t) ${names.params} + t ${names.target}: naive with ${names.params} as it is above, aligned with it brought next to ${names.target}. `,
    meaning, image ? " Pixels are computed in float64 from float32 weights." : "",
    " The barrier is the curve’s height above the chord between its ends. A neuron’s share of the remaining distance counts the squared differences, once aligned, of all weights at it; a weight between two hidden neurons counts half for each.",
    data.stored ? "" : ` The network has too many parameters (${data.parameters.toLocaleString("en")}) to be stored in this page: its heat maps are means over blocks of weights, and it can be aligned and reset, not moved at random.`,
    data.left ? ` The heat maps of ${data.left} further arrays are left out.` : "",
  ];
  root.classList.add("sg-page");
  root.replaceChildren(head,
    make("div", { class: "sg-top" }, weights, panel),
    heading("Between them"), path,
    make("p", { class: "note", style: "margin-top:1rem" }, ...words), probe);

  // --- the first drawing

  // Weights of a deep network scroll, by the keyboard too.
  if (maps.scrollHeight > maps.clientHeight) maps.setAttribute("tabindex", 0);

  readPalette();
  if (known) {
    chart = lineChart(path.chartFigure, {
      x: "t", y: "loss", height: image ? 216 : 280, margin: { left: LEFT, right: RIGHT }, follow: true,
      series: methods.map((label) => ({ label, color: `var(--${label})`, dash: label === "naive" ? "6 4" : "", x: times(), y: [] })),
      hover: (x) => chart.at(x === null ? state.t : x),
      pick: (x) => setTime(Math.round(100 * x) / 100),
    });
    if (data.curve) { Object.assign(curves, { naive: data.curve.naive, aligned: data.curve.aligned }); showCurves(); }
    else methods.forEach(trace);
  }
  if (image) methods.forEach(drawFilm);
  setTime(0.5, true);
  showNumbers();
  drawMaps();
  const repaint = () => { readPalette(); drawMaps(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  new MutationObserver(repaint).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });

  return {
    distance,
    loss,
    setTime: (t) => setTime(t, true),
    image: (which, t) => Array.from(draw(between(which, t))),
    losses: (which) => curves[which],
    neuron: picked,
    time: () => state.t,
  };
}

// Inside a frame of a page of the same origin: as high as its content, in the theme of the page around it.
function fitFrame() {
  let frame = null, around = null;
  try {
    frame = window.frameElement;
    around = frame && window.parent.document.documentElement;
  } catch (error) {
    return; // another origin: the frame keeps its height and scrolls
  }
  if (!frame) return;
  const fit = () => { frame.style.height = `${document.documentElement.scrollHeight + 4}px`; };
  const follow = () => {
    const notebook = window.parent.document.body.dataset.jpThemeLight;
    const theme = around.dataset.theme || (notebook && (notebook === "true" ? "light" : "dark"));
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  };
  new ResizeObserver(fit).observe(document.body);
  new MutationObserver(follow).observe(around, { attributes: true, attributeFilter: ["data-theme"] });
  follow();
}
