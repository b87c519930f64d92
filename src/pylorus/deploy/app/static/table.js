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

export function drawTable(table, rows, names, decisionClass) {
  const head = document.createElement("tr");
  for (const title of ["file", "answer", ...names, `for ${decisionClass}`, "unlikeness"]) {
    const cell = head.appendChild(document.createElement("th"));
    cell.scope = "col";
    cell.textContent = title;
    if (names.includes(title) || title === "unlikeness") cell.className = "number";
  }
  table.tHead.replaceChildren(head);
  table.tBodies[0].replaceChildren(...rows.map((row) => createRow(row, names, decisionClass)));
}

function createRow(row, names, decisionClass) {
  const line = document.createElement("tr");
  const heading = line.appendChild(document.createElement("th"));
  heading.scope = "row";
  heading.textContent = heading.title = row.file;
  const add = (text, kind = "") => {
    const cell = line.appendChild(document.createElement("td"));
    cell.textContent = text;
    cell.className = kind;
    return cell;
  };
  if (row.error) {
    add(`not processed: ${row.error}`, "wide").colSpan = names.length + 3;
    return line;
  }
  add(row.abstain ? `none: ${row.why}` : row.predicted);
  for (const name of names) add(percent(row.probability[name]), "number");
  add(row.abstain ? "do not use" : decisionText(row, decisionClass).toLowerCase());
  add(row.unlikeness.toFixed(3), "number");
  return line;
}

export function decisionText(row, decisionClass) {
  return row.decision === decisionClass ? "Positive" : "Negative";
}

export function percent(probability) {
  const value = 100 * probability;
  if (value > 99.9 && probability < 1) return "> 99.9 %";
  if (value < 0.1 && probability > 0) return "< 0.1 %";
  return `${value.toFixed(1)} %`;
}
