// Draws the charts of a report from the JSON in the element "report-data".
"use strict";
(() => {
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const curves = document.getElementById("curves");
  const scores = document.getElementById("scores");
  const root = document.documentElement;
  const config = {
    responsive: true,
    displayModeBar: false, // it would cover the curves: one drags to zoom, double-clicks to reset
  };
  let axis = Object.keys(report.axes)[0];

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const color = (number) => css(`--run-${number % 7}`);
  // Plotly reads a little HTML in its texts: names of users are shown as they are.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function layout(more) {
    const lines = { gridcolor: css("--line"), linecolor: css("--line"), zerolinecolor: css("--line") };
    const base = {
      autosize: true,
      margin: { l: 56, r: 16, t: 12, b: 44 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--text") },
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text") } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    };
    return { ...base, ...more, xaxis: { ...lines, ...more.xaxis }, yaxis: { ...lines, ...more.yaxis } };
  }

  // The standard errors of many points are a band, those of a few are bars.
  function band(each) {
    const edge = (sign) => each.y.map((y, i) => (y === null ? null : y + sign * (each.errors[i] || 0)));
    const shared = { type: "scatter", mode: "lines", x: each.x[axis], line: { width: 0 }, hoverinfo: "skip" };
    const fill = { fill: "tonexty", fillcolor: `${color(each.color)}33` };
    return [-1, 1].map((sign) => ({ ...shared, y: edge(sign), showlegend: false, ...(sign > 0 ? fill : {}) }));
  }

  function traces(each) {
    const many = each.y.length > 25;
    const banded = each.errors && many;
    const look = {
      pale: { mode: "lines", line: { width: 1, color: color(each.color) }, opacity: 0.3, hoverinfo: "skip" },
      line: { mode: each.y.length > 1 ? "lines" : "markers", line: { width: 2.2, color: color(each.color) } },
      measured: {
        mode: "lines+markers",
        line: { width: 1.6, color: color(each.color) },
        marker: { size: many ? 5 : 7, color: css("--card"), line: { width: 1.4, color: color(each.color) } },
        ...(banded ? { mode: "lines" } : {}),
      },
      event: {
        mode: "markers",
        yaxis: "y2",
        marker: { symbol: "triangle-up", size: 9, color: color(each.color) },
        text: (each.texts || []).map(plain),
        hovertemplate: "%{text}<extra></extra>",
      },
    }[each.look];
    const errors = each.errors && !many && {
      error_y: { type: "data", array: each.errors, thickness: 1, width: 3, color: color(each.color) },
    };
    const name = plain(each.legend || each.name || "");
    const own = { type: "scatter", x: each.x[axis], y: each.y, name, showlegend: Boolean(each.legend) };
    return [...(banded ? band(each) : []), { ...own, ...look, ...errors }];
  }

  function drawChart(chart, place) {
    const scale = axis === "flops" ? { exponentformat: "e" } : { exponentformat: "B" };
    const y = chart.log ? { type: "log" } : chart.limits ? { range: chart.limits } : {};
    const small = chart.limits && chart.limits[1] < 1; // such as a learning rate: 0.0006, not 600µ
    const line = { width: 1, dash: "dash", color: css("--muted") };
    const shapes = chart.lines.map((each) => (
      { type: "line", xref: "paper", x0: 0, x1: 1, y0: each.value, y1: each.value, line }
    ));
    const annotations = chart.lines.map((each) => ({
      xref: "paper", x: chart.rises ? 0.01 : 1, xanchor: chart.rises ? "left" : "right", y: chart.log ? Math.log10(each.value) : each.value, yanchor: "bottom",
      text: plain(each.label), showarrow: false, font: { size: 11, color: css("--muted") },
    }));
    const more = {
      height: chart.wide ? 400 : 250,
      hovermode: "x unified",
      shapes,
      annotations,
      xaxis: { title: { text: report.axes[axis] }, nticks: chart.wide ? 10 : 5, rangemode: "tozero", ...scale },
      yaxis: { exponentformat: small ? "none" : "B", nticks: chart.wide ? 9 : 6, ...y },
      yaxis2: { overlaying: "y", range: [-0.04, 1], visible: false, fixedrange: true },
    };
    Plotly.react(place, chart.traces.flatMap(traces), layout(more), config);
  }

  function drawScores(place) {
    const { rows, series } = report.scores;
    const symbols = ["diamond-open", "square-open", "triangle-up-open", "cross-open", "x-open"];
    let published = 0;
    const points = series.map((each) => {
      const own = each.color !== null;
      const marker = own
        ? { size: 10, color: color(each.color) }
        : { size: 9, color: css("--muted"), symbol: symbols[published++ % symbols.length], line: { width: 1.5 } };
      const errors = each.errors && {
        error_x: { type: "data", array: each.errors, thickness: 1.6, width: 5, color: marker.color },
      };
      return { type: "scatter", mode: "markers", name: plain(each.name), x: each.y, y: rows.map(plain), marker, ...errors };
    });
    const more = {
      height: 130 + 34 * rows.length,
      margin: { l: 16, r: 16, t: 12, b: 44 },
      hovermode: "closest",
      showlegend: true,
      xaxis: { title: { text: "Score ± standard error" }, rangemode: "tozero" },
      yaxis: { type: "category", autorange: "reversed", automargin: true },
    };
    Plotly.react(place, points, layout(more), config);
  }

  function add(parent, tag, properties) {
    return parent.appendChild(Object.assign(document.createElement(tag), properties));
  }

  const places = [];
  function draw() {
    report.charts.forEach((chart, number) => drawChart(chart, places[number]));
    if (scores && report.scores) drawScores(scores);
  }

  if (curves) {
    const choice = add(curves, "div", { className: "choice" });
    choice.setAttribute("role", "group");
    choice.setAttribute("aria-label", "x axis");
    for (const [name, title] of Object.entries(report.axes)) {
      const button = add(choice, "button", { type: "button", textContent: title });
      button.setAttribute("aria-pressed", String(name === axis));
      button.addEventListener("click", () => {
        axis = name;
        for (const other of choice.children) other.setAttribute("aria-pressed", String(other === button));
        draw();
      });
    }
    const grid = add(curves, "div", { className: "charts" });
    for (const chart of report.charts) {
      const figure = add(grid, "figure", { className: chart.wide ? "wide" : "" });
      add(figure, "figcaption", { textContent: chart.title });
      places.push(add(figure, "div", { className: "chart" }));
    }
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.getElementById("theme").addEventListener("click", () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
    root.dataset.theme = isDark ? "light" : "dark";
    draw();
  });
  dark.addEventListener("change", draw);
  draw();
})();
