// The page: what is shown, what is chosen, and what the keys do.
import { fileUrl, get, post } from "/assets/api.js";
import { Annotator } from "/assets/annotate.js";
import { Curves } from "/assets/curves.js";
import { EpisodeList, pill } from "/assets/list.js";
import { Stage } from "/assets/stage.js";
import { STRINGS, errorText, getLanguage, initialLanguage, say, sayAll, setLanguage } from "/assets/strings.js";

const $ = (id) => document.getElementById(id);
const KINDS = ["tracks", "overlay", "plain"];
const state = {
  episode: null, // EpisodeView
  camera: 0,
  mode: "review", // or "annotate"
  tracks: null, // TracksView
  chosen: null, // index of a point
  correction: null, // {point, t, x, y}
  job: null, // JobView of work that goes on
  undos: [], // {episode, event}, what this page did
  visit: 0, // grows with every change of episode or camera; answers for older ones are dropped
};

const stage = new Stage({
  stage: $("stage"),
  frame: $("frame"),
  video: $("video"),
  still: $("still"),
  overlay: $("overlay"),
  loupe: $("loupe"),
});
const curves = new Curves($("curves"), (frame) => stage.seek(frame));
const list = new EpisodeList($("list"), { search: $("search"), filter: $("filter"), sort: $("sort") }, (episode) =>
  open(episode),
);
const annotator = new Annotator(
  {
    list: $("annotated"),
    usual: $("usual"),
    kind: $("annotation-kind"),
    warning: $("annotation-warning"),
    save: $("save"),
    revert: $("revert"),
  },
  () => {
    annotator.renderRest();
    stage.draw();
  },
);

// --- messages ---

let toastTimer = 0;
function toast(text, isError = false) {
  const node = $("toast");
  node.textContent = text;
  node.className = isError ? "shown error" : "shown";
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (node.className = ""), isError ? 7000 : 3500);
}

// Errors become one line on the page; where the page is behind the files, it catches up.
async function trying(work) {
  try {
    return await work();
  } catch (error) {
    toast(error.code === "lost" ? say("lostServer") : errorText(error), true);
    if (String(error.code).startsWith("stale")) await reload();
    return null;
  }
}

// Wishes are carried out one after the other.
let line = Promise.resolve();
let waiting = 0;
const inTurn = (work) => () => {
  waiting += 1;
  line = line.then(() => (state.job ? null : trying(work))).finally(() => (waiting -= 1));
  return line;
};
// A key that is hit twice does not decide twice: what comes while something is carried out is dropped.
const once = (work) => () => (waiting || state.job ? null : inTurn(work)());

// --- episodes ---

const infoOf = (view) => ({ fps: view.fps, numFrames: view.num_frames, width: view.width, height: view.height });
const mayLeave = () => state.mode !== "annotate" || !annotator.dirty || confirm(say("unsavedLeave"));

async function refreshList() {
  const { episodes } = await get("episodes");
  list.setRows(episodes);
  renderOverall();
}

async function open(episode, { camera = null, mode = null } = {}) {
  if (!mayLeave()) return;
  await trying(async () => {
    const visit = (state.visit += 1);
    const view = await get("episode", { episode });
    if (visit !== state.visit) return;
    const waiting = view.cameras.findIndex((one) => one.proposed || !(one.annotated || one.tracks_sha256));
    state.episode = view;
    state.camera = Math.min(camera ?? (view.state === "proposal" ? waiting : 0), view.cameras.length - 1);
    const unfinished = view.state === "proposal" || view.state === "unannotated";
    state.mode = mode ?? (unfinished ? "annotate" : "review");
    state.chosen = null;
    $("reason").value = "";
    list.choose(episode);
    await openCamera(visit, 0);
  });
}

async function openCamera(visit = (state.visit += 1), frame = stage.shown) {
  const { episode, cameras } = state.episode;
  const camera = cameras[state.camera];
  state.correction = null;
  state.tracks = null;
  annotator.clear();
  curves.set([], 0);
  location.replace(`#${new URLSearchParams({ episode, camera: state.camera, mode: state.mode })}`);
  const reads = [get("annotation", { episode, camera: state.camera })];
  if (camera.tracks_sha256) reads.push(get("tracks", { episode, camera: state.camera }));
  loadVideo(state.mode === "annotate" ? 0 : frame);
  render();
  const [annotation, tracks] = await Promise.all(reads);
  if (visit !== state.visit) return;
  annotator.set(annotation);
  state.tracks = tracks ?? null;
  curves.set(state.tracks?.points ?? [], state.episode.num_frames);
  curves.choose(state.chosen);
  render();
}

