"""lib_report.py -- the page that report.py writes: its HTML, its style, its program.

Nothing from a file reaches the page as markup: text goes through html.escape, data through JSON in a block that
is not executed, and the page's program sets textContent only. The content security policy of the page allows
no program but ours (by hash) and no address but, with --watch, the server itself.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence

from lib_results import UserError


def esc(value: object) -> str:
    return html.escape(str(value), quote=True)


def to_json(data: object) -> str:
    """JSON that can stand in a <script> block: no tag can begin or end in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def num(value: float, digits: int = 6) -> float | int | None:
    """A number for a curve: rounded, None for what is not finite."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def html_table(
    rows: Sequence[Mapping[str, object]], columns: Sequence[str], of: str, words: Sequence[str] = ()
) -> str:
    """A table in a box of its own that scrolls; `of` names it for a reader who does not see."""
    number = lambda c: c not in words and all(str(r[c])[:1] in "-+[0123456789n" for r in rows)
    side = {c: ' class="num"' if number(c) else "" for c in columns}
    head = "".join(f"<th scope=col{side[c]}>{esc(c)}</th>" for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{side[c]}>{esc(r[c])}</td>" for c in columns) + "</tr>\n"
        for r in rows
    )
    box = f'<div class="box" tabindex="0" role="region" aria-label="{esc(of)}">'
    return f"{box}<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"


def forest(rows: Sequence[tuple[str, str, float, float, float, str]]) -> str:
    """Differences with intervals, drawn to one scale: (label, words, difference, lo, hi, class); nan: no interval."""
    ends = [v for _, _, *values, _ in rows for v in values if math.isfinite(v)] + [0.0]
    low, high = min(ends), max(ends)
    pad = 0.06 * (high - low) or 0.01
    low, high = low - pad, high + pad
    at = lambda v: f"{100 * (v - low) / (high - low):.2f}%"
    wide = lambda a, b: f"{100 * (b - a) / (high - low):.2f}%"
    out = []
    for label, words, diff, lo, hi, kind in rows:
        bar = (
            f'<i class="bar" style="left:{at(lo)};width:{wide(lo, hi)}"></i>'
            if math.isfinite(lo + hi)
            else ""
        )
        point = f'<i class="point" style="left:{at(diff)}"></i>' if math.isfinite(diff) else ""
        zero = f'<i class="zero" style="left:{at(0)}"></i>'
        strip = f'<span class="strip {esc(kind)}" aria-hidden="true">{zero}{bar}{point}</span>'
        out.append(
            f'<li><span class="who"><b>{esc(label)}</b> <small>{esc(words)}</small></span>{strip}</li>'
        )
    ticks = sorted({v for v in (min(ends), 0.0, max(ends))})
    marks = "".join(
        f'<i style="left:{at(v)}">{v:+.4f}</i>'
        for v in ticks
        if v == 0 or abs(v) > 0.15 * (high - low)
    )
    axis = f'<li class="axis"><span class="who"></span><span class="strip">{marks.replace("+0.0000", "0")}</span></li>'
    return f'<ul class="forest">{"".join(out)}{axis}</ul>'


def library() -> str:
    """plotly.js as text. Raises UserError without plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError(
            "a report needs plotly: pip install plotly (or -r requirements-dev.txt)"
        ) from None
    return get_plotlyjs().replace("</script", "<\\/script")


def page(title: str, main: str, data: object, live: int = 0) -> str:
    """The whole page. `live`: seconds between two questions to the server, 0 for a file."""
    scripts = [library(), PROGRAM]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in scripts
    )
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
    )
    policy += f"connect-src {chr(39)}self{chr(39)}; " if live else ""
    policy += "base-uri 'none'; form-action 'none'"
    return f"""<!doctype html>
<html lang="en" data-live="{live}">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{esc(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main id="main">
{main}
</main>
<script type="application/json" id="data">{to_json(data)}</script>
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body>
</html>
"""


