// The card of one feature: examples with heat maps, how often and when it is active, and what is related to it.

/** A small chart as SVG: bars from edges and counts (logarithmic), or a line through points. */
function chart(label, unit, xs, ys, isBars) {
  const [width, height, left, bottom] = [240, 110, 6, 18];
  const heights = isBars ? ys.map((value) => Math.log1p(value)) : ys;
  const most = Math.max(...heights, 1e-12);
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const toX = (x) => left + ((x - first) / (last - first || 1)) * (width - 2 * left);
  const toY = (y) => height - bottom - (y / most) * (height - bottom - 22);
  const marks = isBars
    ? heights.map((value, place) => h("rect", {
        x: toX(xs[place]), y: toY(value), width: Math.max(1, toX(xs[place + 1]) - toX(xs[place]) - 1),
        height: Math.max(0, height - bottom - toY(value)), class: "bar",
      }, h("title", {}, `${shown(xs[place])} to ${shown(xs[place + 1])}: ${shown(ys[place])}`)))
    : [h("path", { class: "curve", d: xs.map((x, place) => `${place ? "L" : "M"}${toX(x)} ${toY(ys[place])}`).join("") }),
       ...xs.map((x, place) => h("rect", { x: toX(x) - 3, y: toY(ys[place]) - 3, width: 6, height: 6, class: "bar" },
         h("title", {}, `${shown(x)}: ${shown(ys[place])}`)))];
  return h("svg", {
    viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img",
    "aria-label": `${label}, ${shown(first)} to ${shown(last)}`,
  },
    h("text", { x: left, y: 11, class: "chart-title" }, label), marks,
    h("line", { x1: left, x2: width - left, y1: height - bottom, y2: height - bottom, class: "axis" }),
    h("text", { x: left, y: height - 5 }, shown(first)),
    h("text", { x: width / 2, y: height - 5, "text-anchor": "middle" }, unit),
    h("text", { x: width - left, y: height - 5, "text-anchor": "end" }, shown(last)));
}

/** One example: the picture, and over it the activation at each position, the highest red, the lowest above 0 blue. */
function exampleTile() {
  const shownPicture = picture("", { loading: "lazy" });
  const canvas = h("canvas", { class: "heat", "aria-hidden": "true" });
  const caption = h("figcaption");
  const element = h("figure", { class: "example" }, h("div", { class: "stack" }, shownPicture.element, canvas), caption);
  return {
    element,
    clear: shownPicture.clear,
    show(example) {
      element.hidden = false;
      const name = example.prompt || `item ${example.item}`;
      shownPicture.show(example.picture, name);
      element.title = `${name}, seed ${example.seed ?? "unknown"}`;
      caption.replaceChildren(h("b", {}, shown(example.activation)), h("small", {}, example.group));
      const [rows, columns] = [example.map.length, example.map[0].length];
      canvas.width = columns;
      canvas.height = rows;
      const pixels = new ImageData(columns, rows);
      const span = example.vmax - example.vmin || 1;
      example.map.flat().forEach((value, place) => {
        if (value > 0) pixels.data.set([...colourAt(TURBO, (value - example.vmin) / span), 255], 4 * place);
      });
      canvas.getContext("2d").putImageData(pixels, 0, 0);
    },
  };
}

