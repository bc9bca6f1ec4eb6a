// Turning a feature: a picture before and after, their difference, a painted mask, and a random direction as control.

const MASK = 64; // positions on each side of the mask
const FINE = 4; // pixels on the canvas for a position of the mask
const UNDO = 50; // strokes that can be undone
const GAIN = 2; // by which differences are brightened
const WAYS = { add: "add to the update", replace: "replace its activation", clamp: "replace, at most the largest seen" };

/** The difference of two pictures, brightened, on a canvas. */
function differenceCanvas(alt) {
  const canvas = h("canvas", { class: "shot", role: "img", "aria-label": alt });
  return {
    element: canvas,
    async show(one, other) {
      const bitmaps = await Promise.all([one, other].map((bytes) => createImageBitmap(new Blob([bytes]))));
      const [width, height] = [bitmaps[0].width, bitmaps[0].height];
      const [first, second] = bitmaps.map((bitmap) => {
        const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
        context.drawImage(bitmap, 0, 0);
        bitmap.close();
        return context.getImageData(0, 0, width, height);
      });
      first.data.forEach((value, place) => {
        first.data[place] = place % 4 === 3 ? 255 : GAIN * Math.abs(value - second.data[place]);
      });
      canvas.width = width;
      canvas.height = height;
      canvas.getContext("2d").putImageData(first, 0, 0);
    },
  };
}

/** What lies over the picture: the painted mask, the box that was asked about, and the cursor of the keyboard. */
function brushLayer(changed, asked) {
  const canvas = h("canvas", { class: "brush", width: FINE * MASK, height: FINE * MASK, tabindex: "0", role: "img",
    "aria-label": "Picture before. Arrow keys move the cursor, the space bar uses the tool there" });
  const context = canvas.getContext("2d");
  context.scale(FINE, FINE);
  const past = [];
  const state = { tool: "ask", size: 12 };
  let mask = new Uint8Array(MASK * MASK);
  let box = null; // [left, top, right, bottom], in positions
  let cursor = [MASK / 2, MASK / 2];
  let start = null;

  function draw() {
    context.clearRect(0, 0, MASK, MASK);
    context.fillStyle = "rgb(255 80 20 / 55%)";
    mask.forEach((value, place) => { if (value) context.fillRect(place % MASK, Math.floor(place / MASK), 1, 1); });
    if (box) {
      for (const [width, colour] of [[1.5, "black"], [0.75, "white"]]) {
        context.lineWidth = width;
        context.strokeStyle = colour;
        context.strokeRect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
      }
    }
    if (canvas.matches(":focus-visible")) {
      context.fillStyle = "magenta";
      context.fillRect(cursor[0] - 3, cursor[1], 7, 1);
      context.fillRect(cursor[0], cursor[1] - 3, 1, 7);
    }
  }

  function stamp([x, y]) {
    const reach = state.size / 2;
    for (let row = Math.max(0, Math.ceil(y - reach)); row <= Math.min(MASK - 1, y + reach); row++) {
      for (let column = Math.max(0, Math.ceil(x - reach)); column <= Math.min(MASK - 1, x + reach); column++) {
        if ((column - x) ** 2 + (row - y) ** 2 <= reach * reach) mask[row * MASK + column] = state.tool === "paint" ? 1 : 0;
      }
    }
  }
  function stroke(from, to) { // circles close enough to make a line
    const steps = Math.max(1, Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1]) / (state.size / 4)));
    for (let i = 0; i <= steps; i++) stamp([0, 1].map((axis) => from[axis] + ((to[axis] - from[axis]) * i) / steps));
  }
  function remember() {
    past.push(mask.slice());
    if (past.length > UNDO) past.shift();
  }
  function boxBetween(from, to) {
    const order = (axis) => [Math.min(from[axis], to[axis]), Math.max(from[axis], to[axis]) + 1];
    const [[left, right], [top, bottom]] = [order(0), order(1)];
    return [left, top, right, bottom];
  }
  function ask() {
    const region = new Uint8Array(MASK * MASK);
    for (let row = box[1]; row < box[3]; row++) region.fill(1, row * MASK + box[0], row * MASK + box[2]);
    asked(region);
  }

  const inside = (value, most) => Math.min(Math.max(value, 0), most);
  const place = (event) => [event.offsetX / canvas.clientWidth, event.offsetY / canvas.clientHeight].map(
    (share) => inside(Math.floor(share * MASK), MASK - 1));
  const actions = {
    pointerdown(event) {
      if (event.button) return;
      canvas.setPointerCapture(event.pointerId);
      start = cursor = place(event);
      if (state.tool === "ask") box = boxBetween(start, start);
      else { remember(); stamp(start); }
      draw();
    },
    pointermove(event) {
      if (!start) return;
      const here = place(event);
      if (state.tool === "ask") box = boxBetween(start, here);
      else { stroke(cursor, here); cursor = here; }
      draw();
    },
    pointerup() { // the kernel is asked only now
      if (!start) return;
      start = null;
      if (state.tool === "ask") ask();
      else changed();
    },
    pointercancel() { start = null; },
    keydown(event) {
      const moves = { ArrowLeft: [-2, 0], ArrowRight: [2, 0], ArrowUp: [0, -2], ArrowDown: [0, 2] };
      if (event.key in moves) cursor = cursor.map((value, axis) => inside(value + moves[event.key][axis], MASK - 1));
      else if (event.key === " " && state.tool === "ask") {
        const reach = Math.floor(state.size / 2);
        box = [-reach, -reach, reach + 1, reach + 1].map((step, side) => inside(cursor[side % 2] + step, MASK));
        ask();
      } else if (event.key === " ") { remember(); stamp(cursor); changed(); }
      else return;
      event.preventDefault();
      draw();
    },
    focus: draw,
    blur: draw,
  };
  for (const [name, action] of Object.entries(actions)) canvas.addEventListener(name, action);
  return {
    element: canvas, state,
    get mask() { return mask; },
    painted: () => mask.some(Boolean),
    canUndo: () => past.length > 0,
    undo() { mask = past.pop() ?? mask; draw(); changed(); },
    clearMask() { remember(); mask = new Uint8Array(MASK * MASK); draw(); changed(); },
    forgetBox() { box = null; draw(); },
  };
}

