// The table of all results, on the page and as CSV, with the columns of `pylorus predict`.

export function columns(names, sets = false) {
  const set = sets ? ["prediction_set"] : [];
  return ["file", "predicted", ...names.map((name) => `probability/${name}`), "decision", ...set, "abstain", "why", "unlikeness", "error"];
}

export function cells(row, names, sets = false) {
  const answered = !row.error;
  const shares = names.map((name) => (answered ? row.probability[name] : ""));
  const set = sets ? [answered ? `{${row.prediction_set.join(", ")}}` : ""] : [];
  const words = answered ? [row.abstain ? "True" : "False", row.why, row.unlikeness] : ["", "", ""];
  return [row.file, answered ? row.predicted : "", ...shares, answered ? row.decision : "", ...set, ...words, row.error];
}

export function asCsv(rows, names, sets = false) {
  const lines = [columns(names, sets), ...rows.map((row) => cells(row, names, sets))];
  return lines.map((line) => line.map(quoted).join(",") + "\r\n").join("");
}

function quoted(value) {
  let text = String(value);
  // A spreadsheet would run a name that begins so as a formula.
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

export function drawTable(table, rows, names, deciding) {
  const head = document.createElement("tr");
  for (const title of ["file", "answer", ...names, `for ${deciding}`, "unlikeness"]) {
    const cell = head.appendChild(document.createElement("th"));
    cell.scope = "col";
    cell.textContent = title;
    if (names.includes(title) || title === "unlikeness") cell.className = "number";
  }
  table.tHead.replaceChildren(head);
  table.tBodies[0].replaceChildren(...rows.map((row) => drawnRow(row, names, deciding)));
}

function drawnRow(row, names, deciding) {
  const line = document.createElement("tr");
  const name = line.appendChild(document.createElement("th"));
  name.scope = "row";
  name.textContent = name.title = row.file;
  const add = (text, kind = "") => {
    const cell = line.appendChild(document.createElement("td"));
    cell.textContent = text;
    cell.className = kind;
    return cell;
  };
  if (row.error) {
    add(`not read: ${row.error}`, "wide").colSpan = names.length + 3;
    return line;
  }
  add(row.abstain ? `none: ${row.why}` : row.predicted);
  for (const each of names) add(percent(row.probability[each]), "number");
  add(row.abstain ? "not to be used" : decided(row, deciding).toLowerCase());
  add(row.unlikeness.toFixed(3), "number");
  return line;
}

export function decided(row, deciding) {
  return row.decision === deciding ? "Positive" : "Negative";
}

export function percent(share) {
  const value = 100 * share;
  if (value > 99.9 && share < 1) return "> 99.9 %";
  if (value < 0.1 && share > 0) return "< 0.1 %";
  return `${value.toFixed(1)} %`;
}
