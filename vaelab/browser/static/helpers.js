// What all parts of the feature browser use: elements, pictures, numbers, and requests to the kernel.
// The files of this folder are joined by feature_browser.py into one module, in the order given there.

const SVG_TAGS = new Set(["svg", "rect", "path", "line", "text", "title"]);

/** Makes an element. Strings among the children become text, never markup. */
function h(tag, attributes = {}, ...children) {
  const isSvg = SVG_TAGS.has(tag);
  const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (["value", "checked", "disabled", "hidden"].includes(name) && !isSvg) element[name] = value;
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** A control inside its label. */
function labelled(text, control, className = "") {
  return h("label", { class: `field ${className}` }, h("span", {}, text), control);
}

function button(text, onclick, attributes = {}) {
  return h("button", { type: "button", ...attributes, onclick }, text);
}

function select(options, onchange, attributes = {}) {
  const choices = options.map(([value, text]) => h("option", { value }, text));
  return h("select", { ...attributes, onchange }, choices);
}

/** A row of buttons of which one is chosen; `choose(value)` is called with the new one. */
function choice(label, options, chosen, choose) {
  const buttons = options.map(([value, text]) =>
    button(text, () => { mark(value); choose(value); }, { "data-value": value }));
  const mark = (value) => buttons.forEach((one) => one.setAttribute("aria-pressed", one.dataset.value === value));
  mark(chosen);
  return h("div", { class: "choice", role: "group", "aria-label": label }, buttons);
}

/** One <img>: `show` swaps its bytes and gives the previous object URL back. */
function picture(alt, attributes = {}) {
  const element = h("img", { alt, ...attributes });
  let url = null;
  const clear = () => {
    if (url) URL.revokeObjectURL(url);
    url = null;
    element.removeAttribute("src");
  };
  return {
    element,
    clear,
    async show(bytes, text = alt) {
      const previous = url;
      url = URL.createObjectURL(new Blob([bytes]));
      element.src = url;
      element.alt = text;
      if (previous) URL.revokeObjectURL(previous);
      await element.decode().catch(() => {}); // it was swapped again before it was decoded
    },
  };
}

/** A number with three significant digits; "–" where there is none. */
function shown(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

const floats = (view) => new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
const texts = (view) => JSON.parse(new TextDecoder().decode(view));

/** Calls a function once the calls have paused for some milliseconds; `busy` hears of the pause's begin and end. */
function afterPause(milliseconds, action, busy) {
  let timer = 0;
  const end = () => {
    if (!timer) return;
    clearTimeout(timer);
    timer = 0;
    busy(false);
  };
  const call = () => {
    if (!timer) busy(true);
    clearTimeout(timer);
    timer = setTimeout(() => { action(); end(); }, milliseconds);
  };
  call.cancel = end;
  return call;
}

/** Sends requests to the kernel. On each line (by default one per kind) one request is under way and at most one waits;
 * a newer one takes the place of the one that waits, and an answer that was overtaken is dropped. `ask` resolves to
 * {answer, buffers}, or to null for a request that was overtaken or failed. */
function kernelLink(model, report, busy) {
  const view = Math.random().toString(36).slice(2);
  const lines = new Map();
  let number = 0;

  function send(line) {
    const { content, buffers } = line.current;
    busy(true);
    try {
      model.send({ ...content, view }, undefined, buffers);
    } catch {
      line.current.resolve(null);
      line.current = null;
      busy(false);
      report("The kernel does not answer: run the cell again.");
    }
  }

  function ask(kind, content = {}, buffers = [], name = kind) {
    if (!lines.has(name)) lines.set(name, { current: null, waiting: null });
    const line = lines.get(name);
    number += 1;
    return new Promise((resolve) => {
      const job = { content: { ...content, ask: kind, request: number }, buffers, resolve };
      if (line.current) {
        line.waiting?.resolve(null);
        line.waiting = job;
      } else {
        line.current = job;
        send(line);
      }
    });
  }

  function receive(answer, buffers) {
    if (answer.view !== view) return; // another view of the same widget asked
    const line = [...lines.values()].find((one) => one.current?.content.request === answer.request);
    if (!line) return;
    const { resolve } = line.current;
    line.current = line.waiting;
    line.waiting = null;
    busy(false);
    if (line.current) {
      resolve(null);
      send(line);
    } else if (answer.error) {
      report(answer.error);
      resolve(null);
    } else {
      resolve({ answer, buffers });
    }
  }

  model.on("msg:custom", receive);
  return { ask, close: () => model.off("msg:custom", receive) };
}

/** The sheets of thumbnails, decoded in the browser; `ready` resolves when all are. `draw` draws one feature's tile. */
function thumbnails(sheets, [columns, rows, side]) {
  const bitmaps = sheets.map(() => null);
  const ready = Promise.all(sheets.map(async (bytes, place) => {
    bitmaps[place] = await createImageBitmap(new Blob([bytes]));
  }));
  return {
    side,
    ready,
    draw(context, feature, x, y, size) {
      const bitmap = bitmaps[Math.floor(feature / (columns * rows))];
      if (!bitmap) return;
      const place = feature % (columns * rows);
      const left = (place % columns) * side;
      const top = Math.floor(place / columns) * side;
      context.drawImage(bitmap, left, top, side, side, x, y, size, size);
    },
    close: () => bitmaps.forEach((bitmap) => bitmap?.close()),
  };
}

/** A canvas with one feature's thumbnail; `show` changes the feature. */
function thumbnail(app) {
  const canvas = h("canvas", { class: "thumb", width: app.thumbs.side, height: app.thumbs.side, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  let current = -1;
  const draw = () => {
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (current >= 0) app.thumbs.draw(context, current, 0, 0, canvas.width);
  };
  app.thumbs.ready.then(draw);
  return { element: canvas, show: (feature) => { current = feature; draw(); } };
}

/** A button with a feature's thumbnail, number and a value, which opens the feature. */
function featureButton(app, feature, value) {
  const thumb = thumbnail(app);
  thumb.show(feature);
  return h("button", {
    type: "button", class: "feature-button", title: app.nameOf(feature), onclick: () => app.open(feature, "see"),
    "aria-label": `open feature ${feature}${value ? `, ${value}` : ""}`,
  }, thumb.element, h("span", {}, h("b", {}, String(feature)), value ? h("small", {}, value) : null));
}

// Two of matplotlib's colour maps, each at equal distances: viridis, and turbo from 0.08 to 0.92.
const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
const TURBO = [
  "#424bb5", "#477bf2", "#37a8fa", "#1ad2d2", "#27eea4", "#65fd69", "#a4fc3c", "#d0ea34", "#f2c93a", "#fe9e2f", "#f56918",
  "#dd3d08", "#b71d02",
];

/** "#rrggbb" as [r, g, b]. */
const fromHex = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
const toCss = (colour) => `rgb(${colour.join(" ")})`;

/** The colour [r, g, b] at a place from 0 to 1 of a colour map. */
function colourAt(map, place) {
  const position = Math.min(Math.max(place, 0), 1) * (map.length - 1);
  const low = Math.min(Math.floor(position), map.length - 2);
  const [from, to] = [fromHex(map[low]), fromHex(map[low + 1])];
  return from.map((value, channel) => Math.round(value + (to[channel] - value) * (position - low)));
}
