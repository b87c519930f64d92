// Names what Material leaves without a name, and lets the keyboard reach what scrolls.

function complete() {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  document.querySelectorAll(".md-code__nav").forEach((toolbar, index) => {
    toolbar.setAttribute("aria-label", `Code ${index + 1}`);
  });
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
