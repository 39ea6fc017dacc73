// The video with what is drawn on it. Frames are exact: what is drawn belongs to the frame that is on the screen.
const TRAIL = 14; // frames
const REACH = 16; // screen pixels around a dot that take hold of it
const LOUPE = 7; // screen pixels per image pixel

export class Stage {
  constructor(nodes) {
    Object.assign(this, nodes); // stage, frame, video, still, overlay, loupe
    this.info = null; // {fps, numFrames, width, height}
    this.shown = 0;
    this.wanted = 0;
    this.seeking = false;
    this.scene = () => ({ points: [], chosen: null, trails: false, names: false });
    this.onFrame = () => {};
    this.onPlaying = () => {};
    this.onGrab = () => false; // (point or null, {x, y}) -> whether to drag
    this.onDrag = () => {};
    this.onDrop = () => {};
    new ResizeObserver(() => this.fit()).observe(this.stage);
    this.video.addEventListener("seeked", () => this.seeked());
    this.video.addEventListener("loadeddata", () => this.jump());
    this.video.addEventListener("play", () => this.onPlaying(true));
    this.video.addEventListener("pause", () => this.paused());
    this.video.addEventListener("ended", () => this.paused());
    this.still.addEventListener("load", () => this.draw());
    this.follow();
    this.listen();
  }

  load(url, info, frame = 0) {
    this.info = info;
    this.frame.hidden = false;
    this.seeking = false;
    this.wanted = this.shown = Math.min(frame, info.numFrames - 1);
    this.video.src = url;
    this.fit();
  }

  unload() {
    this.info = null;
    this.video.removeAttribute("src");
    this.video.load();
    this.frame.hidden = true;
  }

  // A picture in place of the video, or null.
  showStill(url) {
    this.still.hidden = url === null;
    if (url !== null) this.still.src = url;
  }

  get playing() {
    return !this.video.paused && !this.video.ended;
  }

  // Files of odd size have one more column or row than the images.
  fit() {
    if (!this.info) return;
    const width = this.info.width + (this.info.width % 2);
    const height = this.info.height + (this.info.height % 2);
    const scale = Math.min(this.stage.clientWidth / width, this.stage.clientHeight / height);
    this.frame.style.width = `${width * scale}px`;
    this.frame.style.height = `${height * scale}px`;
    this.scale = scale;
    const ratio = window.devicePixelRatio || 1;
    this.overlay.width = Math.round(width * scale * ratio);
    this.overlay.height = Math.round(height * scale * ratio);
    this.draw();
  }

  seek(frame) {
    if (!this.info) return;
    this.video.pause();
    this.wanted = Math.max(0, Math.min(this.info.numFrames - 1, Math.round(frame)));
    this.jump();
  }

  // One seek at a time; the last wish wins.
  jump() {
    if (this.seeking || !this.info || this.video.readyState < 1) return;
    const time = (this.wanted + 0.5) / this.info.fps;
    if (Math.abs(this.video.currentTime - time) < 0.25 / this.info.fps && this.video.readyState >= 2) {
      this.show(this.wanted);
      return;
    }
    this.seeking = true;
    this.aim = this.wanted;
    this.video.currentTime = time;
  }

  seeked() {
    this.seeking = false;
    if (!this.info) return;
    if (this.aim !== this.wanted && !this.playing) this.jump();
    else if (!this.playing) this.show(this.wanted);
  }

  // The time of the frame that the browser puts on the screen.
  follow() {
    if (!this.video.requestVideoFrameCallback) {
      const tick = () => {
        if (this.playing && this.info) this.show(Math.floor(this.video.currentTime * this.info.fps + 1e-6));
        requestAnimationFrame(tick);
      };
      requestAnimationFrame(tick);
      return;
    }
    const next = (_, metadata) => {
      if (this.info && (this.playing || !this.seeking)) this.show(Math.round(metadata.mediaTime * this.info.fps));
      this.video.requestVideoFrameCallback(next);
    };
    this.video.requestVideoFrameCallback(next);
  }

