"""The review page in headless Chromium: the whole flow by mouse and keys, then what lies in files and database."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from review_fakes import OFFSET, SETTINGS, Folder, serving

from trackbench.data.video_io import read_video
from trackbench.robotics.keypoints import read_annotation
from trackbench.robotics.review import tracks_sha256
from trackbench.robotics.store import Decisions
from trackbench.robotics.track_file import read_tracks

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page is tested with playwright's Python package"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Chromium, none is on this machine")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CUP = 2  # row of the keypoint "cup"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Page:
    """A page at a laptop's size, and what the tests ask of it."""

    def __init__(self, browser: Any, place: str, locale: str = "en-US") -> None:
        self.place = place
        self.context = browser.new_context(viewport={"width": 1280, "height": 800}, locale=locale)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("request", lambda request: self._check_origin(request.url))

    def _check_origin(self, url: str) -> None:
        if not url.startswith(f"http://{self.place}/"):
            self.problems.append(f"asks {url}")

    def open(self, address: str = "/", **hash_values: Any) -> Page:
        fragment = "&".join(f"{key}={value}" for key, value in hash_values.items())
        self.page.goto("about:blank")
        self.page.goto(f"http://{self.place}{address}#{fragment}")
        self.page.wait_for_selector("body[data-ready]")
        self.wait("document.getElementById('video').readyState >= 2")
        return self

    def wait(self, condition: str) -> None:
        """Until an expression is true; asked from here, as the page's policy forbids to evaluate text in it."""
        deadline = time.monotonic() + 20
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            self.page.wait_for_timeout(20)

    def wait_text(self, selector: str, text: str) -> None:
        self.page.locator(selector).filter(has_text=text).first.wait_for(timeout=20000)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    @property
    def frame(self) -> int:
        """The frame that the page says it shows."""
        return int(self.text("#time").split("/")[0])

    def wait_frame(self, frame: int) -> None:
        self.wait(f"document.getElementById('time').textContent.startsWith('{frame} /')")
        self.wait("!document.getElementById('video').seeking")

    def at(self, xy: Any) -> tuple[float, float]:
        """Screen position of image coordinates, from the size of the video on the screen alone."""
        box = self.page.locator("#overlay").bounding_box()
        assert abs(box["width"] / box["height"] - SETTINGS.width / SETTINGS.height) < 0.01
        scale = box["width"] / SETTINGS.width
        return box["x"] + float(xy[0]) * scale, box["y"] + float(xy[1]) * scale

    def drag(self, start: Any, end: Any) -> None:
        mouse = self.page.mouse
        mouse.move(*self.at(start))
        mouse.down()
        mouse.move(*self.at((np.asarray(start) + end) / 2))
        mouse.move(*self.at(end))
        mouse.up()

    def screenshot(self, name: str = "") -> np.ndarray:
        """What is on the screen, (800, 1280, 3); kept under $REVIEW_SHOTS where that is set."""
        png = self.page.screenshot()
        if name and os.environ.get("REVIEW_SHOTS"):
            Path(os.environ["REVIEW_SHOTS"], f"{name}.png").write_bytes(png)
        return np.array(Image.open(io.BytesIO(png)).convert("RGB"))

    def close(self) -> None:
        self.context.close()
        assert self.problems == []


@pytest.fixture
def place(folder: Folder) -> Iterator[str]:
    with serving(folder) as address:
        yield address


@pytest.fixture
def page(browser: Any, place: str) -> Iterator[Page]:
    page = Page(browser, place)
    yield page
    page.close()


def dot_centre(picture: np.ndarray, around: tuple[float, float], colour: str) -> np.ndarray:
    """Mean position of the pixels of a colour within 30 pixels of a place."""
    x, y = (round(value) for value in around)
    part = picture[y - 30 : y + 30, x - 30 : x + 30].astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    rows, columns = np.nonzero(np.abs(part - wanted).max(axis=2) < 12)
    assert len(rows) > 20, f"no dot of {colour} around {around}"
    return np.array([x - 30 + columns.mean() + 0.5, y - 30 + rows.mean() + 0.5])


