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
    items.replaceChildren(...shelf.map(item));
  }

  function item(one) {
    const { feature } = one;
    const write = (note) => save(shelf.map((other) => (other.feature === feature ? { feature, note } : other)));
    const remove = () => { save(shelf.filter((other) => other.feature !== feature)); draw(); };
    return h("li", {}, featureButton(app, feature, ""),
      h("div", { class: "grow" }, h("p", { class: "caption" }, app.captionOf(feature)),
        h("textarea", { rows: 2, placeholder: "note", "aria-label": `note on feature ${feature}`, value: one.note,
          onchange: (event) => write(event.target.value) })),
      button("Export", () => app.exportFeature(feature), { "aria-label": `export feature ${feature} as a page` }),
      button("×", remove, { "aria-label": `remove feature ${feature} from the shelf` }));
  }

  async function save(next) {
    shelf = next; // at once, so that the next change builds on this one
    await app.ask("shelf", { shelf });
  }

  draw();
  return {
    element,
    async keep(feature) {
      if (!shelf.some((one) => one.feature === feature)) {
        const saved = save([...shelf, { feature, note: "" }]);
        draw();
        await saved;
      }
      app.report(`Feature ${feature} is on the shelf.`);
    },
  };
}
