"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  const STROKES = ["", "6 4", "2 3", "6 3 2 3", "10 4", "10 4 2 4"];
  const hiddenRuns = new Set();
  const arrays = new Map();
  let printing = false;

  // ---- what the page holds ----------------------------------------------------------------------------------------

  function array(number, Kind) {
    if (!arrays.has(number)) {
      const bytes = Uint8Array.from(atob(data.arrays[number]), (character) => character.charCodeAt(0));
      arrays.set(number, new Kind(bytes.buffer));
    }
    return arrays.get(number);
  }

  function palette() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    const colors = (name) => read(name).split(/\s+/);
    return {
      series: colors("--series"), scale: colors("--scale"),
      page: read("--page"), text: read("--text"), quiet: read("--quiet"), line: read("--line"), box: read("--box"),
    };
  }

  function between(colors, place) {
    const at = Math.min(place * (colors.length - 1), colors.length - 1.0001);
    const channels = (color) => [1, 3, 5].map((from) => parseInt(color.slice(from, from + 2), 16));
    const [low, high] = [channels(colors[Math.floor(at)]), channels(colors[Math.floor(at) + 1])];
    return `rgb(${low.map((channel, i) => Math.round(channel + (high[i] - channel) * (at % 1))).join(",")})`;
  }

  const colorOf = (line, colors) =>
    line.color === null ? between(colors.scale, line.place) : colors.series[line.color % colors.series.length];

  function labelOf(line, chart) {
    if (data.runs.length === 1) return line.name;
    const alone = chart.lines.every((other) => other.name === line.name);
    return alone ? data.runs[line.run] : `${line.name} · ${data.runs[line.run]}`;
  }

  // Plotly takes some HTML in its texts for markup.
  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

  // ---- drawing ----------------------------------------------------------------------------------------------------

  function lineTraces(chart, colors) {
    const traces = [];
    chart.lines.forEach((line, number) => {
      const steps = array(line.steps, Int32Array), values = array(line.values, Float32Array);
      const color = colorOf(line, colors), name = plain(labelOf(line, chart));
      const visible = !hiddenRuns.has(line.run) && !chart.hidden.has(number);
      traces.push({
        x: steps, y: values, name, visible, type: "scatter", mode: values.length > 40 ? "lines" : "lines+markers",
        line: { color, dash: DASHES[line.dash], width: 2 }, marker: { color, size: 5 },
        hovertemplate: "%{y:.6~g}<extra>%{fullData.name}, step %{x}</extra>", meta: number,
      });
      const marks = nonfiniteMarks(steps, values);
      if (marks.x.length) {
        traces.push({
          ...marks, name, visible, type: "scatter", mode: "markers", meta: number,
          marker: { color, size: 11, symbol: "x-thin", line: { color, width: 3 } },
          hovertemplate: "%{text}<extra>%{fullData.name}, step %{x}</extra>",
        });
      }
    });
    return traces;
  }

  // A value that is not finite has no height: its mark stands where the last finite one was.
  function nonfiniteMarks(steps, values) {
    const marks = { x: [], y: [], text: [] };
    let height = values.find(Number.isFinite) ?? 0;
    values.forEach((value, i) => {
      if (Number.isFinite(value)) { height = value; return; }
      marks.x.push(steps[i]);
      marks.y.push(height);
      marks.text.push(Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "−∞");
    });
    return marks;
  }

  function layout(chart, colors) {
    const axis = { color: colors.quiet, gridcolor: colors.line, zerolinecolor: colors.line, linecolor: colors.line, automargin: true };
    return {
      paper_bgcolor: colors.page, plot_bgcolor: colors.page, showlegend: false, autosize: true,
      font: { color: colors.text, family: "system-ui, sans-serif", size: 12 }, margin: { l: 48, r: 10, t: 8, b: 36 },
      xaxis: { ...axis, title: { text: "optimizer step", font: { size: 12 } }, tickformat: "~s" },
      yaxis: { ...axis, title: { text: plain(chart.unit), font: { size: 12 } }, exponentformat: "power",
        rangemode: negative(chart) ? "normal" : "nonnegative" },
      hovermode: chart.lines.length <= 10 ? "x unified" : "closest",
      hoverlabel: { bgcolor: colors.box, bordercolor: colors.line, font: { color: colors.text }, namelength: 60 },
      dragmode: COARSE ? false : "zoom", // a finger on a chart scrolls the page
    };
  }

  const negative = (chart) => chart.lines.some((line) => array(line.values, Float32Array).some((value) => value < 0));

  const COARSE = matchMedia("(pointer: coarse)").matches;
  const CONFIG = {
    responsive: true, displaylogo: false, doubleClick: "reset", displayModeBar: COARSE ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };

  function draw(figure) {
    const chart = data.charts[figure.id], plot = figure.querySelector(".plot"), colors = palette();
    chart.hidden ??= new Set();
    const size = printing ? { width: 330, height: 200, autosize: false } : {};
    Plotly.react(plot, lineTraces(chart, colors), { ...layout(chart, colors), ...size }, CONFIG);
    if (chart.lines.length > 1) legend(figure, chart, colors);
    figure.dataset.drawn = "";
  }

  function legend(figure, chart, colors) {
    const place = figure.querySelector(".legend");
    const buttons = chart.lines.flatMap((line, number) => {
      if (hiddenRuns.has(line.run)) return [];
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", String(!chart.hidden.has(number)));
      button.append(swatch(colorOf(line, colors), STROKES[line.dash]), label(labelOf(line, chart)));
      button.addEventListener("click", () => toggle(figure, chart, number));
      button.dataset.line = number;
      return [button];
    });
    place.replaceChildren(...buttons);
  }

  function label(text) {
    const element = document.createElement("bdi");
    element.textContent = text;
    return element;
  }

  function swatch(color, stroke) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("width", "28");
    svg.setAttribute("height", "8");
    svg.setAttribute("aria-hidden", "true");
    const line = document.createElementNS(svg.namespaceURI, "path");
    for (const [name, value] of Object.entries({ d: "M0 4H28", stroke: color, "stroke-width": 3, "stroke-dasharray": stroke })) {
      line.setAttribute(name, value);
    }
    svg.append(line);
    return svg;
  }

  function toggle(figure, chart, number) {
    if (!chart.hidden.delete(number)) chart.hidden.add(number);
    draw(figure);
    figure.querySelector(`[data-line="${number}"]`)?.focus();
  }

  // ---- when to draw -----------------------------------------------------------------------------------------------

  const figures = [...document.querySelectorAll("figure.chart")];
  const drawn = () => figures.filter((figure) => "drawn" in figure.dataset);
  const shown = (figure) => figure.getClientRects().length > 0;

  const waiting = [];

  // One at a time, so that the page scrolls while many are to be drawn.
  function drawNext() {
    const figure = waiting.shift();
    if (!("drawn" in figure.dataset)) draw(figure);
    if (waiting.length) setTimeout(drawNext);
  }

  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      if (waiting.push(target) === 1) setTimeout(drawNext);
    }
  }, { rootMargin: "300px" });
  figures.forEach((figure) => near.observe(figure));

  // A chart that was drawn in a closed part has kept an old size.
  document.addEventListener("toggle", ({ target }) => {
    if (target.open) drawn().filter((figure) => target.contains(figure)).forEach((figure) => Plotly.Plots.resize(figure.querySelector(".plot")));
  }, true);

  for (const box of document.querySelectorAll("[data-run]")) {
    box.addEventListener("change", () => {
      const run = Number(box.dataset.run);
      if (box.checked) hiddenRuns.delete(run); else hiddenRuns.add(run);
      drawn().forEach(draw);
    });
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn().forEach(draw));
  addEventListener("beforeprint", () => { printing = true; figures.filter(shown).forEach(draw); });
  addEventListener("afterprint", () => { printing = false; drawn().forEach(draw); });

  // ---- links into parts that are closed ---------------------------------------------------------------------------

  function reveal() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
    target?.scrollIntoView();
  }
  addEventListener("hashchange", reveal);
  if (location.hash) reveal();

  // One player at a time: voices are compared one after the other.
  document.addEventListener("play", ({ target }) => {
    for (const player of document.querySelectorAll("audio")) if (player !== target) player.pause();
  }, true);
})();
