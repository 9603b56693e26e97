"use strict";
// The data come from files. They become text nodes and attributes of fixed names, never markup.
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const photos = data.photos;
const grid = $("grid"), detail = $("detail");
const LEAST_WIDTH = 264; // CSS pixels of a photo
const MOST_TIMES = 2; // as large as it is, because small photos would only blur
const ROWS_AHEAD = 3; // rendered above and below what is seen
const UNSURE = [[0.05, "u3"], [0.12, "u2"], [0.25, "u1"]]; // probability below, class
const WORD = /[\p{L}\p{N}]/u;

const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (share) => `${number(100 * share)} %`;

function make(tag, name, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children);
  return element;
}

// A caption's pieces are [text, probability] or [text].
function levelOf(probability) {
  const level = UNSURE.find(([below]) => probability < below);
  return level ? level[1] : "";
}

const textOf = (caption) => caption.pieces.map(([text]) => text).join("");

function inline(caption) {
  return caption.pieces.map(([text, probability]) => {
    const level = probability === undefined || !WORD.test(text) ? "" : levelOf(probability);
    if (!level) return document.createTextNode(text);
    const word = text.trimStart();
    const span = make("span", level, word);
    span.title = percent(probability);
    const both = document.createDocumentFragment();
    both.append(text.slice(0, text.length - word.length), span);
    return both;
  });
}

// Each word with its probability below it.
function spelled(caption) {
  return caption.pieces.map(([text, probability]) => {
    if (probability === undefined || !WORD.test(text)) return document.createTextNode(text);
    const word = text.trimStart();
    const share = make("small", "", number(100 * probability));
    const both = document.createDocumentFragment();
    both.append(text.slice(0, text.length - word.length));
    both.append(make("span", "word", make("span", levelOf(probability), word), share));
    return both;
  });
}

// ---- Searching, filtering, sorting: `shown` has the places of photos in `photos`.

const BETWEEN_WORDS = /[^\p{L}\p{M}\p{N}]+/gu;
const WITHOUT_SPACES = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}]/u;
const plainWords = (text) => text.normalize("NFKC").toLowerCase().replace(BETWEEN_WORDS, " ").trim();
const searched = photos.map(() => null);

function searchedText(place) {
  if (searched[place] === null) {
    const photo = photos[place];
    const texts = [photo.name, ...photo.captions.map(textOf), ...(photo.references || [])];
    searched[place] = ` ${texts.map(plainWords).join(" ")}`;
  }
  return searched[place];
}

const best = (photo) => photo.captions[0];
const confidence = (photo) => (best(photo) ? best(photo).confidence : undefined);
const hasConfidence = photos.some((photo) => confidence(photo) !== undefined);
const hasCider = photos.some((photo) => photo.cider !== undefined);
const inOrder = photos.map((photo, place) => place);

// What is missing comes last, whichever way it is sorted.
const by = (value, sign) => (a, b) => {
  const [x, y] = [value(photos[a]), value(photos[b])];
  if (x === undefined || y === undefined) return (x === undefined) - (y === undefined) || a - b;
  return sign * (x - y) || a - b;
};
const names = new Intl.Collator("en", { numeric: true });
const SORTS = [
  ["In order", (a, b) => a - b, true],
  ["Least sure first", by(confidence, 1), hasConfidence],
  ["Surest first", by(confidence, -1), hasConfidence],
  ["Lowest CIDEr first", by((photo) => photo.cider, 1), hasCider],
  ["Highest CIDEr first", by((photo) => photo.cider, -1), hasCider],
  ["By file name", (a, b) => names.compare(photos[a].name, photos[b].name) || a - b, true],
].filter(([, , fits]) => fits);

const unsure = (photo) =>
  best(photo) && best(photo).pieces.some(([text, p]) => p < UNSURE[0][0] && WORD.test(text));
const FILTERS = [
  ["All photos", () => true],
  ["Captioned", (photo) => !photo.error],
  ["Set aside", (photo) => photo.error],
  ["With a word below 5 %", unsure],
  ["CIDEr below 20", (photo) => photo.cider < 20],
  ["CIDEr 100 or more", (photo) => photo.cider >= 100],
].map(([label, fits]) => [label, fits, photos.filter(fits).length])
  .filter(([, , count], place) => !place || (count && count < photos.length));

function fill(select, labels) {
  labels.forEach((label, place) => select.append(new Option(label, String(place))));
  select.parentElement.hidden = labels.length < 2;
}
fill($("sort"), SORTS.map(([label]) => label));
fill($("show"), FILTERS.map(([label, , count], place) => (place ? `${label} (${number(count)})` : label)));

let shown = inOrder;

