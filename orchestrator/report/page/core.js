// Data, state and formats that the parts of the page share.

const data = JSON.parse(document.getElementById("data").textContent);
const metrics = data.metrics;
const recipes = data.recipes;
const metricAt = new Map(metrics.map((metric, k) => [metric.name, k]));
const recipeAt = new Map(recipes.map((recipe, k) => [recipe.id, k]));

const STANDINGS = {
  certain: "certainly on the frontier",
  possible: "may be on the frontier",
  member: "not told apart from a member",
  dominated: "dominated",
  broken: "breaks a constraint",
};

const state = {
  selected: -1, // number of a recipe
  terms: [], // of the filter, see filter.js
  ranges: new Map(), // axis of the parallel coordinates -> [low, high]
  shown: recipes.map(() => true),
  hidden: new Set(["broken"]), // standings that the frontier plot leaves out
};

const listeners = [];

/** Calls `listener(what)` whenever something changed: "shown", "selected" or "theme". */
function onChange(listener) {
  listeners.push(listener);
}

function changed(what) {
  for (const listener of listeners) listener(what);
}

function select(k) {
  state.selected = k;
  changed("selected");
}

function byId(id) {
  return document.getElementById(id);
}

/** Returns a new element; text goes in as text, never as markup. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function isBaseline(recipe) {
  return recipe.steps.length === 0;
}

function cssColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// --- numbers ---------------------------------------------------------------------------------------------------------

function significant(value, digits) {
  return String(Number(value.toPrecision(digits)));
}

function scaled(value, digits = 4) {
  for (const [factor, prefix] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= factor) return [significant(value / factor, digits), prefix];
  return [significant(value, digits), ""];
}

/** Returns a number as [text, unit], as the command line shows it. */
function formatParts(metric, value) {
  if (metric.unit === "bytes" || metric.unit === "") {
    const [text, prefix] = scaled(value);
    return [text, prefix + (metric.unit === "bytes" ? "B" : "")];
  }
  if (metric.unit === "%") return [value.toFixed(2), "%"];
  if (metric.unit === "percentage points") return [value.toFixed(2), "points"];
  return [Math.abs(value) >= 9999 ? Math.round(value).toLocaleString("en-US") : significant(value, 4), metric.unit];
}

function format(metric, value) {
  return value === null || value === undefined ? "–" : formatParts(metric, value).join("\u00a0").trim();
}

/** Returns "97.10 to 98.90 %" (without the unit: "97.10 to 98.90"), or "" where the value has no interval. */
function formatInterval(metric, low, high, withUnit = true) {
  if (low === null || low === undefined || high === null || high === undefined) return "";
  const [from, unitFrom] = formatParts(metric, low);
  const [to, unit] = formatParts(metric, high);
  if (!withUnit && unitFrom === unit) return `${from} to ${to}`;
  return `${from}${unitFrom === unit ? "" : "\u00a0" + unitFrom} to ${to}\u00a0${unit}`.trim();
}

function formatProbability(p) {
  if (p === undefined || p === null) return "–";
  return p > 0.995 && p < 1 ? ">0.99" : p > 0 && p < 0.005 ? "<0.01" : p.toFixed(2);
}

function plural(count, noun) {
  return `${count.toLocaleString("en-US")} ${noun}${count === 1 ? "" : "s"}`;
}

function axisTitle(metric) {
  const scaledUnit = metric.unit === "bytes" || metric.unit === "";
  return metric.title + (scaledUnit ? "" : ` (${metric.unit})`);
}
