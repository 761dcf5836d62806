"use strict";

const NEXT = { none: "ascending", ascending: "descending", descending: "none" };
const inOrder = new Intl.Collator("en", { numeric: true });

function compare(a, b) {
  const [x, y] = [a.dataset.value, b.dataset.value];
  return x !== undefined && y !== undefined ? x - y : inOrder.compare(a.textContent, b.textContent);
}

function sorted(rows, column, order) {
  if (order === "none") return rows;
  const filled = rows.filter((row) => !("none" in row.cells[column].dataset));
  const empty = rows.filter((row) => "none" in row.cells[column].dataset);
  const sign = order === "ascending" ? 1 : -1;
  filled.sort((a, b) => sign * compare(a.cells[column], b.cells[column]));
  return [...filled, ...empty];
}

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const order = NEXT[heading.getAttribute("aria-sort") ?? "none"];
      for (const other of headings) other.removeAttribute("aria-sort");
      if (order !== "none") heading.setAttribute("aria-sort", order);
      body.append(...sorted(rows, column, order));
    });
  });
}

// What does not fit its box can be scrolled by keyboard.
const watch = new ResizeObserver((boxes) => {
  for (const { target } of boxes) {
    const wide = target.scrollWidth > target.clientWidth;
    for (const [name, value] of [["tabindex", "0"], ["role", "region"], ["aria-label", target.dataset.label]]) {
      if (wide) target.setAttribute(name, value);
      else target.removeAttribute(name);
    }
  }
});
for (const box of document.querySelectorAll(".scroll")) watch.observe(box);
