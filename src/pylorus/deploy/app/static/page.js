// Images go to this server, two at a time; what comes back is drawn. Nothing else is asked, nothing is kept.

import { asCsv, decided, drawTable, percent } from "./table.js";

const AT_ONCE = 2;
const MOST_BARS = 8;
const PATIENCE = 60; // tries, 2 s apart, while the server is busy

const at = (id) => document.getElementById(id);
const files = at("files"), drop = at("drop"), heat = at("heat"), cards = at("cards"), status = at("status");
const waiting = [];
let rows = [], running = 0, finished = 0, expected = 0, era = 0;

const model = await fetch("api/model").then((response) => response.json()).catch(() => {
  status.textContent = "The server did not answer. Once it runs, load the page again.";
  throw new Error("no answer");
});
const names = model.short_names;
const fullNames = Object.fromEntries(names.map((name, place) => [name, model.classes[place]]));
if (model.no_heat_maps) {
  heat.checked = false;
  heat.disabled = true;
  at("no-heat").hidden = false;
  at("no-heat").textContent = `None here: ${model.no_heat_maps}`;
}

files.addEventListener("change", () => {
  take([...files.files]);
  files.value = ""; // the same file may be chosen again
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.toggle("over", drop.contains(event.target));
});
addEventListener("dragleave", () => drop.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault(); // else the browser would open the file in the page's place
  drop.classList.remove("over");
  take([...event.dataTransfer.files]);
});
addEventListener("paste", (event) => take([...event.clipboardData.files]));
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

function take(chosen) {
  const most = model.limits.most_files;
  const taken = chosen.slice(0, most);
  if (finished === expected) finished = expected = 0;
  expected += taken.length;
  for (const file of taken) {
    const card = cards.appendChild(make("li", "card waiting"));
    draw(card, file.name, picture("waiting …"), []);
    waiting.push({ file, card, place: rows.push(null) - 1, era });
  }
  const left = chosen.length - taken.length;
  show(left ? `${left} more were left out: ${most} at a time. For folders there is pylorus predict.` : "");
  while (running < AT_ONCE && waiting.length) next();
}

async function next() {
  const task = waiting.shift();
  if (!task) return;
  running += 1;
  const row = await answer(task.file);
  running -= 1;
  if (task.era === era) {
    rows[task.place] = row;
    finished += 1;
    drawAnswer(task.card, row);
    show();
  }
  next();
}

async function answer(file) {
  const failed = (error) => ({ file: file.name, error });
  const most = model.limits.most_bytes;
  if (file.size > most) return failed(`the file has ${megabytes(file.size)} MB, over the limit of ${megabytes(most)} MB`);
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    return failed("the browser can not read it; is it a folder, or was it changed meanwhile?");
  }
  const words = new URLSearchParams({ image: 1, heat_map: heat.checked ? 1 : 0 });
  for (let tries = 0; ; tries += 1) {
    const form = new FormData();
    form.append("files", file, file.name);
    const response = await fetch(`api/predict?${words}`, { method: "POST", body: form }).catch(() => null);
    if (!response) return failed("the server did not answer; is it still running?");
    if (response.status === 503 && tries < PATIENCE) {
      await new Promise((resolve) => setTimeout(resolve, 2000));
      continue;
    }
    const said = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
    return response.ok && said.results ? { ...said.results[0], file: file.name } : failed(said.error);
  }
}

function show(words) {
  const done = rows.filter(Boolean);
  at("download").disabled = !done.length;
  at("clear").disabled = !cards.children.length;
  at("summary").hidden = !done.length;
  drawTable(at("table"), done, names, model.decision.class);
  status.textContent = [words, progress()].filter(Boolean).join(" ");
}

function progress() {
  if (!expected) return "";
  if (finished < expected) return `${finished} of ${expected} done …`;
  const latest = rows.slice(-expected);
  if (expected === 1) return `${latest[0].file}: ${sentence(latest[0])}.`;
  const bad = latest.filter((row) => row.error).length;
  const none = latest.filter((row) => row.abstain).length;
  const parts = [`${expected} files: ${expected - bad - none} answered`];
  if (none) parts.push(`${none} without an answer`);
  if (bad) parts.push(`${bad} not read`);
  return `${parts.join(", ")}.`;
}

