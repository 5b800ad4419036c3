"use strict";
// Draws the gallery. Everything that comes from the data goes into the page as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

let group = data.groups[0];
let shown = []; // the tiles of the group that pass the filters
let open = 0; // the place in `shown` of the one in the viewer
const dirty = new WeakMap(); // canvas -> how to draw it

// ---- what passes the filters

const minScore = () => Number(at("score").value);
const passes = (item) =>
  (at("category").value === "" || item.c === Number(at("category").value)) &&
  (item.s === null || item.s >= minScore());
const isTouched = () => at("category").value !== "" || minScore() > data.threshold;

function isShown(tile) {
  if (group.id === "errors" || !isTouched()) return true;
  const image = data.images[tile.image];
  const items = group.id === "missed" ? [image.truth[tile.mark]] : group.id === "wrong" ? [image.found[tile.mark]] : image.found;
  return items.some(passes);
}

// ---- colours

function colourOf(item, place) {
  const n = at("colour").value === "class" ? item.c : place;
  if (n < data.palette.length) return data.palette[n];
  // Far from its neighbours on the wheel: the golden angle.
  const hue = (n * 137.508) % 360;
  const channel = (k) => Math.round(255 * (0.55 - 0.25 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  return [0, 8, 4].map((k) => channel((k + hue / 30) % 12));
}
const css = (rgb) => `rgb(${rgb.join()})`;

// ---- masks: COCO's compressed run lengths, column by column (rleFrString of maskApi.c)

function runsOf(counts) {
  const runs = [];
  for (let p = 0; p < counts.length; ) {
    let x = 0, k = 0, more = true;
    while (more) {
      const c = counts.charCodeAt(p++) - 48;
      x |= (c & 31) << (5 * k++);
      more = (c & 32) !== 0;
      if (!more && c & 16) x |= -1 << (5 * k);
    }
    if (runs.length > 2) x += runs[runs.length - 2];
    runs.push(x);
  }
  return runs;
}

function paintMask(pixels, height, width, counts, rgb) {
  const inside = new Uint8Array(height * width);
  let start = 0;
  runsOf(counts).forEach((run, n) => {
    if (n % 2) inside.fill(1, start, start + run);
    start += run;
  });
  for (let i = inside.indexOf(1); i >= 0 && i < inside.length; i++) {
    if (!inside[i]) continue;
    const y = i % height, x = (i - y) / height;
    const edge = y === 0 || y === height - 1 || x === 0 || x === width - 1 ||
      !inside[i - 1] || !inside[i + 1] || !inside[i - height] || !inside[i + height];
    const to = 4 * (y * width + x);
    pixels[to] = rgb[0]; pixels[to + 1] = rgb[1]; pixels[to + 2] = rgb[2];
    pixels[to + 3] = edge ? 255 : 105;
  }
}

// ---- one picture

function draw(canvas, image, items, mark) {
  const cssWidth = canvas.clientWidth, cssHeight = canvas.clientHeight;
  if (!cssWidth) return;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(cssWidth * ratio);
  canvas.height = Math.round(cssHeight * ratio);
  const context = canvas.getContext("2d");
  const drawn = items.map((item, place) => ({ item, place })).filter(({ item, place }) => place === mark || passes(item));
  if (at("masks").checked) {
    const layer = make("canvas");
    layer.width = image.tw;
    layer.height = image.th;
    const layerContext = layer.getContext("2d"), pixels = layerContext.createImageData(image.tw, image.th);
    // The best score last, so that it lies on top.
    for (const { item, place } of [...drawn].reverse()) {
      if (item.m !== null) paintMask(pixels.data, image.th, image.tw, item.m, colourOf(item, place));
    }
    layerContext.putImageData(pixels, 0, 0);
    context.drawImage(layer, 0, 0, canvas.width, canvas.height);
  }
  context.scale(ratio, ratio);
  drawBoxes(context, drawn, [cssWidth / image.w, cssHeight / image.h], mark);
  if (at("labels").checked) writeLabels(context, drawn, [cssWidth / image.w, cssHeight / image.h], [cssWidth, cssHeight], mark);
}

function drawBoxes(context, drawn, [scaleX, scaleY], mark) {
  for (const { item, place } of drawn) {
    if (!at("boxes").checked && place !== mark) continue;
    const [x, y, w, h] = item.b;
    context.setLineDash(item.crowd ? [4, 3] : []);
    const strokes = place === mark ? [["#fff", 5], ["#d00000", 3]] : [[css(colourOf(item, place)), 1.5]];
    for (const [style, width] of strokes) {
      context.strokeStyle = style;
      context.lineWidth = width;
      context.strokeRect(x * scaleX, y * scaleY, w * scaleX, h * scaleY);
    }
  }
}

function writeLabels(context, drawn, [scaleX, scaleY], [width, height], mark) {
  const small = width < 420, letter = small ? 10 : 12, high = letter + 4, taken = [];
  context.font = `600 ${letter}px system-ui, "DejaVu Sans", sans-serif`;
  context.textBaseline = "middle";
  const marked = drawn.filter((one) => one.place === mark);
  for (const { item, place } of [...marked, ...drawn.filter((one) => one.place !== mark)]) {
    const name = data.categories[item.c];
    const short = name.length > 18 ? `${name.slice(0, 17)}…` : name;
    const words = item.s === null ? short : `${short} ${item.s.toFixed(2)}`;
    const wide = context.measureText(words).width + 6;
    const left = Math.max(0, Math.min(item.b[0] * scaleX, width - wide));
    const tops = [item.b[1] * scaleY - high, item.b[1] * scaleY, (item.b[1] + item.b[3]) * scaleY];
    const free = tops.find((top) => top >= 0 && top + high <= height &&
      !taken.some(([l, t, w]) => left < l + w && l < left + wide && top < t + high && t < top + high));
    if (free === undefined) continue;
    taken.push([left, free, wide]);
    const rgb = place === mark ? [208, 0, 0] : colourOf(item, place);
    context.fillStyle = css(rgb);
    context.fillRect(left, free, wide, high);
    context.fillStyle = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 125 ? "#000" : "#fff";
    context.fillText(words, left + 3, free + high / 2 + 0.5);
  }
}

// Canvases are drawn when they come into view, and again when their size changes.
const drawNow = (canvas) => dirty.has(canvas) && dirty.get(canvas)();
const inView = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    entry.target.dataset.inView = entry.isIntersecting ? "1" : "";
    if (entry.isIntersecting) drawNow(entry.target);
  }
}, { rootMargin: "200px" });
const resized = new ResizeObserver((entries) => entries.forEach((e) => e.target.dataset.inView && drawNow(e.target)));

