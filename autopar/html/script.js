// Shows what is pointed at or focused beneath its chart, and zooms the timeline. The page reads
// without this: every shape has a title, and every chart a table.
"use strict";

function tipOf(target) {
  const shape = target instanceof Element ? target.closest("[data-tip]") : null;
  const line = shape ? shape.closest("section").querySelector(".tip") : null;
  if (line) line.textContent = shape.dataset.tip;
}

document.addEventListener("pointerover", (event) => tipOf(event.target));
document.addEventListener("focusin", (event) => tipOf(event.target));

// A link to a folded block unfolds it.
function unfold() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) target.open = true;
}
window.addEventListener("hashchange", unfold);
unfold();
