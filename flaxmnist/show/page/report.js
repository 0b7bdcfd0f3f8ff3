// A click on a column's title sorts the table by it: numbers by value, largest first, everything else as text.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const value = (row) => row.cells[column].textContent, number = (row) => Number(value(row).replaceAll(",", ""));
    const numeric = [...body.rows].every((row) => !Number.isNaN(number(row)));
    const before = head.getAttribute("aria-sort");
    const order = (before || (numeric ? "ascending" : "descending")) === "ascending" ? "descending" : "ascending";
    const rows = [...body.rows].sort((a, b) => (numeric ? number(a) - number(b) : value(a).localeCompare(value(b))));
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    body.append(...(order === "ascending" ? rows : rows.reverse()));
  }));
}