def test_dots_sit_on_the_keypoints_of_the_frame_that_is_shown(page: Page, folder: Folder) -> None:
    page.open(episode="episode_0", camera=0)
    tracks = read_tracks(folder.workspace.file("episode_0", 0, "tracks"))
    truth = folder.truth("episode_0")
    colours = page.page.evaluate("fetch('/api/tracks?episode=episode_0&camera=0').then(r => r.json())")["points"]
    page.press("n", "t")  # names and trails off: dots alone
    looked = 0
    for frame in (0, 7, 23):
        page.page.locator("#slider").fill(str(frame))
        page.wait_frame(frame)
        picture = page.screenshot()
        for k, name in enumerate(tracks.names):
            known = np.linalg.norm(tracks.xy[k, frame] - truth.xy[0, k, frame]) < 1
            apart = np.linalg.norm(tracks.xy[:, frame] - tracks.xy[k, frame], axis=1)
            if not (known and tracks.visible[k, frame]) or np.sort(apart)[1] < 12:
                continue  # a point that the tracker lost, or one under another
            at = page.at(truth.xy[0, k, frame])
            found = dot_centre(picture, at, colours[k]["colour"])
            assert np.abs(found - at).max() < 2.5, f"{name}, frame {frame}"
            looked += 1
    assert looked >= 6


def test_scrubbing_is_exact_to_the_frame(page: Page, folder: Folder) -> None:
    page.open(episode="episode_0", camera=0)
    video = read_video(folder.workspace.file("episode_0", 0, "video")).astype(float)
    grab = """() => { const v = document.getElementById('video'), c = document.createElement('canvas');
        c.width = v.videoWidth; c.height = v.videoHeight; const pen = c.getContext('2d'); pen.drawImage(v, 0, 0);
        return c.toDataURL('image/png').split(',')[1]; }"""
    steps = [("ArrowRight", 1), ("ArrowRight", 2), ("Shift+ArrowRight", 12), ("ArrowLeft", 11), ("End", 23)]
    steps += [("Shift+ArrowLeft", 13), ("Home", 0), ("ArrowLeft", 0)]
    for key, frame in steps:
        page.press(key)
        page.wait_frame(frame)
        png = base64.b64decode(page.page.evaluate(grab))
        shown = np.array(Image.open(io.BytesIO(png)).convert("RGB"), float)
        difference = np.abs(video - shown).mean(axis=(1, 2, 3))
        assert int(difference.argmin()) == frame
    page.press(" ")
    page.wait("!document.getElementById('video').paused")
    page.wait("document.getElementById('video').paused")  # at its end
    page.wait_frame(23)


def test_curves_are_drawn_and_a_click_goes_to_their_frame(page: Page) -> None:
    page.open(episode="episode_1", camera=0)
    box = page.page.locator("canvas[data-curve=error]").bounding_box()
    left, right = box["x"] + 12, box["x"] + box["width"] - 12
    page.page.mouse.click(left + (right - left) * 15 / 23, box["y"] + 30)
    page.wait_frame(15)
    page.press(str(CUP + 1))
    label = page.page.locator("canvas[data-curve=error]").get_attribute("aria-label")
    assert "cup" in label
    used = page.page.evaluate(
        """() => [...document.querySelectorAll('#curves canvas')].map((c) => {
            const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; const seen = new Set();
            for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 200) seen.add(`${d[i]},${d[i+1]},${d[i+2]}`);
            return seen.size; })"""
    )
    assert min(used) > 5
    page.screenshot("curves")


