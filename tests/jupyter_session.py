"""A real JupyterLab on a folder, and a real Chromium on it."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = {"checkForUpdates": False, "doNotDisturbMode": True, "fetchNews": "false"}


def missing():
    """Why there is no browser to test with; empty if there is one."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (pip install -r requirements-browser.lock)"
    return "" if CHROMIUM else "no chromium on the path"


@contextmanager
def jupyterlab(folder, theme="JupyterLab Light"):
    """Start JupyterLab in a folder; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = folder / ".settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(QUIET))
    (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "JUPYTERLAB_WORKSPACES_DIR")
    own = {name: str(folder / f".{name.lower()}") for name in folders}
    own["JUPYTERLAB_SETTINGS_DIR"] = str(folder / ".settings")
    own["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True",
        f"--ServerApp.root_dir={folder}",
    ]  # fmt: skip
    with open(folder / "lab.log", "w") as log:
        lab = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env={**os.environ, **own})
        address = f"http://127.0.0.1:{port}"
        try:
            wait_for_server(f"{address}/api", lab)
            yield address
        finally:
            lab.terminate()
            lab.wait(20)


def wait_for_server(url, process, seconds=240):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start within {seconds} s")


@contextmanager
def chromium(width=1280, height=1400, **options):
    """Start Chromium; gives a page of this size whose messages of the console are kept in ``page.complaints``."""
    from playwright.sync_api import sync_playwright

    arguments = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--enable-precise-memory-info",
        "--js-flags=--expose-gc",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        page = context.new_page()
        page.set_default_timeout(240_000)  # a machine may be busy
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        yield page
        browser.close()


def save_notebook(path, cells):
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=metadata)
    nbformat.write(notebook, path)


def open_notebook(page, address, name):
    """Open a notebook and run all its cells."""
    page.goto(f"{address}/doc/tree/{name}")
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
    run_all(page)


def kernel_python(page, expression):
    """Evaluate an expression in the notebook's kernel."""
    code = f"import json; print(json.dumps({expression}))"
    return json.loads(page.evaluate("""async (code) => {
        const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
        const future = kernel.requestExecute({ code, store_history: false });
        let text = "";
        future.onIOPub = ({ content }) => { text += content.text ?? content.traceback?.join("\\n") ?? ""; };
        await future.done;
        return text;
    }""", code))  # fmt: skip


def run_all(page):
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