function choose() {
  const terms = plainWords($("search").value).split(" ").filter(Boolean)
    .map((term) => (WITHOUT_SPACES.test(term) ? term : ` ${term}`));
  const [, fits] = FILTERS[Number($("show").value)];
  const [, compare] = SORTS[Number($("sort").value)];
  shown = inOrder.filter((place) => fits(photos[place])
    && terms.every((term) => searchedText(place).includes(term)));
  shown.sort(compare);
  active = 0;
  $("count").value = shown.length === photos.length
    ? `${number(shown.length)} ${shown.length === 1 ? "photo" : "photos"}`
    : `${number(shown.length)} of ${number(photos.length)}`;
  $("nothing").hidden = shown.length > 0 || !photos.length;
  clear();
  if (grid.getBoundingClientRect().top < 0) $("tools").scrollIntoView();
  render();
}

// ---- The grid: only the rows near the window are in the document.

const cards = new Map(); // position in `shown` → element
let columns = 1, width = LEAST_WIDTH, rowHeight = 360, gap = 24, active = 0;

function clear() {
  cards.forEach((card) => card.remove());
  cards.clear();
}

function measure() {
  gap = parseFloat(getComputedStyle(document.querySelector("main")).getPropertyValue("--gap-px"))
    || Math.min(36, Math.max(20, innerWidth * 0.022));
  const room = grid.clientWidth;
  columns = Math.max(1, Math.floor((room + gap) / (LEAST_WIDTH + gap)));
  width = (room - gap * (columns - 1)) / columns;
  clear();
  render();
}

function place(card, position) {
  card.style.width = `${width}px`;
  card.style.transform =
    `translate(${(position % columns) * (width + gap)}px, ${Math.floor(position / columns) * rowHeight}px)`;
}

function render() {
  const top = -grid.getBoundingClientRect().top;
  const first = Math.max(0, (Math.floor(top / rowHeight) - ROWS_AHEAD) * columns);
  const last = Math.min(
    shown.length, (Math.ceil((top + innerHeight) / rowHeight) + ROWS_AHEAD) * columns);
  const held = document.activeElement && document.activeElement.closest(".card");
  cards.forEach((card, position) => {
    if ((position < first || position >= last) && card !== held) {
      card.remove();
      cards.delete(position);
    }
  });
  let following = null; // in the order of positions, for those who listen to the page
  for (let position = last - 1; position >= first; position -= 1) {
    let card = cards.get(position);
    if (!card) {
      card = cardOf(position);
      cards.set(position, card);
      place(card, position);
      grid.insertBefore(card, following);
    }
    following = card;
  }
  const sample = cards.get(first);
  const height = sample ? sample.offsetHeight + gap : rowHeight;
  if (Math.abs(height - rowHeight) > 0.5) {
    rowHeight = height;
    cards.forEach(place);
    render();
    return;
  }
  grid.style.height = `${Math.max(0, Math.ceil(shown.length / columns) * rowHeight - gap)}px`;
}

function source(photo, index) {
  if (photo.uri) return photo.uri;
  return `${data.thumbnails}/${String(index).padStart(6, "0")}.jpg`;
}

function image(photo, index) {
  const picture = make("img");
  [picture.width, picture.height] = photo.size;
  picture.decoding = "async";
  picture.alt = `Photo ${photo.name}`;
  picture.src = source(photo, index);
  return picture;
}

function enlarged(photo, index) {
  const picture = image(photo, index);
  picture.style.maxWidth = `${MOST_TIMES * photo.size[0]}px`;
  picture.style.maxHeight = `${MOST_TIMES * photo.size[1]}px`;
  return picture;
}

function figures(photo) {
  const found = [];
  if (confidence(photo) !== undefined) found.push(make("span", "", percent(confidence(photo))));
  if (photo.cider !== undefined) found.push(make("span", "", `CIDEr ${number(photo.cider)}`));
  return found;
}

function captionLine(tag, name, photo, words) {
  const caption = best(photo);
  const line = make(tag, name, ...(caption ? words(caption) : ["No caption"]));
  line.dir = "auto";
  if (caption) line.lang = ""; // in whatever language the captions are
  else line.classList.add("none");
  return line;
}

function missing(photo) {
  return photo.error || photo.missing || "no picture";
}

function cardOf(position) {
  const index = shown[position], photo = photos[index];
  const open = make("button", "photo", photo.size ? image(photo, index) : make("span", "", missing(photo)));
  open.type = "button";
  open.tabIndex = position === active ? 0 : -1;
  if (!photo.size) open.setAttribute("aria-label", `Photo ${photo.name}: ${missing(photo)}`);
  const name = make("bdi", "", photo.name);
  name.title = photo.name;
  const text = make("div", "text", captionLine("p", "caption", photo, inline),
    make("p", "meta", name, ...figures(photo)));
  const card = make("li", "card", open, text);
  card.setAttribute("aria-posinset", position + 1);
  card.setAttribute("aria-setsize", shown.length);
  card.dataset.position = position;
  return card;
}

