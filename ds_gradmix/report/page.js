"use strict";
// Draws the figures of the page by Bokeh. Their colours are names of page.css, so light, dark and paper have their own.
const figures = JSON.parse(document.getElementById("figures").textContent);
const names = Object.keys(figures), form = document.getElementById("view"), root = document.documentElement;
const {ndarray} = Bokeh.require("core/util/ndarray");  // what an image is made of
const every = span(Object.values(figures)), drawn = new Map(), hidden = new Set();
const dark = matchMedia("(prefers-color-scheme: dark)"), PAPER_PIXELS = 680;
let shown = every, style = getComputedStyle(root), generation = 0, printing = false;

function span(all) {
  const ends = all.flatMap(figure => figure.heat
    ? [0.5, figure.heat.cells[0].length - 0.5].map(place => figure.heat.first + figure.heat.width * place)
    : figure.lines.flatMap(line => [line.x[0], line.x[line.x.length - 1]]));
  const least = Math.max(0, Math.min(...ends)), greatest = Math.max(...ends);
  return greatest > least ? [least, greatest] : [Math.max(0, least - 1), least + 1];
}

function color(name) { return style.getPropertyValue(name.slice(4, -1)).trim(); }

function palette(stops, size = 128) {
  const ends = stops.map(stop => color(stop).match(/[0-9a-f]{2}/g).map(pair => parseInt(pair, 16)));  // each as #rrggbb
  return Array.from({length: size}, (_, i) => {
    const place = i / (size - 1) * (ends.length - 1), low = Math.min(Math.floor(place), ends.length - 2);
    const mixed = ends[low].map((value, k) => Math.round(value + (place - low) * (ends[low + 1][k] - value)));
    return "#" + mixed.map(value => value.toString(16).padStart(2, "0")).join("");
  });
}

function emptyFigure(div, own) {
  const range = new Bokeh.Range1d({start: shown[0], end: shown[1], bounds: every});
  const figure = Bokeh.Plotting.figure({
    width: div.clientWidth, height: div.clientHeight, sizing_mode: "stretch_width", toolbar_location: null, tools: [],
    x_range: range, y_axis_type: own.log ? "log" : "linear", x_axis_label: "step", y_axis_label: own.axis,
    background_fill_color: own.heat ? color("var(--missing)") : null, border_fill_color: null,
    outline_line_color: null, min_border_right: 24,
  });
  const soft = color("var(--soft)"), rule = color("var(--rule)"), font = getComputedStyle(document.body).fontFamily;
  const text = {major_label_text_color: color("var(--ink)"), major_label_text_font: font, major_label_text_font_size: "12px",
    axis_label_text_color: soft, axis_label_text_font: font, axis_label_text_font_style: "normal", axis_label_text_font_size: "13px",
    axis_line_color: rule, major_tick_line_color: rule, minor_tick_line_color: null};
  for (const axis of [...figure.below, ...figure.left]) axis.setv(text);
  for (const grid of figure.center) grid.setv({grid_line_color: own.heat ? null : color("var(--grid)")});
  figure.below[0].formatter = new Bokeh.NumeralTickFormatter({format: "0,0"});
  const narrow = div.clientWidth < 600;
  figure.below[0].ticker.min_interval = 1;
  figure.below[0].ticker.desired_num_ticks = narrow ? (own.heat ? 2 : 4) : 10;
  const Formatter = own.format?.startsWith("%") ? Bokeh.PrintfTickFormatter : Bokeh.NumeralTickFormatter;
  if (own.format) figure.left[0].formatter = new Formatter({format: own.format});
  figure.add_tools(new Bokeh.BoxZoomTool({dimensions: "width"}));
  range.change.connect(() => { if (drawn.get(div.id) === figure) follow(range.start, range.end); });
  return figure;
}

function addLines(figure, own) {
  for (const line of own.lines) {
    if (hidden.has(line.run)) continue;
    const full = color(line.color), pale = palette([line.color, "var(--page)"])[64];
    const dash = {solid: [], dash: [7, 4], dot: [2, 4]}[line.dash];
    if (line.smoothed) addLine(figure, line, line.name, {line_color: pale, line_width: 1});
    addLine(figure, line.smoothed ?? line, line.smoothed ? `${line.name}, smoothed` : line.name,
      {line_color: full, line_width: 2.25, line_dash: dash}, line.marks ? full : null);
  }
}

function addLine(figure, {x, y}, name, look, marks) {
  const source = new Bokeh.ColumnDataSource({data: {x, y}}), at = [{field: "x"}, {field: "y"}];
  const line = figure.line(...at, {source, name, ...look});
  if (marks) figure.scatter(...at, {source, size: 5, fill_color: marks, line_color: null});
  figure.add_tools(new Bokeh.HoverTool({renderers: [line], formatters: {"@y": "printf"},
    tooltips: [["", "$name"], ["step", "@x{0,0}"], ["value", "@y{%.5g}"]]}));
}

