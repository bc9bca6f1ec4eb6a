"""A hub on this machine, which answers as huggingface.co does for one public repository of a local folder."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def small_hub(folder: Path, monkeypatch, cache: Path):
    """Serve ``folder`` as the model ``lab/small``; yields the list of the files that were downloaded.

    The libraries' settings point to it, and to an empty cache.
    """
    import huggingface_hub
    from huggingface_hub import constants

    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    downloaded = []

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = unquote(urlsplit(self.path).path)
            content, headers = b"", {"X-Repo-Commit": COMMIT}
            if "/resolve/" in path and (name := path.split("/resolve/")[1].partition("/")[2]) in files:
                content = files[name].read_bytes()
                headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
                downloaded.extend([name] if body else [])
            elif path.startswith("/api/models/lab/small/tree/"):
                entries = [{"type": "file", "path": name, **sizes(file)} for name, file in files.items()]
                content = json.dumps(entries).encode()
            elif path.startswith("/api/models/lab/small"):
                siblings = [{"rfilename": name, **sizes(file)} for name, file in files.items()]
                content = json.dumps({"id": "lab/small", "sha": COMMIT, "siblings": siblings}).encode()
            else:
                headers["X-Error-Code"] = "EntryNotFound"
            self.send_response(200 if content else 404)
            for header, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(header, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *given):
            pass

    def sizes(file):
        return {"size": file.stat().st_size, "oid": hashlib.sha1(file.read_bytes()).hexdigest()}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    api = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)  # functions such as model_info are its methods
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **options: api(**{"endpoint": address, **options}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield downloaded
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
