"use strict";
(() => {
const live = Number(document.documentElement.dataset.live);
let data = JSON.parse(document.getElementById("data").textContent);
const kept = {};                                   // what was chosen, by stage: outlives a refresh
const dashes = ["solid", "dash", "dashdot", "dot"], strokes = ["", "7 4", "7 3 2 3", "2 3"];
const symbols = ["circle", "square", "triangle-up", "diamond", "triangle-down", "x"];
const shapes = ["M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "M-3.5 -3.5h7v7h-7z", "M0 -4.5L4.5 3.5H-4.5z",
  "M0 -5L5 0L0 5L-5 0z", "M0 4.5L4.5 -3.5H-4.5z", "M-4 -4L4 4M4 -4L-4 4"];
const what = {val: "validation loss", diff: "difference to baseline", train_loss: "training loss",
  lr: "learning rate", tokens_per_s: "throughput", grad_norm: "gradient norm"};
const units = {lr: " (AdamW)", tokens_per_s: " (tokens/s, all ranks)", grad_norm: ""};
const forms = {val: ".4f", train_loss: ".4f", diff: "+.4f"};

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = i => { const all = css("--series").split(","); return all[i % all.length]; };
const safe = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
function el(tag, text, attributes, space) {        // text only: nothing from a file becomes markup
  const e = space ? document.createElementNS(space, tag) : document.createElement(tag);
  if (text != null) e.textContent = text;
  for (const [name, value] of Object.entries(attributes || {})) e.setAttribute(name, value);
  return e;
}
const svg = (tag, attributes) => el(tag, null, attributes, "http://www.w3.org/2000/svg");

// ---------------------------------------------------------------- curves
function xs(curve, axis, unit) {                   // s: steps, t: seconds, k: tokens, or tokens per step
  if (axis === "steps") return curve.s;
  const x = axis === "time" ? curve.t : typeof curve.k === "number" ? curve.s.map(s => s * curve.k) : curve.k;
  return x ? x.map(v => v == null ? null : v / unit) : [];
}
function unitOf(stage, axis) {
  let top = 0;
  for (const c of [...stage.cells, ...stage.runs])
    for (const part of [c.val, c.trace])
      if (part) for (const v of xs(part, axis, 1)) top = Math.max(top, v);
  if (axis === "time") return top > 18000 ? [3600, "h"] : top > 300 ? [60, "min"] : [1, "s"];
  if (axis === "tokens") return top >= 1e9 ? [1e9, "billions"] : top >= 1e6 ? [1e6, "millions"] : [1, "count"];
  return [1, "steps"];
}
function smooth(values, share) {                   // exponential mean, without the bias of its start
  if (!share) return values;
  let sum = 0, weight = 0;
  return values.map(v => {
    if (v == null) return null;
    sum = share * sum + (1 - share) * v;
    weight = share * weight + (1 - share);
    return sum / weight;
  });
}
function interpolate(x, px, py) {
  if (!px.length || x == null || x < px[0] || x > px[px.length - 1]) return null;
  let low = 0, high = px.length - 1;
  while (low < high) { const mid = (low + high) >> 1; if (px[mid] < x) low = mid + 1; else high = mid; }
  if (px[low] === x) return py[low];
  return py[low - 1] + (x - px[low - 1]) / (px[low] - px[low - 1]) * (py[low] - py[low - 1]);
}
function lines(stage, state, unit) {               // what is to be drawn: key, label, style, x, y, low, high
  const runs = stage.runs.map(r => ({...r, key: r.id})), cells = stage.cells.map(c => ({...c, key: "c" + c.style}));
  const source = state.lines === "cells" ? [...cells, ...runs.filter(r => r.cell == null || r.going)] : runs;
  const ofVal = state.y === "val" || state.y === "diff", out = [];
  for (const c of source) {
    const part = ofVal ? c.val : c.trace;
    if (!part || !part.s.length) continue;
    const x = xs(part, state.x, unit);
    let y = ofVal ? part.v : part[state.y], low = ofVal ? part.lo : null, high = ofVal ? part.hi : null;
    if (!y || !x.some(v => v != null) || !y.some(v => v != null)) continue;
    if (state.y === "diff") {
      const base = c.base == null ? null : stage.cells.find(b => b.style === c.base);
      if (!base) continue;
      const bx = xs(base.val, state.x, unit);
      y = y.map((v, i) => {
        const b = interpolate(x[i], bx, base.val.v);
        return b == null || !part.s[i] ? null : v - b;
      });
      low = high = null;
    }
    out.push({key: c.key, label: c.label, style: c.style, x, y: smooth(y, state.smooth),
      low: state.smooth ? null : low, high});
  }
  return out;
}
function viewOf(found, state) {                    // of the last three quarters: step 0 would squash the rest
  let end = 0, low = Infinity, high = -Infinity;
  for (const c of found) for (const x of c.x) end = Math.max(end, x);
  const see = v => { if (v != null) { low = Math.min(low, v); high = Math.max(high, v); } };
  for (const c of found) c.x.forEach((x, i) => {
    if (x > 0 && x >= end / 4) { see(c.y[i]); if (c.low) { see(c.low[i]); see(c.high[i]); } }
  });
  if (state.y === "diff") see(0);
  if (!(high >= low)) return null;
  if (state.yscale === "log") return low > 0 ? [Math.log10(low) - 0.005, Math.log10(high) + 0.005] : null;
  const pad = 0.05 * (high - low) || 0.01 * Math.abs(high) || 1;
  return [low - pad, high + pad];
}
function tracesOf(c, state, word, many) {
  const visible = !state.hidden.has(c.key), ink = colour(c.style), out = [];
  if (c.low) {
    const edge = {type: "scatter", mode: "lines", line: {width: 0}, hoverinfo: "skip", visible, meta: c.key, x: c.x};
    out.push({...edge, y: c.low}, {...edge, y: c.high, fill: "tonexty", fillcolor: ink + "2e"});
  }
  const name = safe(c.label), per = word === "count" ? "tokens" : word;
  out.push({type: "scatter", mode: many || c.x.length > 60 ? "lines" : "lines+markers", x: c.x, y: c.y, visible, name,
    meta: c.key, line: {color: ink, width: 1.8, dash: dashes[c.style % 4]},
    marker: {symbol: symbols[c.style % 6], size: 6, color: ink},
    hovertemplate: "<b>" + name.replace(/[%{}]/g, c => "&#" + c.charCodeAt(0) + ";") + "</b><br>%{x:.5~g} " + per
      + "<br>%{y:" + (forms[state.y] || ".4~g") + "}<extra></extra>"});
  return out;
}
function draw(stage, state, box) {
  const [unit, word] = unitOf(stage, state.x), found = lines(stage, state, unit), narrow = innerWidth < 700;
  drawLegend(stage, state, box, found);
  box.chart.classList.toggle("empty", !found.length);
  if (!found.length) {
    Plotly.purge(box.chart);
    box.chart.textContent = "No run has this in its log.";
    return;
  }
  if (!box.chart.classList.contains("js-plotly-plot")) box.chart.textContent = "";
  const title = {steps: "optimizer steps", time: "training time (" + word + ")",
    tokens: "training tokens (" + word + ", all ranks)"}[state.x];
  const ink = css("--ink"), paper = css("--paper"), rule = css("--rule");
  const axis = {gridcolor: rule, linecolor: rule, zerolinecolor: css("--soft"), automargin: true};
  const layout = {paper_bgcolor: paper, plot_bgcolor: paper, showlegend: false, hovermode: "closest",
    font: {color: ink, size: narrow ? 11 : 13, family: "system-ui, sans-serif"}, margin: {l: 10, r: 10, t: 10, b: 10},
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",  // a finger scrolls the page
    hoverlabel: {bgcolor: css("--panel"), bordercolor: rule, font: {color: ink}, align: "left"},
    xaxis: {...axis, title: {text: title}, type: state.xscale, zeroline: false},
    yaxis: {...axis, title: {text: what[state.y] + (narrow ? "" : units[state.y] ?? " (" + stage.loss_unit + ")")}, type: state.yscale,
      zeroline: state.y === "diff"}};
  if (state.xscale === "linear") layout.xaxis.rangemode = "tozero";
  const view = state.y in forms ? viewOf(found.filter(c => !state.hidden.has(c.key)), state) : null;
  if (view) layout.yaxis.range = view;
  const config = {responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover",
    plotlyServerURL: "",                           // by name, so that no button comes along that sends data away
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
    toImageButtonOptions: {filename: "curves_" + stage.id, scale: 2}};
  const traces = found.flatMap(c => tracesOf(c, state, word, found.length > 30));
  Plotly.react(box.chart, traces, layout, config);
}
function swatch(style) {
  const ink = colour(style), s = svg("svg", {width: 30, height: 12, viewBox: "-15 -6 30 12", "aria-hidden": "true"});
  const dash = strokes[style % 4] ? {"stroke-dasharray": strokes[style % 4]} : {};
  s.append(svg("line", {x1: -15, x2: 15, y1: 0, y2: 0, stroke: ink, "stroke-width": 2, ...dash}));
  s.append(svg("path", {d: shapes[style % 6], fill: ink, stroke: ink}));
  return s;
}
function drawLegend(stage, state, box, found) {
  const isOn = c => !state.hidden.has(c.key), redraw = () => draw(stage, state, box);
  box.legend.replaceChildren();
  if (found.length > 2) {
    const all = el("button", "all or none", {type: "button"});
    all.onclick = () => { state.hidden = new Set(found.some(isOn) ? found.map(c => c.key) : []); redraw(); };
    box.legend.append(all);
  }
  for (const c of found) {
    const b = el("button", null, {type: "button", "aria-pressed": String(isOn(c)),
      title: "click: hide or show; double click: this one only"});
    b.append(swatch(c.style), el("span", c.label));
    b.onclick = () => {
      if (isOn(c)) state.hidden.add(c.key); else state.hidden.delete(c.key);
      b.setAttribute("aria-pressed", String(isOn(c)));
      const which = box.chart.data.flatMap((trace, i) => trace.meta === c.key ? [i] : []);
      Plotly.restyle(box.chart, {visible: isOn(c)}, which);
    };
    b.ondblclick = () => { state.hidden = new Set(found.map(o => o.key).filter(key => key !== c.key)); redraw(); };
    box.legend.append(b);
  }
}
function setUp(stage, place) {
  const state = kept[stage.id] = kept[stage.id] || {x: "steps", y: "val", xscale: "linear", yscale: "linear",
    smooth: 0, picked: false,
    hidden: new Set(stage.cells.filter(c => c.off).map(c => "c" + c.style))};
  if (!state.picked) state.lines = stage.cells.length ? "cells" : "runs";
  const legend = el("div", null, {class: "legend", role: "group", "aria-label": "curves"});
  const box = {chart: el("div", null, {class: "chart"}), legend}, bar = el("div", null, {class: "controls"});
  const redraw = () => draw(stage, state, box);
  const add = (word, input) => { const label = el("label", word); label.append(input); bar.append(label); };
  const pick = (word, key, options) => {
    const select = el("select", null, {"data-key": key});
    for (const [value, text] of options) select.append(el("option", text, {value}));
    select.value = state[key];
    select.onchange = () => { state[key] = select.value; state.picked ||= key === "lines"; redraw(); };
    add(word, select);
  };
  pick("show", "y", Object.entries(what).filter(([y]) => y !== "diff" || stage.cells.some(c => c.base != null)));
  pick("against", "x", [["steps", "steps"], ["time", "time"], ["tokens", "tokens"]]);
  pick("lines", "lines", [["cells", "means and bands"], ["runs", "single runs"]]);
  pick("x axis", "xscale", [["linear", "linear"], ["log", "log"]]);
  pick("y axis", "yscale", [["linear", "linear"], ["log", "log"]]);
  const range = el("input", null, {type: "range", min: 0, max: 0.98, step: 0.02, "data-key": "smooth"});
  range.value = state.smooth;
  range.oninput = () => { state.smooth = Number(range.value); redraw(); };
  add("smoothing", range);
  const reset = el("button", "reset view", {type: "button"});
  reset.onclick = redraw;
  bar.append(reset);
  place.replaceChildren(bar, box.chart, box.legend);
  if (stage.note) place.append(el("p", stage.note, {class: "soft"}));
  redraw();
  place.redraw = redraw;
}

// ---------------------------------------------------------------- runs
const text = value => String(typeof value === "number" ? data.pool[value] : value);
function pairs(title, object) {
  const entries = Object.entries(object).filter(([, value]) => text(value) !== "");
  if (!entries.length) return [];
  const list = el("dl"), long = [];
  for (const [name, value] of entries) {
    if (text(value).includes("\n")) long.push(el("h4", name), el("pre", text(value)));
    else list.append(el("dt", name), el("dd", text(value)));
  }
  return [el("h4", title), list, ...long];
}
function setUpRuns(stage, place) {
  const hint = {type: "search", placeholder: "run id, seed, status, ...", "aria-label": "filter runs"};
  const search = el("input", null, hint), list = el("div"), more = el("button", "", {type: "button"}), bar = el("p");
  let shown = 50;
  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const hits = stage.details.filter(d => words.every(word => d.line.toLowerCase().includes(word)));
    list.replaceChildren(...hits.slice(0, shown).map(d => {
      const box = el("details", null, {class: "run", id: "run-" + stage.id + "-" + d.n});
      box.append(el("summary", d.line));
      box.ontoggle = () => {
        if (!box.open || box.children.length > 1) return;
        box.append(...pairs("Result", {...stage.common.row, ...d.row}),
          ...pairs("Knobs", {...stage.common.knobs, ...d.knobs}),
          ...pairs("Environment", {...stage.common.env, ...d.env}));
      };
      return box;
    }));
    if (!hits.length) list.textContent = stage.details.length ? "No run matches." : "No runs.";
    more.textContent = "show more of " + hits.length;
    more.hidden = hits.length <= shown;
  };
  search.oninput = () => { shown = 50; show(); };
  more.onclick = () => { shown += 200; show(); };
  bar.append(search);
  place.replaceChildren(bar, list, more);
  if (stage.runs_note) place.append(el("p", stage.runs_note, {class: "soft"}));
  show();
}

// ---------------------------------------------------------------- page
let watcher = null;
function start() {                                 // a chart is made when it comes into view
  if (watcher) watcher.disconnect();
  watcher = new IntersectionObserver(entries => {
    for (const {target, isIntersecting} of entries) {
      if (!isIntersecting) continue;
      watcher.unobserve(target);
      setUp(data.stages.find(s => s.id === target.dataset.stage), target);
    }
  }, {rootMargin: "300px"});
  for (const place of document.querySelectorAll("[data-stage]")) watcher.observe(place);
  for (const place of document.querySelectorAll("[data-runs]")) {
    const stage = data.stages.find(s => s.id === place.dataset.runs), box = place.closest("details");
    const fill = () => { if (box.open && !place.filled) { place.filled = true; setUpRuns(stage, place); } };
    box.addEventListener("toggle", fill);
    fill();
  }
}
function redraw() { for (const place of document.querySelectorAll("[data-stage]")) if (place.redraw) place.redraw(); }
for (const query of ["(prefers-color-scheme: dark)", "(max-width: 700px)"])
  matchMedia(query).addEventListener("change", redraw);

function replace(fresh) {                          // the new page in place of the old; what was open or typed stays
  const main = document.getElementById("main"), top = scrollY;
  const open = [...main.querySelectorAll("details[open][id]")].map(d => d.id);
  const drawn = [...main.querySelectorAll("[data-stage]")].filter(p => p.redraw).map(p => p.dataset.stage);
  const typed = [...main.querySelectorAll("[data-runs]")].map(p => [p.dataset.runs, p.querySelector("input")?.value]);
  for (const chart of main.querySelectorAll(".js-plotly-plot")) Plotly.purge(chart);
  data = fresh.data;
  main.innerHTML = fresh.main;
  const reopen = () => { for (const id of open) { const d = document.getElementById(id); if (d) d.open = true; } };
  reopen();
  start();
  for (const id of drawn) {
    const place = main.querySelector('[data-stage="' + CSS.escape(id) + '"]');
    const stage = data.stages.find(s => s.id === id);
    if (place && stage) { watcher.unobserve(place); setUp(stage, place); }
  }
  for (const [id, words] of typed) {
    const input = main.querySelector('[data-runs="' + CSS.escape(id) + '"] input');
    if (input && words) { input.value = words; input.oninput(); }
  }
  reopen();
  scrollTo({top, behavior: "instant"});
}
async function ask() {                             // only with --watch
  try {
    const answer = await fetch("live?have=" + encodeURIComponent(data.version));
    if (answer.status === 200) replace(await answer.json());
  } catch (error) {
    const made = document.getElementById("made");
    if (made) made.textContent = "The server is gone; this is the last page it made.";
  }
  setTimeout(ask, 1000 * live);
}
start();
if (live) setTimeout(ask, 1000 * live);
})();
