// The frontier in two metrics, drawn by plotly.js.

const SYMBOLS = { normal: "circle", slower: "triangle-down", simulated: "square" };
const FEW_TICKS = 4;
const MANY_BARS = 60; // possible members beyond which only those of the certain ones and of the selected one have bars

function kindOf(recipe) {
  return recipe.simulated ? "simulated" : recipe.slower ? "slower" : "normal";
}

function axisMetric(which) {
  return metrics[Number(byId(`axis-${which}`).value)];
}

function startFrontier() {
  const objectives = metrics.filter((m) => m.objective);
  const others = metrics.filter((m) => !m.objective);
  const group = (label, members) => members.length
    ? [element("optgroup", { label }, ...members.map((m) => element("option", { value: metricAt.get(m.name) }, m.title)))]
    : [];
  for (const which of ["x", "y"]) {
    const box = byId(`axis-${which}`);
    box.setAttribute("aria-label", which === "x" ? "Horizontal axis" : "Vertical axis");
    box.append(...group("objectives of this frontier", objectives), ...group("also known", others));
    box.addEventListener("change", drawFrontier);
  }
  if (metrics.length) {
    byId("axis-y").value = "0";
    byId("axis-x").value = String(Math.min(1, metrics.length - 1));
  }
  drawLegend();
  onChange(drawFrontier);
  drawFrontier();
}

function drawLegend() {
  const counts = {};
  for (const recipe of recipes) counts[recipe.standing] = (counts[recipe.standing] ?? 0) + (isBaseline(recipe) ? 0 : 1);
  const entry = (standing) => {
    const button = element("button", { type: "button", class: "key", "aria-pressed": !state.hidden.has(standing) ? "true" : "false" },
      mark(standing, "normal"), `${STANDINGS[standing]} (${counts[standing]})`);
    button.addEventListener("click", () => {
      if (!state.hidden.delete(standing)) state.hidden.add(standing);
      button.setAttribute("aria-pressed", state.hidden.has(standing) ? "false" : "true");
      drawFrontier();
    });
    return button;
  };
  const legend = byId("legend");
  legend.append(...Object.keys(STANDINGS).filter((s) => counts[s]).map(entry));
  const plain = (shape, text) => element("span", { class: "key" }, shape, text);
  if (recipes.some(isBaseline)) legend.append(plain(mark("baseline"), "uncompressed baseline"));
  if (recipes.some((r) => r.slower)) legend.append(plain(mark("dominated", "slower"), "slower than it"));
  if (recipes.some((r) => r.simulated)) legend.append(plain(mark("dominated", "simulated"), "simulated quantisation"));
}

/** Returns a small drawing of a point. */
function mark(standing, kind = "normal") {
  const NS = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(NS, "svg");
  svg.setAttribute("viewBox", "-8 -8 16 16");
  svg.setAttribute("class", `mark ${standing}`);
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(NS, "path");
  const shapes = {
    normal: "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
    slower: "M-6,-4.5L6,-4.5L0,6z",
    simulated: "M-4.8,-4.8H4.8V4.8H-4.8z",
    baseline: "M0,-7L1.8,-2.2L6.8,-2L2.8,1.1L4.2,6L0,3.2L-4.2,6L-2.8,1.1L-6.8,-2L-1.8,-2.2z",
    broken: "M-4.5,-4.5L4.5,4.5M-4.5,4.5L4.5,-4.5",
  };
  path.setAttribute("d", shapes[standing] ?? shapes[kind]);
  svg.append(path);
  return svg;
}

// --- the plot --------------------------------------------------------------------------------------------------------

/** Returns the corners of the line that bounds what the points are certain to dominate, or [[], []]. */
function staircase(points, xBetter, yBetter) {
  if (!xBetter || !yBetter) return [[], []];
  const sx = xBetter === "minimize" ? 1 : -1;
  const sy = yBetter === "minimize" ? 1 : -1;
  const sorted = points.map(([x, y]) => [x * sx, y * sy]).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const xs = [], ys = [];
  let best = Infinity;
  for (const [x, y] of sorted) {
    if (y >= best) continue;
    if (xs.length) { xs.push(x * sx); ys.push(best * sy); }
    xs.push(x * sx);
    ys.push(y * sy);
    best = y;
  }
  return [xs, ys];
}

function isLog(metric, values) {
  const low = Math.min(...values), high = Math.max(...values);
  return !["%", "percentage points"].includes(metric.unit) && low > 0 && high / low > 4;
}

