// Names what Material leaves without a name, and lets the keyboard reach what scrolls.

function complete() {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  document.querySelectorAll(".md-code__nav").forEach((toolbar, index) => {
    toolbar.setAttribute("aria-label", `Code ${index + 1}`);
  });
  const labels = new Map();
  for (const list of document.querySelectorAll(".md-nav .md-nav[aria-label]")) {
    const label = (list.dataset.label ??= list.ariaLabel); // a page has several tables of contents
    const count = (labels.get(label.toLowerCase()) ?? 0) + 1;
    labels.set(label.toLowerCase(), count);
    if (count > 1) list.ariaLabel = `${label}, ${count}`;
  }
  for (const area of document.querySelectorAll(".md-typeset__scrollwrap, pre > code")) {
    if (area.scrollWidth > area.clientWidth) area.tabIndex = 0;
  }
}

addEventListener("DOMContentLoaded", () => {
  complete();
  new MutationObserver(complete).observe(document.body, { childList: true, subtree: true });
});
addEventListener("load", complete);
addEventListener("resize", complete);
