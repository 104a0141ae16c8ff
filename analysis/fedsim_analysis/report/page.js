"use strict";
(function () {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const charts = Array.from(document.querySelectorAll("[data-chart]"));
  const switches = document.querySelector(".switches");

  function colour(name) {
    return getComputedStyle(root).getPropertyValue("--" + name).trim();
  }

  function light(parts) { // relative luminance, as WCAG defines it
    const [r, g, b] = parts.slice(0, 3).map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  function parts(text) { // of #rrggbb, rgb(…) or rgba(…)
    return text[0] === "#" ? [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)) : text.match(/[\d.]+/g).map(Number);
  }

  function visible(text) { // a colour of a curve; on dark ground lighter, as far as needed to be seen
    if (!dark.matches) return text;
    const ground = light(parts(colour("card"))), [r, g, b, a = 1] = parts(text);
    for (let white = 0; white < 1; white += 0.05) {
      const mixed = [r, g, b].map((v) => Math.round(v + (255 - v) * white));
      if ((light(mixed) + 0.05) / (ground + 0.05) >= 3.5) return "rgba(" + mixed + "," + a + ")";
    }
    return text;
  }

  function painted(one) { // a trace, or a part of it
    const made = Object.assign({}, one);
    for (const key of ["color", "fillcolor"]) if (typeof made[key] === "string") made[key] = visible(made[key]);
    for (const key of ["line", "marker", "error_x", "error_y"]) if (made[key]) made[key] = painted(made[key]);
    return made;
  }

  function mark() {
    for (const dot of document.querySelectorAll(".dot")) {
      dot.dataset.colour = dot.dataset.colour || dot.style.backgroundColor;
      dot.style.backgroundColor = visible(dot.dataset.colour);
    }
  }

  async function titled(place) { // the title of the axis below smaller, where the chart has no room for it
    if (place.small) await Plotly.relayout(place, { "xaxis.title.font.size": null });
    const title = place.querySelector(".g-xtitle text");
    if (!title) return;
    const box = title.getBoundingClientRect(), around = place.getBoundingClientRect(), middle = box.left + box.width / 2;
    const share = (Math.min(middle - around.left, around.right - middle) - 2) / (box.width / 2);
    place.small = share < 1;
    if (place.small) await Plotly.relayout(place, { "xaxis.title.font.size": Math.max(9, Math.floor(parseFloat(getComputedStyle(title).fontSize) * share)) });
  }

  function themed(place, layout) {
    const axis = { gridcolor: colour("grid"), linecolor: colour("line"), zerolinecolor: colour("line"), tickcolor: colour("line") };
    const made = Object.assign({}, layout, {
      width: place.layout ? place.layout.width : place.clientWidth, height: place.chart.height,
      paper_bgcolor: colour("card"), plot_bgcolor: colour("card"), font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("ink") },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") }, namelength: -1 },
      legend: Object.assign({}, layout.legend, { bgcolor: colour("card") }),
    });
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) made[key] = Object.assign({ automargin: true }, layout[key], axis);
    }
    if (window.matchMedia("(pointer: coarse)").matches) made.dragmode = false; // a finger scrolls the page
    return made;
  }

  const config = {
    displaylogo: false, displayModeBar: window.matchMedia("(pointer: coarse)").matches ? false : "hover",
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d"]],
  };

  function draw(place) {
    const chart = JSON.parse(document.getElementById(place.dataset.chart + "-data").textContent);
    place.chart = chart;
    return Plotly.newPlot(place, chart.data.map(painted), themed(place, chart.layout), config).then(() => titled(place));
  }

  function after(place, change) { // one change of a chart at a time
    place.work = (place.work || Promise.resolve()).then(change);
    return place.work;
  }

  function repaint(place) {
    const data = place.chart.data.map((trace, index) => Object.assign(painted(trace), { visible: place.data[index].visible }));
    return Plotly.react(place, data, themed(place, place.chart.layout), config).then(() => titled(place));
  }

  function paint() {
    root.dataset.drawn = "";
    mark();
    return Promise.all(charts.map((place) => after(place, () => repaint(place)))).then(finish);
  }

  function fit(place) {
    const width = place.clientWidth; // 0 in print
    return width && width !== place.layout.width ? Plotly.relayout(place, { width: width }).then(() => titled(place)) : null;
  }

  // by the size of each chart itself: plotly's own way listens to the window, and keeps the width of a printed sheet
  const sizes = new ResizeObserver((changed) => changed.forEach((one) => after(one.target, () => fit(one.target))));

  function finish() {
    root.dataset.drawn = "all";
  }

  function apply(box) {
    for (const place of charts) {
      const of = place.data.flatMap((trace, index) => (trace.legendgroup === box.dataset.group ? [index] : []));
      if (of.length) after(place, () => Plotly.restyle(place, { visible: box.checked ? true : "legendonly" }, of));
    }
  }

  root.classList.add("live");
  mark();
  charts.reduce((before, place) => before.then(() => draw(place)), Promise.resolve()).then(function () {
    dark.addEventListener("change", paint);
    if (switches && charts.length) {
      switches.hidden = false;
      switches.addEventListener("change", (event) => apply(event.target));
    }
    charts.forEach((place) => sizes.observe(place));
    finish();
  });
})();