/** Returns tick positions on a logarithmic axis between two values, few enough to be read. */
function logTicks(low, high) {
  const decades = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) decades.push(10 ** e);
  for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]]) {
    const found = decades.flatMap((d) => steps.map((s) => Number((d * s).toPrecision(3)))).filter((v) => v >= low && v <= high);
    if (found.length >= FEW_TICKS) return found;
  }
  const step = (high - low) / 5;
  return [1, 2, 3, 4, 5].map((k) => Number((low + (k - 0.5) * step).toPrecision(2)));
}

const hovers = { axes: "", texts: [] }; // a selection or a filter draws again, and thousands of texts take their time

function hoverText(k, x, y) {
  const axes = `${x.name}|${y.name}`;
  if (hovers.axes !== axes) Object.assign(hovers, { axes, texts: [] });
  hovers.texts[k] ??= writeHover(recipes[k], x, y);
  return hovers.texts[k];
}

function writeHover(recipe, x, y) {
  const escape = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const line = (metric) => {
    const k = metricAt.get(metric.name);
    const interval = formatInterval(metric, recipe.low[k], recipe.high[k]);
    return `${escape(metric.title)}: <b>${format(metric, recipe.value[k])}</b>${interval ? ` (${interval})` : ""}`;
  };
  return [
    escape(recipe.label).replaceAll(" + ", "<br>+ "),
    line(y),
    line(x),
    recipe.standing === "possible" ? `on the frontier with probability ${formatProbability(recipe.probability)}` : STANDINGS[recipe.standing],
    recipe.members.length > 1 ? `one of ${recipe.members.length} that noise does not tell apart` : "",
    recipe.slower ? "slower than the baseline" : "",
    recipe.simulated ? "simulated: no speed-up is claimed" : "",
  ].filter(Boolean).join("<br>");
}

/** Returns plotly's error bars of recipes: from their value to the ends of the interval, nothing where it is exact. */
function errorBars(numbers, k, color) {
  const reach = (n, end) => Math.abs((recipes[n][end][k] ?? recipes[n].value[k]) - recipes[n].value[k]);
  return { type: "data", symmetric: false, array: numbers.map((n) => reach(n, "high")), arrayminus: numbers.map((n) => reach(n, "low")),
    thickness: 1, width: 3, color };
}

function frontierTraces(x, y) {
  const kx = metricAt.get(x.name), ky = metricAt.get(y.name);
  const usable = recipes.map((r, k) => k).filter((k) =>
    typeof recipes[k].value[kx] === "number" && typeof recipes[k].value[ky] === "number");
  const visible = usable.filter((k) => state.shown[k]);
  const colours = Object.fromEntries(["certain", "dominated", "baseline", "selected", "page", "member"].map((c) => [c, cssColour(c)]));
  const scatter = (name, numbers, marker, bars) => ({
    type: "scatter",
    mode: "markers",
    name,
    x: numbers.map((n) => recipes[n].value[kx]),
    y: numbers.map((n) => recipes[n].value[ky]),
    text: numbers.map((n) => hoverText(n, x, y)),
    customdata: numbers,
    hovertemplate: "%{text}<extra></extra>",
    marker,
    cliponaxis: false,
    ...(bars ? { error_x: errorBars(numbers, kx, bars), error_y: errorBars(numbers, ky, bars) } : {}),
  });
  const of = (standing) => visible.filter((k) => recipes[k].standing === standing && !isBaseline(recipes[k]) && !state.hidden.has(standing));
  const symbols = (numbers, end = "") => numbers.map((k) => SYMBOLS[kindOf(recipes[k])] + end);
  const line = staircase(usable.filter((k) => recipes[k].standing === "certain").map((k) => [recipes[k].value[kx], recipes[k].value[ky]]), x.better, y.better);
  const [broken, dominated, member, possible, certain] = ["broken", "dominated", "member", "possible", "certain"].map(of);
  const baseline = visible.filter((k) => isBaseline(recipes[k]));
  const many = dominated.length > 500, crowded = possible.length > MANY_BARS;
  const selected = usable.filter((k) => k === state.selected);
  return [
    { type: "scatter", mode: "lines", name: "certain frontier", x: line[0], y: line[1], line: { color: colours.certain, width: 1.2 }, opacity: 0.55, hoverinfo: "skip" },
    scatter("broken", broken, { symbol: "x-thin-open", size: 7, color: colours.dominated, line: { width: 1.2 }, opacity: 0.8 }),
    scatter("dominated", dominated, { symbol: symbols(dominated), size: many ? 5 : 8, color: colours.dominated, opacity: many ? 0.35 : 0.6, line: { width: 0 } }),
    scatter("member", member, { symbol: symbols(member), size: 7, color: colours.member, opacity: 0.9, line: { width: 0 } }),
    scatter("possible", possible, { symbol: symbols(possible), size: crowded ? 7 : 10, color: colours.page, line: { color: colours.certain, width: crowded ? 1.1 : 1.6 } },
      crowded ? null : colours.certain + "66"),
    scatter("certain", certain, { symbol: symbols(certain), size: 11, color: colours.certain, line: { color: colours.page, width: 1 } }, colours.certain + "aa"),
    scatter("baseline", baseline, { symbol: "star", size: 16, color: colours.baseline, line: { color: colours.page, width: 1 } }, colours.baseline + "aa"),
    { ...scatter("selected", selected, { symbol: "circle-open", size: 21, color: colours.selected, line: { width: 2 } }, colours.selected + "aa"), hoverinfo: "skip", hovertemplate: null },
  ];
}

