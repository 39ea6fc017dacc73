// Keypoints on the first frame: clicked, dragged, named, deleted; the panel beside the picture.
import { say } from "/assets/strings.js";

const LOW = 0.5; // a confidence below it is marked

export class Annotator {
  constructor(nodes, onChange) {
    Object.assign(this, nodes); // list, usual, kind, warning, save, revert
    this.onChange = onChange;
    this.clear();
  }

  clear() {
    this.view = null;
    this.points = [];
    this.chosen = null;
    this.dirty = false;
    this.list.replaceChildren();
  }

  set(view) {
    this.view = view;
    this.points = view.points.map((point) => ({ ...point }));
    this.chosen = null;
    this.dirty = false;
    this.render();
  }

  get ready() {
    const names = this.points.map((point) => point.name.trim());
    return names.length > 0 && names.every(Boolean) && new Set(names).size === names.length;
  }

  get savable() {
    return this.ready && (this.dirty || this.view?.kind === "proposal");
  }

  add({ x, y }) {
    const taken = new Set(this.points.map((point) => point.name));
    let name = this.view.usual.find((usual) => !taken.has(usual));
    for (let number = this.points.length + 1; !name || taken.has(name); number += 1) name = `point_${number}`;
    this.points.push({ name, x, y, frame: 0, confidence: null });
    this.choose(this.points.length - 1);
    this.changed();
  }

  choose(index) {
    this.chosen = index;
    this.render();
    this.onChange();
  }

  move({ x, y }) {
    const point = this.points[this.chosen];
    if (!point) return;
    Object.assign(point, { x, y, confidence: null });
    this.dirty = true;
    this.onChange();
  }

  nudge(dx, dy, { width, height }) {
    const point = this.points[this.chosen];
    if (!point || point.frame) return;
    const limit = (value, most) => Math.max(0, Math.min(most, value));
    this.move({ x: limit(point.x + dx, width), y: limit(point.y + dy, height) });
    this.render();
  }

  remove(index) {
    if (!this.points[index]) return;
    this.points.splice(index, 1);
    this.chosen = null;
    this.changed();
  }

  changed() {
    this.dirty = true;
    this.render();
    this.onChange();
  }

  wish() {
    return this.points.map(({ name, x, y, frame }) => ({ name: name.trim(), x, y, frame }));
  }

  // What the stage draws: points on other frames are in the list only.
  drawn() {
    return this.points.map((point, index) => ({
      index,
      name: point.name,
      colour: colourOf(index, this.points.length),
      at: () => (point.frame ? null : { x: point.x, y: point.y, visible: (point.confidence ?? 1) >= LOW, given: true }),
    }));
  }

  render() {
    const names = this.points.map((point) => point.name.trim());
    this.list.replaceChildren(
      ...this.points.map((point, index) => {
        const item = document.createElement("li");
        item.className = index === this.chosen ? "chosen" : "";
        const swatch = document.createElement("span");
        swatch.className = "swatch";
        swatch.style.background = colourOf(index, this.points.length);
        const name = document.createElement("input");
        name.type = "text";
        name.value = point.name;
        name.maxLength = 100;
        name.setAttribute("list", this.usual.id);
        name.setAttribute("aria-label", say("namePoint", { n: index + 1 }));
        name.setAttribute("aria-invalid", String(!point.name.trim() || names.indexOf(names[index]) !== names.lastIndexOf(names[index])));
        name.addEventListener("input", () => {
          point.name = name.value;
          this.dirty = true;
          this.renderRest();
          this.onChange();
        });
        name.addEventListener("focus", () => {
          if (this.chosen === index) return;
          this.chosen = index;
          for (const other of this.list.children) other.classList.toggle("chosen", other === item);
          this.onChange();
        });
        name.addEventListener("keydown", (event) => {
          if (event.key === "Enter") name.blur();
        });
        const note = document.createElement("span");
        if (point.frame) note.textContent = say("otherFrame", { t: point.frame });
        else if (point.confidence !== null) {
          note.className = `pill ${point.confidence < LOW ? "low" : ""}`;
          note.textContent = `${Math.round(100 * point.confidence)}%`;
          note.title = say("confidence", { p: note.textContent });
        }
        const remove = document.createElement("button");
        remove.type = "button";
        remove.textContent = "✕\uFE0E";
        remove.setAttribute("aria-label", say("deletePoint", { name: point.name }));
        remove.addEventListener("click", () => this.remove(index));
        item.append(swatch, name, note, remove);
        return item;
      }),
    );
    this.renderRest();
  }

  renderRest() {
    const view = this.view;
    if (!view) return;
    this.usual.replaceChildren(...view.usual.map((name) => new Option(name)));
    const kinds = { annotation: "confirmedBanner", proposal: "proposalBanner", none: "noneBanner" };
    this.kind.textContent = say(kinds[view.kind]) + (this.dirty ? ` (${say("unsaved")})` : "");
    this.save.textContent = say(view.kind === "proposal" ? "confirm" : "save");
    this.save.disabled = !this.savable;
    this.revert.disabled = !this.dirty;
    const names = this.points.map((point) => point.name.trim());
    const texts = [];
    if (names.length && !this.ready) texts.push(say("needsName"));
    else if (names.length && view.usual.length) {
      const missing = view.usual.filter((name) => !names.includes(name));
      const extra = names.filter((name) => !view.usual.includes(name));
      if (missing.length) texts.push(say("missing", { episode: view.usual_episode, names: missing.join(", ") }));
      if (extra.length) texts.push(say("extra", { episode: view.usual_episode, names: extra.join(", ") }));
    }
    this.warning.hidden = !texts.length;
    this.warning.textContent = texts.join(" ");
  }
}

const colourOf = (index, count) => `hsl(${Math.round((299 * index) / Math.max(1, count - 1))} 100% 57.5%)`; // as visualization.spectrum
