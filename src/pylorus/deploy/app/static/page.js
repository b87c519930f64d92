// Sends images to this server, two at a time, and shows the answers. Sends nothing else and stores nothing.

import { asCsv, capital, describeReason, describeVerdict, drawTable, percent, percents, verdictClass, writeOut } from "./table.js";

const AT_ONCE = 2;
const MAX_BARS = 8;
const MAX_TRIES = 60; // 2 s apart, while the server is busy

const at = (id) => document.getElementById(id);
const files = at("files"), drop = at("drop"), heat = at("heat"), cards = at("cards"), status = at("status");
const waiting = [];
let rows = [], running = 0, finished = 0, expected = 0, era = 0;

const model = await fetch("api/model").then((response) => response.json()).catch(() => {
  status.textContent = "The server did not answer. Check that it is running, then reload the page.";
  throw new Error("no answer");
});
const names = model.short_names;
if (model.no_heat_maps) {
  heat.checked = false;
  heat.disabled = true;
  at("no-heat").hidden = false;
  at("no-heat").textContent = `Not available: ${model.no_heat_maps}`;
}

files.addEventListener("change", () => {
  addFiles([...files.files]);
  files.value = ""; // allow the same file to be chosen again
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.toggle("over", drop.contains(event.target));
});
addEventListener("dragleave", () => drop.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault(); // otherwise the browser would open the file instead of this page
  drop.classList.remove("over");
  addFiles([...event.dataTransfer.files]);
});
addEventListener("paste", (event) => addFiles([...event.clipboardData.files]));
at("to-card").addEventListener("click", () => {
  at("card").querySelector("details").open = true;
});
at("clear").addEventListener("click", () => {
  era += 1;
  waiting.length = 0;
  rows = [];
  finished = expected = 0;
  cards.replaceChildren();
  show("Cleared.");
  files.focus();
});
at("download").addEventListener("click", () => {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob(["\ufeff", asCsv(rows.filter(Boolean), names, !!model.prediction_sets)], { type: "text/csv" }));
  link.download = "predictions.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

document.documentElement.dataset.ready = "yes";

function addFiles(chosen) {
  const maxFiles = model.limits.max_files;
  const accepted = chosen.slice(0, maxFiles);
  if (finished === expected) finished = expected = 0;
  expected += accepted.length;
  for (const file of accepted) {
    const card = cards.appendChild(make("li", "card waiting"));
    draw(card, file.name, placeholder("waiting …"), []);
    card.classList.toggle("pair", heat.checked);
    waiting.push({ file, card, index: rows.push(null) - 1, era });
  }
  const left = chosen.length - accepted.length;
  show(left ? `${left} ${left === 1 ? "file was" : "files were"} skipped: at most ${maxFiles} at a time. For whole folders, use pylorus predict.` : "");
  while (running < AT_ONCE && waiting.length) next();
}

async function next() {
  const task = waiting.shift();
  if (!task) return;
  running += 1;
  const row = await answer(task.file);
  running -= 1;
  if (task.era === era) {
    rows[task.index] = row;
    finished += 1;
    drawAnswer(task.card, row);
    show();
  }
  next();
}

async function answer(file) {
  const failed = (error) => ({ file: file.name, error });
  const maxBytes = model.limits.max_bytes;
  if (file.size > maxBytes) return failed(`the file has ${megabytes(file.size)} MB, over the limit of ${megabytes(maxBytes)} MB`);
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    return failed("the browser can't read it; is it a folder, or was it changed in the meantime?");
  }
  const query = new URLSearchParams({ image: 1, heat_map: heat.checked ? 1 : 0 });
  for (let tries = 0; ; tries += 1) {
    const form = new FormData();
    form.append("files", file, file.name);
    const response = await fetch(`api/predict?${query}`, { method: "POST", body: form }).catch(() => null);
    if (!response) return failed("the server did not answer; is it still running?");
    if (response.status === 503 && tries < MAX_TRIES) {
      await new Promise((resolve) => setTimeout(resolve, 2000));
      continue;
    }
    const body = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
    return response.ok && body.results ? { ...body.results[0], file: file.name } : failed(body.error);
  }
}

function show(message) {
  const done = rows.filter(Boolean);
  at("download").disabled = !done.length;
  at("clear").disabled = !cards.children.length;
  at("summary").hidden = !done.length;
  cards.classList.toggle("pairs", !!cards.querySelector(".pair"));
  drawTable(at("table"), done, model);
  status.textContent = [message, progress()].filter(Boolean).join(" ");
}