function focusOn(position) {
  const before = cards.get(active);
  if (before) before.querySelector("button").tabIndex = -1;
  active = position;
  const row = Math.floor(position / columns) * rowHeight;
  const box = grid.getBoundingClientRect();
  const bar = $("tools").getBoundingClientRect().height + 12;
  if (box.top + row < bar) scrollBy(0, box.top + row - bar);
  else if (box.top + row + rowHeight > innerHeight) scrollBy(0, box.top + row + rowHeight - innerHeight);
  render();
  const button = cards.get(position).querySelector("button");
  button.tabIndex = 0;
  button.focus({ preventScroll: true });
}

// ---- The detail of one photo.

function section(title, list, name) {
  return list.length ? [make("h3", "", title), make(name, "", ...list)] : [];
}

function item(caption) {
  const line = make("li", "", ...inline(caption));
  line.dir = "auto";
  line.lang = "";
  if (caption.confidence !== undefined) line.append(" ", make("small", "", percent(caption.confidence)));
  return line;
}

function fact(term, value) {
  return value === undefined || value === "" ? [] : [make("dt", "", term), make("dd", "", value)];
}

let opened = 0; // its position; closing moves the focus back to where it was, and so `active`

function show(position) {
  const index = shown[position], photo = photos[index];
  $("place").textContent = `${number(position + 1)} of ${number(shown.length)}`;
  $("stage").replaceChildren(photo.size ? enlarged(photo, index) : make("p", "", missing(photo)));
  const heading = captionLine("h2", "", photo, spelled);
  heading.id = "detail-caption";
  const references = (photo.references || []).map((text) => item({ pieces: [[text]] }));
  $("story").replaceChildren(
    heading,
    ...section("Other captions", photo.captions.slice(1).map(item), "ol"),
    ...section("References", references, "ul"),
    make("dl", "",
      ...fact("Confidence", confidence(photo) === undefined ? "" : percent(confidence(photo))),
      ...fact("CIDEr", photo.cider === undefined ? "" : number(photo.cider, 1)),
      ...fact("Set aside", photo.error),
      ...fact("File", make("bdi", "", photo.name))));
  $("story").scrollTop = 0;
  $("previous").disabled = position === 0;
  $("next").disabled = position === shown.length - 1;
  opened = position;
  if (!detail.open) detail.showModal();
}

function step(by) {
  const position = opened + by;
  if (position < 0 || position >= shown.length) return;
  show(position);
  if (document.activeElement === document.body || document.activeElement.disabled) $("story").focus();
}

// ---- Events.

let due = false;
function soon() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    render();
  });
}
addEventListener("scroll", soon, { passive: true });
new ResizeObserver(measure).observe(grid.parentElement);

let waiting = 0;
$("search").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(choose, 120);
});
$("sort").addEventListener("change", choose);
$("show").addEventListener("change", choose);
$("confidence").addEventListener("change", (event) => {
  document.body.classList.toggle("plain", !event.target.checked);
});
$("reset").addEventListener("click", () => {
  $("search").value = "";
  $("show").value = "0";
  choose();
  $("search").focus();
});
grid.addEventListener("click", (event) => {
  const card = event.target.closest(".card");
  if (card && !String(getSelection())) show(Number(card.dataset.position));
});
grid.addEventListener("focusin", (event) => {
  const card = event.target.closest(".card");
  if (card) active = Number(card.dataset.position);
});
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("close").addEventListener("click", () => detail.close());
detail.addEventListener("click", (event) => {
  if (event.target === detail) detail.close(); // beside it
});
detail.addEventListener("close", () => focusOn(opened));

const pageRows = () => Math.max(1, Math.floor(innerHeight / rowHeight)) * columns;
const MOVES = {
  ArrowLeft: () => -1, ArrowRight: () => 1, ArrowUp: () => -columns, ArrowDown: () => columns,
  PageUp: () => -pageRows(), PageDown: pageRows,
  Home: () => -shown.length, End: () => shown.length,
};
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (detail.open) {
    if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
    return;
  }
  const at = event.target;
  if (at.matches("input, select")) {
    if (at === $("search") && event.key === "Escape") { at.value = ""; choose(); }
    else if (at === $("search") && event.key === "ArrowDown" && shown.length) focusOn(active);
    else return;
    event.preventDefault();
    return;
  }
  if (event.key === "/") {
    event.preventDefault();
    $("search").focus();
    $("search").select();
  } else if (MOVES[event.key] && shown.length && (at.closest(".card") || event.key.startsWith("Arrow"))) {
    event.preventDefault();
    const goal = at.closest(".card") ? active + MOVES[event.key]() : active;
    const end = shown.length - 1;
    if (goal >= 0 && goal <= end) focusOn(goal);
    else if (event.key !== "ArrowUp" && event.key !== "ArrowDown") focusOn(Math.min(end, Math.max(0, goal)));
  }
});

$("title").textContent = data.title;
$("facts").append(...data.facts.map((fact) => make("span", "", fact)));
$("confidence-label").hidden = !hasConfidence;
$("legend").hidden = !hasConfidence;
choose();
measure();