def test_a_point_is_corrected_by_dragging_tracked_again_and_put_back(page: Page, folder: Folder) -> None:
    path = folder.workspace.file("episode_0", 0, "tracks")
    before, content = read_tracks(path), path.read_bytes()
    page.open(episode="episode_0", camera=0)
    page.page.locator("#slider").fill("8")
    page.wait_frame(8)
    target = before.xy[CUP, 8] + [9.0, -6.0]
    page.drag(before.xy[CUP, 8], target)
    assert "cup" in page.text("#correction-text")
    assert "10.8 px on frame 8" in page.text("#correction-text")
    page.screenshot("correction")
    page.press("Escape")
    assert "Drag a keypoint" in page.text("#correction-text")
    page.drag(before.xy[CUP, 8], target)
    page.press("Alt+ArrowRight", "Alt+Shift+ArrowUp")
    page.page.click("#retrack")
    page.wait_text("#history li", "corrected cup, frame 8")
    after = read_tracks(path)
    np.testing.assert_allclose(after.xy[CUP, 8], target + np.array([1, -0.25]), atol=0.75)  # a pixel of the screen
    np.testing.assert_allclose(after.corrections[-1], [CUP, 8, *after.xy[CUP, 8]], atol=1e-3)
    np.testing.assert_array_equal(after.xy[CUP, :8], before.xy[CUP, :8])
    page.wait_frame(8)
    page.wait("!document.getElementById('undo').disabled")
    page.press("u")
    page.wait_text("#history li.undone", "corrected cup")
    assert path.read_bytes() == content
    kinds = [event.kind for event in Decisions(folder.workspace.review).history("episode_0")]
    assert kinds == ["correction", "undo"]


def test_accept_reject_with_reason_and_undo(page: Page, folder: Folder) -> None:
    page.open()
    first = page.text("#episode-name")
    second = {"episode_0": "episode_1", "episode_1": "episode_0"}[first]
    page.press("r")
    page.page.keyboard.type("drifts from frame 12")
    page.press("Enter")
    page.wait_text("#episode-name", second)
    decisions = Decisions(folder.workspace.review)
    rejected = decisions.current(first)
    assert rejected is not None
    assert (rejected.verdict, rejected.reason) == ("reject", "drifts from frame 12")
    assert rejected.tracks_sha256 == tracks_sha256(folder.workspace, first)
    page.page.click("#accept")
    page.wait_text("#overall-text", "2 of 4 decided")
    assert decisions.current(second).verdict == "accept"  # type: ignore[union-attr]
    page.screenshot("decided")
    page.press("u")
    page.wait_text("#overall-text", "1 of 4 decided")
    assert page.text("#episode-name") == second
    page.press("Control+z")
    page.wait_text("#overall-text", "0 of 4 decided")
    page.wait_text("#episode-name", first)
    assert decisions.all_current() == {}
    assert [event.kind for event in decisions.history()] == ["decision", "decision", "undo", "undo"]
    page.wait_text("#history li.undone", "drifts from frame 12")
    page.wait("document.getElementById('undo').disabled")


def test_no_decision_is_made_by_accident(page: Page, folder: Folder) -> None:
    page.open()
    first = page.text("#episode-name")
    page.press("Shift+?")
    page.page.mouse.click(20, 780)  # beside the help closes it
    page.page.locator("#sort").focus()
    page.press("a")  # a list's own key
    page.page.evaluate(
        """() => { for (const repeat of [false, true, true]) document.body.dispatchEvent(
            new KeyboardEvent('keydown', { key: 'a', bubbles: true, repeat })); }"""
    )
    page.wait_text("#overall-text", "1 of 4 decided")
    page.wait(f"document.getElementById('episode-name').textContent !== '{first}'")
    page.page.click("#names")
    page.press(" ")  # plays, and does not click once more
    page.wait("!document.getElementById('video').paused")
    assert page.page.locator("#names").get_attribute("aria-pressed") == "false"
    assert [event.episode for event in Decisions(folder.workspace.review).history()] == [first]


def test_keypoints_are_clicked_named_moved_deleted_and_saved(page: Page, folder: Folder) -> None:
    page.open(episode="episode_3", camera=0)
    assert page.page.locator("#mode-annotate").get_attribute("aria-pressed") == "true"
    truth = folder.truth("episode_3")
    for k in range(4):
        page.page.mouse.click(*page.at(truth.xy[0, k, 0]))
    names = [page.page.locator("#annotated input").nth(k).input_value() for k in range(4)]
    assert names == list(truth.names[:4]), "the names that other episodes have are offered in their order"
    assert "Missing, compared with episode_0: table" in page.text("#annotation-warning")
    page.page.locator("#annotated input").nth(3).fill("夹爪")
    page.press("Enter", "3", "Delete")
    page.drag(truth.xy[0, 0, 0], truth.xy[0, 0, 0] + [20, 10])
    page.screenshot("annotate")
    page.press("Control+s")
    page.wait_text("#annotation-kind", "Confirmed keypoints")
    path = folder.workspace.file("episode_3", 0, "annotation")
    keypoints = read_annotation(path, SETTINGS.height, SETTINGS.width)
    assert keypoints.names == (truth.names[0], truth.names[1], "夹爪")
    places = truth.xy[0, [0, 1, 3], 0] + [[20, 10], [0, 0], [0, 0]]
    np.testing.assert_allclose(keypoints.xy, places, atol=0.5)  # a pixel of the screen
    assert json.loads(path.read_text())["imagePath"] == "cam0.png"
    page.press("u")
    page.wait_text("#annotation-kind", "No keypoints yet")
    assert not path.exists()


