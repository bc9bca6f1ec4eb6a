import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
import traitlets
from jupyter_session import chromium, jupyterlab, kernel_python, missing, open_notebook, run_all, save_notebook
from synthetic_features import MARKUP, SyntheticFeatures

from vaelab.browser import FeatureBrowser
from vaelab.browser.feature_browser import STATIC, packed
from vaelab.browser.feature_data import WAYS


class Asked(FeatureBrowser):
    """A widget whose messages are kept."""

    def send(self, content, buffers=()):
        self.sent = (content, list(buffers))

    def ask(self, name, buffers=(), **content):
        self._answer(self, {"ask": name, "view": "v", "request": 1, **content}, list(buffers))
        return self.sent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return SyntheticFeatures(64, tmp_path_factory.mktemp("features"))


def test_bytes_travel_as_buffers_and_numbers_that_are_not_finite_as_nothing():
    buffers = []
    found = packed({"a": [b"one", np.float32(2), float("nan")], 3: {"b": b"two"}}, buffers)
    assert found == {"a": [{"buffer": 0}, 2.0, None], "3": {"b": {"buffer": 1}}}
    assert buffers == [b"one", b"two"]


def test_the_table_travels_as_bytes(data):
    answer, buffers = Asked(data, prompt="a star", seed=3).ask("open")
    assert (answer["count"], answer["prompt"], answer["seed"], answer["request"]) == (64, "a star", 3, 1)
    columns = {one["name"]: one for one in answer["columns"]}
    assert list(columns) == list(data.table)
    frequency = np.frombuffer(buffers[columns["frequency"]["numbers"]["buffer"]], np.float32)
    np.testing.assert_allclose(frequency, data.table["frequency"], rtol=1e-6)
    assert json.loads(buffers[columns["caption"]["texts"]["buffer"]]) == data.table["caption"].tolist()
    json.dumps(answer, allow_nan=False)


def test_input_that_cannot_be_used_is_answered_by_its_reason(data):
    asked = {"feature": 1, "strength": 1, "way": "add", "steps": None, "before": False, "control": False}
    answer, _ = Asked(data).ask("turn", prompt="a zebra", seed=0, **asked)
    assert answer["error"] == "prompt: the text model does not know 'zebra'"
    answer, _ = Asked(data).ask("turn", prompt="a star", seed=1.5, **asked)
    assert answer["error"] == "seed: expected a whole number, at least 0, got 1.5"


def test_an_error_of_the_kernel_is_raised_and_answered(data):
    browser = Asked(data)
    with pytest.raises(KeyError):
        browser.ask("turn", prompt="no seed")
    assert "log" in browser.sent[0]["error"] and browser.sent[0]["request"] == 1


def test_a_feature_that_does_not_exist_is_refused(data):
    browser = Asked(data, feature=63)
    with pytest.raises(traitlets.TraitError, match="feature: expected 0 to 63"):
        browser.feature = 64
    assert browser.feature == 63


def test_the_ways_of_the_form_are_those_of_the_data():
    (listed,) = re.findall(r"const WAYS = \{(.*?)\};", (STATIC / "turn.js").read_text())
    assert tuple(re.findall(r"(\w+): \"", listed)) == WAYS


