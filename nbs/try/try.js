// The page to try a network on: five classes with examples, a query, and the answer.
import { prepare } from "./prepare.js";
import { ask } from "./network.js";

const { runtime, missing, networks } = window.stanet;
const CLASSES = 5, PAPER = 210, PEN = 6, LARGEST = 24_000_000;  // pixels
const boards = [];
window.stanet.boards = boards;

function make(tag, options = {}, ...children) {  // an element
  const { text, ...attributes } = options, element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function percent(p) {
  if (p < 0.0005) return "< 0.1 %";
  if (p >= 0.9995) return "> 99.9 %";
  return `${(100 * p).toFixed(p > 0.995 || p < 0.1 ? 1 : 0)} %`;
}

// --- attention -------------------------------------------------------------------------------------------

const BLUE = [0, 114, 178];

function shade(canvas, map, side, onPaper) {
  // dims a photograph where its map is small, as the figures of the paper do; paper is tinted where it is large
  const n = canvas.width, ink = canvas.getContext("2d");
  ink.clearRect(0, 0, canvas.width, canvas.height);
  if (!map) return;
  const most = Math.max(...map), picture = ink.createImageData(n, n);
  const place = i => {  // between which sites pixel i lies, and how far
    const at = Math.min(Math.max((i + 0.5) * side / n - 0.5, 0), side - 1), low = Math.floor(at);
    return [low, Math.min(low + 1, side - 1), at - low];
  };
  for (let y = 0; y < n; y++) {
    const [top, bottom, down] = place(y);
    for (let x = 0; x < n; x++) {
      const [left, right, across] = place(x);
      const above = map[top * side + left] * (1 - across) + map[top * side + right] * across;
      const below = map[bottom * side + left] * (1 - across) + map[bottom * side + right] * across;
      const weight = (above * (1 - down) + below * down) / most;
      const tint = onPaper ? [...BLUE, 160 * weight] : [0, 0, 0, 224 * (1 - weight)];
      picture.data.set(tint, 4 * (y * n + x));
    }
  }
  ink.putImageData(picture, 0, 0);
}

// --- one picture: drawn, or from a file ------------------------------------------------------------------

class Drawing {  // a sheet to draw on, with mouse, finger, pen or keys
  constructor(name, changed) {
    this.strokes = [];
    this.changed = changed;
    this.paper = make("canvas", { width: PAPER, height: PAPER, class: "paper" });
    this.shadow = make("canvas", { width: PAPER, height: PAPER, class: "shadow", "aria-hidden": "true" });
    this.cursor = make("span", { class: "cursor", "aria-hidden": "true" });
    const keys = "arrow keys move the pen, space lowers and lifts it, Z undoes, Delete clears";
    this.element = make("div", {
      class: "sheet", tabindex: 0, role: "application", "aria-label": `${name}: ${keys}`,
    }, this.paper, this.shadow, this.cursor);
    this.said = make("span", { class: "visually-hidden", "aria-live": "polite" });
    this.element.append(this.said);
    this.pen = { x: PAPER / 2, y: PAPER / 2, down: false };
    this.listen();
    this.draw();
  }

  listen() {
    const on = (name, react) => this.element.addEventListener(name, react);
    on("pointerdown", event => {
      if (event.button > 0) return;
      event.preventDefault();
      this.element.focus({ focusVisible: false });
      this.element.setPointerCapture(event.pointerId);
      this.lift();
      this.strokes.push([this.at(event)]);
      this.moving = event.pointerId;
      this.draw();
    });
    on("pointermove", event => {
      if (this.moving !== event.pointerId) return;
      const points = event.getCoalescedEvents?.() ?? [];
      for (const point of points.length ? points : [event]) this.strokes.at(-1).push(this.at(point));
      this.draw();
    });
    const end = event => {
      if (this.moving !== event.pointerId) return;
      this.moving = undefined;
      this.changed();
    };
    on("pointerup", end);
    on("pointercancel", end);
    on("keydown", event => this.key(event));
    on("blur", () => this.lift());
  }

  at(event) {
    const box = this.paper.getBoundingClientRect();
    return [(event.clientX - box.left) * PAPER / box.width, (event.clientY - box.top) * PAPER / box.height];
  }

  lift() {
    if (!this.pen.down) return;
    this.pen.down = false;
    this.said.textContent = "pen up";
    this.draw();
    this.changed();
  }

  key(event) {
    if (event.altKey) return;
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const step = steps[event.key], far = event.shiftKey ? 3 : 12;
    const inside = v => Math.min(Math.max(v, 4), PAPER - 4);
    if (step) {
      this.pen.x = inside(this.pen.x + far * step[0]);
      this.pen.y = inside(this.pen.y + far * step[1]);
      if (this.pen.down) this.strokes.at(-1).push([this.pen.x, this.pen.y]);
    } else if (event.key === " " && !this.pen.down) {
      this.pen.down = true;
      this.strokes.push([[this.pen.x, this.pen.y]]);
      this.said.textContent = "pen down";
    } else if (event.key === " ") this.lift();
    else if (event.key === "z" || event.key === "Z") this.undo();
    else if (event.key === "Delete" || event.key === "Backspace") this.clear();
    else return;
    event.preventDefault();
    this.draw();
  }

  undo() {
    this.pen.down = false;
    this.strokes.pop();
    this.draw();
    this.changed();
  }

  clear() {
    this.pen.down = false;
    this.strokes = [];
    this.draw();
    this.changed();
  }

  draw() {
    const ink = this.paper.getContext("2d", { willReadFrequently: true });
    ink.fillStyle = "#fff";
    ink.fillRect(0, 0, PAPER, PAPER);
    ink.lineWidth = PEN;
    ink.lineCap = ink.lineJoin = "round";
    for (const [first, ...others] of this.strokes) {
      ink.beginPath();
      ink.moveTo(...first);
      if (!others.length) ink.lineTo(first[0] + 0.1, first[1]);
      for (const point of others) ink.lineTo(...point);
      ink.stroke();
    }
    shade(this.shadow);
    this.cursor.style.left = `${100 * this.pen.x / PAPER}%`;
    this.cursor.style.top = `${100 * this.pen.y / PAPER}%`;
    this.cursor.classList.toggle("down", this.pen.down);
  }

  get empty() { return !this.strokes.length; }

  pixels({ size, channels }) {
    const ink = this.paper.getContext("2d", { willReadFrequently: true });
    return prepare(ink.getImageData(0, 0, PAPER, PAPER), size, channels);
  }
}

class Photo {  // the pixels of a file, as the network sees them
  constructor(name, pixels, size, remove) {
    this.name = name;
    this.kept = pixels;
    const about = { class: "paper", role: "img", "aria-label": name };
    this.paper = make("canvas", { width: size, height: size, ...about });
    const ink = this.paper.getContext("2d"), picture = ink.createImageData(size, size), n = size * size;
    for (let i = 0; i < n; i++) {
      const colour = [0, 1, 2].map(c => pixels[(pixels.length === n ? 0 : c * n) + i]);
      picture.data.set([...colour, 255], 4 * i);
    }
    ink.putImageData(picture, 0, 0);
    this.shadow = make("canvas", { width: size, height: size, class: "shadow", "aria-hidden": "true" });
    const label = `remove ${name}`;
    const button = make("button", { type: "button", class: "remove", "aria-label": label, text: "×" });
    button.addEventListener("click", () => remove(this));
    this.element = make("div", { class: "sheet" }, this.paper, this.shadow, button);
  }

  pixels() { return this.kept; }
}

async function readPhoto(file, { size, channels }, remove) {
  let picture;
  try { picture = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" }); }
  catch { throw new Error(`${file.name}: the browser can't read it as a picture`); }
  const { width, height } = picture;
  const tooLarge = `${file.name}: ${width}x${height} pixels are more than 24 million`;
  if (width * height > LARGEST) throw new Error(tooLarge);
  const ink = make("canvas", { width, height }).getContext("2d", { willReadFrequently: true });
  ink.drawImage(picture, 0, 0);
  const pixels = prepare(ink.getImageData(0, 0, width, height), size, channels);
  return new Photo(file.name, pixels, size, remove);
}

// --- a card: a class with its examples, or the query -----------------------------------------------------

class Card {
  constructor(board, index) {  // without an index: the query
    this.board = board;
    this.isQuery = index === undefined;
    const title = this.isQuery ? "And this?" : String.fromCharCode(65 + index);
    this.pictures = [];
    this.stack = make("div", { class: "stack" });
    this.element = make("div", { class: this.isQuery ? "card-of query" : "card-of" });
    this.title = title;
    this.element.append(this.head(title, index), this.stack);
    if (board.draws) this.addSheet(title);
    else this.addChooser(title);
    this.result = make("p", { class: "result" });
    this.element.append(this.result);
  }

  head(title, index) {
    if (this.isQuery) return make("p", { class: "name", text: title });
    const about = { "aria-label": `name of class ${index + 1}`, spellcheck: "false", maxlength: 24 };
    this.input = make("input", { class: "name", value: title, ...about });
    this.input.addEventListener("input", () => this.board.show());
    return this.input;
  }

  get name() { return this.isQuery ? this.title : this.input.value.trim() || this.title; }

  addSheet(title) {
    const sheet = new Drawing(this.isQuery ? "the query" : `example of ${title}`, () => this.board.changed());
    this.pictures = [sheet];
    this.stack.append(sheet.element);
    const undo = make("button", { type: "button", text: "undo", "aria-label": `undo a stroke of ${title}` });
    const clear = make("button", { type: "button", text: "clear", "aria-label": `clear ${title}` });
    undo.addEventListener("click", () => sheet.undo());
    clear.addEventListener("click", () => sheet.clear());
    this.element.append(make("p", { class: "tools" }, undo, clear));
  }

  addChooser(title) {
    const input = make("input", { type: "file", accept: "image/*", class: "visually-hidden" });
    input.multiple = !this.isQuery;
    const what = this.isQuery ? "a picture to name" : `examples of ${title}`;
    input.setAttribute("aria-label", `choose ${what}`);
    const text = this.isQuery ? "drop a picture, or choose" : "drop examples, or choose";
    const label = make("label", { class: "chooser" }, input, make("span", { text }));
    input.addEventListener("change", async () => {
      await this.add([...input.files]);
      input.value = "";  // the same file can be chosen again
    });
    const drag = (event, over) => {
      event.preventDefault();
      this.element.classList.toggle("over", over);
    };
    this.element.addEventListener("dragover", event => drag(event, true));
    this.element.addEventListener("dragleave", event => drag(event, false));
    this.element.addEventListener("drop", event => {
      drag(event, false);
      this.add([...event.dataTransfer.files]);
    });
    this.element.append(label);
  }

  async add(files) {
    const problems = [], remove = photo => {
      this.pictures = this.pictures.filter(p => p !== photo);
      photo.element.remove();
      this.board.changed();
    };
    for (const file of this.isQuery ? files.slice(0, 1) : files) {
      try {
        const photo = await readPhoto(file, this.board.network, remove);
        if (this.isQuery) this.pictures.forEach(p => p.element.remove());
        this.pictures = this.isQuery ? [photo] : [...this.pictures, photo];
        this.stack.append(photo.element);
      } catch (error) { problems.push(error.message); }
    }
    this.board.changed(problems.join("; "));
  }

  get there() { return this.pictures.filter(p => !p.empty); }
}

// --- a board: the cards, and the answer ------------------------------------------------------------------

class Board {
  constructor(element) {
    this.network = networks[element.dataset.network];
    this.draws = "draws" in element.dataset;
    this.cards = Array.from({ length: CLASSES }, (_, i) => new Card(this, i));
    this.query = new Card(this);
    this.status = make("p", { class: "status", role: "status" });
    this.layer = make("select", {});
    this.rounds = 0;
    const grid = make("div", { class: "cards" }, ...[...this.cards, this.query].map(card => card.element));
    element.replaceChildren(this.tools(), grid, this.status, this.about());
    this.say();
  }

  tools() {
    const names = Array.from({ length: this.network?.layers ?? 0 }, (_, i) => `layer ${i + 1}`);
    for (const name of ["none", ...names]) this.layer.append(make("option", { text: name }));
    this.layer.selectedIndex = names.length;
    this.layer.addEventListener("change", () => this.show());
    const clear = make("button", { type: "button", text: "Clear all" });
    clear.addEventListener("click", () => this.clear());
    const line = make("p", { class: "tools" });
    if (this.draws) {
      const example = make("button", { type: "button", text: "Draw an example" });
      example.addEventListener("click", () => this.example());
      line.append(example);
    }
    line.append(clear, make("label", { text: "Attention: " }, this.layer));
    return line;
  }

  about() {  // which network this is
    if (!this.network) return "";
    const { key, accuracy } = this.network;
    const link = make("a", { href: `runs/${key}.html`, text: key });
    const often = ` is right about ${accuracy.toFixed(1)} % of the queries of its test, `;
    const how = "with five new classes and one example each.";
    return make("p", { class: "about" }, "The network ", link, often + how);
  }

  clear() {
    for (const card of [...this.cards, this.query]) {
      if (!this.draws) card.stack.replaceChildren();
      for (const picture of card.pictures) if (this.draws) picture.strokes = [], picture.draw();
      if (!this.draws) card.pictures = [];
    }
    this.changed();
  }

  example() {  // invented characters, each time a little different; the query is one of them
    const wanted = Math.floor(Math.random() * CLASSES);
    const numbers = [...this.cards.keys(), wanted];
    [...this.cards, this.query].forEach((card, i) => {
      card.pictures[0].strokes = invented(numbers[i]);
      card.pictures[0].draw();
    });
    this.changed();
  }

  say(problem = "") {
    const filled = this.cards.filter(card => card.there.length).length;
    const verb = this.draws ? "Draw" : "Add";
    let text = `${verb} at least two classes, and something to name.`;
    if (missing) text = `The network can't be asked here: ${missing}.`;
    else if (filled >= 2 && !this.query.there.length) text = `${verb} what is to be named.`;
    this.status.textContent = problem || text;
    this.status.classList.toggle("problem", Boolean(problem || missing));
  }

  async changed(problem = "") {
    const round = ++this.rounds;
    this.answer = undefined;
    this.show();
    this.say(problem);
    const filled = this.cards.filter(card => card.there.length);
    if (missing || filled.length < 2 || !this.query.there.length) return;
    if (!problem) this.status.textContent = "Asking the network. The first time, 14 MB are loaded.";
    try {
      const answer = await this.ask(filled);
      if (round !== this.rounds) return;  // something has changed meanwhile
      this.answer = answer;
      this.show();
      if (problem) this.status.textContent = `${problem}. ${this.status.textContent}`;
    } catch (error) {
      const hint = location.protocol === "file:" ? "; pages need a server, such as python -m http.server" : "";
      this.status.textContent = `The network could not be asked: ${error.message}${hint}`;
      this.status.classList.add("problem");
    }
  }

  async ask(filled) {
    const pictures = filled.flatMap(card => card.there);
    const labels = filled.flatMap(card => card.there.map(() => this.cards.indexOf(card)));
    const query = this.query.there[0], pixels = picture => picture.pixels(this.network);
    const found = await ask(this.network, pictures.map(pixels), labels, pixels(query));
    return { pictures, labels, query, found, probabilities: Array.from(found.probabilities.data) };
  }

  show() {  // the answer, or none, with the attention of the chosen layer
    const { answer } = this, best = answer && Math.max(...answer.probabilities);
    this.cards.forEach((card, i) => {
      const p = answer?.probabilities[i], known = answer && card.there.length;
      card.result.textContent = known ? percent(p) : "";
      card.result.style.setProperty("--p", known ? p : 0);
      card.element.classList.toggle("best", Boolean(known && p === best));
    });
    this.query.result.textContent = answer ? this.cards[answer.probabilities.indexOf(best)].name : "";
    this.attend();
    if (!answer) return;
    const all = this.cards.map((card, i) => [answer.probabilities[i], card]);
    const named = all.filter(([, card]) => card.there.length);
    named.sort(([a], [b]) => b - a);
    const [first, ...others] = named.map(([p, card]) => [card.name, percent(p)]);
    const rest = others.map(words => words.join(" ")).join(", ");
    this.status.textContent = `It is most like ${first[0]} (${first[1]}), then ${rest}.`;
    this.status.classList.remove("problem");
  }

  attend() {
    const m = this.layer.selectedIndex - 1, { answer } = this;
    for (const card of [...this.cards, this.query]) {
      for (const picture of card.pictures) {
        shade(picture.shadow);
        picture.element.removeAttribute("data-weight");
      }
    }
    if (!answer?.found.on_query || m < 0) return;
    const { on_query, on_support, on_task } = answer.found, side = on_query.dims.at(-1), L = side * side;
    const S = answer.pictures.length;
    shade(answer.query.shadow, on_query.data.slice(m * L, (m + 1) * L), side, this.draws);
    answer.pictures.forEach((picture, s) => {
      const at = (m * S + s) * L;
      shade(picture.shadow, on_support.data.slice(at, at + L), side, this.draws);
      picture.element.dataset.weight = on_task.data[m * S + s].toFixed(2);
    });
  }
}

// --- invented characters: strokes of points in [0, 1] ----------------------------------------------------

const SHAPES = [
  [[[.2, .2], [.8, .2]], [[.5, .2], [.5, .8]], [[.3, .55], [.7, .75]]],
  [[[.25, .8], [.25, .25], [.75, .25], [.75, .6], [.4, .6]]],
  [[[.2, .3], [.5, .75], [.8, .3]], [[.5, .75], [.5, .9]], [[.35, .2], [.65, .2]]],
  [[[.75, .25], [.4, .2], [.25, .45], [.45, .6], [.7, .55], [.7, .8], [.3, .85]]],
  [[[.3, .15], [.3, .85]], [[.3, .5], [.75, .2]], [[.3, .5], [.75, .85]], [[.6, .5], [.8, .5]]],
];

function invented(number) {
  const any = size => (Math.random() - 0.5) * size;
  const turn = any(0.3), stretch = 1 + any(0.2), x = any(0.08), y = any(0.08);
  const move = ([u, v]) => {
    const a = (u - 0.5) * stretch, b = (v - 0.5) / stretch;
    const across = a * Math.cos(turn) - b * Math.sin(turn), down = a * Math.sin(turn) + b * Math.cos(turn);
    return [PAPER * (0.5 + x + across + any(0.03)), PAPER * (0.5 + y + down + any(0.03))];
  };
  return SHAPES[number].map(stroke => stroke.map(move));
}

for (const element of document.querySelectorAll(".try-board")) boards.push(new Board(element));
document.documentElement.dataset.tryReady = runtime ? "yes" : "without";
