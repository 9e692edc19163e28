"""The explorer: what a tab does, without a page, and the page in a real browser."""

import base64
import io
import math
import os
import re
import shlex
import shutil
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import levels
from PIL import Image

import args as flags
import explore
import explorer.tab
import inpaint
import plot_reconstruct
from explorer.tab import Tab
from flow import load
from flow.hierarchy import generation_cone
from flow.latents import encode
from utils.cli import MIXED, UserError
from utils.random import generator

SCRIPTS = {"plot_reconstruct.py": plot_reconstruct, "inpaint.py": inpaint}
NAMES = "rgflow", "realnvp", "grey", "large"  # of the fixture `weights`


@pytest.fixture
def parsed(weights, images, tmp_path):
    """Flags of explore.py for files of weights, by name."""

    def parsed(*names):
        paths = [weights[name] for name in names or NAMES]
        common = ["--data_path", str(images), "--fig_dir", str(tmp_path / "fields"), "--no_browser"]
        return flags.parse(explore.explore_parser(), ["--weights", *paths, *common])

    return parsed


@pytest.fixture
def tab(parsed, tmp_path):
    libraries = []
    yield lambda *names: Tab(libraries.append(explore.Library(parsed(*names), tmp_path)) or libraries[-1])
    for library in libraries:
        library.close()


def picture_of(flow, z):
    """Latents (C, L, L) -> uint8 (C, L, L), by the definition."""
    x = flow.inverse(z[None])[0][0]
    y = 1 / (1 + torch.exp(-x))
    return (256 * ((y - 0.05) / 0.9).clamp(0, 1)).floor().clamp(0, 255).to(torch.uint8)


def sampled(flow, seed, temperature=MIXED):
    return flow.sample_prior(1, temperature, generator(seed, "samples", 0))[0]


