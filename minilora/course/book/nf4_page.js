// The page: what is dragged or slid sets four numbers, and everything is computed and drawn again from these.

const COUNT = 16384, OUTLIER_AT = 5000, SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096], REACH = 10;
const FIRST = {mean: 0, spread: 1, outlier: 0, size: 1, weight: OUTLIER_AT};
const find = id => document.getElementById(id);

// Normal numbers from a generator of its own (mulberry32, Box and Muller), the same at every visit.
const NORMAL = (() => {
  let state = 8;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ state >>> 15, 1 | state);
    mixed = (mixed + Math.imul(mixed ^ mixed >>> 7, 61 | mixed)) ^ mixed;
    return ((mixed ^ mixed >>> 14) >>> 0) / 4294967296;
  };
  return Float32Array.from({length: COUNT}, () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
})();

function settings() {
  const number = id => Number(find(id).value);
  return {mean: number("mean"), spread: number("spread"), outlier: number("outlier"), blocksize: SIZES[number("size")],
          weight: number("weight"), double: find("double").checked};
}

function currentWeights({mean, spread, outlier}) {
  const weights = NORMAL.map(z => mean + spread * z);
  weights[OUTLIER_AT] = outlier;
  return weights;
}

// Drawing

function draw(name, attributes = {}, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

// An empty picture of the width that the page has for it: letters keep their size on a phone.
function canvas(id, height) {
  const svg = find(id), width = Math.max(280, Math.round(svg.parentNode.clientWidth));
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  if (!svg.firstChild) svg.append(draw("g"));       // handles stand behind it and stay: one of them may be held
  svg.firstChild.replaceChildren();
  return {svg, width, add: (name, attributes, text) => svg.firstChild.append(draw(name, attributes, text))};
}

const PLOT = {height: 290, ground: 210, edge: 14};
const across = width => ({to: x => PLOT.edge + (x + REACH) / (2 * REACH) * (width - 2 * PLOT.edge),
                          from: pixel => (pixel - PLOT.edge) / (width - 2 * PLOT.edge) * 2 * REACH - REACH});

function drawWeights(chosen, weights, now, block) {
  const {svg, width, add} = canvas("weights", PLOT.height), {to} = across(width), bins = new Array(160).fill(0);
  for (const weight of weights) {
    const bin = Math.floor((weight + REACH) / (2 * REACH) * bins.length);
    if (bin >= 0 && bin < bins.length) bins[bin]++;
  }
  const tallest = Math.max(...bins), step = 2 * REACH / bins.length;
  bins.forEach((count, i) => count && add("rect", {class: "grey", x: to(i * step - REACH), width: to(step) - to(0),
    y: PLOT.ground - count / tallest * (PLOT.ground - 34), height: count / tallest * (PLOT.ground - 34)}));
  add("line", {class: "base", x1: to(-REACH), x2: to(REACH), y1: PLOT.ground, y2: PLOT.ground});
  for (let x = -REACH; x <= REACH; x += 5) add("text", {class: "tick middle", x: to(x), y: PLOT.height - 6}, digits(x, 0));
  for (let i = block.start; i < block.stop; i++) {
    add("line", {class: "orange", x1: to(weights[i]), x2: to(weights[i]), y1: PLOT.ground + 26, y2: PLOT.ground + 38});
  }
  for (const level of NF4_CODE) {
    const x = to(level * now.absmax[block.number]);
    add("line", {class: "blue", x1: x, x2: x, y1: PLOT.ground + 42, y2: PLOT.ground + 58});
    add("line", {class: "blue faint", x1: x, x2: x, y1: 34, y2: PLOT.ground});
  }
  place(svg, "mean", to(chosen.mean), 20);
  place(svg, "spread", to(chosen.mean + chosen.spread), 34 + (PLOT.ground - 34) * 0.4);
  place(svg, "outlier", to(chosen.outlier), PLOT.ground + 12);
}

function place(svg, name, x, y) {
  let handle = svg.querySelector(`[data-name=${name}]`);
  if (!handle) {
    handle = draw("g", {class: "handle", "data-name": name});
    handle.append(draw("circle", {class: "reach", r: 22}),        // as large as a finger
                  name === "outlier" ? draw("path", {class: "grip", d: "M0 -10 L10 0 L0 10 L-10 0 Z"}) : draw("circle", {class: "grip", r: 9}),
                  draw("text", {class: "tick", x: 14, y: 4}, name));
    svg.append(handle);
  }
  handle.setAttribute("transform", `translate(${x} ${y})`);
  const left = x > svg.viewBox.baseVal.width - 70;              // no room for the name on the right
  handle.lastChild.setAttribute("x", left ? -14 : 14);
  handle.lastChild.setAttribute("class", left ? "tick end" : "tick");
}

function drawCodes(now, block) {
  const {width, add} = canvas("codes", 190), wide = (width - 44) / 16, shares = (from, to) => {
    const counts = new Array(16).fill(0);
    for (let i = from; i < to; i++) counts[now.codes[i]]++;
    return counts.map(count => count / (to - from));
  };
  const all = shares(0, COUNT), here = shares(block.start, block.stop), top = Math.max(0.1, ...all, ...here);
  const height = share => share / top * 140;
  for (const share of [0, top]) {
    add("line", {class: "grid", x1: 40, x2: width, y1: 150 - height(share), y2: 150 - height(share)});
    add("text", {class: "tick end", x: 34, y: 154 - height(share)}, `${(100 * share).toFixed(0)} %`);
  }
  all.forEach((share, code) => {
    const x = 42 + code * wide;
    add("rect", {class: "grey", x, width: wide * 0.8, y: 150 - height(share), height: height(share)});
    add("rect", {class: "blue", x: x + wide * 0.25, width: wide * 0.3, y: 150 - height(here[code]), height: height(here[code])});
    add("text", {class: "tick middle", x: x + wide * 0.4, y: 166}, code);
  });
  add("text", {class: "tick", x: 42, y: 184}, "code 0 is −1, code 7 is 0, code 15 is 1");
  return here.filter(Boolean).length;
}

function drawTradeoff(chosen, weights) {
  const {width, add} = canvas("tradeoff", 270), points = [];
  for (const size of SIZES) {
    const blocks = quantizeBlocks(weights, NF4_CODE, size);
    for (const double of [false, true]) {
      const made = quantizeNF4(weights, size, double, undefined, blocks);
      points.push({double, size, bits: made.bits, error: rmsError(weights, made.values) / chosen.spread});
    }
  }
  const top = 1.1 * Math.max(...points.map(point => point.error)), low = 0.9 * Math.min(...points.map(point => point.error));
  const x = bits => 52 + (bits - 4) / 1.05 * (width - 70), y = error => 225 - (error - low) / (top - low) * 200;
  for (const bits of [4, 4.25, 4.5, 4.75, 5]) {
    add("line", {class: "grid", x1: x(bits), x2: x(bits), y1: 20, y2: 225});
    add("text", {class: "tick middle", x: x(bits), y: 242}, bits);
  }
  for (const part of [0, 0.5, 1]) {
    const error = low + part * (top - low);
    add("line", {class: "grid", x1: 52, x2: width - 18, y1: y(error), y2: y(error)});
    add("text", {class: "tick end", x: 46, y: y(error) + 4}, error.toFixed(3));
  }
  add("text", {class: "tick middle", x: width / 2, y: 262}, "bits a weight");
  add("text", {class: "tick", x: 0, y: 12}, "error, in spreads");
  for (const double of [false, true]) {
    const line = points.filter(point => point.double === double), color = double ? "blue" : "gold";
    add("polyline", {class: `${color} path`, points: line.map(point => `${x(point.bits)},${y(point.error)}`).join(" ")});
    for (const point of line) {
      add("circle", {class: color, r: 3.5, cx: x(point.bits), cy: y(point.error)});
      if (point.size <= 256) {
        add("text", double ? {class: "tick end", x: x(point.bits) - 7, y: y(point.error) + 14}
                           : {class: "tick", x: x(point.bits) + 6, y: y(point.error) - 6}, point.size);
      }
      if (double === chosen.double && point.size === chosen.blocksize) {
        add("circle", {class: "ring", r: 9, cx: x(point.bits), cy: y(point.error)});
      }
    }
  }
}

// Words

const digits = (value, count) => value.toFixed(count).replace("-", "−");
const thousands = value => String(value).replace(/\B(?=(\d{3})+$)/g, ",");

function say(chosen, weights, now, block, used) {
  const other = quantizeNF4(weights, chosen.blocksize, !chosen.double);
  find("bits").textContent = digits(now.bits, 3);
  find("bits-beside").textContent = `${digits(other.bits, 3)} ${chosen.double ? "with float32 constants" : "with double quantization"}`
    + `; 65 billion weights take ${digits(65 * now.bits / 8, 1)} GB`;
  find("error").textContent = digits(rmsError(weights, now.values) / chosen.spread, 4);
  find("error-beside").textContent = `${digits(rmsError(weights, now.values, block.start, block.stop) / chosen.spread, 4)} in this block`;
  find("used").textContent = `${used} of 16`;
  find("used-beside").textContent = `the block of the weights ${thousands(block.start)} to ${thousands(block.stop - 1)}`;
  const moves = now.exact.reduce((sum, exact, i) => sum + Math.abs(now.absmax[i] / exact - 1), 0) / now.exact.length;
  find("moved").textContent = `${digits(100 * moves, 2)} %`;
  find("moved-beside").textContent = chosen.double ? "on average: it is kept in 8 bits" : "it is kept in float32";
  for (const id of ["mean", "spread", "outlier"]) document.querySelector(`output[for=${id}]`).textContent = digits(chosen[id], 2);
  document.querySelector("output[for=size]").textContent = thousands(chosen.blocksize);
  document.querySelector("output[for=weight]").textContent = thousands(chosen.weight);
}

function showBytes(chosen, now, block) {
  const start = Math.max(block.start, chosen.weight - chosen.weight % 64), stop = Math.min(start + 64, block.stop);
  find("strip-title").textContent = `codes of the weights ${thousands(start)} to ${thousands(stop - 1)}, two to a byte; touch one`;
  find("strip").replaceChildren(...Array.from({length: (stop - start) / 2}, (_, pair) => {
    const byte = document.createElement("span");
    byte.append(...[0, 1].map(half => {
      const at = start + 2 * pair + half, cell = document.createElement("button");
      Object.assign(cell, {type: "button", tabIndex: -1, textContent: now.codes[at].toString(16), title: `weight ${at}`});
      cell.dataset.at = at;
      cell.setAttribute("aria-pressed", at === chosen.weight);
      return cell;
    }));
    return byte;
  }));
}

function showWay(chosen, weights, now, block) {
  const at = chosen.weight, weight = weights[at], code = now.codes[at], absmax = now.absmax[block.number];
  const byte = now.packed[at >> 1], half = at % 2 ? "low" : "high";
  const rows = [["weight", digits(weight, 4)], ["largest of its block", digits(now.exact[block.number], 4)],
    ["divided by it", digits(weight / now.exact[block.number], 4)],
    ["nearest level", `${digits(NF4_CODE[code], 4)}, code ${code}`],
    ["stored", `${half} four bits of the byte ${byte.toString(16).padStart(2, "0")}`],
    ["constant as stored", now.nested ? `${digits(absmax, 4)}, 8-bit code ${now.nested.codes[block.number]}` : digits(absmax, 4)],
    ["comes out as", `${digits(now.values[at], 4)}, off by ${digits(now.values[at] - weight, 4)}`]];
  find("way").replaceChildren(...rows.map(([name, value]) => {
    const row = document.createElement("tr"), head = document.createElement("th"), cell = document.createElement("td");
    head.textContent = name; head.scope = "row"; cell.textContent = value;
    row.append(head, cell);
    return row;
  }));
}

function render() {
  const chosen = settings(), weights = currentWeights(chosen), now = quantizeNF4(weights, chosen.blocksize, chosen.double);
  const number = Math.floor(chosen.weight / chosen.blocksize), start = number * chosen.blocksize;
  const block = {number, start, stop: start + chosen.blocksize};
  drawWeights(chosen, weights, now, block);
  say(chosen, weights, now, block, drawCodes(now, block));
  showBytes(chosen, now, block);
  showWay(chosen, weights, now, block);
  drawTradeoff(chosen, weights);
}

// Hands

let waiting = false;
function later() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; render(); });
}

