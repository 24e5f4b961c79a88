// Parallel coordinates on a canvas: plotly.js needs WebGL for them, which not every reader's browser gives, and knows no
// place for a parameter that a recipe does not have.

// Pixels; ABSENT: below an axis, where recipes without the parameter pass; NARROW, WIDE: least room of an axis of a
// parameter and of an objective; LANE: reach of a drag.
const TOP = 50, PLOT = 250, ABSENT = 30, LEFT = 58, RIGHT = 44, NARROW = 60, WIDE = 98, LANE = 12;
const FEW_VALUES = 7;
const parallel = { axes: [], left: [], hovered: -1, drag: null, techniques: new Set() };

function startParallel() {
  const techniques = [...new Set(data.parameters.map((p) => p.name.split(".")[0]))];
  const used = new Set(recipes.flatMap((r) => (r.standing === "certain" || r.standing === "possible" ? r.steps.map(([t]) => t) : [])));
  parallel.techniques = new Set(techniques.filter((t) => used.has(t) || !used.size));
  byId("parallel-controls").append(...techniques.map((technique) => {
    const box = element("input", { type: "checkbox", checked: parallel.techniques.has(technique) });
    box.addEventListener("change", () => {
      if (box.checked) parallel.techniques.add(technique);
      else parallel.techniques.delete(technique);
      for (const name of state.ranges.keys()) if (name.startsWith(`${technique}.`) && !box.checked) state.ranges.delete(name);
      layoutParallel();
      applyFilter();
    });
    return element("label", { class: "choice" }, box, ` ${technique}`);
  }));
  const canvas = byId("parallel-canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Parallel coordinates of objectives and parameters; the table below has the same numbers");
  canvas.addEventListener("pointerdown", startDrag);
  canvas.addEventListener("pointermove", moveOver);
  canvas.addEventListener("pointerup", endDrag);
  canvas.addEventListener("pointerleave", () => hover(-1));
  new ResizeObserver(() => { layoutParallel(); drawParallel(); }).observe(canvas.parentElement);
  onChange(drawParallel);
  layoutParallel();
  drawParallel();
}

// --- geometry --------------------------------------------------------------------------------------------------------

function layoutParallel() {
  const parameters = data.parameters.filter((p) => parallel.techniques.has(p.name.split(".")[0])).map(parameterAxis);
  parallel.axes = [...parameters, ...metrics.filter((m) => m.objective).map(metricAxis)].filter(Boolean);
  const canvas = byId("parallel-canvas");
  const room = canvas.parentElement.clientWidth;
  const least = parallel.axes.map((axis, k) => (k ? (axis.group ? NARROW : WIDE) : 0));
  const total = least.reduce((sum, gap) => sum + gap, 0);
  const stretch = Math.max(1, (room - LEFT - RIGHT) / Math.max(1, total));
  let x = LEFT;
  parallel.left = least.map((gap) => (x += gap * stretch));
  const width = Math.max(room, x + RIGHT), height = TOP + PLOT + ABSENT + 14;
  const sharp = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * sharp);
  canvas.height = Math.round(height * sharp);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
}

function parameterAxis(parameter) {
  const [technique, name] = [parameter.name.split(".")[0], parameter.name.split(".").slice(1).join(".")];
  const numbers = numbersCalled(parameter.name) ?? (() => []);
  const values = recipes.map((r) => numbers(r).find((v) => typeof v === "number"));
  const seen = [...new Set([...parameter.values, ...values.filter((v) => v !== undefined)])].sort((a, b) => a - b);
  const [low, high] = [seen[0], seen[seen.length - 1]];
  const ticks = seen.length <= FEW_VALUES ? seen : [low, (low + high) / 2, high];
  return { key: parameter.name, group: technique, title: name, values, low, high, log: false, flip: false, spread: true,
    ticks: ticks.map((v) => [v, significant(v, 3)]) };
}

function metricAxis(metric) {
  const k = metricAt.get(metric.name);
  const values = recipes.map((r) => (typeof r.value[k] === "number" ? r.value[k] : undefined));
  const known = values.filter((v) => v !== undefined);
  if (!known.length) return null;
  const low = Math.min(...known), high = Math.max(...known);
  const log = isLog(metric, known);
  const ticks = log ? logTicks(low, high) : linearTicks(low, high);
  return { key: metric.name, group: null, title: metric.title.split(",")[0], values, low, high, log, flip: metric.better === "minimize",
    spread: false, ticks: ticks.map((v) => [v, tickText(metric, v)]) };
}

