// The table of all results on the page, and as CSV with the columns of `pylorus predict`.

export function columns(names, sets = false) {
  const set = sets ? ["prediction_set"] : [];
  return ["file", "predicted", ...names.map((name) => `probability/${name}`), "decision", ...set, "abstain", "why", "unlikeness", "error"];
}

export function cells(row, names, sets = false) {
  const answered = !row.error;
  const probabilities = names.map((name) => (answered ? row.probability[name] : ""));
  const set = sets ? [answered ? `{${row.prediction_set.join(", ")}}` : ""] : [];
  const abstention = answered ? [row.abstain ? "True" : "False", row.why, row.unlikeness] : ["", "", ""];
  return [row.file, answered ? row.predicted : "", ...probabilities, answered ? row.decision : "", ...set, ...abstention, row.error];
}

export function asCsv(rows, names, sets = false) {
  const lines = [columns(names, sets), ...rows.map((row) => cells(row, names, sets))];
  return lines.map((line) => line.map(quoteCell).join(",") + "\r\n").join("");
}

function quoteCell(value) {
  let text = String(value);
  // A spreadsheet would run a name that starts with one of these characters as a formula.
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

export function drawTable(table, rows, model) {
  const head = document.createElement("tr");
  const details = model.decision.threshold === null ? [] : ["most probable"];
  for (const title of ["file", "result", ...details, ...model.short_names, "unlikeness"]) {
    const cell = head.appendChild(document.createElement("th"));
    cell.scope = "col";
    cell.textContent = title;
    if (model.short_names.includes(title) || title === "unlikeness") cell.className = "number";
  }
  table.tHead.replaceChildren(head);
  table.tBodies[0].replaceChildren(...rows.map((row) => createRow(row, model, head.children.length)));
}

function createRow(row, model, width) {
  const line = document.createElement("tr");
  const heading = line.appendChild(document.createElement("th"));
  heading.scope = "row";
  heading.textContent = row.file;
  const add = (text, kind = "") => {
    const cell = line.appendChild(document.createElement("td"));
    cell.textContent = text;
    cell.className = kind;
    return cell;
  };
  if (row.error) {
    add(`Not processed: ${row.error}`, "wide").colSpan = width - 1;
    return line;
  }
  const why = row.why === "unlike" ? "unlike the training images" : "uncertain";
  add(row.abstain ? `No answer: ${why}` : describeVerdict(row, model), "result");
  if (model.decision.threshold !== null) add(row.abstain ? "" : row.predicted);
  for (const name of model.short_names) add(percent(row.probability[name]), "number");
  add(row.unlikeness.toFixed(3), "number");
  return line;
}

// The class that the verdict is about: that of the stored decision if it has a threshold, otherwise the most probable one.
export function verdictClass(row, model) {
  return model.decision.threshold === null ? row.predicted : model.decision.class;
}

export function describeVerdict(row, model) {
  const name = capital(writeOut(verdictClass(row, model), model));
  if (model.decision.threshold === null) return `${name}, ${percent(row.probability[row.predicted])}`;
  return `${name}: ${row.decision === model.decision.class ? "positive" : "negative"}`;
}

export function describeReason(row, model) {
  if (row.why === "unlike") {
    return `the image is unlike those the model was trained on (unlikeness ${row.unlikeness.toFixed(3)}, limit ${model.abstention.unlike_above.toFixed(3)})`;
  }
  const [probability, least] = percents(row.probability[row.predicted], model.abstention.unsure_below);
  return `the model is uncertain (${writeOut(row.predicted, model)} has ${probability}, an answer needs ${least})`;
}

// The full name of a class; names of folders have underscores for spaces.
export function writeOut(name, model) {
  return model.classes[model.short_names.indexOf(name)].replaceAll("_", " ");
}

export function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

export function percent(probability, digits = 1) {
  const value = 100 * probability;
  const least = 10 ** -digits;
  if (value > 100 - least && probability < 1) return `> ${(100 - least).toFixed(digits)} %`;
  if (value < least && probability > 0) return `< ${least.toFixed(digits)} %`;
  return `${value.toFixed(digits)} %`;
}

// Two different probabilities with as many digits as it takes to see which is larger.
export function percents(one, other) {
  for (let digits = 1; digits < 6; digits += 1) {
    const texts = [percent(one, digits), percent(other, digits)];
    if (texts[0] !== texts[1]) return texts;
  }
  return [percent(one), percent(other)];
}
