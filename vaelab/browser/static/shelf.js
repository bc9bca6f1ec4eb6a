// The shelf: features that are kept with notes, in the run's folder.

function shelfPanel(app) {
  let shelf = app.start.shelf;
  const items = h("ul", { class: "shelf" });
  const exportAll = button("Export the shelf as one page", () => app.exportShelf());
  const hint = h("p", { class: "hint" }, "Nothing is kept yet: open a feature and press Keep.");
  const element = h("div", {}, hint, items, exportAll);

  function draw() {
    hint.hidden = shelf.length > 0;
    exportAll.hidden = !shelf.length;
    items.replaceChildren(...shelf.map((one) => h("li", {},
      featureButton(app, one.feature, ""),
      h("div", { class: "grow" }, h("p", { class: "caption" }, app.textOf(one.feature, "caption") || app.textOf(one.feature, "words")),
        h("textarea", { rows: 2, placeholder: "note", "aria-label": `note on feature ${one.feature}`, value: one.note,
          onchange: (event) => save(shelf.map((other) => (other === one ? { ...one, note: event.target.value } : other))) })),
      button("Export", () => app.exportFeature(one.feature), { "aria-label": `export feature ${one.feature} as a page` }),
      button("×", () => save(shelf.filter((other) => other !== one)), { "aria-label": `remove feature ${one.feature} from the shelf` }))));
  }

  async function save(next) {
    shelf = next; // at once, so that the next change builds on this one
    draw();
    await app.ask("shelf", { shelf });
  }

  draw();
  return {
    element,
    async keep(feature) {
      if (!shelf.some((one) => one.feature === feature)) await save([...shelf, { feature, note: "" }]);
      app.report(`Feature ${feature} is on the shelf.`);
    },
  };
}
