"use strict";

// Photos are sent some at a time; the rest wait here, not on the server.
const AT_ONCE = 4;
const TRIES = 6;
const PARTS = ["upload", "decode", "wait", "encode", "search"];

const find = (selector, within = document) => within.querySelector(selector);
const waiting = [];
let running = 0;
let limits = null;

function bytes(count) {
  return count < 1e6 ? `${Math.ceil(count / 1e3)} kB` : `${(count / 1e6).toFixed(1).replace(".0", "")} MB`;
}

function milliseconds(value) {
  return value >= 1000 ? `${(value / 1000).toFixed(1)} s` : `${Math.round(value)} ms`;
}

// Text is only ever set as text: names of files and captions are never read as HTML.
function element(tag, text, name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = name;
  return made;
}

function score(value) {
  return value.toFixed(2).replace("-", "\u2212");
}

function showDoubt(doubt) {
  const line = find("#doubt");
  line.hidden = !doubt;
  if (doubt) line.textContent = `This model\u2019s captions mean little: ${doubt}.`;
}

async function showModel() {
  const answer = await fetch("about");
  if (!answer.ok) return;
  limits = await answer.json();
  const words = limits.words.toLocaleString("en");
  find("#model").textContent =
    `${limits.model} \u00b7 ${limits.backbone} \u00b7 ${words} words \u00b7 ${limits.search} \u00b7 ${limits.device}`;
  find("#limits").textContent =
    `Up to ${bytes(limits.max_bytes)} and ${Math.floor(limits.max_pixels / 1e6)} megapixels each.`;
  showDoubt(limits.doubt);
}

function add(files) {
  const cards = document.createDocumentFragment();
  const jobs = [];
  for (const file of files) {
    const card = find("#card").content.firstElementChild.cloneNode(true);
    const name = file.name || "pasted";
    find(".name", card).textContent = name;
    const image = find("img", card);
    const address = URL.createObjectURL(file);
    image.onload = () => { image.hidden = false; find(".noimage", card).hidden = true; };
    image.onerror = () => URL.revokeObjectURL(address);
    image.src = address;
    const job = { card, file, name, tries: 0 };
    find(".again", card).onclick = () => { job.tries = 0; enqueue(job); };
    cards.append(card);
    jobs.push(job);
  }
  find("#photos").prepend(cards);
  if (jobs.length) jobs[0].card.scrollIntoView({ block: "nearest" });
  jobs.forEach(enqueue);
}

function enqueue(job) {
  job.card.classList.add("busy");
  find(".again", job.card).hidden = true;
  find(".error", job.card).hidden = true;
  find(".caption", job.card).textContent = "Waiting\u2026";
  waiting.push(job);
  next();
}

function next() {
  while (running < AT_ONCE && waiting.length) {
    running += 1;
    const job = waiting.shift();
    send(job).finally(() => { running -= 1; next(); });
  }
}

async function send(job) {
  const { card, file, name } = job;
  if (limits && file.size > limits.max_bytes) {
    fail(job, `too large: ${bytes(file.size)}; a photo may have ${bytes(limits.max_bytes)}`, false);
    return;
  }
  find(".caption", card).textContent = "Looking\u2026";
  const form = new FormData();
  form.append("file", file, name);
  let answer, found;
  try {
    answer = await fetch("caption", { method: "POST", body: form });
    found = await answer.json();
  } catch {
    fail(job, "the server does not answer", true);
    return;
  }
  if (answer.status === 503 && ++job.tries < TRIES) {
    find(".caption", card).textContent = "The server is busy; waiting\u2026";
    const seconds = Number(answer.headers.get("Retry-After")) || 1;
    await new Promise((done) => setTimeout(done, 1000 * seconds * job.tries));
    await send(job);
  } else if (answer.ok) {
    show(job, found);
  } else {
    fail(job, found.error || `the server answers ${answer.status}`, answer.status >= 500);
  }
}

function fail(job, reason, again) {
  job.card.classList.remove("busy");
  find(".caption", job.card).textContent = "";
  const line = find(".error", job.card);
  line.textContent = `No caption: ${reason}.`;
  line.hidden = false;
  find(".again", job.card).hidden = !again;
}

function show({ card }, found) {
  card.classList.remove("busy");
  find(".caption", card).textContent = found.caption || "(an empty caption)";
  find("img", card).alt = found.caption;
  find(".score", card).textContent = `score ${score(found.score)}`;
  const others = found.captions.slice(1).map((other) => {
    const line = document.createElement("li");
    line.append(element("span", other.caption), element("span", score(other.score)));
    return line;
  });
  find(".others", card).replaceChildren(...others);
  const time = found.timing_ms;
  const bars = [], parts = [element("b", milliseconds(time.total))];
  for (const part of PARTS) {
    const bar = element("i", "", part);
    bar.style.flexGrow = time[part];
    bars.push(bar);
    const line = element("span", "");
    line.append(element("i", "", part), `${part} ${milliseconds(time[part])}`);
    parts.push(line);
  }
  if (found.batch > 1) parts.push(element("span", `in a batch of ${found.batch}`));
  find(".bar", card).replaceChildren(...bars);
  find(".parts", card).replaceChildren(...parts);
  find(".time", card).hidden = false;
  showDoubt(found.doubt);
}

function filesOf(transfer) {
  return transfer ? [...transfer.files] : [];
}

for (const input of document.querySelectorAll("input[type=file]")) {
  input.addEventListener("change", () => { add([...input.files]); input.value = ""; });
}
document.addEventListener("paste", (event) => {
  const files = filesOf(event.clipboardData);
  if (files.length) { event.preventDefault(); add(files); }
});
const carriesFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
document.addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  find("#veil").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) find("#veil").hidden = true;
});
document.addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  find("#veil").hidden = true;
  add(filesOf(event.dataTransfer));
});
showModel();