def check_commands(files, folder, monkeypatch):
    """Run the command that each PNG of {name: bytes} holds, beside these files: it must make the same picture."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    monkeypatch.chdir(folder)
    for name in files:
        image = Image.open(folder / name)
        if command := image.text.get("Command"):
            _, script, *words = shlex.split(command)
            SCRIPTS[script].main([*words, "--fig_dir", f"again_{name}"])
            pattern = "_pixels" if script == "plot_reconstruct.py" else "_(rgflow|realnvp)_0_"
            (made,) = [path for path in Path(f"again_{name}").glob("*.png") if re.search(pattern, path.name)]
            assert (np.asarray(Image.open(made)) == np.asarray(image)).all()


# Without a page


@pytest.mark.parametrize("name", ["rgflow", "realnvp", "grey"])
def test_tab_shows_what_the_flow_makes(tab, weights, images, name):
    flow, _ = load(weights[name])
    tab = tab(name)
    assert torch.equal(tab.picture, picture_of(flow, sampled(flow, 0)))
    tab.set_temperature(1, 1.25)
    z, other = sampled(flow, 0, (0.2, 1.25)), sampled(flow, 1, (0.2, 1.25))
    assert torch.equal(tab.picture, picture_of(flow, z)) and torch.equal(tab.second, picture_of(flow, other))
    for h, picture in enumerate(tab.levels):
        assert torch.equal(picture, picture_of(flow, torch.where(levels(flow) < h, 0.0, z)))
    tab.set_theta(1, True)
    assert torch.equal(tab.picture, picture_of(flow, torch.where(levels(flow) >= 1, z, other)))
    tab.set_theta(1, False)
    assert torch.equal(tab.picture, picture_of(flow, torch.where(levels(flow) >= 1, other, z)))
    tab.open_test("a", 2) if name != "grey" else tab.open_sample("a", 3)
    assert (tab.theta, tab.high) == (0, True)  # as before mixing
    tab.choose_levels([0, 1])
    assert torch.equal(tab.picture, tab.second)


def test_latents_where_their_receptive_fields_are_strongest(tab, weights):
    """By a Jacobian of autograd, over the same draws of z."""
    flow, _ = load(weights["rgflow"])
    tab = tab("rgflow")
    draws = flow.sample_prior(4, 1.0, generator(0, "receptive fields", 0))
    jacobians = [torch.autograd.functional.jacobian(lambda z: flow.inverse(z[None])[0][0], z) for z in draws]
    fields = torch.stack(jacobians).abs().mean(0).sum(0)  # (L, L, C, L, L), pixels by latents
    for pixel, strengths in (((3, 6), fields[3, 6]), (None, fields.mean((0, 1)))):
        tab.list_latents(pixel)
        listed = dict(tab.latents)
        for h in (0, 1):
            own = torch.where(levels(flow) == h, strengths, -1).flatten()
            best = [
                tuple(map(int, np.unravel_index(int(k), strengths.shape))) for k in own.argsort(descending=True)[:4]
            ]
            assert [name for name in listed if name.startswith(f"{h}:")] == [f"{h}:{i}:{j}:{c}" for c, i, j in best]
            (c, i, j), *_ = best
            assert listed[f"{h}:{i}:{j}:{c}"] == pytest.approx(own.max().item())


def test_fields_that_are_there_do_not_wait_for_others(tab):
    tab = tab("rgflow")
    tab.list_latents()
    with explore.COMPUTING:
        tab.pick(tab.latents[0][0])
        assert tab.field().shape == (3, 8, 8)


def test_errors_change_nothing(tab, weights, tmp_path):
    tab = tab()
    broken = tmp_path / "uploads" / "broken.png"
    broken.parent.mkdir()
    broken.write_bytes(b"no picture")
    torch.save(torch.nn.Linear(1, 1), code := broken.with_name("code.pt"))
    before = tab.picture.clone()
    for method, values, words in (
        (tab.open_file, ["a", str(broken)], "^broken.png: no readable image"),
        (tab.add_weights, [str(broken)], "^checkpoint broken.png: damaged, or not a checkpoint"),
        (tab.add_weights, [str(code)], r"^checkpoint code.pt: damaged, or not .* \(more than plain data\)$"),
        (tab.open_test, ["a", 6], r"^test image 6: must be in 0\.\.5"),
        (tab.open_test, ["a", 0.5], "^test image 0.5: must be a whole number"),
        (tab.open_test, ["a", None], "^test image missing: must be a whole number"),
        (tab.open_sample, ["a", -1], "^seed -1: must be a whole number"),
        (tab.set_latent, [1.0], "^no latent is chosen"),
        (tab.save_walk, [], "^no slider was moved"),
        (tab.set_temperature, [1, math.inf], "must be finite"),
    ):
        with pytest.raises((UserError, ValueError), match=words), tab.changing():
            method(*values)
        assert torch.equal(tab.picture, before) and tab.weights == "rgflow" and tuple(tab.known) == NAMES
        assert tab.temperature == (0.2, 0.6)
    for steps, draws, words in ((1, 1, "^no region is chosen"), (1, 0, "^draws 0: must be a whole number from 1")):
        with pytest.raises(UserError, match=words):
            tab.inpaint(steps, draws, lambda *_: None)
    tab.pick("0:1:1:0")
    with pytest.raises(FloatingPointError, match="not finite"), tab.changing():
        tab.set_latent(math.inf)
    assert torch.equal(tab.picture, before) and not tab.values
    tab.open_sample("a", None)
    assert tab.a.name == 0
    tab.add_weights(weights["grey"])
    assert tab.picture.shape == (1, 8, 8)


@pytest.mark.parametrize("name", ["rgflow", "realnvp"])
def test_commands_make_the_pictures_again(tab, tmp_path, monkeypatch, name):
    wide = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3)).astype(np.uint8)).save(wide)
    tab = tab(name)
    tab.list_latents()
    tab.pick(tab.latents[0][0])
    tab.set_latent(-1.5)
    tab.choose_levels([0])
    files = tab.files()
    tab.open_test("a", 4)
    tab.open_file("b", str(wide))
    tab.choose_levels([1])
    tab.set_latent(2)
    before, mask = tab.picture, torch.zeros(8, 8, dtype=torch.bool)
    mask[1:4, 2:6] = True
    tab.select((1, 2, 3, 4))
    tab.inpaint(5, 3, lambda done, total: None)
    assert torch.equal(tab.picture[:, ~mask], before[:, ~mask]) and not torch.equal(tab.picture, before)
    tab.set_latent(1)
    files |= tab.files()
    tab.open_test("a", 5)
    tab.config = {**tab.config, "data": "msds1"}  # as if it were of other weights
    tab.open_weights(name)
    files |= tab.files()
    assert len(files) == 6  # a sample and a picture of the tab, the upload, before and after inpainting, the test image
    check_commands(files, tmp_path, monkeypatch)


def test_pixels_that_a_latent_changes(tab):
    """Counted against what the picture is without the latent's value, whatever else was changed since."""
    tab = tab("large")
    tab.pick("0:5:6:1")
    tab.set_latent(5)
    words = tab.describe().rpartition(". ")[2]
    assert words.endswith("0 of them outside the generation cone") and " 0 of 256" not in words
    tab.choose_levels([1, 2])
    tab.set_temperature(2, 1.0)
    words = tab.describe().rpartition(". ")[2]
    assert words.endswith("0 of them outside the generation cone") and " 0 of 256" not in words


