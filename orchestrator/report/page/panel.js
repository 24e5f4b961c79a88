// The recipe that was clicked: steps, numbers, group, commands.

function startPanel() {
  onChange((what) => { if (what === "selected") drawPanel(); });
  drawPanel();
}

function drawPanel() {
  const panel = byId("panel");
  const recipe = recipes[state.selected];
  if (!recipe) {
    panel.replaceChildren(element("p", { class: "note" }, recipes.length ? "Click a point, a line or a row to see its recipe." : "No recipe to show."));
    return;
  }
  const kind = isBaseline(recipe) ? "baseline" : recipe.standing;
  const probability = recipe.standing === "possible" ? `, with probability ${formatProbability(recipe.probability)}` : "";
  panel.replaceChildren(
    element("p", { class: "standing" }, mark(kind, kindOf(recipe)), ` ${STANDINGS[recipe.standing]}${probability}`),
    ...steps(recipe),
    ...flags(recipe),
    numbersTable(recipe),
    ...groupList(recipe),
    ...commands(recipe),
  );
}

function steps(recipe) {
  if (isBaseline(recipe)) return [element("p", { class: "recipe-name" }, "The uncompressed baseline")];
  const step = ([technique, config]) => element("li", {}, element("b", {}, technique),
    element("span", { class: "config" }, ...Object.entries(config).flatMap(([name, value], k) => [
      k ? ", " : " ", element("span", { class: "pair-of" }, `${name} `, element("i", {}, String(value)))])));
  return [element("ol", { class: "steps" }, ...recipe.steps.map(step))];
}

function flags(recipe) {
  const found = [];
  if (recipe.slower) found.push("Slower than the best way to run the uncompressed model, with its whole interval.");
  if (recipe.simulated) found.push("Simulated quantisation: no integer kernel ran, so no speed-up is claimed.");
  if (recipe.seeds > 1) found.push(`Means over ${recipe.seeds} seeds.`);
  return found.map((text) => element("p", { class: "flag" }, text));
}

function numbersTable(recipe) {
  const rows = metrics.map((metric, k) => {
    if (typeof recipe.value[k] !== "number") return null;
    const interval = formatInterval(metric, recipe.low[k], recipe.high[k]);
    const ratio = recipe.ratio[k];
    return element("tr", { "data-metric": metric.name },
      element("th", { scope: "row" }, metric.title),
      element("td", {}, format(metric, recipe.value[k]), interval ? element("small", {}, interval) : null),
      element("td", { class: "ratio" }, typeof ratio === "number" && !isBaseline(recipe) ? `${significant(ratio, 3)}×` : ""));
  });
  return element("table", { class: "numbers" },
    element("thead", {}, element("tr", {}, element("th", {}, ""), element("th", {}, "value, 95 % interval"), element("th", {}, "of baseline"))),
    element("tbody", {}, ...rows.filter(Boolean)));
}

function groupList(recipe) {
  const others = recipe.members.filter((id) => id !== recipe.id);
  if (!others.length) return [];
  const entry = (id) => {
    const k = recipeAt.get(id);
    return element("li", {}, k === undefined ? id : element("button", { type: "button", class: "link", onclick: () => select(k) }, recipes[k].label));
  };
  return [element("h3", {}, "Not told apart by any objective from"), element("ul", { class: "members" }, ...others.map(entry))];
}

function commands(recipe) {
  const trial = `${quoted(data.study)} ${recipe.id}`;
  const lines = [`vitpareto show ${trial}${data.option}`];
  if (!isBaseline(recipe)) lines.push(`vitpareto export ${trial} exported-${recipe.id} --format onnx${data.option}`);
  const number = recipe.number === undefined ? "" : `, number ${recipe.number}`;
  return [element("h3", {}, `Trial ${recipe.id}${number}`), ...lines.map((line) => {
    const code = element("code", {}, line);
    const button = element("button", { type: "button", class: "copy", onclick: () => copy(line, code, button) }, "Copy");
    return element("div", { class: "command" }, code, button);
  })];
}

function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\"'\"'")}'`;
}

async function copy(text, code, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(code); // no clipboard here: selected, for the reader's own key
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}
