"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  const hiddenRuns = new Set();
  const arrays = new Map();

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
    const colors = (name, count) => Array.from({ length: count }, (_, number) => read(`${name}-${number}`));
    return {
      series: colors("--series", 7), scale: colors("--scale", 5),
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

  // The library is part of the page, but is evaluated only when a chart is touched: its text is one of the two scripts
  // that the page's policy lets run.
  function load() {
    if ("Plotly" in window) return;
    const script = document.createElement("script");
    script.textContent = document.getElementById("plotly").textContent;
    document.head.append(script);
  }

  function draw(figure) {
    load();
    const chart = data.charts[figure.id], live = figure.querySelector(".live"), colors = palette();
    chart.hidden ??= new Set();
    figure.dataset.drawn = ""; // before it is drawn, so that it has a size
    Plotly.react(live, lineTraces(chart, colors), layout(chart, colors), CONFIG);
  }

  // What a chart shows before it is touched, and on paper.
  function hide(figure) {
    const chart = data.charts[figure.id];
    for (const part of figure.querySelectorAll("[data-line]")) {
      const line = Number(part.dataset.line), gone = hiddenRuns.has(Number(part.dataset.run));
      part.classList.toggle("hidden", gone || (part.tagName !== "BUTTON" && Boolean(chart.hidden?.has(line))));
      if (part.tagName === "BUTTON") part.setAttribute("aria-pressed", String(!chart.hidden?.has(line)));
    }
  }

  function toggle(figure, number) {
    const chart = data.charts[figure.id];
    chart.hidden ??= new Set();
    if (!chart.hidden.delete(number)) chart.hidden.add(number);
    hide(figure);
    draw(figure);
  }

  // ---- when to draw -----------------------------------------------------------------------------------------------

  const figures = [...document.querySelectorAll("figure.chart")];
  const drawn = () => figures.filter((figure) => "drawn" in figure.dataset);

  function touch(figure, event) {
    if ("drawn" in figure.dataset) return;
    draw(figure);
    // What the pointer rests on is said at once.
    const { clientX, clientY } = event;
    const target = figure.querySelector(".nsewdrag");
    if (clientX !== undefined) target?.dispatchEvent(new MouseEvent("mousemove", { clientX, clientY, bubbles: true, view: window }));
  }

  for (const figure of figures) {
    const plot = figure.querySelector(".plot");
    let resting;
    plot.addEventListener("focusin", (event) => touch(figure, event));
    plot.addEventListener("pointerdown", (event) => touch(figure, event));
    plot.addEventListener("pointermove", (event) => { // a pointer that only passes by touches nothing
      clearTimeout(resting);
      if (event.pointerType === "mouse" && !("drawn" in figure.dataset)) resting = setTimeout(() => touch(figure, event), 120);
    });
    plot.addEventListener("pointerleave", () => clearTimeout(resting));
    figure.querySelector(".legend")?.addEventListener("click", ({ target }) => {
      const button = target.closest("button");
      if (button) toggle(figure, Number(button.dataset.line));
    });
  }

  // A chart that was drawn in a closed part has kept an old size.
  document.addEventListener("toggle", ({ target }) => {
    if (target.open) drawn().filter((figure) => target.contains(figure)).forEach((figure) => Plotly.Plots.resize(figure.querySelector(".live")));
  }, true);

  for (const box of document.querySelectorAll("[data-run][type=checkbox]")) {
    box.addEventListener("change", () => {
      const run = Number(box.dataset.run);
      if (box.checked) hiddenRuns.delete(run); else hiddenRuns.add(run);
      figures.forEach(hide);
      drawn().forEach(draw);
    });
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn().forEach(draw));

  // ---- links into parts that are closed ---------------------------------------------------------------------------

  function reveal() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
    target?.scrollIntoView();
  }
  addEventListener("hashchange", reveal);
  if (location.hash) reveal();

  // ---- where the reader is ----------------------------------------------------------------------------------------

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const nav = document.querySelector("nav");
  const reading = new Set();
  const follow = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting) reading.add(target.id); else reading.delete(target.id);
    const at = [...links.keys()].find((id) => reading.has(id));
    if (at === undefined) return;
    for (const [id, link] of links) if (id === at) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
    nav.scrollLeft = links.get(at).offsetLeft - nav.clientWidth / 3;
  }, { rootMargin: "-15% 0px -70% 0px" }); // a band near the top, in which a heading that was jumped to stands
  document.querySelectorAll("main > section").forEach((section) => follow.observe(section));

  // One player at a time: voices are compared one after the other.
  document.addEventListener("play", ({ target }) => {
    for (const player of document.querySelectorAll("audio")) if (player !== target) player.pause();
  }, true);
})();
