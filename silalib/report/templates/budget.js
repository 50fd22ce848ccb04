// A slider over the rows of Figure 4's table of budgets, which stands below it, and alone without this script.
(() => {
  const table = document.getElementById("T_fig4_budget");
  if (!table) return;
  const texts = (row) => [...row.cells].map((cell) => cell.textContent.trim());
  const names = texts(table.tHead.rows[0]);
  const rows = [...table.tBodies[0].rows].map(texts);
  const add = (parent, tag, text = "") => {
    const element = parent.appendChild(document.createElement(tag));
    element.textContent = text;
    return element;
  };

  const box = document.createElement("div");
  box.className = "budget";
  const label = add(box, "label", "Budget, " + names[0]);
  label.htmlFor = "budget";
  const slider = add(box, "input");
  Object.assign(slider, { id: "budget", type: "range", min: 0, max: rows.length - 1 });
  const list = add(box, "dl");
  const shown = names.map((name) => {
    const entry = add(list, "div");
    add(entry, "dt", name);
    const number = add(entry, "dd");
    const bar = name.startsWith("exit") ? add(entry, "dd") : null;
    if (bar) bar.className = "bar";
    return { number, bar };
  });

  const show = () => {
    const row = rows[slider.value];
    slider.setAttribute("aria-valuetext", names.map((name, i) => `${name} ${row[i]}`).join(", "));
    shown.forEach(({ number, bar }, i) => {
      number.textContent = row[i];
      if (bar) bar.style.width = `${row[i]}%`;
    });
  };
  slider.value = Math.floor(rows.length / 2);
  slider.addEventListener("input", show);
  show();

  table.closest("main > *").before(box); // which has the width of the text
})();