function loadVideo(frame) {
  const { episode, cameras } = state.episode;
  const annotating = state.mode === "annotate";
  const drawn = !annotating && $("kind").value === "overlay" && cameras[state.camera].overlay;
  const version = drawn ? cameras[state.camera].tracks_sha256 : "";
  stage.load(fileUrl(episode, state.camera, drawn ? "overlay" : "video", version), infoOf(state.episode), frame);
  stage.showStill(annotating ? fileUrl(episode, state.camera, "image") : null);
  curves.goTo(stage.shown);
  renderTime();
}

async function reload() {
  if (!state.episode) return;
  await trying(async () => {
    const visit = (state.visit += 1);
    const view = await get("episode", { episode: state.episode.episode });
    if (visit !== state.visit) return;
    state.episode = view;
    await Promise.all([openCamera(visit), refreshList()]);
    list.choose(view.episode);
  });
}

async function chooseCamera(camera) {
  if (camera === state.camera || !mayLeave()) return;
  state.camera = camera;
  state.chosen = null;
  await trying(() => openCamera());
}

async function chooseMode(mode) {
  if (!state.episode || mode === state.mode || !mayLeave()) return;
  state.mode = mode;
  await trying(() => openCamera(undefined, 0));
}

function choosePoint(index) {
  state.chosen = state.chosen === index ? null : index;
  if (state.correction && state.correction.point !== state.chosen) state.correction = null;
  curves.choose(state.chosen);
  renderPoints();
  renderCorrection();
  stage.draw();
}

// --- decisions ---

const decide = (verdict) =>
  once(async () => {
    const view = state.episode;
    if (!view || state.mode !== "review" || !view.cameras.some((camera) => camera.tracks_sha256)) return;
    const hashes = view.cameras.map((camera, index) => [String(index), camera.tracks_sha256]);
    const order = list.order();
    const after = await post("decide", {
      episode: view.episode,
      verdict,
      reason: $("reason").value.trim(),
      tracks_sha256: Object.fromEntries(hashes.filter(([, hash]) => hash)),
    });
    state.undos.push({ episode: view.episode, event: after.undoable });
    state.episode = after;
    toast(say(`done_${verdict}`, { episode: view.episode }));
    await refreshList();
    const next = list.nextIn("review", order, view.episode);
    if (next) await open(next, { mode: "review" });
    else render();
  })();

const undo = inTurn(async () => {
  if (!mayLeave()) return;
  const step = state.undos.pop() ?? { episode: state.episode?.episode, event: state.episode?.undoable };
  if (!step.event) {
    toast(say("nothingToUndo"));
    return;
  }
  const event = (await get("episode", { episode: step.episode })).history.find((one) => one.id === step.event);
  const job = await post("undo", { event: step.event });
  annotator.dirty = false;
  if (job) {
    state.after = { episode: step.episode, text: say("done_undo", { what: eventText(event) }) };
    watch(job);
    return;
  }
  toast(say("done_undo", { what: eventText(event) }));
  await refreshList();
  await open(step.episode, { camera: event.content.camera ?? null, mode: modeOf(event) });
});

const modeOf = (event) => (["annotation", "confirmation"].includes(event.kind) ? "annotate" : "review");

// --- corrections ---

function setCorrection(point, { x, y }) {
  state.correction = { point, t: stage.shown, x, y };
  renderCorrection();
  stage.draw();
}

const retrack = once(async () => {
  const wish = state.correction;
  if (!wish) return;
  const job = await post("correct", {
    episode: state.episode.episode,
    camera: state.camera,
    ...wish,
    backward: $("backward").checked,
    tracks_sha256: state.tracks.tracks_sha256,
  });
  const { name } = state.tracks.points[wish.point];
  state.after = { episode: state.episode.episode, text: say("retracked", { name }), remember: true };
  watch(job);
});

let watching = 0;
function watch(job) {
  state.job = job;
  clearTimeout(watching);
  renderCorrection();
  renderDecision();
  watching = setTimeout(poll, 300);
}