def test_no_script_makes_markup_of_text_or_asks_another_host():
    for path in STATIC.iterdir():
        text = path.read_text()
        for word in (
            "innerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "fetch(",
            "import(",
            "@import",
            "url(",
        ):
            assert word not in text, (path.name, word)
        assert set(re.findall(r"https?://[^\s\"]+", text)) <= {"http://www.w3.org/2000/svg"}, path.name


# In JupyterLab, in a real browser

FEATURES = 1200
CELL = f"""
import sys, types
from pathlib import Path
import jupyter_session
root = Path(jupyter_session.__file__).parents[1]
package = types.ModuleType("vaelab.browser")  # the widget alone, without the models that the package imports
package.__path__ = [str(root / "vaelab" / "browser")]
sys.modules["vaelab.browser"] = package
from synthetic_features import SyntheticFeatures
from vaelab.browser.feature_browser import FeatureBrowser
data = SyntheticFeatures({FEATURES}, Path("."))
browser = FeatureBrowser(data, prompt="a red star", seed=2)
browser
"""


@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
def test_every_action_in_jupyterlab(tmp_path):
    save_notebook(tmp_path / "features.ipynb", [CELL] + [f"print({i})\n" * 30 for i in range(2)])
    with jupyterlab(tmp_path) as address, chromium() as page:
        open_notebook(page, address, "features.ipynb")
        lab = Lab(page, SyntheticFeatures(FEATURES, tmp_path))
        for step in STEPS:
            step(lab)
        assert page.complaints == []


class Lab(types.SimpleNamespace):
    """The page, its widget, and the data as the kernel has it."""

    def __init__(self, page, data):
        super().__init__(page=page, data=data, widget=page.locator(".vaelab-browser"))

    def settle(self):
        """Wait until the kernel has answered and the pictures are shown."""
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        self.page.wait_for_selector(".vaelab-browser[data-ready][data-busy='0']")

    def python(self, expression):
        return kernel_python(self.page, expression)

    def rows(self):
        """The features in sight in the table, in order."""
        script = """() => [...document.querySelectorAll(".grid-row")].filter((row) => !row.hidden)
            .map((row) => [Number(row.getAttribute("aria-rowindex")), Number(row.children[1].textContent)])
            .sort((a, b) => a[0] - b[0]).map((pair) => pair[1])"""
        return self.page.evaluate(script)

    def pixels(self, selector):
        """The RGB values (H, W, 3) of a picture or canvas."""
        width, height, values = self.page.evaluate("""async (selector) => {
            const source = document.querySelector(selector);
            const [width, height] = [source.naturalWidth || source.width, source.naturalHeight || source.height];
            const context = new OffscreenCanvas(width, height).getContext("2d");
            context.drawImage(source, 0, 0);
            const { data } = context.getImageData(0, 0, width, height);
            return [width, height, Array.from(data, (value) => String.fromCharCode(value)).join("")];
        }""", selector)  # fmt: skip
        return np.array(list(map(ord, values))).reshape(height, width, 4)[..., :3]

    def turned(self):
        """Where (H, W) the picture after the turn is redder than the one before."""
        return self.pixels("img.shot[alt^=after]")[..., 0] > 102

    def source(self, name):
        return self.page.get_attribute(f"img.shot[alt^={name}]", "src")

    def drag(self, selector, path):
        """Press at the first place, move through the others and release; places are shares of the element's sides."""
        self.page.locator(selector).scroll_into_view_if_needed()
        box = self.page.locator(selector).bounding_box()
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in path]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place, steps=4)
        self.page.mouse.up()
        self.settle()

    def tab(self, name):
        self.widget.get_by_role("tab", name=name).click()
        self.settle()

    def count(self):
        return self.widget.locator(".count").text_content()

    def press(self, name, exact=True):
        self.widget.get_by_role("button", name=name, exact=exact).click()
        self.settle()


def opens(lab):
    lab.settle()
    assert lab.count() == "1,200 of 1,200 features"
    assert lab.rows()[:3] == [1199, 1198, 1197]
    assert lab.widget.locator("h3").first.text_content() == "Feature 1199"


def sorts(lab):
    scores = lab.data.table["f1"]
    header = lab.widget.get_by_role("button", name="truth F1")
    for ascending in (False, True):
        header.click()
        assert lab.rows()[:5] == scores.sort_values(ascending=ascending).index.tolist()[:5]
    lab.page.locator(".grid").evaluate("(grid) => { grid.scrollTop = grid.scrollHeight; }")
    lab.page.wait_for_function("document.querySelector('.grid-row[aria-rowindex=\"1200\"]')")
    assert lab.rows()[-1] % 3 == 0  # features without a value come last
    lab.widget.get_by_label("sort by").select_option("frequency")
    lab.press("lowest first")


def filters(lab):
    table = lab.data.table
    lab.widget.get_by_label("Word").fill("Star near a RING")
    expected = table[table["caption"].str.contains("star near a ring")]
    assert lab.count() == f"{len(expected)} of 1,200 features"
    lab.page.locator(".filters summary").click()
    lab.widget.get_by_label("frequency, least").fill("0.5")
    assert lab.count() == f"{(expected['frequency'] >= 0.5).sum()} of 1,200 features"
    lab.widget.get_by_label("frequency, least").fill("")
    lab.widget.get_by_label("Word").fill("")
    lab.page.locator(".filters summary").click()
    assert lab.count() == "1,200 of 1,200 features"


