// Hypervolume over the study, contributions of techniques, failures by class.

function startBars() {
  for (const box of document.querySelectorAll("#progress-controls input")) box.addEventListener("change", drawProgress);
  onChange((what) => { if (what === "theme") drawProgress(); });
  drawProgress();
  drawTechniques();
  drawStopped();
  drawFailures();
}

function drawProgress() {
  const known = data.history.filter((point) => typeof point.volume === "number");
  const note = byId("progress-note"), plot = byId("progress-plot");
  if (!known.length) {
    note.textContent = "No frontier with a hypervolume has been stored yet.";
    plot.hidden = byId("progress-controls").hidden = true;
    return;
  }
  const titles = data.history_over.map((name) => metrics[metricAt.get(name)]?.title ?? name);
  note.textContent = `Of the study's own objectives (${titles.join(", ")}), in multiples of the baseline; more is better. ` +
    `Last: ${significant(known[known.length - 1].volume, 4)}.`;
  const overTime = document.querySelector("#progress-controls input:checked").value === "time";
  const last = known[known.length - 1].at - known[0].at;
  const [unit, length] = last > 2 * 3600e3 ? ["hours", 3600e3] : last > 120e3 ? ["minutes", 60e3] : ["seconds", 1e3];
  const trace = {
    type: "scatter",
    mode: known.length > 60 ? "lines" : "lines+markers",
    x: known.map((p) => (overTime ? (p.at - known[0].at) / length : p.trials)),
    y: known.map((p) => p.volume),
    line: { shape: "hv", color: cssColour("certain"), width: 2 },
    marker: { size: 5 },
    hovertemplate: `%{y:.4f} after %{x:.4~g} ${overTime ? unit : "trials"}<extra></extra>`,
  };
  const layout = baseLayout({
    xaxis: { title: { text: overTime ? `${unit} since the first one` : "trials" }, automargin: true, zeroline: false, showline: true, rangemode: "tozero" },
    yaxis: { automargin: true, zeroline: false, showline: true, rangemode: "tozero", nticks: 6 },
    margin: { l: 40, r: 12, t: 8, b: 44 },
    hovermode: "closest",
  });
  Plotly.react(plot, [trace], layout, { ...plotConfig("hypervolume"), displayModeBar: false });
}

function bar(share, text) {
  const fill = element("span", { class: "fill", hidden: share <= 0 });
  fill.style.width = `${Math.max(0, Math.min(100, share * 100))}%`;
  return element("span", { class: "bar" }, element("span", { class: "track" }, fill), element("span", { class: "bar-text" }, text));
}

function drawTechniques() {
  const note = byId("techniques-note");
  if (data.volume === null || data.volume === undefined || !data.volume) {
    note.textContent = "Cannot be told: there is no hypervolume over the baseline yet.";
    return;
  }
  const rows = data.techniques.map((t) => ({ ...t, lost: (data.volume - t.volume) / data.volume }));
  const most = Math.max(...rows.map((r) => r.lost), 1e-9);
  note.textContent = `Share of the hypervolume (${significant(data.volume, 4)} with all recipes, repeated measurements pooled) that is lost without any recipe that uses ` +
    "the technique. Techniques that stand in for each other lose little each, so shares do not add up.";
  const percent = (share) => (share < 0.001 ? (share > 0 ? "<0.1 %" : "0 %") : `${(100 * share).toFixed(1)} %`);
  byId("techniques-bars").replaceChildren(element("table", { class: "bars" },
    element("thead", {}, element("tr", {}, ...["technique", "hypervolume lost without it", "recipes", "certain"].map((t) => element("th", { scope: "col" }, t)))),
    element("tbody", {}, ...rows.map((r) => element("tr", {},
      element("th", { scope: "row" }, r.technique),
      element("td", {}, bar(r.lost / most, r.recipes ? percent(r.lost) : "not used")),
      element("td", { class: "number" }, String(r.recipes)),
      element("td", { class: "number" }, String(r.certain)))))));
}

function drawStopped() {
  if (!data.stopped.length) return;
  byId("stopped").hidden = false;
  byId("stopped-note").textContent = "Their recovery training was paused where the others promised more. Numbers are those found there; the command brings one to its end.";
  const found = [...new Set(data.stopped.flatMap((s) => Object.keys(s.found)))];
  byId("stopped-list").replaceChildren(element("table", { class: "bars failures" },
    element("thead", {}, element("tr", {}, ...["recipe", "stopped at", ...found, "cost"].map((t) => element("th", { scope: "col" }, t)))),
    element("tbody", {}, ...data.stopped.map((s) => element("tr", {},
      element("th", { scope: "row" }, s.label,
        element("code", { class: "aside" }, `vitpareto resume ${quoted(data.study)} --finish ${s.trial}${data.option}`)),
      element("td", { class: "number" }, s.rung),
      ...found.map((name) => element("td", { class: "number" }, s.found[name] || "")),
      element("td", { class: "number" }, s.cost))))));
}

function drawFailures() {
  const place = byId("failures-list");
  if (!data.failures.length) {
    place.replaceChildren(element("p", { class: "note" }, "No trial failed."));
    return;
  }
  const most = Math.max(...data.failures.map((f) => f.count));
  const reason = (r) => element("li", {}, r.count > 1 ? `${r.count}× ` : "", element("q", {}, r.text),
    element("code", { class: "aside" }, `vitpareto show ${quoted(data.study)} ${r.trial}${data.option}`));
  place.replaceChildren(element("table", { class: "bars failures" },
    element("thead", {}, element("tr", {}, ...["class", "trials", "reasons, most frequent first"].map((t) => element("th", { scope: "col" }, t)))),
    element("tbody", {}, ...data.failures.map((f) => element("tr", {},
      element("th", { scope: "row" }, f.status),
      element("td", {}, bar(f.count / most, String(f.count))),
      element("td", {}, element("ul", {}, ...f.reasons.map(reason))))))));
}
