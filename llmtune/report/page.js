(() => {
  document.documentElement.classList.add("js");
  const form = document.querySelector("form.tools"), found = document.querySelector("#found");
  const items = [...document.querySelectorAll("#items [data-item]")].map(node => ({
    node, suite: node.dataset.suite, flips: JSON.parse(node.dataset.flips), slices: JSON.parse(node.dataset.slices), text: null,
  }));
  const groups = [...document.querySelectorAll("#items [data-group]")].reverse(); // inner ones before those around them
  let before = null;

  const wanted = () => Object.fromEntries([...new FormData(form)].map(([name, value]) => [name, value.trim()]).filter(([, value]) => value));
  const matches = (item, { text, suite, metric, way, slice }) => {
    if (suite && item.suite !== suite) return false;
    const ways = metric ? [item.flips[metric]].filter(Boolean) : Object.values(item.flips);
    if ((metric || way) && !ways.some(one => !way || way === "flipped" || one === way)) return false;
    if (slice && !item.slices.includes(slice)) return false;
    return !text || (item.text ??= item.node.textContent.toLowerCase()).includes(text.toLowerCase());
  };
  const apply = () => {
    const asked = wanted(), active = Object.keys(asked).length > 0;
    if (active && !before) before = groups.map(group => group.open);
    let count = 0;
    for (const item of items) count += !(item.node.hidden = !matches(item, asked));
    groups.forEach((group, i) => {
      group.hidden = active && !group.querySelector("[data-item]:not([hidden])");
      if (before && group.localName === "details") group.open = active ? !group.hidden : before[i];
    });
    if (!active) before = null;
    found.textContent = active ? `${count.toLocaleString("en")} of ${items.length.toLocaleString("en")} items` : "";
  };
  const remember = () => {
    const asked = new URLSearchParams(wanted()).toString();
    history.replaceState(null, "", asked ? `#items?${asked}` : "#items");
  };
  const fill = asked => {
    form.reset();
    for (const [name, value] of Object.entries(asked)) if (form.elements[name]) form.elements[name].value = value;
    apply();
  };
  const follow = () => {
    if (!location.hash.startsWith("#items?")) return;
    fill(Object.fromEntries(new URLSearchParams(location.hash.slice(7))));
    document.querySelector("#items form").scrollIntoView({ behavior: "instant" });
  };
  if (form) {
    form.addEventListener("input", () => { apply(); remember(); });
    form.addEventListener("submit", event => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => { apply(); remember(); }));
    for (const link of document.querySelectorAll("[data-filter]"))
      link.addEventListener("click", event => {
        event.preventDefault();
        fill(JSON.parse(link.dataset.filter));
        remember();
        form.scrollIntoView({ behavior: "instant" });
        form.elements.suite.focus({ preventScroll: true });
      });
    addEventListener("hashchange", follow);
    follow();
  }

  const reachable = part => {
    for (const box of part.querySelectorAll("pre, .scroll"))
      if (box.scrollHeight > box.clientHeight + 1 || box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0; else box.removeAttribute("tabindex");
  };
  reachable(document);
  addEventListener("resize", () => reachable(document));
  document.addEventListener("toggle", event => { if (event.target.open) reachable(event.target); }, true);
  let printed = [];
  addEventListener("beforeprint", () => {
    printed = [...document.querySelectorAll("details:not([data-item], [data-group]):not([open])")];
    for (const fold of printed) fold.open = true;
  });
  addEventListener("afterprint", () => { for (const fold of printed) fold.open = false; });
})();
