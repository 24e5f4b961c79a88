// Puts the parts together.

state.selected = data.picked === undefined || data.picked === null ? -1 : recipeAt.get(data.picked) ?? -1;
startFilter();
startPanel();
startFrontier();
startParallel();
startBars();
startTable();
applyFilter();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => changed("theme"));