  show(frame) {
    this.shown = Math.max(0, Math.min(this.info.numFrames - 1, frame));
    if (this.playing) this.wanted = this.shown;
    this.draw();
    this.onFrame(this.shown);
  }

  toggle() {
    if (!this.info) return;
    if (this.playing) this.video.pause();
    else {
      if (this.shown >= this.info.numFrames - 1) this.video.currentTime = 0;
      this.video.play().catch(() => {});
    }
  }

  // Rest in the middle of the frame that is on the screen.
  paused() {
    this.onPlaying(false);
    if (!this.info || this.seeking) return;
    this.wanted = this.shown;
    this.jump();
  }

  toImage(event) {
    const box = this.overlay.getBoundingClientRect();
    return { x: (event.clientX - box.left) / this.scale, y: (event.clientY - box.top) / this.scale };
  }

  inside({ x, y }) {
    const limit = (value, most) => Math.max(0, Math.min(most, value));
    return { x: limit(x, this.info.width), y: limit(y, this.info.height) };
  }

  nearest(place) {
    let best = null;
    let least = REACH / this.scale;
    for (const point of this.scene().points) {
      const at = point.at(this.shown);
      if (!at) continue;
      const distance = Math.hypot(at.x - place.x, at.y - place.y);
      if (distance < least) [best, least] = [point, distance];
    }
    return best;
  }