function shot(image, items, mark, alt, caption) {
  const figure = make("figure", { class: "shot" });
  const picture = make("img", { src: image.src, alt, width: image.tw, height: image.th, loading: "lazy" });
  const canvas = make("canvas", { "aria-hidden": "true" });
  figure.append(picture, canvas);
  figure.style.aspectRatio = `${image.tw} / ${image.th}`;
  if (caption) figure.append(make("figcaption", {}, caption));
  dirty.set(canvas, () => draw(canvas, image, items, mark));
  inView.observe(canvas);
  resized.observe(canvas);
  return figure;
}

// ---- words

function summaryOf(items) {
  const counts = new Map();
  for (const item of items.filter(passes)) counts.set(item.c, (counts.get(item.c) || 0) + 1);
  const words = [...counts].sort((a, b) => b[1] - a[1]).map(([c, n]) => `${n} ${data.categories[c]}`);
  return words.length ? words.join(", ") : "nothing";
}

function shotsOf(tile, always) {
  const image = data.images[tile.image];
  if (!image.src) return [make("div", { class: "unreadable" }, image.error || "This image cannot be shown.")];
  const foundMark = group.id === "wrong" ? tile.mark : undefined;
  const truthMark = group.id === "missed" ? tile.mark : undefined;
  const pair = image.truth !== null && (always || group.id === "wrong" || group.id === "missed");
  const shots = [shot(image, image.found, foundMark, `${image.key}: found ${summaryOf(image.found)}`, pair ? "found" : "")];
  if (pair) shots.push(shot(image, image.truth, truthMark, `${image.key}: the truth is ${summaryOf(image.truth)}`, "truth"));
  return shots;
}

