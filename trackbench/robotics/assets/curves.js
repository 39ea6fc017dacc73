// Visibility, forward-backward error and speed of the keypoints over time; a click goes to the frame.
import { say } from "/assets/strings.js";

const LEFT = 12;
const RIGHT = 12;
const TOP = 19;
const BOTTOM = 5;
const LEAST = { visibility: 1, error: 4, motion: 4 }; // tops of the scales: nothing is blown up
const UNIT = { visibility: "", error: "px", motion: "pxPerFrame" };

export class Curves {
  constructor(root, onSeek) {
    this.canvases = [...root.querySelectorAll("canvas")];
    this.points = [];
    this.chosen = null;
    this.length = 0;
    this.frame = 0;
    for (const canvas of this.canvases) {
      new ResizeObserver(() => this.draw()).observe(canvas);
      const seek = (event) => {
        const box = canvas.getBoundingClientRect();
        const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
        if (this.length) onSeek(Math.round(share * (this.length - 1)));
      };
      canvas.addEventListener("pointerdown", (event) => {
        canvas.setPointerCapture(event.pointerId);
        seek(event);
      });
      canvas.addEventListener("pointermove", (event) => {
        if (event.buttons & 1) seek(event);
      });
    }
  }

  set(points, length) {
    this.points = points.map((point) => ({ ...point, motion: speeds(point) }));
    this.length = length;
    this.draw();
  }

  choose(index) {
    this.chosen = index;
    this.draw();
  }

  goTo(frame) {
    this.frame = frame;
    this.draw();
  }

  draw() {
    for (const canvas of this.canvases) this.drawOne(canvas, canvas.dataset.curve);
  }

  drawOne(canvas, key) {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const chosen = this.points[this.chosen] ?? null;
    const drawn = chosen ? [chosen] : this.points;
    const largest = Math.max(LEAST[key], ...drawn.map((point) => largestOf(point[key])));
    const x = (t) => LEFT + ((width - LEFT - RIGHT) * t) / Math.max(1, this.length - 1);
    const y = (value) => height - BOTTOM - ((height - TOP - BOTTOM) * value) / largest;
    if (chosen) drawHidden(pen, chosen.visible, x, TOP, height - BOTTOM);
    pen.strokeStyle = "#2b343f";
    pen.lineWidth = 1;
    pen.beginPath();
    for (const value of [0, largest]) {
      pen.moveTo(LEFT, Math.round(y(value)) + 0.5);
      pen.lineTo(width - RIGHT, Math.round(y(value)) + 0.5);
    }
    pen.stroke();
    for (const point of this.points) {
      if (point === chosen) continue;
      pen.globalAlpha = chosen ? 0.28 : 0.85;
      this.drawCurve(pen, point, key, x, (value) => y(Math.min(value, largest)), 1.2);
    }
    pen.globalAlpha = 1;
    if (chosen) {
      this.drawCurve(pen, chosen, key, x, y, 2);
      if (key === "motion") for (const t of chosen.jumps) drawMark(pen, x(t), TOP + 3, "#ff6b5e");
      if (key === "error") for (const t of chosen.corrected) drawMark(pen, x(t), TOP + 3, "#fff");
    }
    pen.strokeStyle = "#fff";
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(Math.round(x(this.frame)) + 0.5, TOP - 3);
    pen.lineTo(Math.round(x(this.frame)) + 0.5, height);
    pen.stroke();
    this.label(pen, key, chosen, largest, width);
    canvas.setAttribute("aria-label", say("curveHint", { curve: say(key), point: chosen?.name ?? say("all") }));
  }

  label(pen, key, chosen, largest, width) {
    pen.font = '500 11.5px system-ui, "Noto Sans CJK SC", "DejaVu Sans", sans-serif';
    pen.textBaseline = "alphabetic";
    pen.fillStyle = "#c9d3de";
    const unit = UNIT[key] ? ` ${say(UNIT[key])}` : "";
    let text = say(key);
    if (chosen) {
      const value = chosen[key][this.frame];
      text += `  ${chosen.name}: ${value === null || value === undefined ? "–" : value.toFixed(key === "visibility" ? 2 : 1)}${unit}`;
    }
    pen.fillText(text, LEFT, TOP - 6);
    pen.textAlign = "right";
    pen.fillStyle = "#93a0ad";
    pen.fillText(`${key === "visibility" ? "1" : largest.toFixed(largest < 10 ? 1 : 0)}${unit}`, width - RIGHT, TOP - 6);
    pen.textAlign = "left";
  }

  drawCurve(pen, point, key, x, y, width) {
    pen.strokeStyle = point.colour;
    pen.lineWidth = width;
    pen.lineJoin = "round";
    pen.beginPath();
    let down = false;
    point[key].forEach((value, t) => {
      if (value === null) down = false;
      else if (down) pen.lineTo(x(t), y(value));
      else {
        pen.moveTo(x(t), y(value));
        down = true;
      }
    });
    pen.stroke();
  }
}

function speeds(point) {
  return point.x.map((x, t) => {
    if (t === 0 || x === null || point.x[t - 1] === null) return null;
    return Math.hypot(x - point.x[t - 1], point.y[t] - point.y[t - 1]);
  });
}

const largestOf = (values) => values.reduce((most, value) => (value !== null && value > most ? value : most), 0);

// Grey behind the frames where the keypoint is not visible.
function drawHidden(pen, visible, x, top, bottom) {
  const half = (x(1) - x(0)) / 2;
  pen.fillStyle = "#ffffff1c";
  let start = null;
  for (let t = 0; t <= visible.length; t += 1) {
    if (t < visible.length && !visible[t]) start ??= t;
    else if (start !== null) {
      pen.fillRect(x(start) - half, top, x(t - 1) - x(start) + 2 * half, bottom - top);
      start = null;
    }
  }
}

function drawMark(pen, x, y, colour) {
  pen.fillStyle = colour;
  pen.beginPath();
  pen.moveTo(x - 4, y - 3);
  pen.lineTo(x + 4, y - 3);
  pen.lineTo(x, y + 4);
  pen.fill();
}