def test_proposals_are_checked_and_confirmed_one_after_the_other(page: Page, folder: Folder) -> None:
    page.open()
    page.page.select_option("#filter", "proposal")
    page.page.locator("#list .item").first.click()
    page.wait_text("#annotation-kind", "Transferred from another episode")
    assert page.page.locator("#annotated .pill.low").count() == 2
    page.screenshot("proposal")
    truth = folder.truth("episode_2").xy[0, :, 0]
    page.drag(truth[1] + [OFFSET, 0], truth[1])
    page.press("Control+s")
    page.wait("location.hash.includes('camera=1')")
    page.wait_text("#annotation-kind", "Transferred from another episode")
    page.page.click("#save")
    page.wait_text("#episode-state", "not tracked")
    for camera in range(2):
        assert not folder.workspace.file("episode_2", camera, "proposal").exists()
    path = folder.workspace.file("episode_2", 0, "annotation")
    keypoints = read_annotation(path, SETTINGS.height, SETTINGS.width)
    np.testing.assert_allclose(keypoints.xy[1], truth[1], atol=0.5)
    np.testing.assert_allclose(keypoints.xy[2], truth[2] + [OFFSET, 0], atol=1e-3)
    kinds = [event.kind for event in Decisions(folder.workspace.review).history("episode_2")]
    assert kinds == ["confirmation", "confirmation"]


def test_every_word_changes_with_the_language(page: Page) -> None:
    page.open(episode="episode_0", camera=0)
    page.press("l")
    page.wait_text("h1", "关键点审核")
    page.screenshot("chinese")
    for letter in "?e":
        page.press(letter)
        latin = page.page.evaluate(
            r"""() => { const out = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (walk.nextNode()) { const n = walk.currentNode, e = n.parentElement;
              if (e.offsetParent && !e.closest('kbd, dt, #episode-name, .name, #language, #points button'))
                out.push(n.textContent.trim()); }
            for (const e of document.querySelectorAll('[title], [placeholder], [aria-label]'))
              if (e.offsetParent && !e.closest('.item, #points, #annotated, #episode-name, #language'))
                out.push(e.title, e.placeholder ?? '', e.getAttribute('aria-label') ?? '');
            return out.filter((s) => /[A-Za-z]{3,}/.test(s.replace(/Shift|English|[a-z_]+ 的/g, ''))); }"""
        )
        assert latin == []
        page.screenshot(f"chinese{ord(letter)}")
        page.press("Escape")
    page.page.click("#language")
    page.wait_text("h1", "Keypoint review")
    assert page.page.evaluate("document.documentElement.lang") == "en"


def test_the_language_comes_from_the_address_or_the_browser(browser: Any, place: str) -> None:
    for address, locale, title in (
        ("/", "zh-CN", "关键点审核"),
        ("/?lang=zh", "en-GB", "关键点审核"),
        ("/", "de", "Keypoint"),
    ):
        page = Page(browser, place, locale).open(address)
        assert title in page.text("h1")
        page.close()


def test_both_languages_say_the_same_things(page: Page) -> None:
    page.open()
    keys = page.page.evaluate(
        """import('/assets/strings.js').then(({ STRINGS }) => Object.values(STRINGS).map((words) => [
            Object.keys(words), words.keys.length, words.reasons.length,
            Object.values(words).map((text) => [...String(text).matchAll(/\\{\\w+\\}/g)].map(String).sort()),
        ]))"""
    )
    assert keys[0] == keys[1]