// ---- the gallery

function showTiles() {
  at("score-value").value = minScore().toFixed(2);
  for (const canvas of at("tiles").querySelectorAll("canvas")) { inView.unobserve(canvas); resized.unobserve(canvas); }
  shown = group.tiles.filter(isShown);
  const list = at("tiles");
  list.classList.toggle("pairs", group.id === "wrong" || group.id === "missed");
  list.replaceChildren(...shown.map((tile, place) => {
    const image = data.images[tile.image];
    const button = make("button", { type: "button", class: "tile" });
    button.append(make("div", { class: "shots" }, ...shotsOf(tile, false)));
    const more = tile.words || (image.error ? image.error : `found ${summaryOf(image.found)}`);
    button.append(make("div", { class: "words" }, make("b", { title: image.id }, image.key), make("span", {}, more)));
    button.addEventListener("click", () => show(place));
    return make("li", {}, button);
  }));
  at("status").textContent = shown.length === group.tiles.length
    ? `${shown.length} images` : `${shown.length} of ${group.tiles.length} images pass the filters`;
}

function choose(chosen) {
  group = chosen;
  for (const button of at("groups").children) button.setAttribute("aria-pressed", String(button.dataset.group === group.id));
  at("about").textContent = group.about;
  showTiles();
}

// ---- the viewer

function show(place) {
  open = (place + shown.length) % shown.length;
  const tile = shown[open], image = data.images[tile.image];
  at("viewer-title").textContent = image.key;
  const size = image.w ? `, ${image.w} × ${image.h} pixels (width × height)` : "";
  at("viewer-note").textContent = [`${image.id}${size}`, tile.words, image.note].filter(Boolean).join(". ");
  at("viewer-pictures").replaceChildren(...shotsOf(tile, true));
  const rows = image.found.map((item, n) => ({ item, n })).filter(({ item }) => passes(item));
  const body = rows.map(({ item, n }) => {
    const swatch = make("i", { class: "swatch" });
    swatch.style.background = css(colourOf(item, n));
    const cells = [item.s === null ? "–" : item.s.toFixed(3), item.a === null ? "–" : item.a.toLocaleString("en"), item.b.map((v) => v.toFixed(0)).join(" ")];
    return make("tr", {}, make("th", { scope: "row" }, swatch, data.categories[item.c]), ...cells.map((c) => make("td", { class: "number" }, c)));
  });
  const head = ["category", "score", "pixels", "box x y w h"].map((h, n) => make("th", { scope: "col", class: n ? "number" : "" }, h));
  at("viewer-list").replaceChildren(...(rows.length ? [make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body))] : []));
  if (!at("viewer").open) at("viewer").showModal();
}

// ---- start

for (const one of data.groups) {
  const button = make("button", { type: "button", "data-group": one.id, "aria-pressed": "false" }, `${one.label} `, make("small", {}, String(one.tiles.length)));
  button.addEventListener("click", () => choose(one));
  at("groups").append(button);
}
data.categories.forEach((name, n) => at("category").append(make("option", { value: String(n) }, name)));
at("score").value = String(data.threshold);
at("filters").addEventListener("input", showTiles);
at("filters").addEventListener("submit", (event) => event.preventDefault());
at("previous").addEventListener("click", () => show(open - 1));
at("next").addEventListener("click", () => show(open + 1));
at("close").addEventListener("click", () => at("viewer").close());
at("viewer").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") show(open - 1);
  if (event.key === "ArrowRight") show(open + 1);
});
at("viewer").addEventListener("close", () => at("tiles").children[open]?.firstChild.focus());
if (group) choose(group);
