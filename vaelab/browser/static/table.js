// The table of features: sorted and filtered in the browser, only the rows in sight are elements.

const ROW = 36; // px, as in the style sheet
const TITLES = {
  feature: "feature", frequency: "frequency", mu: "mean act.", density: "density", specificity: "specificity",
  f1: "truth F1", control: "random F1", value: "best value", stability: "stability", caption: "caption",
  caption_score: "caption score",
  words: "prompt words",
};
const EXPLAINED = {
  frequency: "share of the store's items in which the feature is active",
  density: "share of the store's positions at which the feature is active",
  mu: "mean activation where it is active",
  specificity: "how few different prompts activate it",
  f1: "F1 of the feature against the factor value that it fits best",
  control: "F1 of the best random direction for that value",
  stability: "cosine of its nearest feature in an autoencoder trained with another seed",
  caption_score: "how well the caption tells active from inactive pictures",
};
const hasValues = ({ numbers, texts: words }) =>
  words ? words.some(Boolean) : numbers.some((value) => !Number.isNaN(value));
const title = (name) => TITLES[name] ?? name.replaceAll("_", " ");

/** Sorts and filters the features: `rows` is what is listed now, in order. */
function featureList(app) {
  const { columns, count } = app.table;
  const orders = new Map();
  const searched = Array.from({ length: count }, (_, feature) => {
    const words = columns.filter((one) => one.texts).map((one) => one.texts[feature]);
    return `${feature} ${words.join(" ")}`.toLowerCase();
  });
  const list = { sort: "frequency", descending: true, word: "", ranges: new Map(), subset: null, rows: null, inside: null };

  /** The order of all features by a column, values that are missing last. */
  function order() {
    const key = `${list.sort} ${list.descending}`;
    if (orders.has(key)) return orders.get(key);
    const column = columns.find((one) => one.name === list.sort);
    const sign = list.descending ? -1 : 1;
    const result = Uint32Array.from({ length: count }, (_, feature) => feature);
    if (column.numbers) {
      const numbers = Float32Array.from(column.numbers, (value) => (Number.isNaN(value) ? Infinity : value * sign));
      result.sort((a, b) => numbers[a] - numbers[b] || a - b);
    } else {
      const words = column.texts.map((text) => text.toLowerCase());
      const missing = (a, b) => (words[a] === "") - (words[b] === "");
      result.sort((a, b) => missing(a, b) || (words[a] < words[b] ? -sign : words[a] > words[b] ? sign : a - b));
    }
    orders.set(key, result);
    return result;
  }

  list.update = () => {
    const chosen = list.subset && new Set(list.subset.features);
    const source = list.sort === "rank" && list.subset ? list.subset.features : order();
    const ranges = [...list.ranges].map(([name, [low, high]]) => ({
      numbers: columns.find((one) => one.name === name).numbers, low: low ?? -Infinity, high: high ?? Infinity,
    }));
    const word = list.word.trim().toLowerCase();
    const rows = [];
    const inside = new Uint8Array(count);
    for (const feature of source) {
      if (chosen && !chosen.has(feature)) continue;
      if (word && !searched[feature].includes(word)) continue;
      if (!ranges.every(({ numbers, low, high }) => numbers[feature] >= low && numbers[feature] <= high)) continue;
      rows.push(feature);
      inside[feature] = 1;
    }
    list.rows = rows;
    list.inside = inside;
  };
  return list;
}