async function poll() {
  let job;
  try {
    job = await get("job");
  } catch (error) {
    toast(error.code === "lost" ? say("lostServer") : errorText(error), true);
    watching = setTimeout(poll, 2000);
    return;
  }
  if (job.state === "running") {
    watch(job);
    return;
  }
  const after = state.after ?? { episode: job.episode, text: "" };
  state.job = state.after = null;
  if (job.state === "failed") toast(job.message, true);
  else if (job.state === "done" && after.text) toast(after.text);
  await trying(async () => {
    if (job.state === "done" && after.remember) {
      const view = await get("episode", { episode: after.episode });
      state.undos.push({ episode: after.episode, event: view.undoable });
    }
    if (job.state !== "done") {
      render();
      return;
    }
    if (state.episode?.episode === job.episode) await reload();
    else await refreshList();
  });
}

// --- annotation ---

const save = once(async () => {
  if (state.mode !== "annotate" || !annotator.savable) return;
  const { view } = annotator;
  const { episode } = state.episode;
  const order = list.order();
  await post("annotate", { episode, camera: state.camera, points: annotator.wish(), seen: view.seen });
  annotator.dirty = false;
  const after = await get("episode", { episode });
  state.undos.push({ episode, event: after.undoable });
  await refreshList();
  if (view.kind !== "proposal") {
    toast(`${say("saved")} ${say("thenTrack")}`);
    await open(episode, { camera: state.camera, mode: "annotate" });
    return;
  }
  toast(say("confirmed"));
  const other = after.cameras.findIndex((camera) => camera.proposed);
  const next = other >= 0 ? episode : list.nextIn("proposal", order, episode);
  if (next) await open(next, { camera: other >= 0 ? other : null, mode: "annotate" });
  else await open(episode, { camera: state.camera, mode: "annotate" });
});

// --- what is drawn on the video ---

stage.scene = () => {
  if (state.mode === "annotate") {
    const points = annotator.drawn();
    return { points, chosen: points[annotator.chosen] ?? null, trails: false, names: isOn("names") };
  }
  if (!state.tracks || $("kind").value !== "tracks") return { points: [], chosen: null, trails: false, names: false };
  const points = state.tracks.points.map((point, index) => ({
    index,
    name: point.name,
    colour: point.colour,
    at: (t) => {
      const { correction } = state;
      const at = { x: point.x[t], y: point.y[t], visible: point.visible[t], given: point.corrected.includes(t) };
      if (at.x === null || at.x === undefined || at.y === null) return null;
      if (correction?.point === index && correction.t === t)
        return { x: correction.x, y: correction.y, visible: true, given: true, from: at };
      return at;
    },
  }));
  return { points, chosen: points[state.chosen] ?? null, trails: isOn("trails"), names: isOn("names") };
};

stage.onFrame = (frame) => {
  curves.goTo(frame);
  renderTime();
};
stage.onPlaying = (playing) => {
  $("play").textContent = playing ? "❚❚\uFE0E" : "▶\uFE0E";
  $("play").dataset.sayTitle = playing ? "pause" : "play";
  sayAll($("transport"));
};
stage.onGrab = (point, place) => {
  if (state.mode === "annotate") {
    if (point) annotator.choose(point.index);
    else annotator.add(place);
    return true;
  }
  if (!point || state.job) return false;
  if (state.chosen !== point.index) choosePoint(point.index);
  return true;
};
stage.onDrag = (place) => {
  if (state.mode === "annotate") annotator.move(place);
  else if (state.chosen !== null) setCorrection(state.chosen, place);
};
stage.onDrop = () => {
  if (state.mode === "annotate") annotator.render();
};

const isOn = (id) => $(id).getAttribute("aria-pressed") === "true";
function flip(id) {
  $(id).setAttribute("aria-pressed", String(!isOn(id)));
  stage.draw();
}

function goToWorst() {
  const points = state.tracks?.points ?? [];
  const looked = state.chosen === null ? points : [points[state.chosen]];
  let [worst, frame] = [-1, null];
  for (const point of looked)
    point.error.forEach((value, t) => {
      if (value !== null && point.visible[t] && value > worst) [worst, frame] = [value, t];
    });
  if (frame !== null) stage.seek(frame);
}

function nudge(dx, dy) {
  if (state.mode === "annotate") {
    annotator.nudge(dx, dy, state.episode);
    return;
  }
  if (state.chosen === null || !state.tracks || state.job || stage.playing) return;
  const at = stage.scene().points[state.chosen]?.at(stage.shown);
  if (at) setCorrection(state.chosen, stage.inside({ x: at.x + dx, y: at.y + dy }));
}

// --- rendering ---

