// The whole browser: asks the kernel for the table once, then lays out find, see, turn and keep.

const NARROW = 760; // px: below it the four parts are four tabs, above it find stands beside the others

/** What the kernel sent: strings and numbers, with {buffer: n} where bytes belong. */
function unpack(value, buffers) {
  if (Array.isArray(value)) return value.map((one) => unpack(one, buffers));
  if (value === null || typeof value !== "object") return value;
  if (typeof value.buffer === "number") return buffers[value.buffer];
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, unpack(one, buffers)]));
}

function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "text/html" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** Builds the parts once the kernel has sent the table; returns {close}. */
function buildBrowser(root, model, link, { report, busy }, start) {
  const table = {
    count: start.count, positions: floats(start.positions),
    columns: start.columns.map(({ name, numbers, texts: words }) =>
      numbers ? { name, numbers: floats(numbers) } : { name, texts: texts(words) }),
  };
  const column = (name) => table.columns.find((one) => one.name === name);
  const app = { table, start, report, busy, feature: -1 };
  app.ask = async (...request) => {
    const found = await link.ask(...request);
    return found && { answer: unpack(found.answer, found.buffers) };
  };
  app.textOf = (feature, name) => column(name)?.texts?.[feature] ?? "";
  app.captionOf = (feature) => app.textOf(feature, "caption") || app.textOf(feature, "words");
  app.nameOf = (feature) => [feature, app.captionOf(feature)].filter((part) => part !== "").join(" · ");
  app.thumbs = thumbnails(start.sprites, start.sprite_grid);
  app.thumbs.ready.then(() => find.draw());
  app.list = featureList(app);
  app.list.update();

  const find = findPanel(app);
  const card = cardPanel(app);
  const turn = turnPanel(app);
  const shelf = shelfPanel(app);
  app.refresh = () => find.refresh();
  app.keep = (feature) => shelf.keep(feature);
  app.setSubset = (name, features, ranked = true) => {
    app.list.subset = name === null ? null : { name: `${name}: ${shown(features.length)}`, features: [...features], ranked };
    if (ranked && name !== null) app.list.sort = "rank";
    else if (app.list.sort === "rank") Object.assign(app.list, { sort: "frequency", descending: true });
    model.set("selected", name === null ? [] : [...features]);
    model.save_changes();
    find.apply();
  };
  app.open = (feature, tab) => {
    if (tab && !(tab === "see" && chosen === "turn" && !narrow())) showTab(tab);
    if (feature === app.feature) return;
    app.feature = feature;
    model.set("feature", feature);
    model.save_changes();
    find.draw();
    card.load(feature);
    turn.featureChanged();
  };
  const exported = async (name, content) => {
    const found = await app.ask("export", content, [], name); // on its own line: none takes another's place
    if (!found) return;
    download(name, found.answer.page);
    report(`${name} is downloaded; it opens without a network.`);
  };
  app.exportFeature = (feature) => exported(`feature-${feature}.html`, { features: [feature], shelf: false });
  app.exportShelf = () => exported("shelf.html", { features: [], shelf: true });

  // tabs
  const base = `tab-${Math.random().toString(36).slice(2)}`;
  const names = [["find", "Find"], ["see", "See"], ["turn", "Turn"], ["keep", "Keep"]];
  let chosen = "find";
  const narrow = () => root.clientWidth < NARROW;
  const panels = { find: find.element, see: card.element, turn: turn.element, keep: shelf.element };
  const tabs = names.map(([name, text]) => h("button", {
    type: "button", role: "tab", id: `${base}-${name}`, "aria-controls": `${base}-${name}-panel`,
    onclick: () => showTab(name), onkeydown: (event) => nextTab(event, name),
  }, text));
  for (const [name] of names) {
    panels[name].id = `${base}-${name}-panel`;
    panels[name].classList.add("panel");
    if (name !== "find") panels[name].setAttribute("role", "tabpanel");
  }
  function showTab(name) {
    chosen = name;
    const open = !narrow() && name === "find" ? "see" : name;
    names.forEach(([other], place) => {
      const selected = other === open;
      tabs[place].setAttribute("aria-selected", selected);
      tabs[place].tabIndex = selected ? 0 : -1;
      tabs[place].hidden = other === "find" && !narrow();
      panels[other].hidden = !selected && !(other === "find" && !narrow());
    });
    turn.shown(open === "turn");
    find.draw();
  }
  function nextTab(event, name) {
    const usable = names.map(([other]) => other).filter((other) => other !== "find" || narrow());
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = usable[(usable.indexOf(name) + step + usable.length) % usable.length];
    showTab(next);
    tabs[names.findIndex(([other]) => other === next)].focus();
    event.preventDefault();
  }

  const bar = h("div", { class: "tabs", role: "tablist", "aria-label": "Parts of the feature browser" }, tabs);
  const detail = h("div", { class: "detail" }, bar, panels.see, panels.turn, panels.keep);
  root.append(h("div", { class: "parts" }, detail, find.element));
  let wasNarrow = null;
  const observer = new ResizeObserver(() => {
    if (narrow() === wasNarrow) return;
    wasNarrow = narrow();
    showTab(chosen);
  });
  observer.observe(root);
  showTab("find");
  find.refresh();
  const fromPython = () => { if (model.get("feature") >= 0) app.open(model.get("feature"), null); };
  fromPython();
  if (app.feature < 0 && app.list.rows.length) app.open(app.list.rows[0], null);
  model.on("change:feature", fromPython);

  // canvases take their colours from the theme, so they are drawn again when it changes
  const theme = window.matchMedia("(prefers-color-scheme: dark)");
  const redraw = () => find.draw();
  theme.addEventListener("change", redraw);
  const themes = new MutationObserver(redraw);
  themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });

  return () => {
    observer.disconnect();
    themes.disconnect();
    theme.removeEventListener("change", redraw);
    model.off("change:feature", fromPython);
    find.close(); card.close(); turn.close(); app.thumbs.close();
  };
}

function render({ model, el }) {
  const status = h("p", { class: "status", role: "status" });
  const title = h("h2", {}, "Feature browser");
  // notebooks have shortcuts of one key; they must not be taken while someone works in the browser
  const root = h("div", { class: "vaelab-browser", "data-lm-suppress-shortcuts": "true" }, h("header", {}, title, status));
  el.append(root);
  let underWay = 0;
  let waiting = 0;
  let message = 0;
  const report = (text) => {
    clearTimeout(message);
    status.textContent = text;
    message = setTimeout(() => { status.textContent = ""; }, 8000);
  };
  const busy = (now) => {
    underWay += now ? 1 : -1;
    root.dataset.busy = underWay;
    clearTimeout(waiting);
    root.classList.remove("working");
    if (underWay) waiting = setTimeout(() => root.classList.add("working"), 300);
  };
  const link = kernelLink(model, report, busy);
  let close = () => {};
  let removed = false;
  const slow = setTimeout(() => report("Waiting for the kernel. If it was restarted, run the cell again."), 3000);
  link.ask("open").then((found) => {
    clearTimeout(slow);
    if (!found || removed) return;
    status.textContent = "";
    const start = unpack(found.answer, found.buffers);
    title.textContent = `Features of ${start.block}`;
    close = buildBrowser(root, model, link, { report, busy }, start);
    root.dataset.ready = "true";
  });
  return () => {
    removed = true;
    [slow, waiting, message].forEach(clearTimeout);
    link.close();
    close();
    root.remove();
  };
}

export default { render };