function cardPanel(app) {
  const tiles = []; // kept from card to card, so that pictures are swapped and not made anew
  const grid = h("div", { class: "examples" });
  const deciles = h("p", { class: "hint wide" },
    "One of each decile of the items in which it is active, the strongest first");
  const opacity = h("input", { type: "range", min: 0, max: 1, step: 0.05, value: 0.6,
    oninput: () => grid.style.setProperty("--heat", opacity.value) });
  const content = h("div", { class: "card" });
  const empty = h("p", { class: "hint" }, "Choose a feature in the table or on the map.");
  const element = h("div", {}, empty, content);
  content.hidden = true;
  const head = h("div", { class: "card-head" });
  const facts = h("dl", { class: "facts" });
  const rest = h("div", { class: "card-rest" });
  content.append(head, facts,
    h("div", { class: "line" }, h("h4", {}, "Where it is most active"), h("span", { class: "push" }),
      labelled("Heat map", opacity)),
    grid, rest);

  function showFacts(feature) {
    const known = app.table.columns.filter((one) => !["feature", "caption", "words"].includes(one.name));
    facts.replaceChildren(...known.flatMap((one) => {
      const value = one.numbers ? shown(one.numbers[feature]) : one.texts[feature] || "–";
      if (value === "–") return [];
      return [h("div", { title: EXPLAINED[one.name] }, h("dt", {}, title(one.name)), h("dd", {}, value))];
    }));
  }

  function showHead(feature, card) {
    const thumb = thumbnail(app);
    thumb.show(feature);
    const words = app.textOf(feature, "words");
    head.replaceChildren(thumb.element,
      h("div", { class: "grow" }, h("h3", {}, `Feature ${feature}`),
        h("p", { class: "caption" }, card.caption || words || "no caption"),
        card.caption && words ? h("p", { class: "hint" }, `prompt words: ${words}`) : null),
      h("div", { class: "line" },
        button("Keep", () => app.keep(feature), { "aria-label": `keep feature ${feature}` }),
        button("Turn", () => app.showTab("turn"), { "aria-label": `turn feature ${feature}` }),
        button("Export", () => app.exportFeature(feature), { "aria-label": `export feature ${feature} as a page` })));
  }

  function showExamples(examples) {
    while (tiles.length < examples.length) {
      tiles.push(exampleTile());
      grid.append(tiles.at(-1).element);
    }
    tiles.forEach((tile, place) => {
      if (place < examples.length) tile.show(examples[place]);
      else { tile.element.hidden = true; tile.clear(); }
    });
    const first = examples.findIndex((one) => one.group !== "top");
    if (first > 0) tiles[first].element.before(deciles);
    else deciles.remove();
  }

  function scoresTable(scores) {
    const names = [...new Set(scores.flatMap(Object.keys))];
    const cell = (value) => (typeof value === "number" ? shown(value) : value ?? "–");
    return h("div", { class: "scroll" }, h("table", { class: "scores" },
      h("thead", {}, h("tr", {}, names.map((name) => h("th", { scope: "col" }, title(name))))),
      h("tbody", {}, scores.map((score) => h("tr", {}, names.map((name, place) =>
        place ? h("td", {}, String(cell(score[name]))) : h("th", { scope: "row" }, String(cell(score[name])))))))));
  }

  function related(heading, pairs, digits) {
    if (!pairs?.length) return null;
    return h("div", {}, h("h4", {}, heading), h("div", { class: "features" },
      pairs.map(([feature, value]) => featureButton(app, feature, digits(value)))));
  }

  function show(feature, card) {
    empty.hidden = true;
    content.hidden = false;
    content.dataset.feature = feature;
    showHead(feature, card);
    showFacts(feature);
    showExamples(card.examples);
    const { histogram, timesteps, twin } = card;
    const charts = h("div", { class: "charts" });
    if (histogram.counts.length) {
      charts.append(chart("Activations (log count)", "activation", histogram.edges, histogram.counts, true));
    }
    if (timesteps.timestep.length > 1) {
      charts.append(chart("Mean activation over timesteps", "timestep", timesteps.timestep, timesteps.mean, false));
    }
    const twins = twin && `feature ${twin.feature} of the autoencoder with seed ${twin.seed}, cosine ${shown(twin.cosine)}`;
    rest.replaceChildren(charts,
      related("Active at the same positions", card.co_active, (share) => `${Math.round(100 * share)} %`) ?? "",
      related("Nearest directions", card.nearest, (cosine) => `cos ${cosine.toFixed(2)}`) ?? "",
      twin ? h("p", { class: "twin" }, h("b", {}, "Twin: "), twins) : "",
      card.scores?.length ? h("div", {}, h("h4", {}, "Scores and their controls"), scoresTable(card.scores)) : "",
      card.reasoning ? h("details", {}, h("summary", {}, "Reasoning behind the caption"), h("p", {}, card.reasoning)) : "");
  }

  return {
    element,
    async load(feature) {
      const found = await app.ask("card", { feature });
      if (found && feature === app.feature) show(feature, found.answer.card);
    },
    close: () => tiles.forEach((tile) => tile.clear()),
  };
}
