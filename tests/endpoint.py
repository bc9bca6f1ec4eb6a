"""A server on this machine with OpenAI's chat completions."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-a-key-that-nobody-may-see"


def completion(text, **message):
    """The response of a chat completion."""
    message = {"role": "assistant", "content": text, **message}
    return {
        "id": "1", "object": "chat.completion", "created": 0, "model": "seer",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
    }  # fmt: skip


@contextmanager
def serving(respond, monkeypatch):
    """Serve, and name the server in the environment.

    ``respond`` gets a request's body and its number, and returns a status, a body (text or JSON) and headers. Yields
    the list of requests: bodies, with the headers under ``headers``.
    """
    requests, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(requests)
                requests.append(
                    {
                        **body,
                        "headers": {name.lower(): value for name, value in self.headers.items()},
                        "path": self.path,
                    }
                )
            status, answer, headers = respond(body, number)
            text = answer if isinstance(answer, str) else json.dumps(answer)
            try:
                self.send_response(status)
                for name, value in {"content-type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:
                pass  # the client has gone

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    try:
        yield requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
