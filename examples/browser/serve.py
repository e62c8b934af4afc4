"""Serve this folder's page on this machine: ``python examples/browser/serve.py``."""

import argparse
import contextlib
import os
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Page(SimpleHTTPRequestHandler):
    def guess_type(self, path: str | os.PathLike[str]) -> str:
        # Whatever the system's list of types says: browsers run modules of this type only.
        return "text/javascript" if str(path).endswith(".js") else super().guess_type(path)

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8080, help="0 is any free one")
    port = parser.parse_args().port
    folder = Path(__file__).parent
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(Page, directory=folder))
    except OSError as error:
        parser.exit(1, f"cannot listen on port {port}: {error.strerror}; choose another one with --port\n")
    with server:
        print(f"http://localhost:{server.server_port}/", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
