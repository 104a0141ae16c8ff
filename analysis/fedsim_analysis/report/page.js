"use strict";
(function () {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const charts = Array.from(document.querySelectorAll("[data-chart]"));
  const switches = document.querySelector(".switches");

  function colour(name) {
    return getComputedStyle(root).getPropertyValue("--" + name).trim();
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
    return Plotly.newPlot(place, chart.data, themed(place, chart.layout), config);
  }

  function after(place, change) { // one change of a chart at a time
    place.work = (place.work || Promise.resolve()).then(change);
    return place.work;
  }

  function paint() {
    root.dataset.drawn = "";
    return Promise.all(charts.map((place) => after(place, () => Plotly.relayout(place, themed(place, place.chart.layout))))).then(finish);
  }

  function fit(place) {
    const width = place.clientWidth; // 0 in print
    return width && width !== place.layout.width ? Plotly.relayout(place, { width: width }) : null;
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
