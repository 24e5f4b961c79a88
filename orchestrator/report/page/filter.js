// The filter: words that a recipe's texts hold (a minus in front: do not hold), and conditions such as size_bytes<200k.

const COMPARE = {
  "<": (a, b) => a < b,
  "<=": (a, b) => a <= b,
  ">": (a, b) => a > b,
  ">=": (a, b) => a >= b,
  "=": (a, b) => a === b,
  "!=": (a, b) => a !== b,
};
const FACTORS = { k: 1e3, m: 1e6, g: 1e9 };
const CONDITION = /^([a-z_][\w.]*)(<=|>=|!=|<|>|=)([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)([kmg]?)b?%?$/i;

const haystacks = recipes.map((recipe) =>
  [
    recipe.label,
    recipe.id,
    STANDINGS[recipe.standing],
    recipe.standing,
    recipe.simulated ? "simulated" : "",
    recipe.slower ? "slower" : "",
    ...recipe.steps.map(([technique, config]) =>
      [technique, ...Object.entries(config).map(([name, value]) => `${name}=${value}`)].join(" ")),
  ].join(" ").toLowerCase());

/** Returns a function recipe -> numbers called `name`: a metric, a parameter with or without its technique; null if none. */
function numbersCalled(name) {
  const known = [...metricAt.keys(), ...data.parameters.map((p) => p.name)];
  const metric = metricAt.get(name);
  if (metric !== undefined) return (recipe) => [recipe.value[metric]];
  if (name === "probability" || name === "number" || name === "seeds") return (recipe) => [recipe[name]];
  const exists = recipes.some((recipe) => recipe.steps.some(([t, config]) => name in config || named(name, t, config)));
  if (exists || known.includes(name))
    return (recipe) => recipe.steps.flatMap(([t, config]) =>
      Object.entries(config).filter(([p]) => p === name || `${t}.${p}` === name).map(([, value]) => value));
  return null;
}

function named(name, technique, config) {
  return Object.keys(config).some((parameter) => `${technique}.${parameter}` === name);
}

/** Returns {terms, fault}: predicates that must all hold, and what could not be read. */
function parseFilter(text) {
  const terms = [];
  let fault = "";
  const joined = text.replace(/\s*(<=|>=|!=|<|>|=)\s*/g, "$1");
  for (const token of joined.split(/\s+/).filter((t) => t && !/^and$/i.test(t))) {
    const found = CONDITION.exec(token);
    if (found) {
      const numbers = numbersCalled(found[1]);
      const bound = Number(found[3]) * (FACTORS[found[4].toLowerCase()] ?? 1);
      if (numbers === null)
        fault = `no column ${found[1]}; columns: ${[...metricAt.keys(), "probability", ...data.parameters.map((p) => p.name)].join(", ")}`;
      else
        terms.push((k) => numbers(recipes[k]).some((v) => typeof v === "number" && COMPARE[found[2]](v, bound)));
    } else {
      const word = token.toLowerCase();
      const absent = word.length > 1 && word.startsWith("-");
      terms.push((k) => haystacks[k].includes(absent ? word.slice(1) : word) !== absent);
    }
  }
  return { terms, fault };
}

function applyFilter() {
  const ranges = [...state.ranges].map(([axis, range]) => [numbersCalled(axis), range]);
  state.shown = recipes.map((recipe, k) =>
    state.terms.every((term) => term(k)) &&
    ranges.every(([numbers, [low, high]]) => {
      const values = numbers(recipe).filter((v) => typeof v === "number");
      return values.some((v) => v >= low && v <= high);
    }));
  changed("shown");
}

function startFilter() {
  const box = byId("filter");
  let waiting;
  const read = () => {
    const { terms, fault } = parseFilter(box.value);
    state.terms = terms;
    box.setAttribute("aria-invalid", fault ? "true" : "false");
    byId("filter-note").dataset.fault = fault;
    applyFilter();
  };
  box.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(read, recipes.length > 1000 ? 200 : 60);
  });
  byId("filter-clear").addEventListener("click", () => {
    box.value = "";
    state.ranges.clear();
    read();
  });
  onChange((what) => {
    if (what !== "shown") return;
    const count = state.shown.filter(Boolean).length;
    const note = byId("filter-note");
    note.textContent = note.dataset.fault || `${count.toLocaleString("en-US")} of ${plural(recipes.length, "recipe")}`;
    note.classList.toggle("fault", Boolean(note.dataset.fault));
    byId("filter-clear").hidden = count === recipes.length && !box.value;
  });
}