STYLE = """
:root { --paper:#ffffff; --panel:#f6f7f9; --ink:#1b1f24; --soft:#57606a; --rule:#d5dae0; --accent:#0b5cad;
  --bad:#a8071a; --badbg:#fff1f0; --good:#0a6b3d;
  --series:#0072b2,#d55e00,#00845f,#b0528f,#2b8fc4,#a86f00,#222222; }
@media (prefers-color-scheme: dark) { :root { --paper:#14171b; --panel:#1d2127; --ink:#e6e9ed; --soft:#a3adb8;
  --rule:#39414b; --accent:#7ab8ff; --bad:#ff9d94; --badbg:#33191a; --good:#6fd3a0;
  --series:#56b4e9,#ff9147,#3ecf9f,#e59bc8,#9bd3f7,#f0c04a,#f2f2f2; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.5 system-ui,sans-serif; }
main { max-width:1200px; margin:0 auto; padding:1rem clamp(.75rem,3vw,2rem) 4rem; }
h1 { font-size:1.6rem; line-height:1.2; margin:.5rem 0; }
h2 { font-size:1.3rem; margin:2.5rem 0 .5rem; }
h3 { font-size:1.05rem; margin:1.5rem 0 .5rem; }
h1,h2,h3,p,li,summary { overflow-wrap:anywhere; }
small,.soft { color:var(--soft); font-size:.875rem; }
a { color:var(--accent); }
nav { display:flex; flex-wrap:wrap; gap:.25rem 1rem; margin:.5rem 0; }
.tiles { display:flex; flex-wrap:wrap; gap:.5rem; padding:0; list-style:none; }
.tiles li { background:var(--panel); border:1px solid var(--rule); border-radius:6px; padding:.4rem .8rem;
  min-width:6rem; }
.tiles b { display:block; font-size:1.3rem; line-height:1.3; }
.problems { background:var(--badbg); border:1px solid var(--bad); border-radius:6px; padding:.5rem 1rem;
  margin:1rem 0; }
.problems h2 { margin:.25rem 0; font-size:1.1rem; color:var(--bad); }
.problems ul { margin:.25rem 0; padding-left:1.2rem; }
.box { overflow-x:auto; border:1px solid var(--rule); border-radius:6px; margin:.5rem 0; max-width:100%; }
table { border-collapse:collapse; width:100%; font-size:.875rem; font-variant-numeric:tabular-nums; }
th,td { padding:.3rem .6rem; border-bottom:1px solid var(--rule); text-align:left; white-space:nowrap; }
td.long { white-space:normal; min-width:16rem; overflow-wrap:anywhere; }
th { background:var(--panel); font-weight:600; }
tbody tr:last-child td { border-bottom:0; }
.num { text-align:right; }
.notes { padding-left:1.2rem; color:var(--soft); font-size:.875rem; }
.better { color:var(--good); font-weight:600; }
.worse { color:var(--bad); font-weight:600; }
.forest { list-style:none; padding:0; margin:.5rem 0; }
.forest li { display:flex; align-items:center; gap:.75rem; padding:.2rem 0; }
.who { flex:0 0 20rem; }
.who small { display:block; }
.strip { position:relative; flex:1; height:1.6rem; color:var(--soft); }
.strip i { position:absolute; top:50%; }
.strip .zero { top:-.3rem; bottom:-.3rem; border-left:1px solid var(--soft); }
.strip .bar { height:3px; margin-top:-1.5px; background:currentColor; min-width:1px; }
.strip .point { width:11px; height:11px; margin:-5.5px; border-radius:50%; background:var(--paper);
  border:3px solid currentColor; }
.strip.better .point,.strip.worse .point { background:currentColor; }
.axis .strip i { transform:translate(-50%,-50%); font-style:normal; font-size:.8rem; white-space:nowrap; }
.controls { display:flex; flex-wrap:wrap; gap:.4rem .8rem; align-items:center; font-size:.875rem; margin:.5rem 0; }
.controls label { display:flex; align-items:center; gap:.35rem; }
.controls input[type=range] { width:7rem; padding:0; }
select,button,input { font:inherit; color:var(--ink); background:var(--panel); border:1px solid var(--rule);
  border-radius:5px; padding:.25rem .5rem; max-width:100%; }
button { cursor:pointer; }
:focus-visible { outline:2px solid var(--accent); outline-offset:1px; }
.chart { height:430px; width:100%; }
.chart.empty { height:auto; }
.legend { display:flex; flex-wrap:wrap; gap:.3rem; max-height:11rem; overflow-y:auto; margin:.25rem 0; padding:2px; }
.legend button { display:flex; align-items:center; gap:.4rem; text-align:left; font-size:.8125rem;
  overflow-wrap:anywhere; }
.legend button[aria-pressed=false] { opacity:.5; text-decoration:line-through; }
.legend svg { flex:none; }
summary { cursor:pointer; padding:.3rem 0; font-weight:600; }
dl { display:grid; grid-template-columns:minmax(8rem,max-content) 1fr; gap:.1rem .8rem; margin:.25rem 0;
  font-size:.875rem; }
dt { color:var(--soft); }
dd { margin:0; overflow-wrap:anywhere; }
h4 { margin:.6rem 0 .2rem; font-size:.9rem; }
pre { white-space:pre; overflow-x:auto; font-size:.75rem; background:var(--panel); padding:.5rem; max-width:100%; }
.run { border-bottom:1px solid var(--rule); }
.run > summary { font-weight:400; font-size:.875rem; }
@media (max-width:700px) { .chart { height:340px; } .forest li { display:block; padding:.4rem 0; }
  .strip { display:block; margin:.2rem .5rem; } .axis .who { display:none; } dl { grid-template-columns:1fr; }
  dd { margin-bottom:.3rem; } .axis .strip i:first-child:not(:only-child) { transform:translate(-10%,-50%); }
  .axis .strip i:last-child:not(:only-child) { transform:translate(-90%,-50%); } }
@media print { .controls,nav { display:none; } }
"""


PROGRAM = r"""
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
const units = {val: " (nats per token)", diff: " (nats per token)", train_loss: " (nats per token)",
  lr: " (AdamW)", tokens_per_s: " (tokens/s, all ranks)", grad_norm: ""};
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
    yaxis: {...axis, title: {text: what[state.y] + (narrow ? "" : units[state.y])}, type: state.yscale,
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
"""