def shows_markup_as_text(lab):
    lab.widget.get_by_label("Word").fill("onerror")
    assert lab.rows() == [5]
    lab.page.locator(".grid-row").first.click()
    lab.settle()
    assert lab.page.locator(".card .caption").text_content() == MARKUP
    assert lab.page.locator(".card img").first.get_attribute("alt") == f"a star {MARKUP}"
    assert lab.page.locator(".vaelab-browser img[src=x], .vaelab-browser p b:text('bold')").count() == 0
    assert "owned" not in lab.page.title()
    lab.widget.get_by_label("Word").fill("")


def opens_by_keyboard(lab):
    lab.page.locator(".grid").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "Enter"):
        lab.page.keyboard.press(key)
    lab.settle()
    assert lab.page.locator(".card h3").text_content() == "Feature 1198"
    assert lab.page.evaluate("document.activeElement.className") == "grid"  # the notebook's own shortcuts are off


def selects_by_lasso(lab):
    lab.press("Lasso")
    lab.drag(".map", [(0.02, 0.02), (0.5, 0.02), (0.5, 0.98), (0.02, 0.98)])
    chosen, left = set(lab.python("list(browser.selected)")), lab.data.positions[:, 0]
    assert chosen and chosen <= set(np.flatnonzero(left < 0.51)) and chosen >= set(np.flatnonzero(left < 0.49)) - {0}
    assert lab.count() == f"{len(chosen)} of 1,200 features"
    lab.press("remove the selection", exact=False)
    assert lab.count() == "1,200 of 1,200 features" and lab.python("list(browser.selected)") == []
    lab.press("Move")


def zooms_to_thumbnails(lab):
    lab.widget.get_by_label("colour of the dots").select_option("value")
    assert lab.page.locator(".legend").text_content() == "colourshapeno valuenot listed"
    drawn = lambda: lab.page.get_attribute(".map", "data-drawn")  # noqa: E731
    assert drawn() == "dots"
    for _ in range(3):
        lab.press("zoom in")
    assert drawn() == "thumbnails"
    lab.press("Select in sight")
    assert 0 < len(lab.python("list(browser.selected)")) < 300
    lab.press("remove the selection", exact=False)
    lab.page.locator(".map").focus()
    lab.page.keyboard.press("Enter")  # the feature at the centre
    lab.settle()
    assert lab.python("browser.feature") < 5
    lab.page.keyboard.press("0")
    lab.settle()
    assert drawn() == "dots"


def lets_the_page_scroll(lab):
    lab.page.set_viewport_size({"width": 1280, "height": 700})
    top = "document.querySelector('.vaelab-browser').getBoundingClientRect().top"
    for selector in (".map", ".example .stack"):
        lab.page.locator(selector).first.scroll_into_view_if_needed()
        lab.page.locator(selector).first.hover()
        before, drawn = lab.page.evaluate(top), lab.page.get_attribute(".map", "data-drawn")
        lab.page.mouse.wheel(0, 60)
        lab.page.wait_for_timeout(150)
        assert lab.page.evaluate(top) == before - 60, selector
        assert lab.page.get_attribute(".map", "data-drawn") == drawn
    lab.page.set_viewport_size({"width": 1280, "height": 1400})


def finds_by_meaning(lab):
    lab.widget.get_by_label("Meaning").fill("round things")
    lab.press("Search")
    assert lab.rows() == [9, 3, 7] and lab.python("list(browser.selected)") == [9, 3, 7]
    lab.page.locator(".grid-row").nth(2).click()
    lab.settle()
    lab.press("remove the selection", exact=False)


def shows_a_card(lab):
    assert lab.page.locator(".card h3").text_content() == "Feature 7"
    assert lab.page.locator(".example:visible").count() == 14
    heat = lab.pixels(".example canvas")
    assert (heat[:2] == 0).all() and heat[2, 3, 2] > heat[2, 3, 0] and heat[4, 6, 0] > 2 * heat[4, 6, 2]
    assert lab.page.locator(".chart").count() == 2 and lab.page.locator(".scores td").first.text_content() == "0.61"