function tickText(metric, value) {
  if (metric.unit === "bytes" || metric.unit === "") {
    const [text, prefix] = scaled(value, 3);
    return `${text}${prefix || metric.unit ? "\u00a0" : ""}${prefix}${metric.unit ? "B" : ""}`;
  }
  return metric.unit === "%" || metric.unit === "percentage points" ? significant(value, 4)
    : Math.abs(value) >= 9999 ? `${significant(value / 1e3, 3)}\u00a0k` : significant(value, 3);
}

function linearTicks(low, high) {
  if (low === high) return [low];
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((s) => s * power).find((s) => s >= rough);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(Number(v.toPrecision(6)));
  return found;
}

function yOf(axis, value) {
  const scale = axis.log ? Math.log : (v) => v;
  const span = scale(axis.high) - scale(axis.low);
  const part = span ? (scale(value) - scale(axis.low)) / span : 0.5;
  return TOP + PLOT * (axis.flip ? part : 1 - part);
}

function valueAt(axis, y) {
  const part = Math.min(1, Math.max(0, (y - TOP) / PLOT));
  const up = axis.flip ? part : 1 - part;
  return axis.log ? axis.low * (axis.high / axis.low) ** up : axis.low + (axis.high - axis.low) * up;
}

/** Returns where the line of recipe `k` meets an axis; equal settings are spread a little, so that many look like many. */
function heightOf(axis, k) {
  const value = axis.values[k];
  const spread = axis.spread ? ((k * 7) % 11) - 5 : 0;
  return (value === undefined ? TOP + PLOT + ABSENT : yOf(axis, value)) + spread * 0.8;
}

// --- drawing ---------------------------------------------------------------------------------------------------------

function drawParallel() {
  const canvas = byId("parallel-canvas");
  if (parallel.axes.length < 2 || !recipes.length) {
    canvas.hidden = true;
    return;
  }
  canvas.hidden = false;
  const sharp = window.devicePixelRatio || 1;
  const pen = canvas.getContext("2d");
  pen.setTransform(sharp, 0, 0, sharp, 0, 0);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  const order = ["broken", "dominated", "member", "possible", "certain"];
  const many = recipes.length > 300;
  const styles = { dominated: [cssColour("dominated"), many ? 0.12 : 0.35, 1], member: [cssColour("member"), 0.5, 1],
    possible: [cssColour("certain"), many ? 0.25 : 0.55, 1], certain: [cssColour("certain"), 0.95, 1.8] };
  for (const standing of order)
    recipes.forEach((recipe, k) => {
      const style = styles[standing];
      if (recipe.standing !== standing || !style || !state.shown[k] || k === state.selected) return;
      strokeLine(pen, k, isBaseline(recipe) ? [cssColour("baseline"), 0.9, 1.8] : style, standing === "possible");
    });
  if (state.selected >= 0) strokeLine(pen, state.selected, [cssColour("selected"), 1, 2.6]);
  if (parallel.hovered >= 0) strokeLine(pen, parallel.hovered, [cssColour("text"), 1, 2]);
  drawAxes(pen);
}

function strokeLine(pen, k, [colour, alpha, width], dashed = false) {
  pen.beginPath();
  parallel.axes.forEach((axis, j) => {
    const y = heightOf(axis, k);
    if (j) pen.lineTo(parallel.left[j], y);
    else pen.moveTo(parallel.left[j], y);
  });
  pen.setLineDash(dashed ? [5, 3] : []);
  pen.strokeStyle = colour;
  pen.globalAlpha = alpha;
  pen.lineWidth = width;
  pen.lineJoin = "round";
  pen.stroke();
  pen.globalAlpha = 1;
  pen.setLineDash([]);
}

