"""Stands for ``ziggurat serve`` in a process: ``python fake_serve.py serve MODEL --unix-socket PATH | --port N …``.

The model's name says what it does: ``slow`` loads until a file ``MODEL.go`` is there, ``broken`` refuses, ``crash``
dies when it is first asked to answer, and ``stubborn`` ignores requests to end. Arguments and environment go to
``MODEL.asked``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from ziggurat.tui import child

MODEL = Path(sys.argv[2])
PROPS = {
    "version": "0",
    "system_fingerprint": "x",
    "models": [MODEL.stem],
    "description": "fake",
    "n_ctx": 512,
    "n_ctx_train": 512,
    "kv_bytes": 1,
    "kv_unsupported": None,
}
SLOTS: dict[str, Any] = {"running": 0, "queued": 0, "slots": [], "kv": {"bytes": 1, "bytes_planned": 2}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {os.environ['ZIGGURAT_API_KEY']}":
            return self.answer(401, {"error": {"message": "no key"}})
        if "slow" in MODEL.stem and not MODEL.with_suffix(".go").exists():
            error = {"message": "the model is being loaded", "code": "model_loading"}
            return self.answer(503, {"error": error}, headers={"X-Load-Progress": "0.250"})
        self.answer(200, {"/health": {"status": "ok"}, "/props": PROPS, "/slots": SLOTS}.get(self.path, {}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if "crash" in MODEL.stem and not MODEL.with_suffix(".crashed").exists():
            MODEL.with_suffix(".crashed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        chunk = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}
        self.answer(200, f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", "text/event-stream")

    def answer(
        self, status: int, body: Any, kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def address_string(self) -> str:
        return "client"

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    allow_reuse_address = True


def main() -> None:
    threading.Thread(target=child._hold, args=(0,), daemon=True).start()
    asked = {"arguments": sys.argv[1:], "environment": dict(os.environ), "pid": os.getpid()}
    written = MODEL.with_suffix(".writing")
    written.write_text(json.dumps(asked))
    written.rename(MODEL.with_suffix(".asked"))  # whole, for those who wait for it
    if "broken" in MODEL.stem:
        print("noise\nziggurat: error: the model is of no use: get another", file=sys.stderr)
        sys.exit(1)
    if "stubborn" in MODEL.stem:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "--unix-socket" in sys.argv:
        Server.address_family = socket.AF_UNIX
        address: Any = sys.argv[sys.argv.index("--unix-socket") + 1]
    else:
        address = ("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]))
    with Server(address, Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
