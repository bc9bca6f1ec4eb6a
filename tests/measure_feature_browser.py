"""Times and memory of the feature browser in JupyterLab and Chromium: ``python tests/measure_feature_browser.py``.

Synthetic features are opened and filtered. On the embedded model, with the parameters of notebook 37's demo, a feature
is turned, the strength is dragged, and memory is compared before and after 300 turns. Each line has a number and its
limit. The CPU seconds of all processes stand beside a time, for a machine that does other things as well.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import psutil
import yaml
from jupyter_session import chromium, jupyterlab, kernel_python, open_notebook, save_notebook

ROOT = Path(__file__).parents[1]
TURNS = 300
WIDGET = """
import time, sys
sys.path.insert(0, "{tests}")
from synthetic_features import SyntheticFeatures
from vaelab.browser import FeatureBrowser
browser = FeatureBrowser(SyntheticFeatures({count}, None), prompt="a red star")
browser
"""
OPENED = """() => new Promise((done) => {
    const begin = performance.now();
    const look = () => document.querySelector(".vaelab-browser[data-ready]") ? done(performance.now() - begin)
        : requestAnimationFrame(look);
    window.jupyterapp.commands.execute("notebook:run-cell");
    look();
})"""
FILTERED = """(word) => {
    const input = document.querySelector(".find input[type=search]");
    const begin = performance.now();
    input.value = word;
    input.dispatchEvent(new Event("input"));
    document.querySelector(".grid").getBoundingClientRect();
    return performance.now() - begin;
}"""
TURNED = """(strength) => new Promise((done) => {
    const shown = () => document.querySelector("img.shot[alt^=after]")?.src;
    const [begin, before] = [performance.now(), shown()];
    const input = document.querySelector("input[aria-label='strength, as a number']");
    input.value = strength;
    [...document.querySelectorAll(".turn button")].find((one) => one.textContent === "Turn").click();
    const look = () => shown() !== before && document.querySelector(".vaelab-browser").dataset.busy === "0"
        ? done(performance.now() - begin) : requestAnimationFrame(look);
    look();
})"""
MEMORY = "() => { gc(); gc(); return [performance.memory.usedJSHeapSize, document.querySelectorAll('*').length]; }"
COUNTED = "made = []; draw = data.generate; data.generate = lambda *a: (made.append(1), draw(*a))[1]"
failed = []


def cpu():
    """CPU seconds of JupyterLab, its kernels and Chromium so far."""
    seconds = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            seconds += sum(process.cpu_times()[:2])
    return seconds


def drawing(page):
    """CPU milliseconds of the page's main thread so far."""
    found = page.devtools.send("Performance.getMetrics")["metrics"]
    return 1000 * next(one["value"] for one in found if one["name"] == "TaskDuration")


def report(what, number, limit, unit):
    if number > limit:
        failed.append(what)
    print(f"{what}: {number:.3g} {unit} (limit {limit:g}){' TOO MUCH' if number > limit else ''}", flush=True)


def measure_opening(page, address, folder, count, seconds):
    """The second run of the cell is timed: the first has the imports."""
    name = f"open-{count}.ipynb"
    save_notebook(folder / name, [WIDGET.format(count=count, tests=ROOT / "tests")])
    received = []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: received.append(len(frame))))
    open_notebook(page, address, name)
    page.wait_for_selector(".vaelab-browser[data-ready][data-busy='0']", timeout=600_000)
    received.clear()
    page.evaluate("window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    page.evaluate("""() => { const { model } = window.jupyterapp.shell.currentWidget.content;
        model.cells.get(0).sharedModel.setSource("browser"); }""")
    before = cpu()
    report(f"open {count:,} features", page.evaluate(OPENED) / 1000, seconds, "s")
    print(f"    CPU {cpu() - before:.2g} s")
    report(f"bytes for {count:,} features", sum(received) / 1e6, 20, "MB")
    before, words = drawing(page), ("star", "star near", "ring near a red", "7", "")
    times = [page.evaluate(FILTERED, word) for word in words]
    report(f"slowest of five filters over {count:,} features", max(times), 100, "ms")
    page.wait_for_timeout(200)
    print(f"    CPU with drawing the map anew {(drawing(page) - before) / len(words):.3g} ms each")


def measure_turning(page, address, folder):
    notebook = json.loads((ROOT / "notebooks" / "37_feature_browser.ipynb").read_text())
    cells = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"]}
    params = yaml.safe_load((ROOT / "params" / "37_feature_browser" / "demo.yaml").read_text())
    own = "\n".join(f"{name} = {value!r}" for name, value in {**params, "output_dir": str(folder / "run")}.items())
    last = "display(FeatureBrowser(data, prompt=prompt, seed=seed, feature=int(statistics.most_active(1)[0])))"
    lines = [f"import os; os.chdir({str(ROOT)!r})", cells["parameters"], own, cells["load"], cells["run"], last]
    save_notebook(folder / "turn.ipynb", lines)
    open_notebook(page, address, "turn.ipynb")
    page.wait_for_selector(".vaelab-browser[data-ready][data-busy='0']", timeout=600_000)
    page.get_by_role("tab", name="Turn").click()
    page.wait_for_selector("img.shot[alt^=after][src]")
    page.wait_for_selector(".vaelab-browser[data-busy='0']")
    before = cpu()
    times = sorted(page.evaluate(TURNED, 0.5 + i / 100) for i in range(9))
    report("median of nine turns on the embedded model", times[4] / 1000, 1.5, "s")
    print(f"    CPU {(cpu() - before) / 9:.2g} s each")
    kernel_python(page, f"exec({COUNTED!r})")
    box = page.locator(".turn input[type=range]").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    for step in range(100):
        page.mouse.move(box["x"] + box["width"] * (0.5 + step / 250), box["y"] + box["height"] / 2)
    page.mouse.up()
    page.wait_for_timeout(400)
    page.wait_for_selector(".vaelab-browser[data-busy='0']")
    report("generations of a drag of 100 events", kernel_python(page, "len(made)"), 3, "")
    kernel = psutil.Process(kernel_python(page, "os.getpid()"))
    for i in range(20):  # caches fill
        page.evaluate(TURNED, 1 + i / 1000)
    (heap, elements), resident = page.evaluate(MEMORY), kernel.memory_info().rss
    for i in range(TURNS):
        page.evaluate(TURNED, -1 + i / 1000)
    (heap_after, elements_after), resident_after = page.evaluate(MEMORY), kernel.memory_info().rss
    report(f"the kernel's memory grows in {TURNS} turns by", (resident_after - resident) / 1e6, 20, "MB")
    report(f"the page's heap grows in {TURNS} turns by", (heap_after - heap) / 1e6, 3, "MB")
    report(f"elements that {TURNS} turns add", elements_after - elements, 0, "")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name, jupyterlab(Path(name)) as address, chromium() as page:
        page.devtools = page.context.new_cdp_session(page)
        page.devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
        for count, seconds in ((5120, 2), (81_920, 6)):
            measure_opening(page, address, Path(name), count, seconds)
        measure_turning(page, address, Path(name))
        print(page.complaints)
    sys.exit(f"above the limit: {', '.join(failed)}" if failed else 0)
