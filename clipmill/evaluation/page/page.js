"use strict";

// ----------------------------------------------------------------------------------------------------------- players
// A player is a figure around one video. It wants to play or not; it does play while it wants to and can be seen.

const SPEEDS = [0.25, 0.5, 1, 2];
const players = new Map();
let active = null; // the player that was used last, for the keyboard

class Player {
  constructor(figure, wantsToPlay) {
    this.figure = figure;
    this.video = figure.querySelector("video");
    this.fps = Number(figure.dataset.fps);
    this.numFrames = Number(figure.dataset.frames);
    this.numGiven = Number(figure.dataset.given);
    this.wants = wantsToPlay;
    this.isVisible = false;
    const find = name => figure.querySelector(`[data-do=${name}]`);
    this.button = find("play");
    this.scrub = find("scrub");
    this.output = figure.querySelector("output");
    this.video.loop = true; // no gap between two loops, in which a click could be lost
    this.button.addEventListener("click", () => this.toggle());
    find("back").addEventListener("click", () => this.step(-1));
    find("forward").addEventListener("click", () => this.step(1));
    this.scrub.addEventListener("input", () => { this.pause(); this.seek(Number(this.scrub.value)); });
    find("speed").addEventListener("change", event => { this.video.playbackRate = SPEEDS[event.target.selectedIndex]; });
    find("enlarge")?.addEventListener("click", () => enlarge(this, null));
    find("download").addEventListener("click", event => { this.load(); event.currentTarget.href = this.video.src; });
    for (const name of ["pointerdown", "focusin"]) figure.addEventListener(name, () => { active = this; });
    for (const cell of figure.querySelectorAll(".cells i:not(.empty)")) {
      if (find("enlarge")) cell.addEventListener("click", () => enlarge(this, cell));
    }
    this.video.addEventListener("seeked", () => this.show());
    this.video.addEventListener("loadeddata", () => this.show());
    this.show();
  }
  load() {
    if (!this.video.src) this.video.src = this.figure.dataset.src;
  }
  get frame() {
    return Math.min(this.numFrames - 1, Math.floor(this.video.currentTime * this.fps + 0.01));
  }
  show() {
    const frame = this.frame;
    this.scrub.value = frame;
    this.output.textContent = `frame ${frame + 1} of ${this.numFrames}`;
    this.figure.classList.toggle("shows-given", frame < this.numGiven);
  }
  seek(frame) {
    this.load();
    this.video.currentTime = (frame + 0.5) / this.fps; // the middle of a frame: rounding cannot reach its neighbour
    this.show();
  }
  step(number) {
    this.pause();
    this.seek((this.frame + number + this.numFrames) % this.numFrames);
  }
  toggle() { this.wants ? this.pause() : this.play(); }
  play() { this.wants = true; this.update(); }
  pause() { this.wants = false; this.update(); }
  update() {
    this.button.textContent = this.wants ? "Pause" : "Play";
    if (this.wants && this.isVisible) {
      this.load();
      this.video.play().catch(() => {}); // a browser may forbid it until the first click
    } else this.video.pause();
  }
  setVisible(isVisible) {
    this.isVisible = isVisible;
    if (isVisible) this.load();
    this.update();
  }
}

// The frame number follows the video, which says by itself only now and then where it is.
function follow() {
  for (const player of players.values()) if (player.isVisible && !player.video.paused) player.show();
  requestAnimationFrame(follow);
}

const wantsMotion = !matchMedia("(prefers-reduced-motion: reduce)").matches;
const watcher = new IntersectionObserver(entries => {
  for (const entry of entries) players.get(entry.target)?.setVisible(entry.isIntersecting);
}, { rootMargin: "200px" });
for (const figure of document.querySelectorAll("main .player")) {
  players.set(figure, new Player(figure, wantsMotion));
  watcher.observe(figure);
}
requestAnimationFrame(follow);

const allButton = document.getElementById("play-all");
function setAll(wants) {
  for (const player of players.values()) wants ? player.play() : player.pause();
  if (allButton) allButton.textContent = wants ? "Pause all" : "Play all";
}
allButton?.addEventListener("click", () => setAll(![...players.values()].some(player => player.wants)));
if (allButton && !wantsMotion) allButton.textContent = "Play all";