def test_files(tab, tmp_path):
    tab = tab("rgflow")
    tab.set_temperature(0, 0.75)
    for save in (tab.save_picture, tab.save_latents, tab.save_walk):
        save()
    picture, latents, walk = tab.saved.values()
    assert (np.asarray(Image.open(picture)) == tab.picture.permute(1, 2, 0).numpy()).all()
    saved = torch.load(latents, weights_only=True)
    assert torch.equal(saved["z"], sampled(tab.flow, 0, (0.75, 0.6))) and saved["digest"] == tab.trained["digest"]
    with Image.open(walk) as animation:
        assert animation.n_frames == 16 + 14


@pytest.mark.parametrize("last", [2, 4, 9])  # of 3 draws and 50 steps
def test_inpainting_stops(tab, tmp_path, monkeypatch, last):
    tab = tab("rgflow")
    tab.select((0, 0, 3, 3))
    seen = []

    def progress(done, total):
        seen.append((done, total))
        if done == last:
            tab.stop()

    tab.inpaint(50, 3, progress)
    assert seen == [(k, 54) for k in range(1, last + 1)]
    assert "Stopped, the best so far: PSNR" in tab.describe()
    check_commands(tab.files(), tmp_path, monkeypatch)


def test_the_picture_before_inpainting_comes_back(tab):
    tab = tab("rgflow")
    tab.choose_levels([1])
    tab.pick("0:5:6:1")
    tab.set_latent(5)
    before = tab.picture, tab.picture_command(), tab.describe()
    tab.select((0, 0, 3, 3))
    for _ in range(2):
        tab.inpaint(2, 1, lambda *_: None)
    tab.set_temperature(0, 1.5)
    tab.open_sample("b", 9)
    for _ in range(2):
        assert not torch.equal(tab.picture, before[0])
        tab.undo()
    assert torch.equal(tab.picture, before[0]) and (tab.picture_command(), tab.describe()) == before[1:]
    with pytest.raises(UserError, match="was not inpainted"):
        tab.undo()


def test_inpainting_ends_when_the_picture_is_changed(tab):
    tab, seen = tab("rgflow"), []
    tab.select((0, 0, 3, 3))

    def progress(done, total):
        seen.append(done)
        if done == 2:
            with tab.changing():
                tab.open_sample("a", 5)

    with pytest.raises(UserError, match="changed meanwhile"):
        tab.inpaint(50, 3, progress)
    assert seen == [1, 2] and tab.a.name == 5


def test_inference_cone_counted_by_autograd(tab):
    """The latents on which the pixels of the rectangle have an effect."""
    tab = tab("rgflow")
    tab.select((0, 5, 1, 2))
    x = tab.flow.inverse(tab.a.z[None])[0]
    jacobian = torch.autograd.functional.jacobian(lambda x: tab.flow(x[None])[0][0], x[0])  # latents by pixels
    affected = jacobian[..., 0, 5:7].abs().amax((3, 4)) > 0
    expected = [(h, int(affected[:, levels(tab.flow) == h].sum()), n) for h, n in ((0, 144), (1, 48))]
    assert tab.counts() == expected