function drawFrontier(what) {
  const plot = byId("frontier-plot");
  if (!recipes.length) {
    plot.hidden = true;
    byId("frontier-note").textContent = "There is nothing to draw: no trial has measured a recipe yet.";
    return;
  }
  const x = axisMetric("x"), y = axisMetric("y");
  const traces = frontierTraces(x, y);
  const axis = (metric, which) => {
    const k = metricAt.get(metric.name);
    const values = recipes.map((r) => r.value[k]).filter((v) => typeof v === "number");
    const log = isLog(metric, values);
    const made = { type: log ? "log" : "linear", title: { text: axisTitle(metric), standoff: 12 }, automargin: true, zeroline: false,
      showline: true, ticks: "outside", ticklen: 4, nticks: 7 };
    const byte = metric.unit === "bytes";
    if (log) logAxis(made, metric, plot, which, values);
    else if (byte || metric.unit === "") Object.assign(made, { tickformat: "~s", ticksuffix: byte ? "B" : "" });
    return made;
  };
  const layout = baseLayout({
    xaxis: axis(x, "xaxis"),
    yaxis: axis(y, "yaxis"),
    hovermode: "closest",
    margin: { l: 56, r: 16, t: 12, b: 52 },
    uirevision: `${x.name}|${y.name}`, // a filter or a selection keeps the zoom
    dragmode: "zoom",
  });
  const fresh = !plot.on;
  Plotly.react(plot, traces, layout, plotConfig("frontier"));
  if (fresh) {
    plot.on("plotly_click", (event) => select(event.points[0].customdata));
    plot.on("plotly_relayout", (change) => {
      if (Object.keys(change).some((name) => /^[xy]axis\.(range|autorange)/.test(name))) drawFrontier("ticks");
    });
  }
  if (what === "ticks") return;
  const better = [y, x].filter((m) => m.better).map((m) => `${m.title}: ${m.better === "minimize" ? "less" : "more"} is better`);
  const off = data.objectives.filter((name) => name !== x.name && name !== y.name).map((name) => metrics[metricAt.get(name)].title);
  byId("frontier-note").textContent = [
    better.join("; ") + ".",
    off.length ? `Members may owe their place to what is not on the axes: ${off.join(", ")}.` : "",
    "Bars are 95 % intervals of members and of the selected recipe; without one a value is exact. The line bounds what the certain members dominate in these two.",
  ].filter(Boolean).join(" ");
}

/** Gives a logarithmic axis ticks that say their unit and fit its present range. */
function logAxis(axis, metric, plot, which, values) {
  const zoomed = plot._fullLayout?.[which];
  const kept = zoomed && zoomed.type === "log" && zoomed.title?.text === axis.title.text && zoomed.autorange !== true;
  const [low, high] = kept ? zoomed.range.map((v) => 10 ** v).sort((a, b) => a - b) : [Math.min(...values) / 1.25, Math.max(...values) * 1.25];
  const ticks = logTicks(low, high);
  axis.tickvals = ticks;
  axis.ticktext = ticks.map((v) => {
    const [text, prefix] = scaled(v, 3);
    return metric.unit === "bytes" ? `${text}\u00a0${prefix}B` : text + prefix;
  });
}

function baseLayout(more) {
  const text = cssColour("text"), faint = cssColour("rule");
  const axis = { color: cssColour("soft"), gridcolor: faint, linecolor: faint, tickcolor: faint, title: { font: { color: text, size: 13 } } };
  const merged = { ...more };
  for (const name of ["xaxis", "yaxis"]) merged[name] = { ...axis, ...more[name], title: { ...axis.title, ...more[name]?.title } };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: text },
    hoverlabel: { align: "left", bgcolor: cssColour("card"), bordercolor: faint, font: { color: text, size: 13 } },
    showlegend: false,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: cssColour("dominated"), activecolor: text },
    ...merged,
  };
}

function plotConfig(name) {
  return {
    responsive: true,
    displaylogo: false,
    displayModeBar: "hover",
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
    toImageButtonOptions: { format: "svg", filename: `${data.study}-${name}` },
    showTips: false,
  };
}
