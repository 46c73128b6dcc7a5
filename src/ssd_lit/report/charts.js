// The live charts: Vega-Lite specifications, made from the runs' numbers and from what the reader asks for.
const {arms, runs} = JSON.parse(document.getElementById("chart-data").textContent);
const form = document.getElementById("chart-settings");
const armOf = Object.fromEntries(arms.map((arm) => [arm.name, arm]));
const severalSeeds = runs.length > new Set(runs.map((run) => run.arm)).size;

/** A scale that fits the data; zero is no place on a logarithmic one. */
function scaleOf(log, more) {
  return {...(log ? {type: "log"} : {zero: false}), nice: false, ...more};
}

const X_TITLES = {steps: "step", tokens: "tokens", flops: "training FLOPs", seconds: "training time (s)"};
const FRACTIONS = {whole: 0, half: 0.5, quarter: 0.75};
// A range of perplexities wider than this factor starts on a log scale, as in the static figures.
const LOG_RATIO = 3;
const TEXT = "var(--text)", SOFT = "var(--soft)", LINE = "var(--line)";

// Colours are CSS: a change of theme, or printing, needs no new drawing.
const COLOURS = {
  type: "nominal", legend: null,
  scale: {domain: arms.map((arm) => arm.label), range: arms.map((arm) => `light-dark(${arm.colour}, ${arm.on_dark})`)},
};
const DASHES = {
  type: "nominal", legend: null,
  scale: {domain: arms.map((arm) => arm.label), range: arms.map((arm) => (arm.dash.length ? arm.dash : [1, 0]))},
};
const CONFIG = {
  background: null, font: "system-ui, sans-serif", aria: false,
  view: {stroke: null},
  axis: {
    labelColor: SOFT, titleColor: TEXT, titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 12,
    domainColor: SOFT, tickColor: SOFT, gridColor: LINE, labelOverlap: "greedy",
  },
};
const PROGRESS = [
  {field: "step", title: "step", format: ",d"},
  {field: "tokens", title: "tokens", format: ".3~s"},
  {field: "flops", title: "training FLOPs", format: ".3~s"},
  {field: "seconds", title: "training time (s)", format: ".4~r"},
];

/** What the form says: the names of the arms shown, the axis, and which boxes are ticked. */
function asked() {
  const data = new FormData(form);
  const names = new Set(data.getAll("arm"));
  const shown = runs.filter((run) => names.has(run.arm));
  const x = data.get("x");
  const ends = shown.filter((run) => run.phases.length).map((run) => run.phases.at(-1)[x][1]);
  // A part is one of the training that ends first: every run has some of it.
  const from = ends.length ? FRACTIONS[data.get("part")] * Math.min(...ends) : 0;
  return {shown, x, from, end: Math.max(0, ...ends), ticked: (name) => data.has(name)};
}

/** Names of a run for the tooltip. */
function naming(run) {
  return {arm: armOf[run.arm].label, run: run.name, seed: run.seed};
}

const NAMES = [{field: "arm", title: "arm"}, ...(severalSeeds ? [{field: "seed", title: "seed"}] : [])];

/** A row for each point of a curve in view, with `more` in each. */
function points(run, curve, more, state) {
  return curve.value.map((value, i) => ({
    ...naming(run), ...more, value, x: curve[state.x][i], mode: curve.mode[i], step: curve.steps[i],
    tokens: curve.tokens[i], flops: curve.flops[i], seconds: curve.seconds[i],
  })).filter((row) => row.value !== null && inView(row.x, state));
}

function inView(x, state) {
  return x >= state.from && (x > 0 || !state.ticked("log_x"));
}

function xOverTraining(state, rows) {
  const log = state.ticked("log_x");
  const first = log ? Math.min(...rows.map((row) => row.x)) : state.from;
  return {
    field: "x", type: "quantitative", title: X_TITLES[state.x],
    axis: {format: "~s", tickCount: 6, grid: false},
    scale: scaleOf(log, {domain: [Math.max(first, state.from), state.end]}),
  };
}

/** Shades of the sparse phases of runs that alternate; together they stay light enough to read the curves. */
function shades(state, x) {
  const alternating = state.shown.filter((run) => run.alternates);
  const [left, right] = x.scale.domain;
  const values = alternating.flatMap((run) => run.phases.filter((phase) => phase.mode === "sparse").map((phase) => ({
    ...naming(run), left: Math.max(phase[state.x][0], left), right: Math.min(phase[state.x][1], right),
  }))).filter((span) => span.left < span.right);
  return {
    data: {values}, mark: {type: "rect", opacity: 0.14 / Math.max(alternating.length, 1), tooltip: null},
    encoding: {
      x: {...x, field: "left"}, x2: {field: "right"}, color: {...COLOURS, field: "arm"},
      y: {value: 0}, y2: {value: "height"},
    },
  };
}