function render() {
  const view = state.episode;
  $("episode-name").textContent = view?.episode ?? "";
  $("episode-name").title = view?.episode ?? "";
  const chip = $("episode-state");
  chip.hidden = !view;
  if (view) {
    const fresh = pill(view.state, view.stale);
    chip.className = fresh.className;
    chip.textContent = fresh.textContent;
  }
  const annotating = state.mode === "annotate";
  $("cameras").replaceChildren(
    ...(view?.cameras ?? []).map((_, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = say("camera", { n: index });
      button.setAttribute("aria-pressed", String(index === state.camera));
      button.addEventListener("click", () => chooseCamera(index));
      return button;
    }),
  );
  for (const mode of ["review", "annotate"]) $(`mode-${mode}`).setAttribute("aria-pressed", String(mode === state.mode));
  $("modes").hidden = !view;
  $("review-panel").hidden = annotating || !view;
  $("annotate-panel").hidden = !annotating || !view;
  $("transport").hidden = annotating || !view;
  $("curves").hidden = annotating || !view;
  $("banner").hidden = !view?.stale || annotating;
  $("banner").textContent = say("staleLong");
  renderEmpty();
  renderPoints();
  renderCorrection();
  renderDecision();
  renderHistory();
  renderTime();
  annotator.renderRest();
  stage.emptyCursor = annotating ? "crosshair" : "default";
  stage.fit();
}

function renderEmpty() {
  const camera = state.episode?.cameras[state.camera];
  const empty = state.mode === "review" && camera && !camera.tracks_sha256;
  $("empty").hidden = !empty;
  if (!empty) return;
  $("empty-text").textContent = say(camera.annotated ? "notTracked" : "noAnnotation");
  $("empty-button").textContent = say(camera.proposed ? "toConfirm" : "toAnnotate");
  $("empty-button").hidden = camera.annotated;
}

function renderOverall() {
  const decided = list.rows.filter((row) => ["accepted", "rejected"].includes(row.state)).length;
  $("overall-bar").style.width = list.rows.length ? `${(100 * decided) / list.rows.length}%` : "0";
  $("overall-text").textContent = say("progressText", { decided, total: list.rows.length });
}

function renderTime() {
  const info = stage.info;
  if (!info) return;
  $("slider").max = String(info.numFrames - 1);
  $("slider").value = String(stage.shown);
  $("slider").setAttribute("aria-valuetext", `${say("frame")} ${stage.shown}`);
  $("time").textContent = `${stage.shown} / ${info.numFrames - 1}`;
  $("time").title = `${(stage.shown / info.fps).toFixed(2)} s`;
}

function renderPoints() {
  const points = state.tracks?.points ?? [];
  $("outdated").hidden = !state.tracks?.outdated;
  $("worst").hidden = !points.length;
  $("points").replaceChildren(
    ...points.map((point, index) => {
      const row = document.createElement("tr");
      row.className = index === state.chosen ? "chosen" : "";
      row.addEventListener("click", () => choosePoint(index));
      const cells = [
        [null, ""],
        [point.score.toFixed(2), say("score"), point.score < 0.5],
        [point.forward_backward_px.toFixed(1), say("fbLong"), false],
        [`${Math.round(100 * point.lost)}%`, say("lostLong"), point.lost > 0.3],
        [String(point.jumps.length), say("jumpsLong"), point.jumps.length > 0],
      ].map(([text, title, poor]) => {
        const cell = document.createElement("td");
        cell.textContent = text;
        cell.title = title;
        cell.className = poor ? "poor" : "";
        return cell;
      });
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", String(index === state.chosen));
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = point.colour;
      const name = document.createElement("span");
      name.textContent = point.name;
      button.title = point.name;
      button.append(swatch, name);
      cells[0].append(button);
      row.append(...cells);
      return row;
    }),
  );
}

function renderCorrection() {
  const { correction, job } = state;
  const running = job !== null;
  const point = correction && state.tracks?.points[correction.point];
  $("correction-card").hidden = !state.tracks;
  $("correction-progress").hidden = !running;
  $("cancel").hidden = !running;
  for (const id of ["retrack", "discard", "backward-label"]) $(id).hidden = running || !point;
  if (running) {
    const values = { name: job.name, done: job.done, total: job.total || "…" };
    $("correction-text").textContent = say(job.what === "undo" ? "undoing" : "retracking", values);
    $("correction-progress").firstElementChild.style.width = job.total ? `${(100 * job.done) / job.total}%` : "0";
  } else if (point) {
    const distance = Math.hypot(correction.x - point.x[correction.t], correction.y - point.y[correction.t]);
    const values = { name: point.name, px: distance.toFixed(1), t: correction.t };
    $("correction-text").textContent = say("correctionMoved", values);
  } else $("correction-text").textContent = say("correctionHint");
}