function addHeat(figure, {heat, marks}) {
  const most = innerWidth < 600 ? 14 : 28;
  const shortened = label => label.length > most ? "…" + label.slice(1 - most) : label;
  const rows = heat.cells.length, places = heat.cells.map((_, row) => rows - 1 - row);
  const low = heat.ticks[0], high = heat.ticks[heat.ticks.length - 1], colors = palette(heat.colors), missing = color("var(--missing)");
  const mapper = new Bokeh.LinearColorMapper({palette: colors, low, high, nan_color: missing});
  const asImage = row => ndarray(row.map(value => value === null ? NaN : value), {dtype: "float64", shape: [1, row.length]});
  const source = new Bokeh.ColumnDataSource({data: {image: heat.cells.map(asImage), meant: heat.meant.map(row => [row]),
    name: heat.names, y: places}});
  const image = figure.image({image: {field: "image"}, x: heat.first, y: {field: "y"}, dw: heat.width * heat.cells[0].length, dh: 1,
    source, color_mapper: mapper});
  figure.add_tools(new Bokeh.HoverTool({renderers: [image], tooltips: [["", "@name"], ["step", "$x{0,0}"], [heat.unit, "@meant"]]}));
  const axis = figure.left[0];
  figure.y_range = new Bokeh.Range1d({start: 0, end: rows});
  axis.ticker = new Bokeh.FixedTicker({ticks: places.map(place => place + 0.5)});
  axis.major_label_overrides = new Map(places.map((place, row) => [place + 0.5, shortened(heat.labels[row])]));
  for (const each of marks) {
    const data = {x: each.x, y: each.row.map(row => rows - 0.5 - row), text: each.text};
    const line = color("var(--mark)");
    const signs = figure.scatter({field: "x"}, {field: "y"}, {source: new Bokeh.ColumnDataSource({data}), marker: each.marker, size: 10,
      line_color: line, line_width: 2, fill_color: null});
    figure.add_tools(new Bokeh.HoverTool({renderers: [signs], tooltips: [["step", "@x{0,0}"], ["", "@text"]]}));
  }
  const ticks = new Bokeh.FixedTicker({ticks: heat.ticks});
  figure.add_layout(new Bokeh.ColorBar({color_mapper: mapper, ticker: ticks, width: 12, padding: 4, title: heat.unit, title_standoff: 8,
    major_label_overrides: new Map(heat.ticks.map((tick, i) => [tick, heat.texts[i]])), background_fill_color: null,
    major_label_text_color: color("var(--ink)"), title_text_color: color("var(--soft)"), title_text_font_style: "normal",
    major_tick_line_color: null, major_label_text_font_size: "12px"}), "right");
}

async function draw(name) {
  const div = document.getElementById(name), own = figures[name], figure = emptyFigure(div, own);
  (own.heat ? addHeat : addLines)(figure, own);
  div.replaceChildren();
  drawn.set(name, figure);
  await Bokeh.Plotting.show(figure, div);
  unfocus(div);
}

// A drawing is an image, and nothing inside of it is for the keyboard: its numbers are in the table.
function unfocus(node) {
  for (const each of node.querySelectorAll("*")) {
    if (each.hasAttribute("tabindex")) each.removeAttribute("tabindex");
    if (each.shadowRoot) unfocus(each.shadowRoot);
  }
}

// Those on the screen first, so that the page answers at once.
async function drawAll() {
  const mine = ++generation;
  style = getComputedStyle(root);
  root.classList.toggle("dark", dark.matches);
  const visible = name => { const box = document.getElementById(name).getBoundingClientRect(); return box.top < innerHeight && box.bottom > 0; };
  const ordered = [...names.filter(visible), ...names.filter(name => !visible(name))];
  for (const name of ordered) {
    if (mine !== generation) return;
    if (!visible(name)) root.dataset.openedAfterMs ??= Math.round(performance.now());
    await draw(name);
  }
  root.dataset.openedAfterMs ??= Math.round(performance.now());
  root.dataset.drawnAfterMs ??= Math.round(performance.now());  // for tests
}

// All charts show the same steps.
function follow(from, to) {
  if (from === shown[0] && to === shown[1]) return;
  shown = [from, to];
  for (const figure of drawn.values()) figure.x_range.setv({start: from, end: to});
  const all = from === every[0] && to === every[1];
  form.elements.from.value = all ? "" : Math.max(0, Math.round(from));
  form.elements.to.value = all ? "" : Math.round(to);
}

form.addEventListener("submit", event => {
  event.preventDefault();
  const [from, to] = ["from", "to"].map((name, i) => form.elements[name].value === "" ? every[i] : Number(form.elements[name].value));
  if (from < to) follow(Math.max(from, every[0]), Math.min(to, every[1]));
});
form.addEventListener("reset", event => { event.preventDefault(); follow(...every); });
form.addEventListener("change", event => {
  if (event.target.dataset.run === undefined) return;
  hidden[event.target.checked ? "delete" : "add"](Number(event.target.dataset.run));
  drawAll();
});
dark.addEventListener("change", () => { if (!printing) drawAll(); });
// A printer does not wait for charts to be drawn anew.
addEventListener("beforeprint", () => {
  printing = true;
  const width = document.querySelector(".plot")?.clientWidth;
  root.style.setProperty("--drawn-width", `${width}px`);
  root.style.setProperty("--paper-zoom", Math.min(1, PAPER_PIXELS / width));
});
addEventListener("afterprint", () => { printing = false; });
["from", "to"].forEach((name, i) => { form.elements[name].placeholder = Math.round(every[i]); });
drawAll();
