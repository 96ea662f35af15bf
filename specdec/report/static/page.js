"use strict";
// What the page does beyond being read: sorting, filtering, choosing settings, pointing at marks and tokens.
(() => {
  const root = document.documentElement;
  const data = document.getElementById("data");
  const tip = document.getElementById("tip");
  const all = (selector, from = document) => Array.from(from.querySelectorAll(selector));
  const make = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };
  let parsed;
  const content = () => (parsed ??= JSON.parse(data.textContent));
  root.classList.add("scripts");

  // Light and dark: the system's choice until somebody chooses; ?theme=dark chooses too.
  const asked = new URLSearchParams(location.search).get("theme");
  if (asked === "dark" || asked === "light") root.dataset.theme = asked;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  document.getElementById("save").addEventListener("click", () => {
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([data.textContent], { type: "application/json" }));
    link.download = "report.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });

  // The table.
  const table = document.getElementById("cells");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const value = (cell) => {
    const key = cell ? (cell.dataset.key ?? "") : "";
    return key !== "" && Number.isFinite(Number(key)) ? Number(key) : key;
  };
  const before = (a, b) => {
    if (a === "" || b === "") return a === b ? 0 : a === "" ? 1 : -1; // what is missing comes last, either way
    if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
    return typeof a === "number" ? -1 : 1;
  };
  all("thead th[aria-sort]", table).forEach((head) => {
    head.querySelector("button").addEventListener("click", () => {
      const was = head.getAttribute("aria-sort");
      const down = was === "none" ? head.classList.contains("num") : was === "ascending";
      all("thead th[aria-sort]", table).forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = rows.map((row) => [value(row.cells[head.cellIndex]), row]);
      keyed.sort(([a], [b]) => (a === "" || b === "" || !down ? before(a, b) : before(b, a)));
      body.append(...keyed.map(([, row]) => row));
    });
  });
  const filters = all("[data-filter]");
  filters.forEach((select) => select.addEventListener("change", () => {
    let shown = 0;
    for (const row of rows) {
      row.hidden = filters.some((one) => one.value && row.dataset[one.dataset.filter] !== one.value);
      shown += !row.hidden;
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length}`;
  }));

  // Settings in colour, and the one that is pointed at.
  const parts = new Map();
  all("[data-cell]").forEach((part) => {
    const list = parts.get(part.dataset.cell) ?? [];
    list.push(part);
    parts.set(part.dataset.cell, list);
  });
  const chooses = (part) => part.matches(".series:not(.pale), .cell-bar") && !part.closest("#pareto");
  all("[data-choose]").forEach((box) => box.addEventListener("change", () => {
    (parts.get(box.dataset.choose) ?? []).filter(chooses).forEach((part) => {
      part.classList.toggle("on", box.checked);
      if (box.checked && part.matches(".series")) part.parentNode.append(part);
    });
  }));
  let hot = null;
  const heat = (cell) => {
    if (cell === hot) return;
    (parts.get(hot) ?? []).forEach((part) => part.classList.remove("hot"));
    (parts.get(cell) ?? []).forEach((part) => part.classList.add("hot"));
    hot = cell;
  };

  // What a mark says: its <title>, shown at once instead of after a while.
  const show = (text, box) => {
    tip.textContent = text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), innerWidth - width - 8);
    const above = box.top - height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
  };
  const hide = () => { tip.hidden = true; };
  const saying = (node) => {
    const hit = node.closest(".hit, .piece");
    if (!hit) return null;
    const title = hit.querySelector("title");
    if (title) { hit.dataset.tip = title.textContent; title.remove(); }
    if (hit.title) { hit.dataset.tip = hit.title; hit.removeAttribute("title"); }
    return hit;
  };
  document.addEventListener("pointerover", (event) => {
    const hit = saying(event.target);
    if (hit) show(hit.dataset.tip, hit.getBoundingClientRect());
    else hide();
    const part = event.target.closest("[data-cell]");
    heat(part ? part.dataset.cell : null);
  });
  document.addEventListener("scroll", hide, { passive: true, capture: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // The text: what p, q and margin were at the token that is pointed at.
  const reading = document.getElementById("reading");
  const figure = (number) => (typeof number === "number" ? (number >= 0.0001 || number === 0 ? +number.toFixed(4) : number.toExponential(1)) : "–");
  const item = (name, text) => {
    const made = make("span", `${name} `, "what");
    made.append(make("strong", text));
    return made;
  };
  let current = null;
  const read = (token) => {
    if (!token || token === current) return;
    current?.classList.remove("at");
    current = token;
    token.classList.add("at");
    const [cell, which] = token.closest("[data-story]").dataset.story.split("-").map(Number);
    const told = content().cells[cell].story[which].tokens[Number(token.dataset.n)];
    const shown = [make("code", JSON.stringify(told.text ?? "").slice(1, -1) || "∅")];
    shown.push(item("by", told.origin ?? "–"), item("round", typeof told.round === "number" ? told.round + 1 : "–"));
    shown.push(item("position", (told.position ?? Number(token.dataset.n)) + 1), item("p", figure(told.p)));
    shown.push(item("q", figure(told.q)), item("margin", figure(told.margin)));
    for (const refused of told.refused ?? []) {
      const made = make("span", "refused ", "what");
      made.append(make("code", JSON.stringify(refused.text ?? "").slice(1, -1)), ` p ${figure(refused.p)}, q ${figure(refused.q)}`);
      shown.push(made);
    }
    reading.replaceChildren(...shown);
  };
  all(".told").forEach((told) => {
    const tokens = all(".t", told);
    const pointed = (event) => read(event.target.closest(".t[data-n]"));
    told.addEventListener("pointerover", pointed);
    told.addEventListener("click", pointed);
    told.addEventListener("focus", () => { if (!current || !told.contains(current)) read(tokens[0]); });
    told.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const at = tokens.indexOf(current) + step;
      read(tokens[Math.min(Math.max(at, 0), tokens.length - 1)]);
      current?.scrollIntoView({ block: "nearest" });
    });
  });
  // Colours of doubt: the redder, the smaller the figure.
  const shade = (name) => all(".told").forEach((told) => {
    const [cell, which] = told.dataset.story.split("-").map(Number);
    const tokens = content().cells[cell].story[which].tokens;
    told.classList.toggle("doubts", name !== "");
    for (const token of all(".t", told)) {
      const figure = name && tokens[Number(token.dataset.n)][name];
      token.style.setProperty("--doubt", typeof figure === "number" ? 1 - Math.min(Math.max(figure, 0), 1) : 0);
    }
  });
  document.getElementById("tone")?.addEventListener("change", (event) => shade(event.target.value));
  document.getElementById("which-story")?.addEventListener("change", (event) => {
    all(".story").forEach((story) => { story.hidden = story.dataset.of !== event.target.value; });
  });
})();