function renderDecision() {
  const view = state.episode;
  const none = !view || !view.cameras.some((camera) => camera.tracks_sha256);
  for (const verdict of ["accept", "reject"]) {
    $(verdict).disabled = none || state.job !== null;
    $(verdict).classList.toggle("chosen", view?.verdict === verdict && !view.stale);
  }
  $("reason").disabled = none;
  $("reasons").replaceChildren(...say("reasons").map((reason) => new Option(reason)));
  if (!view) return;
  const text = view.verdict ? say(`event_${view.verdict}`) : say("noDecision");
  $("decision-text").textContent = view.reason ? `${text}: ${view.reason}` : text;
}

function renderHistory() {
  const view = state.episode;
  $("undo").disabled = state.job !== null || !(state.undos.length || view?.undoable);
  const format = new Intl.DateTimeFormat(getLanguage() === "zh" ? "zh-CN" : "en-GB", {
    month: "2-digit",
    day: "2-digit",
    hour: "2-digit",
    minute: "2-digit",
  });
  const events = [...(view?.history ?? [])].reverse();
  $("history").replaceChildren(
    ...events.map((event) => {
      const item = document.createElement("li");
      item.className = event.undone ? "undone" : "";
      const time = document.createElement("time");
      time.dateTime = event.time;
      time.textContent = format.format(new Date(event.time));
      const text = document.createElement("span");
      text.textContent = eventText(event);
      item.append(time, text);
      return item;
    }),
  );
}

function eventText(event) {
  const { content } = event;
  if (event.kind === "decision") {
    const text = say(`event_${content.verdict}`);
    return content.reason ? `${text}: ${content.reason}` : text;
  }
  return say(`event_${event.kind}`, content);
}

function renderAll() {
  document.title = say("title");
  sayAll();
  ["drawn", "overlayVideo", "raw"].forEach((key, index) => ($("kind").options[index].text = say(key)));
  $("keys").replaceChildren(
    ...STRINGS[getLanguage()].keys.flatMap(([keys, what]) => {
      const [term, text] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = keys;
      text.textContent = what;
      return [term, text];
    }),
  );
  list.update();
  renderOverall();
  render();
  annotator.render();
  curves.draw();
}

function switchLanguage() {
  setLanguage(getLanguage() === "en" ? "zh" : "en");
  localStorage.setItem("trackbench-language", getLanguage());
  renderAll();
}

// --- controls ---

$("language").addEventListener("click", switchLanguage);
$("help").addEventListener("click", () => $("help-dialog").showModal());
$("help-dialog").addEventListener("click", (event) => event.target === $("help-dialog") && $("help-dialog").close());
$("help-close").addEventListener("click", () => $("help-dialog").close());
$("mode-review").addEventListener("click", () => chooseMode("review"));
$("mode-annotate").addEventListener("click", () => chooseMode("annotate"));
$("empty-button").addEventListener("click", () => chooseMode("annotate"));
$("previous").addEventListener("click", () => stage.seek(stage.wanted - 1));
$("next").addEventListener("click", () => stage.seek(stage.wanted + 1));
$("play").addEventListener("click", () => stage.toggle());
$("slider").addEventListener("input", () => stage.seek(Number($("slider").value)));
$("speed").addEventListener("change", () => (stage.video.playbackRate = stage.video.defaultPlaybackRate = Number($("speed").value)));
$("kind").addEventListener("change", () => loadVideo(stage.shown));
$("trails").addEventListener("click", () => flip("trails"));
$("names").addEventListener("click", () => flip("names"));
$("worst").addEventListener("click", goToWorst);
$("accept").addEventListener("click", () => decide("accept"));
$("reject").addEventListener("click", () => askReason());
$("reason").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.isComposing) decide("reject");
  if (event.key === "Escape") $("reason").blur();
});
$("undo").addEventListener("click", undo);
$("retrack").addEventListener("click", retrack);
$("discard").addEventListener("click", discard);
$("cancel").addEventListener("click", () => trying(() => post("job/cancel", { number: state.job?.number ?? 0 })));
$("save").addEventListener("click", save);
$("revert").addEventListener("click", () => {
  annotator.set(annotator.view);
  stage.draw();
});
stage.video.addEventListener("error", () => stage.info && toast(say("videoFailed"), true));
addEventListener("beforeunload", (event) => {
  if (state.mode === "annotate" && annotator.dirty) event.preventDefault();
});