/** Points that show themselves and what they are when the pointer is near. */
function hovered(tooltip) {
  return {
    params: [{name: "near", select: {type: "point", nearest: true, on: "pointermove", clear: "pointerout"}}],
    mark: {type: "point", filled: true, size: 45, clip: true},
    encoding: {opacity: {condition: {param: "near", empty: false, value: 1}, value: 0}, tooltip},
  };
}

function lossChart(state) {
  const rows = ["validation", "training"].filter(state.ticked).flatMap(
    (what) => state.shown.flatMap((run) => points(run, run.losses[what], {what}, state)));
  if (!rows.length) return null;
  // The training loss of the first steps may leave the chart: what is compared is the validation loss.
  const fitted = rows.filter((row) => row.what === "validation");
  const values = (fitted.length ? fitted : rows).map((row) => row.value);
  const low = Math.min(...values), high = Math.max(...values), margin = 0.05 * (high - low) || 0.05;
  const x = xOverTraining(state, rows);
  const line = (what, mark) => ({
    transform: [{filter: {field: "what", equal: what}}], mark: {type: "line", clip: true, ...mark},
    encoding: {strokeDash: {...DASHES, field: "arm"}},
  });
  return {
    height: 340,
    layer: [
      shades(state, x),
      {
        data: {values: rows},
        encoding: {
          x, color: {...COLOURS, field: "arm"}, detail: {field: "run"},
          y: {
            field: "value", type: "quantitative", title: "loss (nats per target)",
            scale: scaleOf(state.ticked("log_loss"), {domain: [Math.max(low - margin, low / 2), high + margin]}),
          },
        },
        layer: [
          line("training", {strokeWidth: 1, opacity: 0.4}),
          line("validation", {strokeWidth: 2}),
          hovered([...NAMES, {field: "what", title: "loss of"}, {field: "value", title: "loss", format: ".4f"},
            {field: "mode", title: "mode"}, ...PROGRESS]),
        ],
      },
    ],
  };
}

function phaseChart(state) {
  const spans = state.shown.flatMap((run) => run.phases.map((phase) => ({
    ...naming(run), mode: phase.mode, ended_by: phase.ended_by, left: phase[state.x][0], right: phase[state.x][1],
    lane: armOf[run.arm].label + (severalSeeds ? `, seed ${run.seed}` : ""), steps: phase.steps[1] - phase.steps[0],
    step: phase.steps[0], flops: phase.flops[1] - phase.flops[0], seconds: phase.seconds[1] - phase.seconds[0],
  })));
  const x = xOverTraining(state, spans.map((span) => ({x: span.left || span.right})));
  const [left, right] = x.scale.domain;
  const values = spans.filter((span) => span.right > left).map((span) => ({...span, left: Math.max(span.left, left)}));
  if (!values.length) return null;
  return {
    height: 20 * new Set(values.map((span) => span.lane)).size, data: {values},
    mark: {type: "bar", height: {band: 0.75}},
    encoding: {
      x: {...x, field: "left"}, x2: {field: "right"},
      y: {
        field: "lane", type: "nominal", sort: null, title: null,
        axis: {labelLimit: Math.min(180, innerWidth / 4), ticks: false, domain: false},
      },
      color: {...COLOURS, field: "arm"},
      opacity: {condition: {test: "datum.mode === 'sparse'", value: 1}, value: 0.3},
      tooltip: [...NAMES, {field: "mode"}, {field: "step", title: "begins at step", format: ",d"},
        {field: "steps", title: "steps", format: ",d"}, {field: "flops", title: "FLOPs", format: ".3~s"},
        {field: "seconds", title: "seconds", format: ".4~r"}, {field: "ended_by", title: "ended by"}],
    },
  };
}

