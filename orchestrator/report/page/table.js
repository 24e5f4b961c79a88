// The table of all recipes: sorted by a click, filtered by the box at the top, a page of rows at a time.

const PAGE_ROWS = 100;
const table = { column: -1, descending: false, rows: PAGE_ROWS };

function tableColumns() {
  const shown = metrics.map((m, k) => k).filter((k) => metrics[k].objective || metrics[k].name.endsWith("_drop"));
  const rest = metrics.map((m, k) => k).filter((k) => !shown.includes(k));
  const metric = (k) => ({
    title: metrics[k].title,
    sortBy: (recipe) => recipe.value[k],
    descendingFirst: metrics[k].better === "maximize",
    number: true,
    cell: (recipe) => [format(metrics[k], recipe.value[k]), small(formatInterval(metrics[k], recipe.low[k], recipe.high[k], false))],
  });
  const rank = Object.keys(STANDINGS);
  return [
    { title: "", label: "Standing", sortBy: (r) => rank.indexOf(r.standing) - (r.probability ?? 0), cell: (r) => {
      const made = mark(isBaseline(r) ? "baseline" : r.standing, kindOf(r));
      return [made, element("span", { class: "unseen" }, STANDINGS[r.standing])];
    } },
    { title: "Recipe", sortBy: (r) => r.label, cell: (r, k) => [element("button", { type: "button", class: "link", onclick: () => choose(k) }, r.label), small(notes(r))] },
    { title: "P(frontier)", sortBy: (r) => r.probability, number: true, descendingFirst: true, cell: (r) => [formatProbability(r.probability)] },
    ...shown.map(metric),
    ...rest.map(metric),
    { title: "Trial", sortBy: (r) => r.number ?? -1, cell: (r) => [element("code", {}, r.id)] },
  ];
}

function small(text) {
  return text ? element("small", {}, text) : null;
}

function notes(recipe) {
  return [recipe.slower ? "slower than the baseline" : "", recipe.simulated ? "simulated" : "", recipe.seeds > 1 ? `${recipe.seeds} seeds` : ""]
    .filter(Boolean).join(", ");
}

/** Selects from the table; where the panel is not beside it, goes there. */
function choose(k) {
  select(k);
  const panel = byId("panel"), box = panel.getBoundingClientRect();
  if (box.bottom < 0 || box.top > innerHeight) panel.scrollIntoView({ block: "center", behavior: "smooth" });
}

function startTable() {
  const columns = tableColumns();
  const head = byId("recipe-table").tHead;
  head.append(element("tr", {}, ...columns.map((column, k) => {
    const button = element("button", { type: "button", "aria-label": column.label ?? column.title, onclick: () => {
      table.descending = table.column === k ? !table.descending : Boolean(column.descendingFirst);
      table.column = k;
      drawTable(columns);
    } }, column.title);
    return element("th", { scope: "col", class: column.number ? "number" : null }, button);
  })));
  byId("more-rows").addEventListener("click", () => {
    table.rows = table.rows >= 5 * PAGE_ROWS ? Infinity : table.rows + 2 * PAGE_ROWS;
    drawTable(columns);
  });
  table.column = 0;
  onChange((what) => {
    if (what === "shown") {
      table.rows = PAGE_ROWS;
      drawTable(columns);
    }
    if (what === "selected") markRow();
  });
  drawTable(columns);
}

function drawTable(columns) {
  const { sortBy } = columns[table.column];
  const sign = table.descending ? -1 : 1;
  const missing = (v) => v === null || v === undefined;
  const order = recipes.map((r, k) => k).filter((k) => state.shown[k]).sort((a, b) => {
    const [va, vb] = [sortBy(recipes[a]), sortBy(recipes[b])];
    if (missing(va) || missing(vb)) return missing(va) - missing(vb) || a - b; // unknown last, whichever way
    const less = typeof va === "string" ? va.localeCompare(vb) : va - vb;
    return sign * less || a - b;
  });
  const head = byId("recipe-table").tHead.rows[0];
  [...head.cells].forEach((cell, k) =>
    cell.setAttribute("aria-sort", k === table.column ? (table.descending ? "descending" : "ascending") : "none"));
  const row = (k) => element("tr", { "data-recipe": recipes[k].id, class: recipes[k].standing },
    ...columns.map((column) => element("td", { class: column.number ? "number" : null }, ...column.cell(recipes[k], k))));
  byId("recipe-table").tBodies[0].replaceChildren(...order.slice(0, table.rows).map(row));
  const left = order.length - table.rows;
  byId("more-rows").hidden = left <= 0;
  byId("more-rows").textContent = `More (${Math.max(0, left).toLocaleString("en-US")} left)`;
  byId("recipes-note").textContent = recipes.length
    ? "A heading sorts. The filter at the top takes words (-word: without it) and conditions on any column or parameter, such as " +
      "size_bytes<200k, probability>=0.05 or tome.r>2; it narrows the plots, too, and changes nobody's place on the frontier."
    : "None yet.";
  markRow();
}

function markRow() {
  const id = recipes[state.selected]?.id;
  for (const row of byId("recipe-table").tBodies[0].rows) row.classList.toggle("selected", row.dataset.recipe === id);
}
