"use strict";
// Draw the figures of a page, and redraw those that depend on the step.
const page = JSON.parse(document.getElementById("data").textContent);
const config = { responsive: true, displayModeBar: false };
const plots = [...document.querySelectorAll(".plot")];

// --- Light and dark -------------------------------------------------------------------------------

const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
const themeButton = document.getElementById("theme");
let chosen = null;

function theme() {
  return chosen ?? (prefersDark.matches ? "dark" : "light");
}

function themed(layout, name = theme()) {
  return { ...layout, template: page.templates[name] };
}

function showTheme(name) {
  document.documentElement.dataset.theme = name;
  themeButton.textContent = name === "dark" ? "Light" : "Dark";
}

function applyTheme(name = theme()) {
  showTheme(name);
  return Promise.all(plots.map((plot) => plot.data && Plotly.react(plot, plot.data, themed(plot.layout, name), config)));
}

// Plotly figures have a fixed size: resize them to the paper before printing.
function forPaper(printing) {
  document.documentElement.classList.toggle("printing", printing);
  document.documentElement.dataset.theme = printing ? "light" : theme();
  const sizes = plots.map((plot) => [plot.clientWidth, plot.clientHeight]);
  for (const [i, plot] of plots.entries()) {
    if (!plot.data) continue;
    const [width, height] = printing ? sizes[i] : [undefined, undefined];
    const layout = { ...plot.layout, width, height, autosize: !printing };
    Plotly.react(plot, plot.data, themed(layout, printing ? "light" : theme()), config);
  }
}

// --- The matrices of a step -----------------------------------------------------------------------

const packed = page.frames?.matrices ?? {};
const codes = {};
for (const [name, matrix] of Object.entries(packed)) {
  const text = atob(matrix.data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  codes[name] = new Uint16Array(bytes.buffer); // little-endian, as every browser's machine is
}

// As [head][query][key] or [example][head][key]; null for missing values and keys after the query.
function matrixAt(name, frame) {
  const { shape, triangle, low, high } = packed[name];
  const [depth, rows, columns] = shape.length === 3 ? shape : [1, ...shape];
  const perFrame = codes[name].length / low.length;
  const span = high[frame] - low[frame];
  let at = frame * perFrame;
  const result = [];
  for (let d = 0; d < depth; d++) {
    const layer = [];
    for (let r = 0; r < rows; r++) {
      const row = new Array(columns).fill(null);
      const end = triangle ? r + 1 : columns;
      for (let c = 0; c < end; c++) {
        const code = codes[name][at++];
        if (code !== 65535) row[c] = low[frame] + (span * code) / 65534;
      }
      layer.push(row);
    }
    result.push(layer);
  }
  return result;
}

function reduced(layers, head) {
  if (typeof head === "number") return layers[head];
  if (layers.length === 1) return layers[0];
  const join = head === "max" ? Math.max : (a, b) => a + b;
  return layers[0].map((row, r) => row.map((first, c) => (first === null ? null : layers.reduce((sum, layer, h) => (h ? join(sum, layer[r][c]) : sum), first))));
}

function limitOf(rows) {
  let limit = 0;
  for (const row of rows) for (const value of row) if (value !== null) limit = Math.max(limit, Math.abs(value));
  return limit || 1;
}

// --- Redrawing each kind of trace at a step --------------------------------------------------------

function redrawn(trace, layout, matrix) {
  const how = trace.meta;
  const source = how?.from ?? layout.meta?.from;
  if (!how || !source || !packed[source]) return trace;
  const layers = matrix(source);
  switch (how.as) {
    case "matrix": {
      const z = reduced(layers, how.head);
      if (!how.signed) return { ...trace, z };
      const limit = limitOf(z);
      return { ...trace, z, zmin: -limit, zmax: limit };
    }
    case "rows":
      return { ...trace, z: layers.map((example) => example[how.head]) };
    case "row": // of the matrix, and where `x` names another, its first row as x
      return { ...trace, y: layers[0][how.row], ...(how.x && { x: matrix(how.x)[0][0] }) };
    case "plain":
      return { ...trace, z: layers[0] };
    case "points": {
      const values = reduced(layers, how.head);
      const n = values.length;
      const y = how.index.map((flat) => {
        const row = Math.floor(flat / n);
        const value = values[row][flat % n];
        return value === null || !how.per_key ? value : value / (row + 1);
      });
      return { ...trace, y };
    }
    case "lines":
    case "middles":
    case "nodes":
      return redrawnGraph(trace, layout.meta, reduced(layers, "max"));
    default:
      return trace;
  }
}

function redrawnGraph(trace, graph, attention) {
  const how = trace.meta;
  const isEdge = new Set(graph.edges.map(([row, key]) => `${row},${key}`));
  if (how.as === "nodes") {
    const symbol = graph.places.map(() => "square");
    for (const [row, node] of graph.rows) {
      let best = 0;
      for (let key = 1; key <= row; key++) if (attention[row][key] > attention[row][best]) best = key;
      symbol[node] = isEdge.has(`${row},${best}`) ? "circle" : "diamond";
    }
    return { ...trace, marker: { ...trace.marker, symbol } };
  }
  const side = how.kind === "edge" ? graph.bend : -graph.bend;
  const x = [], y = [], customdata = [];
  for (const [row, node, keys] of graph.rows) {
    for (let key = 0; key < keys; key++) {
      const share = attention[row][key];
      if (isEdge.has(`${row},${key}`) !== (how.kind === "edge")) continue;
      if (how.kind === "wrong" && !(share >= graph.wrong)) continue;
      const [[x0, y0], [x1, y1]] = [graph.places[key], graph.places[node]];
      const middle = [(x0 + x1) / 2 - side * (y1 - y0), (y0 + y1) / 2 + side * (x1 - x0)];
      if (how.as === "middles") {
        x.push(middle[0]);
        y.push(middle[1]);
        customdata.push([row, key, share]);
      } else if (Math.max(0, Math.min(graph.levels - 1, Math.floor(share * graph.levels))) === how.level) {
        x.push(x0, middle[0], x1, null);
        y.push(y0, middle[1], y1, null);
      }
    }
  }
  return how.as === "middles" ? { ...trace, x, y, customdata } : { ...trace, x, y };
}

// --- The step -------------------------------------------------------------------------------------

const steps = page.steps ?? [];
const slider = document.getElementById("step");
const readout = document.getElementById("readout");
const playButton = document.getElementById("play");
let current = steps.length - 1;
let wanted = current;
let busy = false;
let timer = null;

function stageAt(step) {
  let name = "";
  for (const [stage, start] of Object.entries(page.stages ?? {})) if (step >= start) name = stage;
  return { stage1: "stage 1", stage2: "stage 2", joint: "joint training" }[name] ?? name;
}

function describe(frame) {
  const step = steps[frame].toLocaleString("en");
  const text = `step ${step}, ${stageAt(steps[frame])}`;
  readout.innerHTML = "";
  const bold = document.createElement("b");
  bold.textContent = `step ${step}`;
  readout.append(bold, ` of ${page.n_steps.toLocaleString("en")} · ${stageAt(steps[frame])}`);
  slider.setAttribute("aria-valuetext", text);
  for (const note of document.querySelectorAll(".print-step")) note.textContent = `Pictures of ${text}`;
  for (const panel of document.querySelectorAll(".panel")) {
    const text = page.captions[panel.dataset.panel]?.[frame];
    if (text === undefined) continue;
    panel.querySelector("figcaption").textContent = text;
    const title = panel.querySelector("h2").textContent;
    for (const plot of panel.querySelectorAll(".plot")) plot.setAttribute("aria-label", `${title} at step ${step}. ${text}`);
  }
}

// While playing, do not redraw figures outside the viewport until they are visible or playing stops.
const inSight = new Set();
const sight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) isIntersecting ? inSight.add(target) : inSight.delete(target);
  if (steps.length && !busy) drawStep(current);
});
for (const plot of plots) sight.observe(plot);

