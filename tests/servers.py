"""Small servers on this machine that answer what a test says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cinema.chat import Endpoint


@contextmanager
def endpoints() -> Iterator[Callable[..., tuple[Endpoint, list[Any]]]]:
    """start(answer) runs a server that sends `answer(how often it was asked)`; gives its endpoint and what it heard."""
    running = list[tuple[ThreadingHTTPServer, threading.Thread]]()

    def start(answer: Callable[[int], str], status: int = 200) -> tuple[Endpoint, list[Any]]:
        asked = list[Any]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(answer(len(asked)).encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        running.append((server, thread))
        thread.start()
        return Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "key", "m"), asked

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()