function similarityChart(state) {
  const rows = state.shown.flatMap((run) => run.similarity.flatMap(
    (stretch, place) => points(run, stretch, {stretch: `${run.name} ${place}`}, state)));
  if (!rows.length) return null;
  const x = xOverTraining(state, rows);
  const thresholds = [...new Set(state.shown.map((run) => run.tau).filter((tau) => tau !== null))];
  const y = {
    type: "quantitative", title: "similarity (adjusted Rand index)",
    scale: {domain: [Math.min(0, ...rows.map((row) => row.value)), 1]},
  };
  return {
    height: 260,
    layer: [
      shades(state, x),
      {
        data: {values: thresholds.map((tau) => ({tau, text: `tau ${tau}`}))},
        encoding: {y: {...y, field: "tau"}},
        layer: [
          {mark: {type: "rule", strokeDash: [4, 3], color: TEXT}},
          {mark: {type: "text", align: "right", dx: -3, dy: -7, color: TEXT}, encoding: {text: {field: "text"}, x: {value: "width"}}},
        ],
      },
      {
        data: {values: rows},
        encoding: {x, y: {...y, field: "value"}, color: {...COLOURS, field: "arm"}, detail: {field: "stretch"}},
        layer: [
          {mark: {type: "line", point: {size: 22}, strokeWidth: 1.4}},
          hovered([...NAMES, {field: "value", title: "similarity", format: ".3f"}, ...PROGRESS]),
        ],
      },
    ],
  };
}

function perplexityRows(state) {
  const sparse = state.shown.flatMap((run) => run.over_k.map((point) => ({
    ...naming(run), ...point, own: point.k === run.top_k, mode: "sparse",
  }))).filter((row) => row.perplexity !== null);
  const dense = state.ticked("dense") || !sparse.length ? state.shown.filter((run) => run.perplexity_dense !== null) : [];
  return {
    sparse,
    dense: dense.map((run) => ({
      ...naming(run), perplexity: run.perplexity_dense, mode: "dense", alone: !run.over_k.length,
    })),
  };
}

function perplexityChart(state) {
  const {sparse, dense} = perplexityRows(state);
  if (!sparse.length && !dense.length) return null;
  const ks = [...new Set(sparse.map((row) => row.k))].sort((a, b) => a - b);
  const y = {
    field: "perplexity", type: "quantitative", title: "validation perplexity",
    scale: scaleOf(state.ticked("log_perplexity"), {padding: 10}),
    axis: {format: "~s", tickCount: 6},
  };
  const x = {
    field: "k", type: "quantitative", title: "experts computed for a token, k",
    axis: {values: ks, format: "d", grid: false},
    scale: scaleOf(state.ticked("log_k"), {padding: 10, ...(state.ticked("log_k") ? {base: 2} : {})}),
  };
  const colour = {...COLOURS, field: "arm"};
  const score = [...NAMES, {field: "mode", title: "mode"}, {field: "perplexity", title: "perplexity", format: ".5~r"}];
  return {
    height: 340,
    layer: [
      {
        data: {values: dense}, mark: {type: "rule", strokeWidth: 1.5},
        encoding: {
          y, color: colour, tooltip: score,
          strokeDash: {condition: {test: "datum.alone", value: [1, 0]}, value: [5, 4]},
        },
      },
      {
        data: {values: sparse},
        encoding: {x, y, color: colour, detail: {field: "run"}},
        layer: [
          {mark: {type: "line", point: {size: 25}, strokeWidth: 2}, encoding: {strokeDash: {...DASHES, field: "arm"}}},
          {transform: [{filter: "datum.own"}], mark: {type: "point", size: 170, strokeWidth: 1.5}},
          hovered([...score, {field: "k", title: "k", format: "d"}]),
        ],
      },
    ],
  };
}

const CHARTS = {loss: lossChart, phases: phaseChart, similarity: similarityChart, perplexity: perplexityChart};
const views = {};

async function draw() {
  const state = asked();
  for (const [name, specOf] of Object.entries(CHARTS)) {
    const place = document.getElementById(`chart-${name}`);
    const spec = specOf(state);
    views[name]?.finalize();
    delete views[name];
    if (spec === null) {
      place.textContent = "None of the arms shown has numbers for this chart.";
      continue;
    }
    views[name] = await vegaEmbed(place, {...spec, width: "container"}, {
      mode: "vega-lite", renderer: "svg", actions: false, config: CONFIG, tooltip: {theme: "report"},
    });
  }
}

// One drawing after the other: two at once would leave both in a chart's place.
let drawn = Promise.resolve();
function redraw() {
  form.dataset.state = "drawing";
  drawn = drawn.then(draw).then(() => { form.dataset.state = "drawn"; });
}

const {sparse, dense} = perplexityRows({shown: runs, ticked: () => true});
const perplexities = [...sparse, ...dense].map((row) => row.perplexity);
form.elements.log_perplexity.checked = Math.max(...perplexities) > LOG_RATIO * Math.min(...perplexities);
form.addEventListener("change", redraw);
form.addEventListener("submit", (event) => event.preventDefault());
for (const button of form.querySelectorAll("[data-arms]")) {
  button.addEventListener("click", () => {
    for (const box of form.querySelectorAll("[name=arm]")) box.checked = button.dataset.arms === "all";
    redraw();
  });
}
redraw();
