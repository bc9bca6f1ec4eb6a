// The map of the dictionary: a dot, or near by a thumbnail, where each feature's direction lies.

const MAP_ROOM = 14; // px around the map
const THUMBS_FROM = 700; // thumbnails are drawn when at most so many features are in sight
const NEAR = 12; // px within which the pointer meets a dot

const GROUPS = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f"];

/** What a text's value belongs to: "colour" of "colour: red". */
const groupOf = (text) => text.split(":")[0];
const groupsOf = (column) => [...new Set(column.texts.filter(Boolean).map(groupOf))].sort();

function featureMap(app) {
  const { columns, positions, count } = app.table;
  const numeric = columns.filter((one) => one.numbers && one.name !== "feature" && hasValues(one));
  const grouped = columns.filter((one) => one.texts && hasValues(one) && groupsOf(one).length <= GROUPS.length);
  const canvas = h("canvas", {
    class: "map", tabindex: "0", role: "img",
    "aria-label": "Map of the features. Arrow keys move, plus and minus zoom, Enter opens the feature at the centre",
  });
  const context = canvas.getContext("2d");
  const hint = "Ctrl or ⌘ with the wheel zooms.";
  const under = h("span", { class: "under" }, hint);
  const legend = h("span", { class: "legend" });
  const bar = h("i", { class: "bar-of-colours", "aria-hidden": "true" });
  const [unlisted, without] = ["unlisted", "without"].map((name) => h("i", { class: name, "aria-hidden": "true" }));
  const view = { scale: 1, x: 0.5, y: 0.5 }; // x, y: the point of the map at the centre
  let mode = "move";
  let drag = null; // {x, y, moved, path}
  let frame = 0;
  let colours = null; // of each feature the place in the palette
  let paletteOn = null; // gives the palette for a dark or a light ground
  let palette = [];

  let extent = [0, 0]; // width and height as last painted: asking the page for each feature would be slow
  const size = () => extent;
  function toScreen(feature) {
    const [width, height] = size();
    const [w, t] = [(width - 2 * MAP_ROOM) * view.scale, (height - 2 * MAP_ROOM) * view.scale];
    return [width / 2 + (positions[2 * feature] - view.x) * w, height / 2 + (positions[2 * feature + 1] - view.y) * t];
  }

  function choose(name) {
    const column = grouped.find((one) => one.name === name);
    if (column) groupColours(column);
    else numberColours(name);
  }

  function groupColours(column) {
    const groups = groupsOf(column);
    colours = Uint8Array.from(column.texts, (text) => (text ? groups.indexOf(groupOf(text)) : 255));
    paletteOn = () => GROUPS.map(fromHex);
    const named = groups.flatMap((group, place) =>
      [h("i", { "aria-hidden": "true", style: `background: ${GROUPS[place]}` }), group]);
    legend.replaceChildren(...named, without, "no value", unlisted, "not listed");
  }

  /** A colour bucket per feature, from the 2nd to the 98th percentile; logarithmic where the values span a lot. */
  function numberColours(name) {
    const { numbers } = numeric.find((one) => one.name === name);
    const sorted = numbers.filter((value) => !Number.isNaN(value)).sort();
    const positive = sorted.filter((value) => value > 0);
    const at = (values, share) => values[Math.min(values.length - 1, Math.floor(share * values.length))];
    const logarithmic = sorted[0] >= 0 && positive.length > 1 && at(positive, 0.98) > 50 * at(positive, 0.02);
    const used = logarithmic ? positive : sorted;
    const [low, high] = [at(used, 0.02), at(used, 0.98)];
    const scale = (value) =>
      logarithmic ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low || 1);
    colours = new Uint8Array(count);
    for (let feature = 0; feature < count; feature++) {
      const value = numbers[feature];
      const missing = Number.isNaN(value) || (logarithmic && value <= 0);
      colours[feature] = missing ? 255 : Math.round(Math.min(Math.max(scale(value), 0), 1) * 31);
    }
    paletteOn = viridisOn;
    legend.replaceChildren(shown(low), bar, `${shown(high)}${logarithmic ? " (log)" : ""}`,
      without, "no value", unlisted, "not listed");
  }
  /** Viridis, without its darkest part on a dark ground. */
  function viridisOn(dark) {
    const from = dark ? 0.25 : 0;
    return Array.from({ length: 32 }, (_, step) => colourAt(VIRIDIS, from + ((1 - from) * step) / 31));
  }

  function paint() {
    frame = 0;
    extent = [canvas.clientWidth, canvas.clientHeight];
    const [width, height] = extent;
    if (!width) return;
    const ratio = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
    if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const ink = getComputedStyle(canvas).color;
    palette = paletteOn(Number(ink.match(/\d+/)[0]) > 127);
    bar.style.background = `linear-gradient(90deg, ${palette.map(toCss).join(", ")})`;
    const [faint, empty] = [unlisted, without].map((one) => getComputedStyle(one).backgroundColor.match(/\d+/g).map(Number));
    const { inside, rows } = app.list;
    const inSight = (x, y) => x > -32 && y > -32 && x < width + 32 && y < height + 32;
    const layers = [faint, empty, ...palette].map((colour) => ({ colour, places: [] })); // drawn in this order
    const seen = [];
    for (let feature = 0; feature < count; feature++) {
      const [x, y] = toScreen(feature);
      if (!inSight(x, y)) continue;
      layers[inside[feature] ? (colours[feature] === 255 ? 1 : 2 + colours[feature]) : 0].places.push(x, y);
      if (inside[feature]) seen.push(feature);
    }
    const radius = Math.min(5, Math.max(1.1, (70 * Math.sqrt(view.scale)) / Math.sqrt(count)));
    if (count > 20000) paintSquares(layers, Math.round(radius * ratio), ratio);
    else paintDiscs(layers, radius);
    const thumbs = seen.length <= THUMBS_FROM && seen.length > 0;
    canvas.dataset.drawn = thumbs ? "thumbnails" : "dots";
    if (thumbs) paintThumbnails(rows, new Set(seen), empty);
    if (app.feature >= 0) ring(toScreen(app.feature), ink);
    if (drag?.path) paintLasso(ink);
    if (canvas.matches(":focus")) paintCentre(width, height, ink);
  }

  function paintDiscs(layers, radius) {
    for (const { colour, places } of layers) {
      context.fillStyle = toCss(colour);
      context.beginPath();
      for (let i = 0; i < places.length; i += 2) {
        context.moveTo(places[i] + radius, places[i + 1]);
        context.arc(places[i], places[i + 1], radius, 0, 7);
      }
      context.fill();
    }
  }

  /** Squares written as pixels: for very many features much faster than discs. */
  function paintSquares(layers, reach, ratio) {
    const image = context.createImageData(canvas.width, canvas.height);
    const pixels = new Uint32Array(image.data.buffer);
    for (const { colour: [red, green, blue], places } of layers) {
      const value = (255 << 24) | (blue << 16) | (green << 8) | red; // bytes in the order of little-endian machines
      for (let i = 0; i < places.length; i += 2) {
        const [left, top] = [Math.round(places[i] * ratio), Math.round(places[i + 1] * ratio)];
        const [from, to] = [Math.max(0, left - reach), Math.min(canvas.width, left + reach)];
        for (let y = Math.max(0, top - reach); y < Math.min(canvas.height, top + reach); y++) {
          if (from < to) pixels.fill(value, y * canvas.width + from, y * canvas.width + to);
        }
      }
    }
    context.putImageData(image, 0, 0);
  }

  /** Thumbnails where they do not cover one another; the other features stay dots. The open feature comes first, then
   * those of the table in its order. */
  function paintThumbnails(rows, seen, empty) {
    const side = 32;
    const taken = new Map();
    for (const feature of [app.feature, ...rows]) {
      if (!seen.has(feature)) continue;
      const [x, y] = toScreen(feature);
      const [column, row] = [Math.floor(x / side), Math.floor(y / side)];
      let free = true;
      for (let dx = -1; dx <= 1 && free; dx++) for (let dy = -1; dy <= 1 && free; dy++) {
        const other = taken.get(`${column + dx},${row + dy}`);
        if (other && Math.abs(other[0] - x) < side + 3 && Math.abs(other[1] - y) < side + 3) free = false;
      }
      if (!free) continue;
      taken.set(`${column},${row}`, [x, y]);
      context.fillStyle = toCss(colours[feature] === 255 ? empty : palette[colours[feature]]);
      context.fillRect(x - side / 2 - 2, y - side / 2 - 2, side + 4, side + 4);
      app.thumbs.draw(context, feature, x - side / 2, y - side / 2, side);
    }
  }

  function ring([x, y], ink) {
    context.lineWidth = 2.5;
    context.strokeStyle = ink;
    context.beginPath();
    context.arc(x, y, canvas.dataset.drawn === "thumbnails" ? 26 : 9, 0, 7);
    context.stroke();
  }

  function paintLasso(ink) {
    context.strokeStyle = ink;
    context.lineWidth = 1.5;
    context.setLineDash([5, 4]);
    context.beginPath();
    drag.path.forEach(([x, y], place) => (place ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.closePath();
    context.stroke();
    context.setLineDash([]);
  }

  function paintCentre(width, height, ink) {
    context.strokeStyle = ink;
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(width / 2 - 8, height / 2); context.lineTo(width / 2 + 8, height / 2);
    context.moveTo(width / 2, height / 2 - 8); context.lineTo(width / 2, height / 2 + 8);
    context.stroke();
  }

  const draw = () => { frame ||= requestAnimationFrame(paint); };

  /** The listed feature nearest to a place on the screen. */
  function nearest(x, y, within = NEAR) {
    let [best, distance] = [-1, within * within];
    for (const feature of app.list.rows) {
      const [left, top] = toScreen(feature);
      const far = (left - x) ** 2 + (top - y) ** 2;
      if (far < distance) [best, distance] = [feature, far];
    }
    return best;
  }

  function zoom(factor, x, y) {
    const [width, height] = size();
    const scale = Math.min(Math.max(view.scale * factor, 1), 400);
    const [w, t] = [width - 2 * MAP_ROOM, height - 2 * MAP_ROOM];
    view.x += ((x - width / 2) / w) * (1 / view.scale - 1 / scale);
    view.y += ((y - height / 2) / t) * (1 / view.scale - 1 / scale);
    view.scale = scale;
    clamp();
  }
  function pan(dx, dy) {
    const [width, height] = size();
    view.x -= dx / ((width - 2 * MAP_ROOM) * view.scale);
    view.y -= dy / ((height - 2 * MAP_ROOM) * view.scale);
    clamp();
  }
  function clamp() {
    const half = 0.5 / view.scale;
    view.x = Math.min(Math.max(view.x, half), 1 - half);
    view.y = Math.min(Math.max(view.y, half), 1 - half);
    draw();
  }
  const zoomCentre = (factor) => zoom(factor, ...size().map((side) => side / 2));
  const whole = () => { Object.assign(view, { scale: 1, x: 0.5, y: 0.5 }); draw(); };

  function within(path, x, y) {
    let inside = false;
    for (let i = 0, j = path.length - 1; i < path.length; j = i++) {
      const [[xi, yi], [xj, yj]] = [path[i], path[j]];
      if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) inside = !inside;
    }
    return inside;
  }
  const listedWhere = (test) => app.list.rows.filter((feature) => test(...toScreen(feature)));

  const pointer = {
    pointerdown(event) {
      if (event.button) return;
      canvas.setPointerCapture(event.pointerId);
      const { offsetX: x, offsetY: y } = event;
      drag = { x, y, moved: false, path: mode === "lasso" ? [[x, y]] : null };
    },
    pointermove(event) {
      if (!drag) {
        const feature = nearest(event.offsetX, event.offsetY);
        under.textContent = feature < 0 ? hint : app.nameOf(feature);
        canvas.style.cursor = feature < 0 ? "" : "pointer";
        return;
      }
      drag.moved ||= Math.hypot(event.offsetX - drag.x, event.offsetY - drag.y) > 4;
      if (drag.path) drag.path.push([event.offsetX, event.offsetY]);
      else if (drag.moved) {
        pan(event.offsetX - drag.x, event.offsetY - drag.y);
        [drag.x, drag.y] = [event.offsetX, event.offsetY];
      }
      draw();
    },
    pointerup(event) {
      const finished = drag;
      drag = null;
      draw();
      if (!finished) return;
      if (!finished.moved) {
        const feature = nearest(event.offsetX, event.offsetY, canvas.dataset.drawn === "thumbnails" ? 20 : NEAR);
        if (feature >= 0) app.open(feature, "see");
      } else if (finished.path) {
        app.setSubset("lasso", listedWhere((x, y) => within(finished.path, x, y)), false);
      }
    },
    pointercancel() { drag = null; draw(); },
    wheel(event) { // without ctrl or cmd the wheel scrolls the page, as everywhere
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      zoom(Math.exp(-event.deltaY / 300), event.offsetX, event.offsetY);
    },
    keydown(event) {
      const moves = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };
      if (event.key in moves) pan(...moves[event.key]);
      else if (event.key === "+" || event.key === "=") zoomCentre(1.5);
      else if (event.key === "-") zoomCentre(1 / 1.5);
      else if (event.key === "0") whole();
      else if (event.key === "Enter") {
        const feature = nearest(...size().map((side) => side / 2), Infinity);
        if (feature >= 0) app.open(feature, "see");
      } else return;
      event.preventDefault();
    },
    focus: draw,
    blur: draw,
  };
  for (const [name, action] of Object.entries(pointer)) canvas.addEventListener(name, action, { passive: false });

  const setMode = (value) => { mode = value; canvas.dataset.mode = value; };
  setMode("move");
  const start = numeric.some((one) => one.name === "f1") ? "f1" : "frequency";
  const colour = select([...numeric, ...grouped].map(({ name }) => [name, `colour: ${title(name)}`]),
    () => { choose(colour.value); draw(); }, { "aria-label": "colour of the dots" });
  colour.value = start;
  choose(start);
  const observer = new ResizeObserver(draw);
  observer.observe(canvas);
  const element = h("div", { class: "map-part" },
    h("div", { class: "line" },
      choice("What dragging on the map does", [["move", "Move"], ["lasso", "Lasso"]], mode, setMode),
      h("div", { class: "choice", role: "group", "aria-label": "Zoom of the map" },
        button("−", () => zoomCentre(1 / 1.6), { "aria-label": "zoom out" }),
        button("+", () => zoomCentre(1.6), { "aria-label": "zoom in" }),
        button("Whole", whole, { "aria-label": "show the whole map" })),
      button("Select in sight", () => {
        const [width, height] = size();
        app.setSubset("in sight on the map", listedWhere((x, y) => x >= 0 && y >= 0 && x <= width && y <= height), false);
      }),
      h("span", { class: "push" }), colour),
    canvas, h("div", { class: "line" }, under, legend));
  return { element, draw, close: () => { observer.disconnect(); cancelAnimationFrame(frame); } };
}