def test_outline():
    """An edge for each side of a pixel where it is not next to another one."""
    page = pytest.importorskip("explorer.page", reason="no Gradio: pip install -r requirements-explore.txt")
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 1:3] = mask[3, 3] = True
    edges = set(re.findall(r"M(\d+) (\d+)([hv])1", page.outline(mask)))
    pair = {("1", "1", "h"), ("2", "1", "h"), ("1", "2", "h"), ("2", "2", "h"), ("1", "1", "v"), ("3", "1", "v")}
    assert edges == pair | {("3", "3", "h"), ("3", "4", "h"), ("3", "3", "v"), ("4", "3", "v")}


def test_weights_to_explore(parsed, weights, tmp_path, monkeypatch):
    """Those given, by names that tell them apart; without, all of the repository."""
    assert explore.known_weights(parsed("rgflow", "grey")) == {name: weights[name] for name in ("rgflow", "grey")}
    same = tmp_path / "rgflow.state"
    shutil.copy(weights["rgflow"], same)
    parser = explore.explore_parser()
    args = flags.parse(parser, ["--weights", weights["rgflow"], str(same)])
    assert list(explore.known_weights(args)) == [weights["rgflow"], str(same)]
    monkeypatch.chdir(explore.WEIGHTS.parent)
    known = explore.known_weights(flags.parse(parser, []))
    assert known == {path.stem: f"weights/{path.name}" for path in explore.WEIGHTS.glob("*.state")}
    args = flags.parse(parser, ["--data_path", str(tmp_path)])
    assert explore.Library(args, tmp_path).data_flags == {"data_path": str(tmp_path)}  # of commands for test images
    with pytest.raises(UserError, match="no checkpoint in"):
        explore.known_weights(flags.parse(parser, ["--data", "msds1", "-o", str(tmp_path)]))


def test_files_of_weights_are_checked_before_the_page_opens(parsed, tmp_path):
    args = parsed()
    args.weights.append(path := str(tmp_path / "missing.state"))
    with pytest.raises(UserError, match=f"^checkpoint {path}: no such file"), explore.serving(args):
        pass


def test_without_gradio_one_sentence_says_what_to_install(parsed, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "explorer.page", raising=False)
    monkeypatch.delattr(explorer, "page", raising=False)
    words = "needs Gradio: python -m pip install -r requirements-explore"
    with pytest.raises(UserError, match=words), explore.serving(parsed()):
        pass


# In a browser


@pytest.fixture(scope="module")
def browser():
    """Playwright's Chromium, or the system's."""
    pytest.importorskip("gradio", reason="no Gradio: pip install -r requirements-explore.txt")
    pytest.importorskip("playwright", reason="no Playwright: pip install -r requirements-dev.txt")
    with chromium() as browser:
        if browser is None:
            pytest.skip("no Chromium: playwright install chromium, or apt-get install chromium")
        yield browser


@contextmanager
def chromium():
    """Playwright's browser, or the system's; None if there is none."""
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        for path in (None, *filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))):
            with suppress(Error):
                browser = playwright.chromium.launch(executable_path=path)
                break
        else:
            yield None
            return
        yield browser
        browser.close()


@pytest.fixture
def address(browser, parsed):
    with explore.serving(parsed()) as address:
        yield address


@pytest.fixture
def visit(browser, address):
    """Open the page in a new tab, as a `Visit`."""
    visits = []
    yield lambda: visits.append(Visit(browser, address)) or visits[-1]
    for each in visits:
        each.page.close()
        assert not each.foreign and not each.errors