function turnPanel(app) {
  const { prompt: firstPrompt, seed: firstSeed, passes } = app.start;
  const turnSoon = afterPause(250, () => turn(), app.busy);
  const changed = () => turnSoon();

  const prompt = h("input", { type: "text", value: firstPrompt, onchange: changed });
  const seed = h("input", { type: "number", min: 0, step: 1, value: firstSeed, onchange: changed });
  const steps = Array.from({ length: passes }, (_, step) => [String(step), String(step)]);
  const from = select(steps, changed);
  const to = select(steps, changed);
  to.value = String(passes - 1);
  const way = select(Object.entries(WAYS), changed);
  const strength = h("input", { type: "range", min: -4, max: 4, step: 0.25, value: 1, onchange: changed,
    oninput: () => { exact.value = strength.value; } });
  const exact = h("input", { type: "number", step: "any", value: 1, "aria-label": "strength, as a number",
    onchange: () => { strength.value = exact.value; changed(); } });
  const control = h("input", { type: "checkbox", onchange: () => { showControl(); changed(); } });

  const heading = h("div", { class: "card-head" });
  const shot = (alt) => picture(alt, { class: "shot" });
  const shots = { before: shot("before"), after: shot("after"), control: shot("random direction") };
  const differences = {
    after: differenceCanvas("difference of before and after"),
    control: differenceCanvas("difference of before and the random direction"),
  };
  const layer = brushLayer(() => { tools(); changed(); }, askActive);
  const figure = (text, ...parts) => h("figure", {}, h("div", { class: "stack" }, parts), h("figcaption", {}, text));
  const figures = {
    before: figure("before", shots.before.element, layer.element),
    after: figure("after", shots.after.element),
    difference: figure(`difference × ${GAIN}`, differences.after.element),
    control: figure("random direction, equal norm", shots.control.element),
    controlDifference: figure(`its difference × ${GAIN}`, differences.control.element),
  };
  const showControl = () => {
    for (const one of [figures.control, figures.controlDifference]) one.hidden = !control.checked;
  };
  showControl();
  figures.control.classList.add("below-after");

  const brushSize = h("input", { type: "range", min: 2, max: 32, value: layer.state.size,
    oninput: () => { layer.state.size = Number(brushSize.value); } });
  const undo = button("Undo", () => layer.undo());
  const clear = button("Clear", () => layer.clearMask());
  const tools = () => { undo.disabled = !layer.canUndo(); clear.disabled = !layer.painted(); };
  const active = h("div", { class: "active", role: "status" });
  const help = "Click or drag in the picture before: the features active there are listed. Or paint a mask: "
    + "the feature is turned only there.";
  const element = h("div", { class: "turn" }, heading,
    h("div", { class: "line" }, labelled("Prompt", prompt, "grow"), labelled("Seed", seed)),
    h("div", { class: "line" }, labelled("Strength (k mu)", strength, "grow"), exact, labelled("Way", way)),
    h("div", { class: "line" }, passes > 1 ? [labelled("Steps", from), labelled("to", to)] : null,
      labelled("Random direction beside it", control, "check"), h("span", { class: "push" }),
      button("Turn", () => { turnSoon.cancel(); turn(); }, { class: "main" })),
    h("div", { class: "results" }, Object.values(figures)),
    h("div", { class: "line" },
      choice("What dragging in the picture does",
        [["ask", "What is active?"], ["paint", "Paint mask"], ["erase", "Erase"]], "ask",
        (value) => { layer.state.tool = value; layer.forgetBox(); }),
      labelled("Brush", brushSize), undo, clear),
    active);
  active.append(h("p", { class: "hint" }, help));
  tools();

  let before = null; // {key, source, bytes}: the picture that is shown as before
  let last = ""; // what was asked for last
  let visible = false;

  async function turn() {
    if (!visible || app.feature < 0) return;
    const steering = {
      feature: app.feature, strength: Number(exact.value), way: way.value, control: control.checked,
      steps: passes > 1 ? [Number(from.value), Number(to.value)] : null,
    };
    const source = { prompt: prompt.value, seed: Number(seed.value) };
    const mask = layer.painted() ? layer.mask.slice() : null;
    const key = JSON.stringify([source, steering, mask && Array.from(mask).join("")]);
    if (key === last) return;
    last = key;
    const sourceKey = JSON.stringify(source);
    const found = await app.ask("turn", { ...source, ...steering, before: before?.key !== sourceKey }, mask ? [mask] : []);
    if (!found) {
      if (last === key) last = ""; // it failed, so the same may be asked again
      return;
    }
    app.busy(true);
    const { before: made, after, control: random } = found.answer;
    if (made) {
      before = { key: sourceKey, source, bytes: made };
      layer.forgetBox();
    }
    await Promise.all([
      made && shots.before.show(made, `before: ${source.prompt}`),
      shots.after.show(after, `after: feature ${steering.feature}, strength ${steering.strength}`),
      differences.after.show(before.bytes, after),
      random && shots.control.show(random),
      random && differences.control.show(before.bytes, random),
    ]);
    app.busy(false);
  }

  async function askActive(region) {
    if (!before) return;
    const found = await app.ask("active", before.source, [region]);
    if (!found) return;
    const { features } = found.answer;
    active.replaceChildren(h("h4", {}, "Active here, strongest first"), h("div", { class: "features" },
      features.slice(0, 12).map(([feature, amount]) => featureButton(app, feature, shown(amount)))));
    app.setSubset("active here", features.map(([feature]) => feature));
  }

  return {
    element,
    shown(now) {
      visible = now;
      if (now) turn();
    },
    featureChanged() {
      const thumb = thumbnail(app);
      thumb.show(app.feature);
      heading.replaceChildren(thumb.element, h("div", { class: "grow" }, h("h3", {}, `Turn feature ${app.feature}`),
        h("p", { class: "caption" }, app.captionOf(app.feature))));
      turn();
    },
    close: () => { turnSoon.cancel(); Object.values(shots).forEach((shot) => shot.clear()); },
  };
}
