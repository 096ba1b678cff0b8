"use strict";
// The plots of tools/report.py. Their numbers stand in #numbers; text is in the page already.

let numbers = JSON.parse(document.getElementById("numbers").textContent);
const chosen = new Set();  // labels of the arms that are shown alone; none: all are shown
const drawn = new Set();   // ids of the plots that have come into view
const touch = matchMedia("(pointer: coarse)").matches;
const dark = matchMedia("(prefers-color-scheme: dark)");
const config = {responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
                modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]]};

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function isShown(label) {
  return chosen.size === 0 || chosen.has(label);
}

// Looks ---------------------------------------------------------------------------------------

// A trace in its arm's colour; the baseline's, which has none, in that of the text.
function painted(trace) {
  const own = trace.meta.colour ?? colour("--ink");
  const copy = {...trace, visible: isShown(trace.meta.label)};
  copy.line = {width: 2, ...trace.line, color: own};
  copy.marker = {size: 8, ...trace.marker, color: own};
  for (const bar of ["error_x", "error_y"]) {
    if (trace[bar]) copy[bar] = {thickness: 1.5, width: 4, ...trace[bar], color: own};
  }
  if (trace.fill) copy.fillcolor = own + "28";  // of 255: faint
  return copy;
}

function layoutOf(own) {
  const ink = colour("--ink");
  const axis = {gridcolor: colour("--grid"), zerolinecolor: colour("--grid"), automargin: true};
  const shapes = (own.shapes ?? []).map(shape => ({...shape, line: {color: ink, ...shape.line}}));
  return {
    autosize: true, height: 360, margin: {l: 50, r: 12, t: touch ? 8 : 30, b: 45},
    showlegend: false, hovermode: "closest", dragmode: touch ? false : "zoom", uirevision: "kept",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {color: ink, size: 12, family: "system-ui, sans-serif"},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("--quiet"), activecolor: ink},
    ...own, shapes, xaxis: {...axis, ...own.xaxis}, yaxis: {...axis, ...own.yaxis},
  };
}

// Curves --------------------------------------------------------------------------------------