class Visit:
    """A tab of the browser with the page."""

    def __init__(self, browser, address, **how):
        self.page, self.foreign, self.errors = browser.new_page(**how), [], []
        own = address, "data:", "blob:"
        self.page.on("request", lambda request: request.url.startswith(own) or self.foreign.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(error))
        self.page.on("console", lambda message: message.type != "error" or self.errors.append(message.text))
        self.page.goto(address)
        self.page.wait_for_selector("#picture img[src^=data]")

    def picture(self):
        """What the page shows: (C, L, L)."""
        source = self.page.locator("#picture img").get_attribute("src")
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
        return torch.from_numpy(np.atleast_3d(image).transpose(2, 0, 1).copy())

    def until_shown(self, expected):
        """Wait until the page shows the picture."""
        until(lambda: (shown := self.picture()).shape == expected.shape and torch.equal(shown, expected))

    def words(self):
        return self.page.locator("#words").inner_text()

    def show(self, name):
        self.page.get_by_role("tab", name=name).click()

    def point(self, row, column, L=8):
        """The middle of a pixel of the picture, on the screen."""
        box = self.page.locator("#picture .picture").bounding_box()
        return box["x"] + (column + 0.5) / L * box["width"], box["y"] + (row + 0.5) / L * box["height"]

    def drag(self, selector, share):
        """Drag a slider with the mouse, from its middle to a share of its width; its value then."""
        slider = self.page.locator(f"{selector} input[type=range]")
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        self.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2, steps=5)
        self.page.mouse.up()
        return float(slider.input_value())

    def choose_region(self):
        self.page.mouse.move(*self.point(1, 2))
        self.page.mouse.down()
        self.page.mouse.move(*self.point(3, 5), steps=4)
        self.page.mouse.up()

    def open(self, name):
        """Other weights."""
        self.page.locator("#weights input").click()
        self.page.get_by_role("option", name=name).click()

    def upload(self, selector, path):
        with self.page.expect_file_chooser() as chooser:
            self.page.locator(selector).click()
        chooser.value.set_files(path)

    def until_warned(self, words):
        """Wait for a sentence, then close it."""
        toast = self.page.locator(".toast-body").filter(has_text=words)
        toast.wait_for()
        toast.locator("button").first.click()


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_dragged_latent_changes_the_picture_inside_its_cone_alone(visit, weights):
    flow, visit = load(weights["large"])[0], visit()
    visit.open("large")
    z = sampled(flow, 0, (0.2, 0.6, 0.6))
    visit.until_shown(before := picture_of(flow, z))
    visit.page.mouse.click(*visit.point(3, 6, 16))
    visit.page.get_by_text("Strongest latents at row 3, column 6").wait_for()
    for level in (0, 1):
        choice = visit.page.locator(f"#list input[value^='{level}:']").first
        _, i, j, c = map(int, choice.get_attribute("value").split(":"))
        choice.click()
        visit.page.locator("#value").filter(has_text=f"{level}:{i}:{j}:{c}").wait_for()
        z[c, i, j] = visit.drag("#value", 0.9)
        visit.until_shown(after := picture_of(flow, z))
        changed, cone = (after != before).any(0), generation_cone(i, j, 16, 4)
        assert changed.any() and not (changed & ~cone).any() and (level or not cone.all())
        until(lambda: "0 of them outside the generation cone" in visit.words())
        before = after
    visit.page.locator("#reset").click()
    until(lambda: "1 latent changed" in visit.words())


def test_keyboard(visit, weights):
    """Arrow keys choose a pixel of the picture, with Shift a rectangle; sliders have theirs anyway."""
    visit = visit()
    visit.page.locator("#picture .picture").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        visit.page.keyboard.press(key)
    visit.page.get_by_text("Strongest latents at row 1, column 2").wait_for()
    for key in ("Shift+ArrowDown", "Shift+ArrowLeft"):
        visit.page.keyboard.press(key)
    visit.page.get_by_text("The 2 × 2 pixels at row 1, column 1 affect").wait_for()
    visit.show("Picture")
    visit.page.locator("#T1 input[type=range]").focus()
    visit.page.keyboard.press("ArrowRight")
    visit.until_shown(picture_of(flow := load(weights["rgflow"])[0], sampled(flow, 0, (0.2, 0.65))))