// A rejection asks for its reason first; Enter in the field gives it, empty or not.
function askReason() {
  if ($("reason").disabled) return;
  if ($("reason").value.trim()) decide("reject");
  else $("reason").focus();
}

function discard() {
  state.correction = null;
  renderCorrection();
  stage.draw();
}

function step(by) {
  const episode = list.neighbour(by);
  if (episode) open(episode);
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const KEYS = {
  " ": () => stage.toggle(),
  ArrowLeft: (event) => stage.seek(stage.wanted - (event.shiftKey ? 10 : 1)),
  ArrowRight: (event) => stage.seek(stage.wanted + (event.shiftKey ? 10 : 1)),
  ArrowUp: () => step(-1),
  ArrowDown: () => step(1),
  Home: () => stage.seek(0),
  End: () => stage.seek(Infinity),
  Enter: () => retrack(),
  Escape: () => discard(),
  Delete: () => state.mode === "annotate" && annotator.chosen !== null && annotator.remove(annotator.chosen),
  a: () => decide("accept"),
  r: () => state.mode === "review" && askReason(),
  u: () => undo(),
  w: () => goToWorst(),
  c: () => state.episode && chooseCamera((state.camera + 1) % state.episode.cameras.length),
  v: () => {
    $("kind").value = KINDS[(KINDS.indexOf($("kind").value) + 1) % KINDS.length];
    if (state.mode === "review" && state.episode) loadVideo(stage.shown);
  },
  t: () => flip("trails"),
  n: () => flip("names"),
  e: () => chooseMode(state.mode === "review" ? "annotate" : "review"),
  l: () => switchLanguage(),
  "/": () => $("search").focus(),
  "?": () => $("help-dialog").showModal(),
};
KEYS.Backspace = KEYS.Delete;
const FRAMES = ["ArrowLeft", "ArrowRight", "Home", "End", " "];

addEventListener("keydown", (event) => {
  const { target } = event;
  const control = event.ctrlKey || event.metaKey;
  if ($("help-dialog").open || event.isComposing) return;
  const typing = target.matches("input[type=text], input[type=search]");
  if (control && event.key.toLowerCase() === "s") {
    event.preventDefault();
    save();
    return;
  }
  if (typing) {
    if (event.key === "Escape") target.blur();
    return;
  }
  if (control && event.key.toLowerCase() === "z") {
    event.preventDefault();
    undo();
    return;
  }
  if (control) return;
  if (event.repeat && !event.key.startsWith("Arrow")) return;
  if (event.altKey) {
    if (!(event.key in ARROWS)) return;
    event.preventDefault();
    const by = event.shiftKey ? 0.25 : 1;
    nudge(...ARROWS[event.key].map((part) => part * by));
    return;
  }
  if (target.matches("select")) return; // its own keys choose in it
  if ((event.key === "Enter" || event.key === " ") && target.matches("button, input[type=checkbox], select, a")) return;
  if (state.mode === "annotate" && FRAMES.includes(event.key)) return;
  if (/^[1-9]$/.test(event.key)) {
    const index = Number(event.key) - 1;
    if (state.mode === "annotate") annotator.points[index] && annotator.choose(index);
    else if (state.tracks?.points[index]) choosePoint(index);
    return;
  }
  const act = KEYS[event.key] ?? KEYS[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act(event);
});

// What was clicked gives the focus back, so that Space plays instead of clicking again.
let pointing = false;
addEventListener("pointerdown", () => (pointing = true), true);
addEventListener("keydown", () => (pointing = false), true);
addEventListener("click", (event) => event.detail > 0 && event.target.closest("button, input[type=checkbox]")?.blur());
for (const node of document.querySelectorAll("select, #slider"))
  node.addEventListener("change", () => pointing && node.blur());
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") trying(refreshList);
});

// --- start ---

setLanguage(initialLanguage());
renderAll();
await trying(async () => {
  await refreshList();
  const asked = new URLSearchParams(location.hash.slice(1));
  const known = list.rows.some((row) => row.episode === asked.get("episode"));
  const first = known ? asked.get("episode") : list.shown.find((row) => row.state !== "broken")?.episode;
  if (first) {
    const camera = known ? Number.parseInt(asked.get("camera"), 10) || 0 : null;
    await open(first, { camera, mode: known ? asked.get("mode") : null });
  }
  const job = await get("job");
  if (job.state === "running") watch(job);
});
document.body.dataset.ready = "yes";