function progress() {
  if (!expected) return "";
  if (finished < expected) return `${finished} of ${expected} done …`;
  const latest = rows.slice(-expected);
  if (expected === 1) return `${latest[0].file}: ${sentence(latest[0])}.`;
  const failed = latest.filter((row) => row.error).length;
  const abstained = latest.filter((row) => row.abstain).length;
  const parts = [`${expected} files: ${expected - failed - abstained} answered`];
  if (abstained) parts.push(`${abstained} without an answer`);
  if (failed) parts.push(`${failed} not processed`);
  return `${parts.join(", ")}.`;
}

function sentence(row) {
  if (row.error) return `not processed: ${row.error}`;
  return row.abstain ? `no answer: ${describeReason(row, model)}` : describeVerdict(row, model);
}

function drawAnswer(card, row) {
  card.className = "card";
  if (row.error) {
    card.classList.add("error");
    draw(card, row.file, placeholder("no image"), [make("p", "verdict", "Not processed"), make("p", "", `Reason: ${row.error}`)]);
    return;
  }
  card.classList.toggle("pair", !!row.heat_map);
  card.classList.toggle("abstains", row.abstain);
  const parts = row.abstain
    ? [make("p", "verdict", "No answer"), make("p", "reason", `${capital(describeReason(row, model))}. Do not use the numbers below.`)]
    : [make("p", "verdict", describeVerdict(row, model)), ...comparison(row)];
  draw(card, row.file, pictures(row), [...parts, bars(row), ...predictionSet(row)]);
}

function draw(card, name, figure, parts) {
  const body = make("div", "body");
  body.append(make("h3", "name", name), ...parts);
  card.replaceChildren(figure, body);
}

function placeholder(text) {
  const group = make("div", "pictures");
  group.append(make("div", "empty", text));
  return group;
}

function pictures(row) {
  const group = make("div", "pictures");
  group.append(picture(row.image, `${row.file}, as the network sees it`, "Image"));
  if (row.heat_map && row.abstain) {
    group.append(make("div", "empty", "no heat map without an answer"));
  } else if (row.heat_map) {
    const likeliest = writeOut(row.predicted, model);
    group.append(picture(row.heat_map, `${row.file}, brightest where it most supports ${likeliest}`, `Heat map: ${likeliest}`));
  }
  return group;
}

function picture(source, description, caption) {
  const figure = make("figure", "picture");
  const image = figure.appendChild(make("img"));
  [image.src, image.alt] = [source, description];
  figure.append(make("figcaption", "", caption));
  return figure;
}

// How the verdict follows from the numbers; the most probable class need not be the one that is decided about.
function comparison(row) {
  const { class: decided, threshold } = model.decision;
  if (threshold === null) return [];
  const verb = row.decision === decided ? "reaches" : "is below";
  const [probability, least] = percents(row.probability[decided], threshold);
  const parts = [`The probability, ${probability}, ${verb} the threshold of ${least}.`];
  if (row.predicted !== decided) {
    parts.push(`Most probable class: ${writeOut(row.predicted, model)} (${percent(row.probability[row.predicted])}).`);
  } else if (row.decision !== decided) {
    parts.push("No other class is more probable.");
  }
  return [make("p", "comparison", parts.join(" "))];
}

function bars(row) {
  const list = make("ul", "bars");
  list.ariaLabel = "Probabilities";
  const top = [...names].sort((a, b) => row.probability[b] - row.probability[a]).slice(0, MAX_BARS);
  const decisionClass = model.decision.class;
  for (const name of names.filter((each) => top.includes(each) || each === decisionClass)) {
    const probability = row.probability[name];
    const item = list.appendChild(make("li", name === verdictClass(row, model) ? "best" : ""));
    const caption = item.appendChild(make("div", "words"));
    const label = caption.appendChild(make("span"));
    const full = capital(writeOut(name, model));
    if (full !== name) label.append(`${full} `);
    label.append(make("span", full === name ? "" : "short", name));
    caption.append(make("span", "", percent(probability)));
    const track = item.appendChild(make("div", "track"));
    track.ariaHidden = "true";
    track.appendChild(make("i")).style.width = `${100 * probability}%`;
    if (name === decisionClass && model.decision.threshold !== null) {
      track.appendChild(make("b")).style.left = `${100 * model.decision.threshold}%`;
    }
  }
  return list;
}

function predictionSet(row) {
  if (!model.prediction_sets) return [];
  const members = row.prediction_set.join(", ") || "empty: no class is plausible enough";
  return [make("p", "set", `Prediction set (${Math.round(1000 * model.prediction_sets.coverage) / 10} %): ${members}`)];
}

function make(tag, kind = "", text = "") {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text) element.textContent = text;
  return element;
}

function megabytes(bytes) {
  return (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);
}