  listen() {
    const canvas = this.overlay;
    let held = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (!this.info || event.button !== 0) return;
      const place = this.toImage(event);
      const point = this.nearest(place);
      const at = point?.at(this.shown);
      held = this.onGrab(point, this.inside(place));
      if (!held) return;
      this.video.pause();
      canvas.setPointerCapture(event.pointerId);
      held = { dx: at ? at.x - place.x : 0, dy: at ? at.y - place.y : 0, start: place, moved: false };
      event.preventDefault();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.info) return;
      const place = this.toImage(event);
      if (!held) {
        canvas.style.cursor = this.nearest(place) ? "grab" : this.emptyCursor ?? "default";
        return;
      }
      canvas.style.cursor = "grabbing";
      if (!held.moved && Math.hypot(place.x - held.start.x, place.y - held.start.y) * this.scale < 2) return;
      held.moved = true;
      const target = this.inside({ x: place.x + held.dx, y: place.y + held.dy });
      this.onDrag(target);
      this.drawLoupe(target);
    });
    const end = () => {
      if (held) this.onDrop(held.moved);
      held = null;
      this.loupe.hidden = true;
      this.draw();
    };
    canvas.addEventListener("pointerup", end);
    canvas.addEventListener("pointercancel", end);
  }

  drawLoupe({ x, y }) {
    const side = this.loupe.width;
    const pen = this.loupe.getContext("2d");
    this.loupe.hidden = false;
    this.loupe.classList.toggle("right", x < this.info.width / 2 && y < this.info.height / 2);
    pen.imageSmoothingEnabled = false;
    pen.fillStyle = "#12171e";
    pen.fillRect(0, 0, side, side);
    const half = side / 2 / LOUPE;
    const picture = this.still.hidden ? this.video : this.still;
    pen.drawImage(picture, x - half, y - half, 2 * half, 2 * half, 0, 0, side, side);
    for (const [colour, width] of [["#000a", 3], ["#fff", 1]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = width;
      pen.beginPath();
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        pen.moveTo(side / 2 + 7 * dx, side / 2 + 7 * dy);
        pen.lineTo(side / 2 + 26 * dx, side / 2 + 26 * dy);
      }
      pen.stroke();
    }
  }

  draw() {
    if (!this.info) return;
    const pen = this.overlay.getContext("2d");
    const ratio = this.overlay.width / (this.frame.clientWidth || 1);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, this.frame.clientWidth, this.frame.clientHeight);
    const scene = this.scene();
    const t = this.shown;
    if (scene.trails) for (const point of scene.points) this.drawTrail(pen, point, t);
    for (const point of scene.points) if (point !== scene.chosen) this.drawPoint(pen, point, t, false);
    if (scene.chosen) this.drawPoint(pen, scene.chosen, t, true);
    if (scene.names) this.drawNames(pen, scene.points, t, scene.chosen);
  }

  drawTrail(pen, point, t) {
    pen.lineCap = "round";
    pen.strokeStyle = point.colour;
    pen.lineWidth = 2.5;
    if (point.at(t)?.from) return;
    for (let s = Math.max(1, t - TRAIL + 1); s <= t; s += 1) {
      const from = point.at(s - 1);
      const to = point.at(s);
      if (!from?.visible || !to?.visible) continue;
      pen.globalAlpha = 1 - (t - s) / TRAIL;
      pen.beginPath();
      pen.moveTo(from.x * this.scale, from.y * this.scale);
      pen.lineTo(to.x * this.scale, to.y * this.scale);
      pen.stroke();
    }
    pen.globalAlpha = 1;
  }

  drawPoint(pen, point, t, chosen) {
    const at = point.at(t);
    if (!at) return;
    const x = at.x * this.scale;
    const y = at.y * this.scale;
    const radius = chosen ? 6.5 : 5.5;
    const circle = (r) => {
      pen.beginPath();
      pen.arc(x, y, r, 0, 2 * Math.PI);
    };
    if (at.from) {
      pen.strokeStyle = "#fff";
      pen.lineWidth = 1.5;
      pen.setLineDash([4, 3]);
      pen.beginPath();
      pen.moveTo(at.from.x * this.scale, at.from.y * this.scale);
      pen.lineTo(x, y);
      pen.stroke();
      pen.setLineDash([]);
    }
    if (chosen) {
      circle(radius + 3.5);
      pen.strokeStyle = "#fff";
      pen.lineWidth = 2;
      pen.stroke();
    }
    circle(radius);
    if (at.visible) {
      pen.fillStyle = point.colour;
      pen.fill();
      pen.strokeStyle = "#101418";
      pen.lineWidth = 1.5;
      pen.stroke();
    } else {
      pen.strokeStyle = "#101418";
      pen.lineWidth = 4;
      pen.stroke();
      pen.strokeStyle = point.colour;
      pen.lineWidth = 2.2;
      pen.stroke();
    }
    if (at.given) {
      circle(1.8);
      pen.fillStyle = "#fff";
      pen.fill();
    }
  }

  // Each name beside its dot, on the first side where it covers no other dot or name.
  drawNames(pen, points, t, chosen) {
    pen.textBaseline = "middle";
    pen.lineWidth = 3.5;
    pen.lineJoin = "round";
    const dots = [];
    for (const point of points) {
      const at = point.at(t);
      if (at) dots.push({ point, x: at.x * this.scale, y: at.y * this.scale });
    }
    const taken = dots.map(({ x, y }) => ({ left: x - 7, right: x + 7, top: y - 7, bottom: y + 7 }));
    for (const { point, x, y } of dots) {
      pen.font = `${point === chosen ? 600 : 500} 12px system-ui, "Noto Sans CJK SC", "DejaVu Sans", sans-serif`;
      const width = pen.measureText(point.name).width;
      const places = [[12, 0], [-12 - width, 0], [-width / 2, -17], [-width / 2, 17], [9, -15], [9, 15]]
        .map(([dx, dy]) => ({ left: x + dx, right: x + dx + width, top: y + dy - 7, bottom: y + dy + 7 }))
        .filter((box) => box.left >= 0 && box.right <= this.frame.clientWidth);
      const box = places.find((place) => !taken.some((other) => overlaps(place, other))) ?? places[0];
      if (!box) continue;
      taken.push(box);
      pen.strokeStyle = "#000b";
      pen.strokeText(point.name, box.left, (box.top + box.bottom) / 2);
      pen.fillStyle = "#fff";
      pen.fillText(point.name, box.left, (box.top + box.bottom) / 2);
    }
  }
}

const overlaps = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