def test_keys_change_camera_video_and_view(page: Page) -> None:
    page.open(episode="episode_0", camera=0)
    page.press("c")
    page.wait("location.hash.includes('camera=1')")
    page.press("v")
    page.wait("document.getElementById('video').src.includes('kind=overlay')")
    page.wait("document.getElementById('video').readyState >= 2")
    page.press("v", "v")
    page.wait("document.getElementById('video').src.includes('kind=video')")
    for key, node in (("t", "trails"), ("n", "names")):
        page.press(key)
        assert page.page.locator(f"#{node}").get_attribute("aria-pressed") == "false"
    page.press("e")
    page.wait("!document.getElementById('annotate-panel').hidden")
    page.press("e", "?")
    assert page.page.locator("#help-dialog").is_visible()
    page.screenshot("help")
    page.press("a")  # nothing is decided behind the help
    page.press("Escape")
    name = page.text("#episode-name")
    page.press("ArrowDown")
    page.wait(f"document.getElementById('episode-name').textContent !== '{name}'")
    assert page.text("#overall-text") == "0 of 4 decided"
    page.press("/")
    page.page.keyboard.type("sode_3")
    page.wait("document.querySelectorAll('#list .item').length === 1")


def test_names_and_reasons_are_text_and_never_markup(browser: Any, folder: Folder) -> None:
    evil = "<img src=x onerror=alert(1)>"
    decisions = Decisions(folder.workspace.review)
    decisions.decide("episode_0", "reject", tracks_sha256(folder.workspace, "episode_0"), evil)
    with serving(folder) as place:
        page = Page(browser, place).open(episode="episode_0", camera=0)
        assert evil in page.text("#decision-text")
        assert evil in page.text("#history")
        assert page.page.locator("main img[src=x]").count() == 0
        page.close()


def test_everything_that_can_be_used_has_a_name_and_can_be_reached_by_tab(page: Page) -> None:
    page.open(episode="episode_0", camera=0)
    nameless = page.page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, [role=listbox], canvas[role], dialog')]
            .filter((e) => e.offsetParent || e.tagName === 'DIALOG')
            .filter((e) => !e.textContent.trim() && !e.getAttribute('aria-label') && !e.labels?.length &&
                !e.getAttribute('aria-labelledby')).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    page.page.locator("#search").focus()
    reached = set()
    for _ in range(60):
        page.press("Tab")
        reached.add(page.page.evaluate("document.activeElement.id"))
    assert {
        "filter",
        "sort",
        "list",
        "slider",
        "play",
        "next",
        "kind",
        "accept",
        "reject",
        "reason",
        "help",
    } <= reached


def test_a_thousand_episodes_are_a_lazy_list(browser: Any, folder: Folder) -> None:
    source = folder.workspace.folder("episode_3")
    info = json.loads((source / "episode.json").read_text())
    for index in range(1000):
        name = f"day_{index // 100}/run_{index}"
        target = folder.workspace.folder(name)
        target.mkdir(parents=True)
        (target / "episode.json").write_text(json.dumps({**info, "episode": name}))
        (target / "quality.json").write_text(json.dumps({"score": index / 1000, "doubt": 1 - index / 1000}))
        for camera in range(2):
            for kind in ("video", "image", "annotation", "tracks"):
                origin = folder.workspace.file("episode_0", camera, kind)
                os.link(origin, folder.workspace.file(name, camera, kind))
    with serving(folder) as place:
        page = Page(browser, place).open()
        assert page.text("#episode-name") == "day_0/run_0"
        assert page.page.locator("#list .item").count() < 40
        page.page.evaluate("document.getElementById('list').scrollTop = 54 * 990")
        page.wait_text("#list .item", "day_9/run_989")
        page.screenshot("thousand")
        page.page.fill("#search", "day_7 run_77")
        page.wait("document.querySelectorAll('#list .item').length === 10")
        page.page.locator("#list .item").last.click()
        page.wait_text("#episode-name", "day_7/run_779")
        page.press("a")
        page.wait_text("#overall-text", "1 of 1004 decided")
        page.close()
    assert set(Decisions(folder.workspace.review).all_current()) == {"day_7/run_779"}
