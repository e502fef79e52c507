(function () {
  const svg = document.querySelector('.maskprop .graph svg'); if (!svg) return;
  const full = svg.getAttribute('viewBox').split(' ').map(Number);
  const fit = function () { const r = svg.clientHeight / svg.clientWidth, h = Math.min(full[3], Math.max(full[2], 700) * r), w = h / r;
    return [full[0] + (full[2] - w) / 2, full[1], w, h]; };
  let view = fit(), from = null, whole = false;
  const show = function () { svg.setAttribute('viewBox', view.join(' ')); };
  const zoom = function (factor, x, y) { view = [x - (x - view[0]) * factor, y - (y - view[1]) * factor, view[2] * factor, view[3] * factor]; show(); };
  const at = function (e) { const b = svg.getBoundingClientRect(); return [view[0] + (e.clientX - b.left) / b.width * view[2], view[1] + (e.clientY - b.top) / b.height * view[3]]; };
  svg.addEventListener('wheel', function (e) { e.preventDefault(); const p = at(e); zoom(e.deltaY > 0 ? 1.15 : 1 / 1.15, p[0], p[1]); }, { passive: false });
  svg.addEventListener('pointerdown', function (e) { from = at(e); svg.setPointerCapture(e.pointerId); });
  svg.addEventListener('pointermove', function (e) { if (!from) return; const p = at(e); view[0] += from[0] - p[0]; view[1] += from[1] - p[1]; show(); });
  svg.addEventListener('pointerup', function () { from = null; });
  const centre = function (f) { zoom(f, view[0] + view[2] / 2, view[1] + view[3] / 2); };
  document.querySelector('.maskprop [data-zoom=in]').onclick = function () { centre(1 / 1.4); };
  document.querySelector('.maskprop [data-zoom=out]').onclick = function () { centre(1.4); };
  document.querySelector('.maskprop [data-zoom=all]').onclick = function () { whole = !whole; view = whole ? full.slice() : fit(); show(); };
  show();
})();