function set(id, value) {
  find(id).value = value;           // the slider keeps it within its ends
  later();
}

let dragged = null;
const plot = find("weights");
plot.addEventListener("pointerdown", event => {
  const handle = event.target.closest(".handle");
  if (!handle) return;
  dragged = handle.dataset.name;
  plot.setPointerCapture(event.pointerId);
  event.preventDefault();
});
plot.addEventListener("pointermove", event => {
  if (!dragged) return;
  const box = plot.getBoundingClientRect(), x = across(box.width).from(event.clientX - box.left);
  set(dragged, dragged === "spread" ? Math.abs(x - settings().mean) : x);
});
// Trap: `touch-action` does not hold for what is inside an SVG, and the page would scroll away under the finger.
plot.addEventListener("touchstart", event => { if (event.target.closest(".handle")) event.preventDefault(); }, {passive: false});
for (const end of ["pointerup", "pointercancel"]) plot.addEventListener(end, () => { dragged = null; });
for (const id of ["mean", "spread", "outlier", "size", "weight", "double"]) find(id).addEventListener("input", later);
find("strip").addEventListener("click", event => {
  if (event.target.dataset.at) set("weight", event.target.dataset.at);
});
find("reset").addEventListener("click", () => {
  for (const [id, value] of Object.entries(FIRST)) set(id, value);
  find("double").checked = true;
});
addEventListener("resize", later);
render();