/** The part that finds features: search, filters, map and table. */
function findPanel(app) {
  const list = app.list;
  const numeric = app.table.columns.filter((one) => one.numbers && one.name !== "feature");
  const count = h("p", { class: "count", role: "status" });
  const chip = h("span", { class: "chip", hidden: true });
  const apply = () => {
    list.update();
    grid.scrollToTop();
    app.refresh();
  };

  const word = h("input", {
    type: "search", placeholder: "star, red, 1024 …",
    oninput: () => { list.word = word.value; apply(); },
  });
  const meaning = h("input", { type: "search", placeholder: "something round" });
  const searchMeaning = async (event) => {
    event.preventDefault();
    if (!meaning.value.trim()) return;
    const found = await app.ask("meaning", { text: meaning.value });
    if (found) app.setSubset(`meaning of “${meaning.value}”`, found.answer.features);
  };

  const sort = select([], () => { list.sort = sort.value; apply(); }, { "aria-label": "sort by" });
  const direction = button("", () => { list.descending = !list.descending; apply(); }, { class: "small" });
  const sortOptions = () => {
    const names = app.table.columns.map((one) => one.name);
    if (list.subset?.ranked) names.unshift("rank");
    sort.replaceChildren(...names.map((name) => h("option", { value: name }, title(name))));
    sort.value = list.sort;
    direction.textContent = list.descending ? "↓" : "↑";
    direction.setAttribute("aria-label", list.descending ? "highest first" : "lowest first");
    direction.disabled = list.sort === "rank";
  };

  const ranges = numeric.map(({ name }) => {
    const change = () => {
      const [low, high] = [from, to].map((one) => (one.value === "" ? null : Number(one.value)));
      if (low === null && high === null) list.ranges.delete(name);
      else list.ranges.set(name, [low, high]);
      apply();
    };
    const limit = (text) => h("input", {
      type: "number", step: "any", placeholder: text, "aria-label": `${title(name)}, ${text}`, oninput: change });
    const [from, to] = [limit("least"), limit("most")];
    return h("div", { class: "range", title: EXPLAINED[name] }, h("span", {}, title(name)), from, to);
  });
  const filters = h("details", { class: "filters" }, h("summary", {}, "Filter by numbers"),
    h("div", { class: "ranges" }, ranges));

  const grid = featureGrid(app, (name) => {
    if (list.sort === name) list.descending = !list.descending;
    else [list.sort, list.descending] = [name, app.table.columns.some((one) => one.name === name && one.numbers)];
    apply();
  });
  const map = featureMap(app);
  const element = h("section", { class: "find", "aria-label": "Find features" },
    h("div", { class: "line" },
      labelled("Word", word, "grow"),
      h("form", { class: "field grow", onsubmit: searchMeaning }, labelled("Meaning", meaning, "grow"),
        h("button", { type: "submit" }, "Search"))),
    map.element,
    h("div", { class: "line" }, count, chip, h("span", { class: "push" }), labelled("Sort", sort), direction),
    filters, grid.element);

  return {
    element,
    apply,
    draw: () => { map.draw(); grid.draw(); },
    refresh() {
      const { subset } = list;
      count.textContent = `${shown(list.rows.length)} of ${shown(app.table.count)} features`;
      chip.hidden = !subset;
      if (subset) {
        chip.replaceChildren(subset.name,
          button("×", () => app.setSubset(null), { "aria-label": `remove the selection: ${subset.name}` }));
      }
      sortOptions();
      grid.draw();
      map.draw();
    },
    close: () => { map.close(); grid.close(); },
  };
}