def test_numbers_that_are_typed(visit, weights):
    """Beyond the ends of a slider they count as its end; an empty field is one that is being filled."""
    flow, visit = load(weights["rgflow"])[0], visit()
    for number, temperature in (("1000", 1.5), ("-2", 0), ("0.7123456", 0.7123456)):
        visit.page.locator("#T1 input[type=number]").fill(number)
        visit.until_shown(picture_of(flow, sampled(flow, 0, (0.2, temperature))))
    assert not visit.page.locator("#T1 button").count()
    seed = visit.page.locator("#seed_a input")
    for number in ("", "-3"):
        seed.fill(number)
        time.sleep(0.3)
    visit.until_warned("seed -3: must be a whole number")
    assert not visit.page.locator(".toast-body").filter(has_text="missing").count()
    seed.fill("5")
    visit.until_shown(picture_of(flow, sampled(flow, 5, (0.2, 0.7123456))))
    visit.show("Save")
    assert "--temperature=0.2,0.7123456" in visit.page.locator("#command").inner_text()


def test_broken_files_get_a_sentence_and_the_page_lives_on(visit, weights, tmp_path):
    visit, broken = visit(), tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    visit.upload("#open_a", broken)
    visit.until_warned("broken.png: no readable image")
    visit.upload("#open_weights", broken)
    visit.until_warned("checkpoint broken.png: damaged, or not a checkpoint")
    visit.page.locator("#number_a input").fill("6")
    visit.page.locator("#test_a").click()
    visit.until_warned("test image 6: must be in 0..5")
    visit.page.locator("#next_a").click()
    flow, _ = load(weights["rgflow"])
    visit.until_shown(picture_of(flow, sampled(flow, 1)))


def test_weights_are_switched(visit, weights, tmp_path):
    visit = visit()
    for name in ("grey", "realnvp"):
        visit.open(name)
        flow, _ = load(weights[name])
        visit.until_shown(picture_of(flow, sampled(flow, 0)))
    own = tmp_path / "mine.state"
    shutil.copy(weights["grey"], own)
    visit.upload("#open_weights", own)
    flow, _ = load(own)
    visit.until_shown(picture_of(flow, sampled(flow, 0)))
    until(lambda: visit.page.locator("#weights input").input_value() == "mine.state")


def test_tabs_do_not_disturb_each_other(visit, weights):
    flow, (one, other) = load(weights["rgflow"])[0], (visit(), visit())
    one.page.locator("#next_a").click()
    one.until_shown(picture_of(flow, sampled(flow, 1)))
    value = other.drag("#T1", 0.8)
    other.until_shown(picture_of(flow, sampled(flow, 0, (0.2, value))))
    one.page.locator("#next_a").click()
    one.until_shown(picture_of(flow, sampled(flow, 2)))
    other.until_shown(picture_of(flow, sampled(flow, 0, (0.2, value))))


def test_an_image_is_opened_inpainted_mixed_and_saved(visit, weights, images, tmp_path, monkeypatch):
    flow, visit = load(weights["rgflow"])[0], visit()
    image = torch.from_numpy(np.asarray(Image.open(images / "test" / "3.png")).transpose(2, 0, 1).copy())
    visit.upload("#open_a", images / "test" / "3.png")
    visit.until_shown(image)
    assert re.search(r"3_\w+\.png \(encoded and decoded: largest error \de-\d+ of 256\)", visit.words())
    visit.choose_region()
    visit.page.get_by_text("The 3 × 4 pixels at row 1, column 2 affect").wait_for()
    visit.page.locator("#steps input").fill("4")
    visit.page.locator("#draws input").fill("3")
    visit.page.locator("#inpaint").click()
    until(lambda: "Inpainted: PSNR" in visit.words())
    filled, mask = visit.picture(), torch.zeros(8, 8, dtype=torch.bool)
    mask[1:4, 2:6] = True
    assert torch.equal(filled[:, ~mask], image[:, ~mask]) and not torch.equal(filled, image)
    visit.show("Mix")
    visit.drag("#theta", 0.55)  # 1
    mixed = torch.where(levels(flow) >= 1, encode(flow, filled[None])[0], sampled(flow, 1))
    visit.until_shown(picture_of(flow, mixed))
    visit.show("Save")
    for name in ("picture", "latents", "walk"):
        visit.page.locator(f"#save_{name}").click()
    links = visit.page.locator("#files a[href]")
    until(lambda: links.count() == 5)  # before and after inpainting, the picture, latents, walk
    saved = {link.get_attribute("download"): link.get_attribute("href") for link in links.all()}
    files = {name: urllib.request.urlopen(href).read() for name, href in saved.items()}
    (latents,) = [content for name, content in files.items() if name.endswith(".pt")]
    torch.testing.assert_close(torch.load(io.BytesIO(latents), weights_only=True)["z"], mixed)
    check_commands({name: content for name, content in files.items() if name.endswith(".png")}, tmp_path, monkeypatch)