def changes_the_heat_maps_opacity(lab):
    sources = "[...document.querySelectorAll('.example img')].map((img) => img.src).join()"
    before = lab.page.evaluate(sources)
    lab.widget.get_by_label("Heat map").fill("0")
    assert lab.page.locator(".heat").first.evaluate("(heat) => getComputedStyle(heat).opacity") == "0"
    assert lab.page.evaluate(sources) == before


def turns(lab):
    lab.tab("Turn")
    assert (lab.pixels("img.shot[alt^=before]") == 102).all()
    assert (lab.pixels("img.shot[alt^=after]")[5, 5] == [142, 102, 102]).all()
    assert (lab.pixels("canvas.shot")[5, 5] == [80, 0, 0]).all()
    before, after, made = lab.source("before"), lab.source("after"), lab.python("data.generations")
    assert made == 2
    lab.press("Turn")  # nothing has changed
    assert (lab.source("before"), lab.source("after"), lab.python("data.generations")) == (before, after, made)
    for strength in ("3", "2"):  # the first is overtaken
        lab.widget.get_by_label("strength, as a number").fill(strength)
        lab.widget.get_by_role("button", name="Turn", exact=True).click()
    lab.settle()
    assert (lab.pixels("img.shot[alt^=after]")[5, 5] == [182, 102, 102]).all()
    assert lab.source("before") == before and lab.source("after") != after
    assert lab.python("data.generations") <= made + 2


def drags(lab):
    made = lab.python("data.generations")
    box = lab.widget.get_by_label("Strength", exact=False).first.bounding_box()
    middle = box["y"] + box["height"] / 2
    lab.page.mouse.move(box["x"] + box["width"] / 2, middle)
    lab.page.mouse.down()
    for step in range(100):
        lab.page.mouse.move(box["x"] + box["width"] * (0.5 + 0.003 * step), middle)
    lab.page.mouse.up()
    lab.settle()
    assert 1 <= lab.python("data.generations") - made <= 3
    lab.widget.get_by_label("strength, as a number").fill("1")
    lab.press("Turn")


def paints_and_undoes(lab):
    plain = lab.pixels("img.shot[alt^=after]")
    lab.press("Paint mask")
    lab.drag(".brush", [(0.2, 0.25), (0.4, 0.25)])
    painted = lab.turned()
    assert painted[16, 13:25].all() and not painted[32:].any() and not painted[:, 40:].any()
    lab.drag(".brush", [(0.8, 0.8), (0.8, 0.85)])
    assert lab.turned().sum() > painted.sum()
    lab.press("Undo")
    assert (lab.turned() == painted).all()
    lab.press("Undo")
    assert (lab.pixels("img.shot[alt^=after]") == plain).all()
    assert lab.widget.get_by_role("button", name="Undo").is_disabled()
    lab.page.locator(".brush").focus()
    for key in ("ArrowLeft", "ArrowLeft", " "):
        lab.page.keyboard.press(key)
    lab.settle()
    by_key = lab.turned()
    assert by_key[54, 47] and not by_key[54, 56] and not by_key[40, 47]  # four positions left of where the pointer was
    lab.press("Clear")


def shows_the_control(lab):
    before, after = lab.source("before"), lab.source("after")
    lab.widget.get_by_role("checkbox").check()
    lab.settle()
    assert (lab.pixels("img.shot[alt='random direction']")[5, 5] == [102, 102, 142]).all()
    assert lab.source("before") == before
    lab.widget.get_by_role("checkbox").uncheck()
    lab.settle()
    assert not lab.page.locator("img.shot[alt='random direction']").is_visible() and after


def keeps_the_picture_when_words_are_unknown(lab):
    before, after = lab.source("before"), lab.source("after")
    lab.widget.get_by_label("Prompt").fill("a zebra")
    lab.press("Turn")
    assert lab.page.locator(".status").text_content() == "prompt: the text model does not know 'zebra'"
    assert (lab.source("before"), lab.source("after")) == (before, after)
    lab.widget.get_by_label("Prompt").fill(MARKUP)
    lab.press("Turn")
    assert lab.page.locator("img.shot").first.get_attribute("alt") == f"before: {MARKUP}"
    lab.widget.get_by_label("Prompt").fill("a red star")
    lab.press("Turn")