/** The rows in sight. Arrow keys move the marked row, Enter opens it. */
function featureGrid(app, sortBy) {
  const list = app.list;
  const known = app.table.columns.filter(hasValues).map((one) => one.name);
  const head = h("div", { class: "grid-head", role: "row" });
  const spacer = h("div", { class: "grid-space" });
  const scroller = h("div", {
    class: "grid", role: "grid", tabindex: "0", onscroll: () => draw(), onkeydown: (event) => move(event),
    "aria-label": "Features. Arrow keys move, Enter opens",
  }, head, spacer);
  const base = `row-${Math.random().toString(36).slice(2)}`;
  let lines = [];
  let names = [];
  let marked = 0; // the place in list.rows
  let wide = null;

  /** The columns for which there is room: those with values, in the narrow layout the sorted one and the caption. */
  function chooseColumns() {
    const words = ["caption", "words"].find((name) => known.includes(name));
    if (scroller.clientWidth > 620) return known.filter((name) => name !== "words" || words === "words");
    const sorted = known.includes(list.sort) && !["feature", words].includes(list.sort) ? list.sort : "frequency";
    const second = ["f1", "mu"].find((name) => known.includes(name) && name !== sorted);
    return ["feature", sorted, scroller.clientWidth > 430 && second, words].filter(Boolean);
  }

  function build() {
    const columns = names.map((name) => app.table.columns.find((one) => one.name === name));
    const widths = columns.map((one) => one.name === "feature" ? "60px"
      : one.numbers ? "minmax(84px, 0.8fr)" : one.name === "value" ? "minmax(90px, 1fr)" : "minmax(110px, 3fr)");
    scroller.style.setProperty("--columns", `32px ${widths.join(" ")}`);
    head.replaceChildren(h("span", { role: "columnheader" }, h("span", { class: "unseen" }, "thumbnail")),
      ...columns.map((one) => h("span",
        { role: "columnheader", title: EXPLAINED[one.name] ?? "", class: one.numbers ? "number" : "" },
        button(title(one.name), () => sortBy(one.name), { "data-name": one.name }))));
    const visible = Math.ceil(scroller.clientHeight / ROW) + 2;
    lines = Array.from({ length: visible }, (_, place) => {
      const thumb = thumbnail(app);
      const cells = columns.map((one) => h("span", { role: "gridcell", class: one.numbers ? "number" : "words" }));
      const line = { thumb, cells, feature: -1 };
      line.element = h("div", { class: "grid-row", role: "row", id: `${base}-${place}`,
        onclick: () => { marked = line.place; app.open(line.feature, "see"); } },
        h("span", { role: "gridcell" }, thumb.element), cells);
      return line;
    });
    spacer.replaceChildren(...lines.map((line) => line.element));
  }

  function draw() {
    if (!scroller.clientHeight) return; // hidden: the number of rows in sight is not known
    const columns = chooseColumns();
    if (columns.join() !== names.join()) {
      names = columns;
      build();
    }
    for (const cell of head.querySelectorAll("[data-name]")) {
      const sorted = cell.dataset.name === list.sort;
      cell.parentElement.setAttribute("aria-sort", sorted ? (list.descending ? "descending" : "ascending") : "none");
    }
    spacer.style.height = `${list.rows.length * ROW}px`;
    scroller.setAttribute("aria-rowcount", list.rows.length);
    const first = Math.max(0, Math.min(Math.floor(scroller.scrollTop / ROW), list.rows.length - lines.length));
    lines.forEach((line, offset) => {
      const place = first + offset;
      const feature = list.rows[place];
      line.element.hidden = feature === undefined;
      if (feature === undefined) return;
      line.place = place;
      line.feature = feature;
      line.element.style.transform = `translateY(${place * ROW}px)`;
      line.element.setAttribute("aria-rowindex", place + 1);
      line.element.setAttribute("aria-selected", feature === app.feature);
      line.element.classList.toggle("marked", place === marked);
      line.thumb.show(feature);
      names.forEach((name, column) => {
        const { numbers, texts: words } = app.table.columns.find((one) => one.name === name);
        const text = name === "feature" ? String(feature) : numbers ? shown(numbers[feature]) : words[feature];
        const isCaption = name === "caption";
        line.cells[column].textContent = isCaption ? app.captionOf(feature) : text;
        line.cells[column].classList.toggle("hint", isCaption && !text); // prompt words stand in for it
        line.cells[column].title = line.cells[column].textContent;
      });
      if (place === marked) scroller.setAttribute("aria-activedescendant", line.element.id);
    });
  }

  function move(event) {
    const page = Math.max(1, Math.floor(scroller.clientHeight / ROW) - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.target !== scroller) return;
    if (event.key === "Enter" && list.rows.length) app.open(list.rows[marked], "see");
    else if (event.key in steps) {
      marked = Math.max(0, Math.min(list.rows.length - 1, marked + steps[event.key]));
      const [top, bottom] = [marked * ROW, (marked + 2) * ROW]; // the head hides one row
      if (top < scroller.scrollTop) scroller.scrollTop = top;
      else if (bottom > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = bottom - scroller.clientHeight;
      draw();
    } else return;
    event.preventDefault();
  }

  const observer = new ResizeObserver(() => {
    if (scroller.clientWidth === wide) return;
    wide = scroller.clientWidth;
    draw();
  });
  observer.observe(scroller);
  return {
    element: scroller, draw,
    scrollToTop: () => { marked = 0; scroller.scrollTop = 0; },
    close: () => observer.disconnect(),
  };
}
