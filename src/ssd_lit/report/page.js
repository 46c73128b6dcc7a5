// Tables that sort by a click on a heading, and the choice between light and dark.

/** The number of a cell, exact where the page holds it; words as they are, and nothing for a dash. */
function keyOf(cell) {
  const text = (cell?.dataset.value ?? cell?.textContent ?? "").trim();
  const number = parseFloat(text.replaceAll(",", ""));
  return text === "-" || text === "" ? null : Number.isNaN(number) ? text.toLowerCase() : number;
}

function compare(a, b) {
  if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
  return typeof a === "number" ? -1 : 1;
}

/** First up, then down, then as the page had them. Rows that belong together stay so; a dash is last either way. */
function sortBy(table, column, units, heading) {
  const order = {none: "ascending", ascending: "descending", descending: "none"}[heading.ariaSort ?? "none"];
  for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
  if (order !== "none") heading.setAttribute("aria-sort", order);
  const keyed = units.map((unit) => [keyOf((unit.rows?.[0] ?? unit).cells[column]), unit]);
  const sign = order === "descending" ? -1 : 1;
  if (order !== "none") {
    keyed.sort(([a], [b]) => (a === null) - (b === null) || (a === null ? 0 : sign * compare(a, b)));
  }
  for (const [, unit] of keyed) unit.parentNode.append(unit);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const units = table.tBodies.length > 1 ? [...table.tBodies] : [...table.tBodies[0].rows];
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "sort";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sortBy(table, column, units, heading));
  });
}

const theme = document.getElementById("theme");
const darkNow = () => (document.documentElement.style.colorScheme || systemScheme()) === "dark";
const systemScheme = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
function nameTheme() {
  theme.textContent = darkNow() ? "Light" : "Dark";
}
theme.addEventListener("click", () => {
  document.documentElement.style.colorScheme = darkNow() ? "light" : "dark";
  nameTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
theme.hidden = false;
nameTheme();