function sentence(row) {
  if (row.error) return `not read: ${row.error}`;
  return row.abstain ? `no answer: ${reason(row)}` : `${row.predicted}, ${percent(row.probability[row.predicted])}`;
}

function reason(row) {
  if (row.why === "unlike") {
    return `unlike the training images (${row.unlikeness.toFixed(3)}, answered up to ${model.abstention.unlike_above.toFixed(3)})`;
  }
  return `unsure (${row.predicted} has ${percent(row.probability[row.predicted])}, answered from ${percent(model.abstention.unsure_below)})`;
}

function drawAnswer(card, row) {
  card.className = "card";
  if (row.error) {
    card.classList.add("error");
    draw(card, row.file, picture("no picture"), [make("p", "verdict", "Not read"), make("p", "", row.error)]);
    return;
  }
  card.classList.toggle("abstains", row.abstain);
  const verdict = make("p", "verdict", row.abstain ? "No answer" : row.predicted);
  const parts = [verdict];
  if (row.abstain) {
    parts.push(make("p", "reason", capital(`${reason(row)}.`)));
  } else {
    verdict.append(make("span", "", percent(row.probability[row.predicted])));
    if (fullNames[row.predicted] !== row.predicted) parts.push(make("p", "full", fullNames[row.predicted]));
  }
  draw(card, row.file, pictures(row), [...parts, bars(row), decision(row), ...predictionSet(row)]);
}

function draw(card, name, figure, parts) {
  const body = make("div", "body");
  const title = make("h3", "name", name);
  title.title = name;
  body.append(title, ...parts);
  card.replaceChildren(figure, body);
}

function picture(words) {
  const figure = make("figure", "picture");
  figure.append(make("div", "empty", words));
  return figure;
}

function pictures(row) {
  const figure = make("figure", "picture");
  const image = figure.appendChild(make("img"));
  const views = { Image: [row.image, `${row.file}, as the network sees it`] };
  if (row.heat_map) views["Heat map"] = [row.heat_map, `${row.file}, brightest where most speaks for ${row.predicted}`];
  const group = make("div", "views");
  group.role = "group";
  group.ariaLabel = `Picture of ${row.file}`;
  const choose = (chosen) => {
    [image.src, image.alt] = views[chosen];
    for (const button of group.children) button.ariaPressed = String(button.textContent === chosen);
  };
  for (const view of Object.keys(views)) {
    const button = group.appendChild(make("button", "", view));
    button.type = "button";
    button.addEventListener("click", () => choose(view));
  }
  choose("Image");
  if (row.heat_map) figure.append(group);
  return figure;
}

function bars(row) {
  const list = make("ul", "bars");
  list.ariaLabel = "Probabilities";
  const best = [...names].sort((one, other) => row.probability[other] - row.probability[one]).slice(0, MOST_BARS);
  const deciding = model.decision.class;
  for (const name of names.filter((each) => best.includes(each) || each === deciding)) {
    const share = row.probability[name];
    const item = list.appendChild(make("li", name === row.predicted ? "best" : ""));
    const words = item.appendChild(make("div", "words"));
    const label = words.appendChild(make("span", "", name));
    label.title = fullNames[name];
    words.append(make("span", "", percent(share)));
    const track = item.appendChild(make("div", "track"));
    track.ariaHidden = "true";
    track.appendChild(make("i")).style.width = `${100 * share}%`;
    if (name === deciding && model.decision.threshold !== null) {
      track.appendChild(make("b")).style.left = `${100 * model.decision.threshold}%`;
    }
  }
  return list;
}

function decision(row) {
  const line = make("p", "decision");
  const threshold = model.decision.threshold;
  line.append(make("b", "", decided(row, model.decision.class)), ` for ${model.decision.class}`);
  line.append(threshold === null ? " (there is no threshold)" : ` at the threshold of ${percent(threshold)}`);
  if (row.abstain) line.append(", not to be used");
  return line;
}

function predictionSet(row) {
  if (!model.prediction_sets) return [];
  const members = row.prediction_set.join(", ") || "empty, no class is as likely as is usual for it";
  return [make("p", "decision", `Prediction set (${Math.round(1000 * model.prediction_sets.coverage) / 10} %): ${members}`)];
}

function make(tag, kind = "", text = "") {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text) element.textContent = text;
  return element;
}

function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}

function megabytes(bytes) {
  return (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);
}