// A film, or one clip of it, large. The clip is cut out of the film by style alone.
const dialog = document.getElementById("large");
let large = null;
function enlarge(player, cell) {
  const figure = player.figure.cloneNode(true);
  figure.querySelector("[data-do=enlarge]").remove();
  figure.classList.remove("shows-given");
  if (cell) {
    const cells = [...player.figure.querySelectorAll(".cells i")];
    const [column, row] = [cells.indexOf(cell) % player.figure.dataset.columns, Math.floor(cells.indexOf(cell) / player.figure.dataset.columns)];
    const [width, height, right, below] = ["width", "height", "right", "below"].map(name => Number(player.figure.dataset[name]));
    const style = figure.style;
    figure.classList.add("single");
    style.setProperty("--aspect", player.figure.dataset.aspect);
    style.setProperty("--film-width", `${10000 / width}%`);
    style.setProperty("--film-height", `${10000 / height}%`);
    style.setProperty("--film-left", `${-column * (width + right) * 100 / width}%`);
    style.setProperty("--film-top", `${-row * (height + below) * 100 / height}%`);
    figure.querySelector(".title").textContent = cell.title;
  }
  dialog.querySelector(".place").replaceChildren(figure);
  player.pause();
  large = new Player(figure, wantsMotion);
  large.video.addEventListener("loadedmetadata", () => large?.seek(player.frame), { once: true });
  large.load();
  large.isVisible = true;
  players.set(figure, large);
  dialog.showModal();
  large.update();
}
dialog?.addEventListener("close", () => {
  players.delete(large.figure);
  large.video.removeAttribute("src");
  large = null;
  dialog.querySelector(".place").replaceChildren();
});
dialog?.querySelector("[data-do=close]").addEventListener("click", () => dialog.close());

// Space and the arrow keys drive the player used last, or all of them. Controls keep their own keys.
addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("button, input, select, a, summary")) return;
  const chosen = large ?? (active && document.contains(active.figure) ? active : null);
  const shown = chosen ? [chosen] : [...players.values()].filter(player => player.isVisible);
  if (event.key === " ") {
    if (chosen) chosen.toggle();
    else setAll(![...players.values()].some(player => player.wants));
  } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    for (const player of shown) player.step(event.key === "ArrowLeft" ? -1 : 1);
  } else return;
  event.preventDefault();
});

// ------------------------------------------------------------------------------------------------------------ charts

const plots = [];
const HEIGHT = 260;
const DASHES = [[], [6, 4], [2, 3]];

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function draw(holder) {
  const chart = JSON.parse(holder.querySelector("script").textContent);
  const axis = label => ({ label, labelSize: 22, stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } });
  const hidden = holder.plot ? holder.plot.series.map(series => series.show === false) : [];
  const number = value => value == null ? "–" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  holder.plot?.destroy();
  holder.plot = new uPlot({
    width: holder.clientWidth,
    height: HEIGHT,
    cursor: { drag: { x: true, y: false } },
    scales: { x: { time: false }, y: { distr: chart.log ? 3 : 1 } },
    axes: [axis(chart.x), { ...axis(chart.y), size: 58 }],
    series: [
      { label: chart.x, value: (_, value) => number(value) },
      ...chart.series.map((series, index) => ({
        label: series.name,
        stroke: colour(`--c${series.colour % 6}`),
        width: 1.6,
        dash: DASHES[series.dash],
        spanGaps: true,
        points: { show: series.points },
        show: !hidden[index + 1],
        value: (_, value) => number(value),
      })),
    ],
  }, uPlot.join(chart.series.map(series => [series.xs, series.ys])), holder);
  holder.owners = chart.series.map(series => series.owners);
}

for (const holder of document.querySelectorAll(".plot")) {
  draw(holder);
  plots.push(holder);
  new ResizeObserver(() => {
    if (holder.clientWidth !== holder.plot.width) holder.plot.setSize({ width: holder.clientWidth, height: HEIGHT });
  }).observe(holder);
  holder.parentElement.querySelector("[data-do=whole]").addEventListener("click", () => draw(holder));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach(draw));
const boxes = [...document.querySelectorAll(".runs input")];
for (const box of boxes) {
  box.addEventListener("change", () => {
    const shown = boxes.filter(one => one.checked).map(one => one.value);
    for (const holder of plots) {
      holder.owners.forEach((owners, index) => {
        if (owners.includes(box.value)) holder.plot.setSeries(index + 1, { show: owners.some(name => shown.includes(name)) });
      });
    }
  });
}