function drawAxes(pen) {
  const family = getComputedStyle(document.body).fontFamily;
  const text = cssColour("text"), soft = cssColour("soft"), page = cssColour("page");
  const write = (words, x, y, { font = 12, colour = text, align = "center", room = Infinity, halo = true, weight = "" } = {}) => {
    pen.font = `${weight} ${font}px ${family}`;
    let shown = words;
    while (pen.measureText(shown).width > room && shown.length > 3) shown = `${shown.slice(0, -2)}…`;
    pen.textAlign = align;
    pen.lineWidth = 4;
    pen.lineJoin = "round";
    pen.strokeStyle = page;
    if (halo) pen.strokeText(shown, x, y);
    pen.fillStyle = colour;
    pen.fillText(shown, x, y);
  };
  parallel.axes.forEach((axis, j) => {
    const x = parallel.left[j];
    pen.fillStyle = soft;
    pen.fillRect(x - 0.5, TOP - 6, 1, PLOT + 12);
    if (axis.group) pen.fillRect(x - 3, TOP + PLOT + ABSENT - 0.5, 6, 1);
    for (const [value, words] of axis.ticks) {
      pen.fillStyle = soft;
      pen.fillRect(x - 4, yOf(axis, value) - 0.5, 4, 1);
      write(words, x - 7, yOf(axis, value) + 4, { font: 11, colour: soft, align: "right" });
    }
    const room = Math.min(x - (parallel.left[j - 1] ?? -99), (parallel.left[j + 1] ?? x + 2 * RIGHT) - x);
    write(axis.title, x, TOP - 14, { font: axis.group ? 11 : 12, weight: axis.group ? "" : "600", room: axis.group ? room + 4 : WIDE - 2, halo: false });
    const first = axis.group && axis.group !== parallel.axes[j - 1]?.group;
    if (first) {
      const count = parallel.axes.filter((other) => other.group === axis.group).length;
      const right = parallel.left[j + count - 1];
      write(axis.group, (x + right) / 2, TOP - 36, { font: 11, colour: soft, room: right - x + 2 * NARROW - 20, halo: false });
      pen.fillRect(x - 20, TOP - 30, right - x + 40, 1);
    }
    const range = state.ranges.get(axis.key);
    if (range) {
      const [from, to] = range.map((v) => yOf(axis, v));
      pen.fillStyle = cssColour("selected");
      pen.globalAlpha = 0.3;
      pen.fillRect(x - 6, Math.min(from, to) - 2, 12, Math.abs(from - to) + 4);
      pen.globalAlpha = 1;
    }
  });
  if (parallel.axes.some((axis) => axis.group)) write("not used", parallel.left[0] - 8, TOP + PLOT + ABSENT + 4, { font: 11, colour: soft, align: "right" });
}

// --- pointer ---------------------------------------------------------------------------------------------------------

function axisNear(x) {
  return parallel.left.findIndex((left) => Math.abs(left - x) <= LANE);
}

function startDrag(event) {
  const at = axisNear(event.offsetX);
  if (at < 0) {
    if (parallel.hovered >= 0) select(parallel.hovered);
    return;
  }
  event.target.setPointerCapture(event.pointerId);
  parallel.drag = { axis: parallel.axes[at], from: event.offsetY, moved: false };
}

function moveOver(event) {
  const drag = parallel.drag;
  if (!drag) {
    const at = axisNear(event.offsetX);
    event.target.style.cursor = at >= 0 ? "ns-resize" : "default";
    hover(at >= 0 ? -1 : lineNear(event.offsetX, event.offsetY), event);
    return;
  }
  if (Math.abs(event.offsetY - drag.from) > 3) drag.moved = true;
  if (!drag.moved) return;
  const ends = [valueAt(drag.axis, drag.from), valueAt(drag.axis, event.offsetY)].sort((a, b) => a - b);
  state.ranges.set(drag.axis.key, ends);
  drawParallel();
}

function endDrag() {
  const drag = parallel.drag;
  if (!drag) return;
  parallel.drag = null;
  if (!drag.moved) state.ranges.delete(drag.axis.key);
  applyFilter();
}

/** Returns the number of the recipe whose line passes within a few pixels of a place, the better standing first; or -1. */
function lineNear(x, y) {
  const j = parallel.left.findLastIndex((left) => left <= x);
  if (j < 0 || j + 1 >= parallel.left.length) return -1;
  const part = (x - parallel.left[j]) / (parallel.left[j + 1] - parallel.left[j]);
  let best = -1, reach = 5;
  recipes.forEach((recipe, k) => {
    if (!state.shown[k] || recipe.standing === "broken") return;
    const from = heightOf(parallel.axes[j], k), to = heightOf(parallel.axes[j + 1], k);
    const distance = Math.abs(from + (to - from) * part - y) + (recipe.standing === "dominated" ? 1.5 : 0);
    if (distance < reach) [best, reach] = [k, distance];
  });
  return best;
}

function hover(k, event) {
  const tip = byId("tip") ?? document.body.appendChild(element("div", { id: "tip", role: "tooltip" }));
  tip.hidden = k < 0;
  if (k >= 0) {
    tip.textContent = `${recipes[k].label} – ${STANDINGS[recipes[k].standing]}`;
    tip.style.left = `${Math.min(event.pageX + 14, document.documentElement.clientWidth - 340)}px`;
    tip.style.top = `${event.pageY + 14}px`;
    byId("parallel-canvas").style.cursor = "pointer";
  }
  if (k !== parallel.hovered) {
    parallel.hovered = k;
    drawParallel();
  }
}
