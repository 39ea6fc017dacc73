// The list of episodes: searched, filtered, sorted; only the rows in sight are in the document.
import { say } from "/assets/strings.js";

const ROW = 54; // pixels, as in the style sheet
const SPARE = 6; // rows beyond what is in sight
export const STATES = ["review", "proposal", "untracked", "unannotated", "accepted", "rejected", "broken"];

export class EpisodeList {
  constructor(root, { search, filter, sort }, onChoose) {
    this.root = root;
    this.search = search;
    this.filter = filter;
    this.sort = sort;
    this.onChoose = onChoose;
    this.rows = [];
    this.shown = [];
    this.current = null;
    this.space = document.createElement("div");
    root.append(this.space);
    root.addEventListener("scroll", () => this.drawRows(), { passive: true });
    new ResizeObserver(() => this.drawRows()).observe(root);
    search.addEventListener("input", () => this.update());
    filter.addEventListener("change", () => this.update());
    sort.addEventListener("change", () => this.update());
    root.addEventListener("click", (event) => {
      const item = event.target.closest(".item");
      if (item) this.onChoose(item.dataset.episode);
    });
  }

  setRows(rows) {
    this.rows = rows;
    this.update();
  }

  // Words of the language, numbers of the states.
  update() {
    const counts = Object.fromEntries(STATES.map((state) => [state, 0]));
    for (const row of this.rows) counts[row.state] += 1;
    const chosen = this.filter.value || "all";
    const options = [["all", `${say("all")} (${this.rows.length})`]];
    for (const state of STATES)
      if (counts[state] || chosen === state) options.push([state, `${say(`state_${state}`)} (${counts[state]})`]);
    this.filter.replaceChildren(...options.map(([value, text]) => new Option(text, value, false, value === chosen)));
    this.sort.options[0].text = say("sortDoubt");
    this.sort.options[1].text = say("sortName");

    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (row) => {
      if (chosen !== "all" && row.state !== chosen) return false;
      const text = `${row.episode} ${row.note}`.toLowerCase();
      return words.every((word) => text.includes(word));
    };
    this.shown = this.rows.filter(fits);
    if (this.sort.value === "name") {
      const order = new Intl.Collator("en", { numeric: true });
      this.shown.sort((a, b) => order.compare(a.episode, b.episode));
    }
    this.drawRows();
  }

  drawRows() {
    const first = Math.max(0, Math.floor(this.root.scrollTop / ROW) - SPARE);
    const last = Math.min(this.shown.length, Math.ceil((this.root.scrollTop + this.root.clientHeight) / ROW) + SPARE);
    this.space.style.height = `${this.shown.length * ROW}px`;
    const items = [];
    for (let index = first; index < last; index += 1) items.push(this.item(index));
    if (!this.shown.length) {
      const none = document.createElement("p");
      none.className = "none";
      none.textContent = this.rows.length ? say("noEpisodes") : say("emptyFolder");
      items.push(none);
      this.space.style.height = "auto";
    }
    this.space.replaceChildren(...items);
    const active = this.shown.findIndex((row) => row.episode === this.current);
    if (active >= first && active < last) this.root.setAttribute("aria-activedescendant", `episode-${active}`);
    else this.root.removeAttribute("aria-activedescendant");
  }

  item(index) {
    const row = this.shown[index];
    const item = document.createElement("div");
    item.className = "item";
    item.id = `episode-${index}`;
    item.dataset.episode = row.episode;
    item.style.top = `${index * ROW}px`;
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", String(row.episode === this.current));
    item.setAttribute("aria-setsize", String(this.shown.length));
    item.setAttribute("aria-posinset", String(index + 1));
    item.title = row.note ? `${row.episode}: ${row.note}` : row.episode;
    const name = document.createElement("div");
    name.className = "name";
    name.textContent = row.episode;
    const line = document.createElement("div");
    line.className = "row";
    if (row.doubt !== null) {
      const bar = document.createElement("div");
      bar.className = "bar";
      const inside = document.createElement("div");
      inside.style.width = `${100 * row.doubt}%`;
      inside.style.background = doubtColour(row.doubt);
      bar.append(inside);
      const number = document.createElement("span");
      number.className = "doubt";
      number.textContent = row.doubt.toFixed(2);
      number.title = say("doubt");
      line.append(bar, number);
    }
    line.append(pill(row.state, row.stale));
    item.append(name, line);
    return item;
  }

  choose(episode) {
    this.current = episode;
    const index = this.shown.findIndex((row) => row.episode === episode);
    if (index >= 0) {
      const top = index * ROW;
      if (top < this.root.scrollTop) this.root.scrollTop = top;
      else if (top + ROW > this.root.scrollTop + this.root.clientHeight)
        this.root.scrollTop = top + ROW - this.root.clientHeight;
    }
    this.drawRows();
  }

  // The episode `step` rows below the current one; null at the ends.
  neighbour(step) {
    const index = this.shown.findIndex((row) => row.episode === this.current);
    if (index < 0) return this.shown[0]?.episode ?? null;
    return this.shown[index + step]?.episode ?? null;
  }

  // The next row below `episode`, then from the top, in that state.
  nextIn(state, order, episode) {
    const index = order.indexOf(episode);
    const states = new Map(this.rows.map((row) => [row.episode, row.state]));
    const round = [...order.slice(index + 1), ...order.slice(0, Math.max(index, 0))];
    return round.find((name) => states.get(name) === state) ?? null;
  }

  order() {
    return this.shown.map((row) => row.episode);
  }
}

export function pill(state, stale) {
  const node = document.createElement("span");
  node.className = `pill ${stale ? "stale" : state}`;
  node.textContent = stale ? say("stale") : say(`state_${state}`);
  return node;
}

const doubtColour = (doubt) => `hsl(${Math.round(140 - 140 * Math.min(1, doubt * 1.15))} 62% 40%)`;
