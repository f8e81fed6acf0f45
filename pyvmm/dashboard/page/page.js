"use strict";
// Shows what /events sends. Each message is the whole state; what comes from the machine is only ever put in as text.

const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#2f6fbb", "#d9822b", "#3d9a50", "#8e5bb5", "#c2498f", "#6b7785", "#9a7b2f", "#2a9d9d"];
const SHOWN = 120;  // seconds of the charts
const COLUMNS = 32;

let before = null;  // the state shown last
let heat = null;  // {at, since, log, regions}, the last there was
let rates = [];  // pages a second of each cell, smoothed, for each region
let busy = [];  // {at, cpus: [share of a CPU]}
let checkpoints = new Map();  // by epoch and time

function element(name, content, attributes = {}) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...[content ?? ""].flat());
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const count = (value) => Math.round(value).toLocaleString("en");
const size = (bytes) => {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return `${bytes >= 100 || unit === 0 ? Math.round(bytes) : bytes.toFixed(1)} ${units[unit]}`;
};
const ms = (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(0)} ms`;
const clock = (at) => new Date(at * 1000).toLocaleTimeString("en", { hour12: false });

function list(target, rows) {
  target.replaceChildren(...rows.filter(([, value]) => value !== undefined && value !== "")
    .flatMap(([name, value]) => [element("dt", name), element("dd", String(value))]));
}

function table(target, heads, rows) {
  const numeric = (i) => (i ? { class: "number" } : {});
  target.replaceChildren(element("table", [
    element("thead", element("tr", heads.map((head, i) => element("th", head, numeric(i))))),
    element("tbody", rows.map((row) => element("tr", row.map((cell, i) => element("td", cell, numeric(i)))))),
  ]));
}

// -- vCPUs ---------------------------------------------------------------------------------------

function meter(share) {
  const bar = element("i");
  bar.style.width = `${Math.min(100, share * 100).toFixed(1)}%`;
  return element("span", bar, { class: "meter" });
}

function kindsOf(kinds) {
  return Object.entries(kinds).filter(([, rate]) => rate > 0).sort((a, b) => b[1] - a[1]).slice(0, 6)
    .map(([kind, rate]) => `${kind} ${count(rate)}`).join(", ");
}

function showCpus(state) {
  const cpus = state.cpus ?? [];
  byId("cpus-card").hidden = !cpus.length;
  table(byId("cpus"), ["vCPU", "time", "", "exits/s", "of these"], cpus.map((cpu) => [
    String(cpu.index), meter(cpu.busy ?? 0), `${((cpu.busy ?? 0) * 100).toFixed(0)} %`, count(cpu.exits_rate ?? 0),
    kindsOf(cpu.kinds_rate ?? {}),
  ]));
  if (cpus.some((cpu) => cpu.busy !== undefined)) busy.push({ at: state.at, cpus: cpus.map((cpu) => cpu.busy ?? 0) });
  busy = busy.filter((one) => one.at > state.at - SHOWN);
  const chart = [100, 50, 0].flatMap((percent) => [
    shape("line", { class: "axis", x1: 40, x2: 600, y1: 100 - percent * 0.9, y2: 100 - percent * 0.9 }),
    shape("text", { x: 0, y: 104 - percent * 0.9 }, `${percent} %`),
  ]);
  cpus.forEach((_, i) => {
    const points = busy.map((one) => `${(600 - (state.at - one.at) * 566 / SHOWN).toFixed(1)},` +
      `${(100 - Math.min(1, one.cpus[i] ?? 0) * 90).toFixed(1)}`);
    chart.push(shape("polyline", { points: points.join(" "), stroke: COLOURS[i % COLOURS.length] }));
  });
  byId("busy").replaceChildren(...chart);
}

// -- where it writes -----------------------------------------------------------------------------

function drawRegions(regions) {
  byId("heat").replaceChildren(...regions.map((region) => {
    const rows = Math.ceil(region.written.length / COLUMNS);
    const cells = region.written.map((_, i) => {
      const rect = shape("rect", { x: (i % COLUMNS) * 18, y: Math.floor(i / COLUMNS) * 12, width: 18, height: 12 });
      rect.append(shape("title", {}));
      return rect;
    });
    const svg = shape("svg", { viewBox: `0 0 ${COLUMNS * 18} ${rows * 12}`, role: "img", "aria-label": "heat map" });
    svg.append(...cells);
    const label = `${size(region.size)} from 0x${region.address.toString(16)}, a cell is ${size(region.bucket)}`;
    return element("div", [element("small", label), svg], { class: "region" });
  }));
  rates = regions.map((region) => region.written.map(() => 0));
}

function showHeat(state) {
  const whose = { others: "as checkpoints or a migration find them", own: "logged while this page looks", none: "" };
  byId("heat-note").textContent = state.heat ? whose[state.heat.log] ?? "" : "nobody counts them now";
  const old = heat;
  heat = state.heat ? { ...state.heat, at: state.at } : heat;
  if (!heat) return;
  const cells = heat.regions.reduce((sum, region) => sum + region.written.length, 0);
  if (document.querySelectorAll("#heat rect").length !== cells) drawRegions(heat.regions);
  const comparable = old?.since === heat.since && old.regions.length === heat.regions.length;
  const seconds = Math.max(0.05, heat.at - (old?.at ?? 0));
  const svgs = document.querySelectorAll("#heat svg");
  heat.regions.forEach((region, r) => {
    const pages = region.bucket / 4096;
    const rects = svgs[r].children;
    region.written.forEach((written, i) => {
      const now = comparable ? (written - old.regions[r].written[i]) / seconds : 0;
      const smooth = rates[r][i] = Math.max(now, rates[r][i] * 0.4);
      const level = smooth < 0.5 ? 0 : Math.max(1, Math.min(6, Math.floor(6 + 2 * Math.log10(smooth / pages))));
      const rect = rects[i];
      const wanted = `h${level}`;
      if (rect.getAttribute("class") !== wanted) rect.setAttribute("class", wanted);
      rect.dataset.written = String(written);
      rect.firstChild.textContent =
        `0x${(region.address + i * region.bucket).toString(16)}: ${count(now)} pages/s, ${count(written)} so far`;
    });
  });
}

// -- protection ----------------------------------------------------------------------------------

function showProtection(state) {
  const colo = state.colo, stats = state.colo_stats;
  byId("protection-card").hidden = byId("checkpoints-card").hidden = !colo;
  if (!colo) return;
  const guarded = colo.mode !== "none";
  byId("failover-box").hidden = !guarded;
  const was = colo["last-mode"] === "none" ? "not yet"
    : `not any more: was ${colo["last-mode"]}, ${colo.reason}${colo["x-problem"] ? ` (${colo["x-problem"]})` : ""}`;
  list(byId("protection"), [
    ["role", guarded ? `${colo.mode}, ${colo["x-checkpoint-mode"]}` : was],
    ["pair", colo["x-pair"] ? `${colo["x-pair"]}, term ${colo["x-term"]}, epoch ${colo["x-epoch"]}` : ""],
    ["other side", colo["x-peer"]],
    ["failover", colo["x-failover"] === "none" ? "" : colo["x-failover"]],
    ["failovers", stats?.failovers ? `${stats.failovers}, the last in ${ms(stats["last-failover"] ?? 0)}` : ""],
    ["heartbeats", guarded && stats
      ? `${count(stats["heartbeats-heard"])} heard, longest silence ${ms(stats["longest-silence"])}` : ""],
    ["sent", stats?.checkpoints ? `${count(stats.checkpoints)} checkpoints, ${size(stats.bytes)}` : ""],
    ["pages rolled back", stats?.["rolled-back-pages"] ? count(stats["rolled-back-pages"]) : ""],
    ["console output held", stats?.["held-bytes"] ? size(stats["held-bytes"]) : ""],
  ]);
  table(byId("reasons"), ["checkpoints because", "how many"],
    [...(stats?.reasons ?? [])].sort((a, b) => b.count - a.count).slice(0, 8).map((one) => [one.reason, count(one.count)]));
}

function showCheckpoints(state) {
  for (const one of state.checkpoints ?? []) checkpoints.set(`${one.epoch} ${one.time}`, one);
  for (const [key, one] of checkpoints) if (one.time < state.at - SHOWN) checkpoints.delete(key);
  const all = [...checkpoints.values()].sort((a, b) => a.time - b.time);
  const pauses = all.map((one) => one.pause).sort((a, b) => a - b);
  byId("checkpoints-note").textContent = pauses.length
    ? `${all.length} in two minutes; pause: median ${ms(pauses[pauses.length >> 1])}, longest ${ms(pauses.at(-1))}` : "";
  const decades = [0.1, 1, 10, 100, 1000];
  const height = (value) => Math.max(1, Math.min(130, (Math.log10(Math.max(value, 0.1)) + 1) * 32));
  byId("checkpoints").replaceChildren(
    ...decades.flatMap((decade) => [
      shape("line", { class: "axis", x1: 44, x2: 600, y1: 142 - height(decade), y2: 142 - height(decade) }),
      shape("text", { x: 0, y: 146 - height(decade) }, `${decade} ms`),
    ]),
    ...all.map((one) => {
      const x = 596 - (state.at - one.time) * 550 / SHOWN, tall = height(one.pause);
      const bar = shape("rect", { class: "bar", x: x.toFixed(1), y: 142 - tall, width: 2, height: tall });
      bar.append(shape("title", {}, `epoch ${one.epoch}, ${clock(one.time)}, ${one.reason}: pause ${ms(one.pause)}, ` +
        `${count(one.pages)} pages, ${size(one.size)}, received after ${ms(one.received)}`));
      return bar;
    }),
  );
}

function showPackets(state) {
  const cards = state.colo_stats?.cards ?? [];
  byId("packets-card").hidden = !cards.length;
  table(byId("packets"), ["card", "sent", "by the replica", "alike: let out", "by checkpoints", "held now", "not needed"],
    cards.map((card, i) => [
      String(i), count(card["primary-frames"]), count(card["secondary-frames"]), count(card.released),
      count(card.committed),
      count(Math.max(0, card["primary-frames"] - card.released - card.committed - card.refused)), count(card.dropped),
    ]));
}

function showQueues(state) {
  const queues = (state.queues ?? []).filter((one) => one.size);  // the others have no driver
  byId("queues-card").hidden = !queues.length;
  table(byId("queues"), ["queue", "", "waiting", "size"], queues.map((one) => [
    `${one.device} ${one.queue}`, meter(one.size ? one.depth / one.size : 0), one.depth === null ? "?" : count(one.depth),
    count(one.size),
  ]));
}

function showMigration(state) {
  const info = state.migration ?? {};
  byId("migration-card").hidden = !info.status || info.status === "colo";
  list(byId("migration"), [
    ["status", info.status], ["sent", info.ram && size(info.ram.transferred)], ["left", info.ram && size(info.ram.remaining)],
    ["bandwidth", info.ram && `${info.ram.mbps.toFixed(1)} Mbit/s`],
    ["pages written", info.ram && `${count(info.ram["dirty-pages-rate"])} a second`],
    ["rounds", info.ram && info.ram["dirty-sync-count"]], ["problem", info["error-desc"]],
  ]);
}

function showEvents(state) {
  const events = state.events ?? [];
  byId("events-card").hidden = !events.length;
  byId("events").replaceChildren(...events.slice().reverse().map((one) => {
    const data = Object.keys(one.data).length ? ` ${JSON.stringify(one.data)}` : "";
    return element("li", `${clock(one.at)} ${one.name}${data}`);
  }));
}

// -- the whole -----------------------------------------------------------------------------------

function show(state) {
  document.title = `${state.name} - pyvmm`;
  byId("name").textContent = state.name || "pyvmm";
  byId("status").textContent = state.status;
  byId("status").className = `badge ${state.status}`;
  const written = typeof state.dirty === "number" ? `, ${count(state.dirty)} pages written a second` : "";
  byId("facts").textContent = `${size(state.memory ?? 0)} of memory${written}`;
  showCpus(state);
  showHeat(state);
  showProtection(state);
  showCheckpoints(state);
  showPackets(state);
  showQueues(state);
  showMigration(state);
  showEvents(state);
  before = state;
}

function connected(text, gone) {
  byId("line").textContent = text;
  document.body.classList.toggle("gone", gone);
}

function listen() {
  const source = new EventSource("events");
  source.onopen = () => connected("", false);
  source.onmessage = (message) => {
    const state = JSON.parse(message.data);
    if (state.name === undefined) {
      connected(state.problem ?? "the machine does not answer", true);
      return;
    }
    connected("", state.status === "ended");
    show(state);
  };
  source.onerror = () => {
    connected(before?.status === "ended" ? "" : "no connection", true);
    if (source.readyState === EventSource.CLOSED) {  // refused: too many look, for example
      setTimeout(listen, 5000);
    }
  };
}

async function failover() {
  byId("failover").disabled = true;
  byId("failover-said").textContent = "asking...";
  try {
    const answer = await fetch("failover", { method: "POST", headers: { "X-Pyvmm-Token": byId("token").value } });
    byId("failover-said").textContent = answer.ok ? "asked for; the role above tells what comes of it" : await answer.text();
  } catch (error) {
    byId("failover-said").textContent = `not asked: ${error.message}`;
  }
  byId("failover").disabled = !byId("token").value;
}

byId("token").addEventListener("input", () => { byId("failover").disabled = !byId("token").value; });
byId("failover").addEventListener("click", () => byId("sure").showModal());
byId("no").addEventListener("click", () => byId("sure").close());
byId("yes").addEventListener("click", () => { byId("sure").close(); failover(); });
listen();
