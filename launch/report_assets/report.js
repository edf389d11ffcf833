// The page of ssl-report: charts (uPlot), theme, and pictures to step through. Text goes into the page as text only.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const $ = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const DASHES = [[], [8, 5], [2, 4], [10, 3, 2, 3]];
  const LISTED = 8; // runs whose values are listed below a chart
  const REACH = 30; // pixels from the cursor to a point whose value is shown

  // ---- Theme. The canvas needs colours as they are computed.
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;
  const ink = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const clear = (colour, alpha) => colour.replace("rgb(", "rgba(").replace(")", `, ${alpha})`);
  const button = $("#theme");
  const named = () => {
    button.textContent = dark() ? "Light mode" : "Dark mode";
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    named();
    drawAll();
  });
  system.addEventListener("change", () => {
    named();
    drawAll();
  });
  named();

  // ---- Numbers for people.
  const short = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size && (size >= 1e7 || size < 1e-3)) return Number(value.toPrecision(4)).toExponential().replace("e+", "e");
    return value.toLocaleString("en", size >= 1e4 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 4 });
  };
  const onAxis = (value) => {
    if (value === null) return "";
    const size = Math.abs(value);
    if (size >= 1e9) return `${Number((value / 1e9).toPrecision(4))}G`;
    if (size >= 1e6) return `${Number((value / 1e6).toPrecision(4))}M`;
    if (size >= 1e4) return `${Number((value / 1e3).toPrecision(4))}k`;
    if (size && size < 1e-3) return Number(value.toPrecision(6)).toExponential().replace("e+", "e");
    return String(Number(value.toPrecision(6)));
  };

  // ---- Charts.
  const form = $(".controls");
  const shown = data.runs.map(() => true);
  let smoothing = 0;
  let byImages = false;
  const sync = uPlot.sync("charts");

  // Exponential mean that starts at the first value (as in TensorBoard); gaps stay.
  const smooth = (values) => {
    let mean = 0;
    let weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = mean * smoothing + (1 - smoothing) * value;
      weight = weight * smoothing + (1 - smoothing);
      return mean / weight;
    });
  };

  // Single points between gaps are dots; a short curve has a dot at every point.
  const dots = (plot, series) => {
    const values = plot.data[series];
    const found = [];
    let seen = 0;
    let before = null; // the last value that is no alignment
    for (let i = 0; i < values.length; i++) {
      if (values[i] === undefined) continue;
      if (values[i] !== null) {
        seen++;
        let next = i + 1;
        while (next < values.length && values[next] === undefined) next++;
        const after = next < values.length ? values[next] : null;
        if (before === null && after === null) found.push(i);
      }
      before = values[i];
    }
    return seen <= 15 ? values.flatMap((value, i) => (value === null || value === undefined ? [] : [i])) : found;
  };

  // The nearest point of a curve that has none at the cursor.
  const near = (plot, series, index) => {
    const values = plot.data[series];
    if (values[index] !== undefined) return index;
    const at = plot.valToPos(plot.data[0][index], "x");
    const close = (i) => Math.abs(plot.valToPos(plot.data[0][i], "x") - at) <= REACH;
    for (let l = index - 1, r = index + 1; l >= 0 || r < values.length; l--, r++) {
      const left = l >= 0 && close(l);
      const right = r < values.length && close(r);
      if (!left && !right) return index;
      if (left && values[l] !== undefined) return l;
      if (right && values[r] !== undefined) return r;
    }
    return index;
  };

  const plots = new Map(); // figure -> {plot, lines: [series, run, first series of the run]}

  const draw = (figure) => {
    plots.get(figure)?.plot.destroy();
    plots.delete(figure);
    const place = $(".plot", figure);
    const chart = data.charts[figure.dataset.chart];
    const log = $(".log", figure).checked;
    const fits = (value) => (value === null || (log && value <= 0) ? null : value);
    const curves = chart.curves.filter((curve) => shown[curve.run]);
    const read = $(".read", figure);
    read.replaceChildren();
    if (!curves.length) return;
    const tables = [];
    const series = [{}];
    const bands = [];
    const lines = [];
    for (const curve of curves) {
      const run = data.runs[curve.run];
      const colour = ink(`k${(curve.run % 28) % 7}`);
      const dash = DASHES[Math.floor((curve.run % 28) / 7)];
      const table = [data.steps[curve.x].map((step) => step * (byImages ? run.batch : 1))];
      const first = series.length;
      const add = (values, more) => {
        table.push(values.map(fits));
        series.push({ label: run.name, points: { show: false }, ...more });
      };
      if (curve.low) {
        add(curve.high, { stroke: "transparent" });
        add(curve.low, { stroke: "transparent" });
        bands.push({ series: [series.length - 2, series.length - 1], fill: clear(colour, 0.18) });
      }
      if (smoothing) add(curve.y, { stroke: clear(colour, 0.3), width: 1, dash });
      add(smoothing ? smooth(curve.y) : curve.y, {
        stroke: colour,
        width: 2,
        dash,
        points: { show: true, filter: dots, size: 6, fill: colour },
      });
      lines.push([series.length - 1, curve.run, first]);
      tables.push(table);
    }
    const axis = { stroke: ink("soft"), grid: { stroke: ink("line"), width: 1 }, ticks: { stroke: ink("line"), width: 1 }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", labelGap: 2, labelSize: 20 };
    const plot = new uPlot(
      {
        width: place.clientWidth,
        height: place.clientHeight,
        legend: { show: false },
        scales: { x: { time: false }, y: { distr: log ? 3 : 1 } },
        focus: { alpha: series.length > lines.length + 1 ? 1 : 0.35 }, // bands and faint lines cannot be told apart
        cursor: {
          y: false,
          sync: { key: sync.key, scales: ["x", null] },
          focus: { prox: curves.length > 1 ? 24 : -1 },
          dataIdx: near,
          points: { size: 8 },
          drag: { x: true, y: false },
        },
        axes: [
          { ...axis, label: byImages ? "images seen" : "step", size: 28, labelSize: 18, space: 64, values: (_, at) => at.map(onAxis) },
          {
            ...axis,
            ...(chart.unit ? { label: chart.unit, labelSize: 24 } : {}),
            values: (_, at) => at.map(onAxis),
            size: (_, texts) => 16 + 7 * Math.max(2, ...(texts ?? []).map((text) => text.length)),
          },
        ],
        series,
        bands,
        hooks: { setCursor: [() => list(figure)], setSeries: [() => list(figure)] },
      },
      tables.length > 1 ? uPlot.join(tables) : tables[0],
      place,
    );
    plots.set(figure, { plot, lines });
    list(figure);
  };

  // The values at the cursor; the last ones where there is none.
  const list = (figure) => {
    if (!plots.has(figure)) return;
    const { plot, lines } = plots.get(figure);
    const { idx, idxs } = plot.cursor;
    const end = (values) => values.findLastIndex((value) => value !== null && value !== undefined);
    const focused = lines.filter(([number, , first]) => plot.series.slice(first, number + 1).some((each) => each._focus));
    const listed = lines.length > LISTED ? (focused.length === 1 ? focused : lines.slice(0, LISTED)) : lines;
    const items = listed.map(([number, run]) => {
      const at = idx === null || idx === undefined ? end(plot.data[number]) : (idxs[number] ?? idx);
      const item = document.createElement("span");
      if (data.runs.length > 1) {
        const key = item.appendChild(document.createElement("span"));
        key.className = `key k${(run % 28) % 7} d${Math.floor((run % 28) / 7)}`;
        item.append(`${data.runs[run].name} `);
      }
      const value = item.appendChild(document.createElement("b"));
      value.textContent = plot.data[number][at] === null ? "not finite" : short(plot.data[number][at]);
      return item;
    });
    if (lines.length > listed.length) {
      const more = document.createElement("span");
      more.className = "soft";
      more.textContent = `${lines.length - listed.length} more runs`;
      items.push(more);
    }
    const where = document.createElement("span");
    where.className = "soft";
    where.textContent = idx === null || idx === undefined ? "last" : `${byImages ? "image" : "step"} ${short5(plot.data[0][idx])}`;
    $(".read", figure).replaceChildren(where, ...items);
  };
  const short5 = (value) => Math.round(value).toLocaleString("en");

  const figures = all(".chart");
  const drawAll = () => figures.forEach(draw);

  // Arrow keys move a cursor along the curve, Home and End go to its ends, Escape shows the whole curve.
  const move = (figure, event) => {
    if (!plots.has(figure)) return;
    const { plot } = plots.get(figure);
    const steps = plot.data[0];
    const last = steps.length - 1;
    const at = plot.cursor.idx;
    const to = {
      ArrowLeft: Math.max(0, (at ?? last + 1) - 1),
      ArrowRight: Math.min(last, (at ?? -1) + 1),
      Home: 0,
      End: last,
    }[event.key];
    if (event.key === "Escape") {
      plot.setScale("x", { min: steps[0], max: steps[last] });
      plot.setCursor({ left: -10, top: -10 });
    } else if (to !== undefined) {
      plot.setCursor({ left: plot.valToPos(steps[to], "x"), top: plot.bbox.height / devicePixelRatio / 2 });
    } else return;
    event.preventDefault();
  };

  const sizes = new ResizeObserver((entries) => {
    for (const entry of entries) {
      const known = plots.get(entry.target.closest(".chart"));
      const { clientWidth: width, clientHeight: height } = entry.target;
      if (known && width && (known.plot.width !== width || known.plot.height !== height)) known.plot.setSize({ width, height });
    }
  });
  for (const figure of figures) {
    const place = $(".plot", figure);
    const box = $(".log", figure);
    box.disabled = !data.charts[figure.dataset.chart].curves.some((curve) => curve.y.some((value) => value > 0));
    box.addEventListener("change", () => draw(figure));
    place.addEventListener("keydown", (event) => move(figure, event));
    sizes.observe(place);
  }
  if (form) {
    form.hidden = false;
    $("#how").hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => {
      if (event.target.id === "smoothing") {
        smoothing = Number(event.target.value);
        event.target.nextElementSibling.textContent = event.target.value;
      }
      if (event.target.id === "across") byImages = event.target.value === "images";
      if (event.target.dataset.run) shown[event.target.dataset.run] = event.target.checked;
      drawAll();
    });
    form.reset();
  }
  drawAll();

  // ---- Paper is white.
  let before;
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    drawAll();
  });
  addEventListener("afterprint", () => {
    if (before) root.dataset.theme = before;
    else delete root.dataset.theme;
    drawAll();
  });

  // ---- Pictures: earlier steps, and large.
  for (const figure of all(".picture")) {
    const images = all("img", figure);
    const stepper = $(".stepper", figure);
    if (stepper) {
      const slider = $("input", stepper);
      const steps = slider.dataset.steps.split(" ").map(Number);
      const show = () => {
        const index = Number(slider.value);
        images.forEach((image, i) => {
          image.hidden = i !== index;
        });
        const step = steps[index].toLocaleString("en");
        $("output", figure).textContent = step;
        slider.setAttribute("aria-valuetext", `step ${step}`);
      };
      stepper.hidden = false;
      slider.value = slider.max; // a browser may restore another
      slider.addEventListener("input", show);
      show();
    }
    $(".enlarge", figure).addEventListener("click", () => {
      const image = images.find((each) => !each.hidden);
      const large = $("#large img");
      large.src = image.src;
      large.alt = image.alt;
      large.width = Math.max(image.width, Math.min(4 * image.naturalWidth, 2400));
      $("#large").showModal();
    });
  }
  $("#close").addEventListener("click", () => $("#large").close());
})();
