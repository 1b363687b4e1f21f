"use strict";
// Sort the summary table by a column, and show only rows that contain every word of the filter.
const table = document.getElementById("summaries");
const filter = document.getElementById("filter");
const count = document.getElementById("count");

function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === "number") return -1;
  if (typeof b === "number") return 1;
  return a.localeCompare(b, "en", { numeric: true });
}

for (const button of table.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const descending = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const empty = (value) => value === "" || Number.isNaN(value);
    rows.sort((a, b) => {
      const [x, y] = [valueOf(a, heading.cellIndex), valueOf(b, heading.cellIndex)];
      if (empty(x) || empty(y)) return empty(x) - empty(y); // last, whichever way
      return descending ? compare(y, x) : compare(x, y);
    });
    body.append(...rows);
  });
}

function apply() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  count.textContent = `${shown} of ${table.tBodies[0].rows.length} runs`;
}

filter.addEventListener("input", apply);
apply();