// The rows of a run that have both values: [{iter, x, y}].
function points(run, x, y) {
  const found = [];
  for (let i = 0; i < run.iter.length; i++) {
    if (run[x][i] !== null && run[y][i] !== null) {
      found.push({iter: run.iter[i], x: run[x][i], y: run[y][i]});
    }
  }
  return found;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

function line(arm, name, x, y, more) {
  return {type: "scatter", mode: "lines", name, meta: arm.meta, x, y,
          hovertemplate: "%{y:.4f} at %{x:,.4~s}<extra>%{fullData.name}</extra>",
          ...more, line: {dash: arm.dash, ...more.line}};
}

function eachSeed(arm, x, y) {
  return arm.runs.map(run => {
    const found = points(run, x, y), name = `${arm.name}, seed ${run.seed}`;
    return line(arm, name, found.map(p => p.x), found.map(p => p.y), {line: {width: 1}});
  });
}

// Median and range of the seeds, where all of them have a value.
function band(arm, x, y) {
  const runs = arm.runs.map(run => new Map(points(run, x, y).map(p => [p.iter, p])));
  const steps = [...runs[0].keys()].filter(step => runs.every(run => run.has(step)));
  const xs = steps.map(step => median(runs.map(run => run.get(step).x)));
  const over = choose => steps.map(step => choose(runs.map(run => run.get(step).y)));
  const edge = {line: {width: 0}, hoverinfo: "skip", hovertemplate: null};
  const marks = y === "train_loss" ? {} : {mode: "lines+markers", marker: {size: 5}};
  const middle = line(arm, arm.name, xs, over(median), marks);
  if (runs.length === 1) return [middle];
  return [line(arm, arm.name, xs, over(values => Math.max(...values)), edge),
          line(arm, arm.name, xs, over(values => Math.min(...values)), {...edge, fill: "tonexty"}),
          middle];
}

// Those that can be shown beside values without squeezing them to less than half.
function near(lines, values) {
  const low = Math.min(...values), high = Math.max(...values), reach = high - low;
  return lines.filter(({loss}) => loss >= low - reach && loss <= high + reach);
}

function curvesOf(curves, element) {
  const value = name => element.closest("figure").querySelector(`[name=${name}]`).value;
  const x = value("x"), y = value("y");
  const drawn = value("seeds") === "band" ? band : eachSeed;
  const traces = curves.arms.flatMap(arm => drawn(arm, x, y));
  // far above all others: left out of the frame until it is chosen
  const cut = chosen.size === 0 && y !== "val_accuracy" ? curves.beyond : [];
  const values = traces.filter(trace => !cut.includes(trace.meta.label)).flatMap(trace => trace.y);
  const lines = y === "val_accuracy" ? [] : near(curves.lines, values);
  const room = 0.05 * (Math.max(...values) - Math.min(...values));
  const low = Math.min(...values, ...lines.map(({loss}) => loss)) - room;
  const range = cut.length ? {range: [low, Math.max(...values) + room]} : {};
  const shapes = lines.map(({name, loss}) => ({
    type: "line", xref: "paper", x0: 0, x1: 1, y0: loss, y1: loss, line: {dash: "dot", width: 1},
    label: {text: name, textposition: "end", font: {size: 10}}}));
  return [traces, {xaxis: {title: {text: curves.axes[x]}, rangemode: "tozero"},
                   yaxis: {title: {text: curves.quantities[y]}, ...range}, shapes,
                   uirevision: `${x} ${y} ${cut.length}`, height: 420}];
}

// Maps ----------------------------------------------------------------------------------------

const FAINTEST = 1e-3;  // weights below look like it

function mapOf({tokens, maps}, element) {
  const map = maps[element.closest("figure").querySelector("[name=map]").value];
  const n = map.values.length, at = [...Array(n).keys()];
  const ticks = {tickvals: at, ticktext: tokens.slice(0, n), tickangle: 0, showgrid: false,
                 zeroline: false, constrain: "domain",
                 tickfont: {size: n > 40 ? 8 : 11, family: "monospace"}};
  const shade = value => value > 0 ? Math.log10(Math.max(value, FAINTEST)) : null;
  const heat = {
    type: "heatmap", meta: {label: "", colour: null}, colorscale: "Viridis",
    reversescale: !dark.matches, z: map.values.map(row => row.map(shade)), customdata: map.values,
    text: map.values.map((row, t) => row.map((_, s) => (
      `${tokens[t]} (${t}) on ${tokens[s]} (${s})`))),
    hovertemplate: "%{text}: %{customdata:.3g}<extra></extra>",
    colorbar: {thickness: 10, title: {text: "log10", side: "right"}}};
  const width = Math.min(element.clientWidth, 720);
  return [[heat], {width, height: width - 40, xaxis: {...ticks, title: {text: "token attended to"}},
                   yaxis: {...ticks, title: {text: "token that attends"}, autorange: "reversed",
                           scaleanchor: "x"}}];
}

// Drawing -------------------------------------------------------------------------------------

function contentOf(element) {
  const [, section, what] = element.id.match(/^s(\d+)-(.+)$/);
  const of = numbers.sections[section];
  if (what === "curves") return curvesOf(of.curves, element);
  if (what === "map") return mapOf(of.maps, element);
  const figure = of.figures[what.slice(1)];
  if (!figure.cut || chosen.size === 0) return [figure.traces, figure.layout];
  const {range, ...whole} = figure.layout[figure.cut];  // what was chosen is shown whole
  return [figure.traces, {...figure.layout, [figure.cut]: whole, uirevision: "whole"}];
}

function draw(element) {
  const [traces, layout] = contentOf(element);
  drawn.add(element.id);
  const looks = traces.map(trace => trace.type === "heatmap" ? trace : painted(trace));
  Plotly.react(element, looks, layoutOf(layout), config);
}

function drawAgain() {
  for (const id of drawn) draw(document.getElementById(id));
}

function filter() {
  for (const button of document.querySelectorAll("#chips button")) {
    button.setAttribute("aria-pressed", chosen.has(button.dataset.label));
  }
  for (const row of document.querySelectorAll("td:first-child")) {
    row.parentElement.hidden = !isShown(row.parentElement.dataset.label);
  }
}

document.getElementById("chips").addEventListener("click", event => {
  const button = event.target.closest("button");
  if (!button) return;
  const label = button.dataset.label;
  if (!chosen.delete(label)) chosen.add(label);
  filter();
  drawAgain();
});
document.addEventListener("change", event => {
  if (event.target.matches("select")) draw(event.target.closest("figure").querySelector(".plot"));
});
dark.addEventListener("change", drawAgain);

const observer = new IntersectionObserver(entries => {
  for (const {isIntersecting, target} of entries) {
    if (isIntersecting && !drawn.has(target.id)) draw(target);
  }
}, {rootMargin: "400px"});
for (const element of document.querySelectorAll(".plot")) observer.observe(element);
addEventListener("beforeprint", () => document.querySelectorAll(".plot").forEach(draw));

// Live ----------------------------------------------------------------------------------------

const SECONDS = 5;  // between two looks at the runs
const said = {};    // id of an element: the words that it has

// What a page must have anew to show other numbers than it was made for.
function shape(of) {
  return JSON.stringify(of.sections.map(({curves, figures, maps}) => [
    curves && [Object.keys(curves.quantities), curves.arms.map(arm => arm.meta.label)],
    figures.map(figure => figure.title), maps && maps.maps.length]));
}

async function update() {
  const note = document.getElementById("live");
  note.hidden = false;
  try {
    const news = await (await fetch("numbers.json", {cache: "no-store"})).json();
    note.textContent = news.error ?? `live, as of ${new Date().toLocaleTimeString()}`;
    if (news.error) return;
    if (shape(news.numbers) !== shape(numbers)) location.reload();
    const before = JSON.stringify(numbers);
    numbers = news.numbers;
    for (const [id, words] of Object.entries(news.words)) {
      if (words === said[id]) continue;  // what was folded open stays so
      document.getElementById(id).innerHTML = said[id] = words;
    }
    filter();
    if (JSON.stringify(numbers) !== before) drawAgain();
  } catch {
    note.textContent = "the server does not answer: this is what it said last";
  }
}

if (numbers.live) {
  update();
  setInterval(update, 1000 * SECONDS);
}
