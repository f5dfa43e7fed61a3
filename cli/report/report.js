"use strict";
// A retention report without this script is still whole: it sorts tables, tells of cells, and turns light into dark.

const tip = document.getElementById("tip");
let shown = null; // the cell that the tip is about

function sort(button) {
  const heading = button.closest("th");
  const table = button.closest("table");
  const column = [...heading.parentNode.children].indexOf(heading);
  const rising = heading.getAttribute("aria-sort") !== "ascending";
  for (const other of heading.parentNode.children) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const value = (row) => row.children[column].dataset.v ?? row.children[column].textContent;
  const isNumeric = table.tBodies[0].rows[0]?.children[column].dataset.v !== undefined;
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (!isNumeric) return (rising ? 1 : -1) * x.localeCompare(y, "en", { numeric: true });
    if (x === "" || y === "") return (x === "") - (y === ""); // what has no value comes last
    return (rising ? 1 : -1) * (Number(x) - Number(y));
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
}

function told(cell) {
  const row = cell.parentNode;
  const heading = cell.closest("table").tHead.rows[0].children[[...row.children].indexOf(cell)];
  const corner = cell.closest("table").tHead.rows[0].children[0].textContent;
  const where = `${heading.textContent}, ${corner} ${row.children[0].textContent.replace(/^\+ /, "")}`;
  return [where, [cell.textContent, heading.dataset.n].filter(Boolean).join(" · "), cell.dataset.t];
}

function show(cell) {
  if (!cell?.dataset.t) return hide();
  shown = cell;
  tip.replaceChildren(...told(cell).filter(Boolean).map((text, i) => {
    const line = document.createElement(i === 1 ? "b" : "span");
    line.textContent = text;
    return line;
  }));
  tip.hidden = false;
  const box = cell.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above < 8 ? box.bottom + 8 : above}px`;
}

function hide() {
  shown = null;
  tip.hidden = true;
}

function go(cell, key) {
  const rows = cell.closest("tbody").rows;
  const [row, column] = [cell.parentNode.sectionRowIndex, cell.cellIndex];
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const target = key === "Home" ? rows[row].cells[1]
    : key === "End" ? rows[row].cells[rows[row].cells.length - 1]
    : key in steps ? rows[row + steps[key][0]]?.cells[column + steps[key][1]] : undefined;
  if (target?.tagName !== "TD") return false;
  cell.tabIndex = -1;
  target.tabIndex = 0;
  target.focus();
  return true;
}

for (const grid of document.querySelectorAll("table.grid")) {
  const first = grid.querySelector("tbody td");
  if (first) first.tabIndex = 0;
  const at = (event) => event.target.closest("td");
  grid.addEventListener("pointerover", (event) => show(at(event)));
  grid.addEventListener("pointerleave", hide);
  grid.addEventListener("click", (event) => show(at(event)));
  grid.addEventListener("focusin", (event) => show(at(event)));
  grid.addEventListener("focusout", hide);
  grid.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    else if (at(event) && go(at(event), event.key)) event.preventDefault();
  });
}

addEventListener("scroll", () => shown && show(shown), { passive: true, capture: true }); // it stays at its cell
for (const button of document.querySelectorAll("table.sortable button")) {
  button.addEventListener("click", () => sort(button));
}

const theme = document.getElementById("theme");
const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
const named = () => {
  theme.textContent = isDark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", `Show this page ${isDark() ? "light" : "dark"}`);
};
theme.hidden = false;
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  named();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", named);
named();