def test_inpainting_ends_with_its_tab_and_with_the_server(browser, parsed, monkeypatch):
    ended, own = [], explorer.tab.inpaint
    monkeypatch.setattr(explorer.tab, "inpaint", lambda *given: (own(*given), ended.append(True))[0])
    with explore.serving(parsed()) as address:
        for leave in (True, False):
            visit = Visit(browser, address)
            visit.choose_region()
            visit.page.locator("#steps input").fill("1000000")
            visit.page.locator("#inpaint").click()
            visit.page.get_by_text("Inpainting, step").wait_for()
            if leave:
                visit.page.close()
                until(lambda: ended)
        assert len(ended) == 1
    until(lambda: len(ended) == 2)
    visit.page.close()


def test_a_page_that_is_older_than_the_server(browser, parsed):
    args = parsed("rgflow")
    with explore.serving(args) as address:
        visit = Visit(browser, address)
    args.port = int(address.rstrip("/").rpartition(":")[2])
    with explore.serving(args):
        visit.page.locator("#next_a").click()
        visit.until_warned("the explorer was started again: load the page again")
    visit.page.close()


def test_nothing_else_is_served(address):
    """No file that nobody opened, under no other name of this machine."""

    def status(path, data=None, **headers):
        try:
            return urllib.request.urlopen(urllib.request.Request(address + path, data, headers)).status
        except urllib.error.HTTPError as error:
            return error.code

    assert address.startswith("http://127.0.0.1:") and status("") == 200
    for path in (__file__, "README.md", "weights/msds1_laplace.state", "/etc/passwd"):
        assert status(f"gradio_api/file={path}") in (403, 404)
    assert status("", Host="elsewhere.example") == 400
    sites = [{"Sec-Fetch-Site": site} for site in ("same-origin", "cross-site")]
    assert [status("", **site) for site in sites] == [200, 200]  # a link from elsewhere
    assert [status("gradio_api/upload", b"", **site) == 403 for site in sites] == [False, True]
    policy = urllib.request.urlopen(address).headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy


def test_a_port_that_is_taken(address, parsed):
    args = parsed()
    args.port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=f"--port {args.port}: cannot be used"), explore.serving(args):
        pass


@pytest.mark.parametrize("width, height", [(1280, 1000), (390, 844)])
def test_screen(browser, tmp_path, width, height):
    """The picture of the README, which EXPLORER_PICTURE=FILE takes again; on a telephone nothing is cut off."""
    weights = str(explore.WEIGHTS / "faces_spline_lu.state")
    own = "--weights", weights, "--no_browser", "--fig_dir", str(tmp_path)
    args = flags.parse(explore.explore_parser(), own)
    args.draws = 4 if "EXPLORER_PICTURE" in os.environ else 1
    with explore.serving(args) as address:
        visit = Visit(browser, address, viewport={"width": width, "height": height})
        visit.page.locator("#seed_a input").fill("6")
        until(lambda: "seed 6" in visit.words())
        visit.page.locator("#picture .picture").scroll_into_view_if_needed()
        visit.page.mouse.click(*visit.point(16, 11, 32))
        visit.page.locator("#list input[value^='1:']").first.click()
        visit.page.locator("#field img").wait_for()
        _, i, j, c = map(int, visit.page.locator("#list input:checked").get_attribute("value").split(":"))
        flow = load(weights)[0].double()
        z = sampled(flow, 6, (0.2, 0.6, 0.6, 0.6))
        z[c, i, j] = visit.drag("#value", 0.8)
        visit.until_shown(picture_of(flow, z))
        visit.page.wait_for_timeout(500)  # until the rest of the page follows
        visit.page.evaluate("scrollTo(0, 0)")
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        picture = os.environ.get("EXPLORER_PICTURE") if width > height else None
        visit.page.screenshot(path=picture or tmp_path / "page.png")
        visit.page.close()