def asks_what_is_active(lab):
    made = lab.python("data.generations")
    lab.press("What is active?")
    lab.drag(".brush", [(0.25, 0.5), (0.625, 0.75)])
    assert lab.rows() == [32, 64 + 40]
    assert lab.page.locator(".active b").all_text_contents() == ["32", "104"]
    lab.drag(".brush", [(0.125, 0.25)])  # a click
    assert lab.rows() == [16, 64 + 8] and lab.python("data.generations") == made
    lab.press("remove the selection", exact=False)


def keeps_and_exports(lab):
    lab.tab("See")
    lab.press("keep feature 7")
    lab.page.get_by_label("open feature 8", exact=False).first.click()
    lab.settle()
    lab.press("keep feature 8")
    lab.tab("Keep")
    lab.page.evaluate("""() => document.querySelectorAll(".shelf textarea").forEach((note, place) => {
        note.value = ["round <b>and</b> red", "not round"][place];
        note.dispatchEvent(new Event("change"));
    })""")  # at once: the second must not undo the first
    lab.settle()
    assert lab.python("data.shelf") == {"7": "round <b>and</b> red", "8": "not round"}
    lab.press("remove feature 8 from the shelf")
    assert lab.python("data.shelf") == {"7": "round <b>and</b> red"}
    with lab.page.expect_download() as download:
        lab.press("export feature 7 as a page")
    assert download.value.suggested_filename == "feature-7.html"
    assert Path(download.value.path()).read_text() == lab.data.feature_page(7)
    with lab.page.expect_download() as download:
        lab.press("Export the shelf as one page")
    assert "<p>7" in Path(download.value.path()).read_text()


def is_narrow(lab):
    lab.page.set_viewport_size({"width": 504, "height": 1000})
    for name in ("Find", "See", "Turn", "Keep"):
        lab.tab(name)
        inside = """(root) => { const { right } = root.getBoundingClientRect();
            return [...root.querySelectorAll("*")].every((one) => one.closest(".scroll, .unseen")
                || one.getBoundingClientRect().right <= right + 1); }"""
        assert lab.widget.evaluate(inside), name
        if name == "Find":
            assert lab.page.locator(".grid-row:visible").count() > 8
    assert not lab.page.locator(".map").is_visible()
    lab.page.set_viewport_size({"width": 1280, "height": 1400})
    lab.settle()
    controls = "button, input, select, textarea, canvas[tabindex], [role=grid]"
    unlabelled = f"""(root) => [...root.querySelectorAll("{controls}")]
        .filter((one) => !(one.textContent.trim() || one.ariaLabel || one.closest("label")))
        .map((one) => one.outerHTML)"""
    assert lab.widget.evaluate(unlabelled) == []


def obeys_python(lab):
    lab.tab("See")
    lab.python("setattr(browser, 'feature', 40)")
    lab.page.wait_for_selector(".card[data-feature='40']")
    assert lab.page.locator(".card h3").text_content() == "Feature 40"


def survives_a_reload(lab):
    lab.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    lab.page.wait_for_timeout(300)
    lab.page.reload()
    lab.settle()
    assert lab.page.locator(".card h3").text_content() == "Feature 40"
    lab.tab("Keep")
    assert lab.widget.get_by_label("note on feature 7").input_value() == "round <b>and</b> red"


def survives_the_kernel(lab):
    lab.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    lab.page.wait_for_timeout(500)
    run_all(lab.page)
    lab.page.wait_for_selector(".vaelab-browser[data-ready]")
    opens(lab)


STEPS = (
    opens, sorts, filters, shows_markup_as_text, opens_by_keyboard, selects_by_lasso, zooms_to_thumbnails,
    lets_the_page_scroll, finds_by_meaning, shows_a_card, changes_the_heat_maps_opacity, turns, drags,
    paints_and_undoes, shows_the_control, keeps_the_picture_when_words_are_unknown, asks_what_is_active,
    keeps_and_exports, is_narrow, obeys_python, survives_a_reload, survives_the_kernel,
)  # fmt: skip
