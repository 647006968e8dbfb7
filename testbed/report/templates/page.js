"use strict";
(() => {
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const filter = document.getElementById("filter");
  const choices = [...document.querySelectorAll(".controls select")];
  const count = document.getElementById("count");

  // Values come before their absence in both directions; numbers by size, the rest as text.
  function compare(a, b, up) {
    if (a === "" || b === "") return (a === "") - (b === "");
    const numbers = [Number(a), Number(b)];
    const order = numbers.some(Number.isNaN) ? a.localeCompare(b, "en", { numeric: true }) : numbers[0] - numbers[1];
    return up ? order : -order;
  }

  function sort(header, column) {
    const up = header.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.key;
    body.append(...[...rows].sort((a, b) => compare(key(a), key(b), up)));
  }

  function show() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = `${row.textContent} ${row.title}`.toLowerCase();
      const chosen = choices.every((c) => c.value === "" || row.cells[c.dataset.column].textContent === c.value);
      row.hidden = !(chosen && words.every((word) => text.includes(word)));
      shown += !row.hidden;
    }
    count.textContent = shown === rows.length ? `${rows.length} rows` : `${shown} of ${rows.length} rows`;
  }

  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sort(header, column));
    header.append(button);
  });
  filter.addEventListener("input", show);
  for (const choice of choices) choice.addEventListener("change", show);
  document.querySelector(".controls").hidden = false; // without JavaScript there is nothing to control
  show();
})();