async function drawStep(frame) {
  const cache = {};
  const matrix = (name) => (cache[name] ??= matrixAt(name, frame));
  const drawing = plots.map((plot) => {
    if (!plot.data || Number(plot.dataset.frame) === frame || (timer !== null && !inSight.has(plot))) return null;
    plot.dataset.frame = frame;
    const cursor = (plot.layout.shapes ?? []).findIndex((shape) => shape.name === "cursor");
    if (cursor >= 0) {
      return Plotly.relayout(plot, { [`shapes[${cursor}].x0`]: steps[frame], [`shapes[${cursor}].x1`]: steps[frame] });
    }
    const data = plot.data.map((trace) => redrawn(trace, plot.layout, matrix));
    if (data.every((trace, i) => trace === plot.data[i])) return null;
    return Plotly.react(plot, data, plot.layout, config);
  });
  await Promise.all(drawing);
}

// Draw the latest requested step; skip steps requested while drawing.
async function show(frame) {
  wanted = Math.max(0, Math.min(steps.length - 1, frame));
  slider.value = wanted;
  describe(wanted);
  if (busy) return;
  busy = true;
  try {
    while (current !== wanted) {
      const next = wanted;
      await drawStep(next);
      current = next;
      document.documentElement.dataset.step = steps[current];
      await new Promise(requestAnimationFrame);
    }
    if (timer === null) await drawStep(current); // what the film passed over
  } finally {
    busy = false;
  }
}

function stop() {
  clearInterval(timer);
  timer = null;
  if (!busy) drawStep(current);
  playButton.textContent = "▶ Play";
  playButton.setAttribute("aria-pressed", "false");
}

function play() {
  if (timer !== null) return stop();
  if (wanted >= steps.length - 1) show(0);
  playButton.textContent = "❚❚ Pause";
  playButton.setAttribute("aria-pressed", "true");
  timer = setInterval(() => {
    if (busy) return;
    if (wanted >= steps.length - 1) stop();
    else show(wanted + Math.ceil(steps.length / 200)); // the longest film takes some 20 seconds
  }, Math.max(80, Math.min(400, 12000 / steps.length)));
}

function onKey(event) {
  const element = document.activeElement;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " " && element?.tagName !== "BUTTON") {
    event.preventDefault();
    play();
  } else if (element !== slider && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
    event.preventDefault();
    show(wanted + (event.key === "ArrowRight" ? 1 : -1));
  }
}

// --- Start ----------------------------------------------------------------------------------------

async function start() {
  showTheme(theme());
  for (const plot of plots) {
    plot.dataset.frame = current; // as which the figures come
    const { data, layout } = page.figures[plot.dataset.figure];
    await Plotly.newPlot(plot, data, themed({ ...layout, uirevision: "kept" }), config);
  }
  themeButton.addEventListener("click", () => { chosen = theme() === "dark" ? "light" : "dark"; applyTheme(); });
  prefersDark.addEventListener("change", () => applyTheme());
  window.addEventListener("beforeprint", () => forPaper(true));
  window.addEventListener("afterprint", () => forPaper(false));
  if (slider && steps.length) {
    slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
    playButton.addEventListener("click", play);
    document.addEventListener("keydown", onKey);
    slider.value = current;
    describe(current);
    document.documentElement.dataset.step = steps[current];
  }
  document.documentElement.dataset.ready = "yes";
}

start();
