"""A bucket on this machine: gcp-storage-emulator in a process of its own, and what makes every client here speak to it.

  python -m tests.bucket

prints the variables to be set, and serves gs://niso-test until it is ended. Loopback only.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator

NAME = "niso-test"
FAULT = ".fault"


def variables(port: int) -> dict[str, str]:
    """Of the environment, for gcsfs and google's own client, array_record's reader, and tensorstore's driver."""
    host = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": host,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": host,
        "TENSORSTORE_GCS_HTTP_URL": host,
        "TENSORSTORE_GCS_HTTP_VERSION": "1.1",
        "GOOGLE_CLOUD_PROJECT": NAME,
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # kinds of buckets that the emulator does not know
    }


@contextlib.contextmanager
def running() -> Iterator[dict[str, str]]:
    """Its variables, while an empty bucket NAME is there."""
    program = subprocess.Popen([sys.executable, "-m", "tests.bucket"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert program.stdout is not None
        port = int(program.stdout.readline())
        yield variables(port)
    finally:
        program.kill()
        program.wait()


def serve() -> None:
    """Serves until this process is ended; the first line of its output is the port."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound

    class Handler(server.RequestHandler):
        """With what the emulator lacks and its clients count on. One request at a time is served, so each is atomic."""

        read: int | None = None  # the generation of the object that is sent

        def do_GET(self) -> None:  # noqa: N802 (the names are http.server's)
            if not self.refused():
                super().do_GET()

        def do_POST(self) -> None:  # noqa: N802
            if not self.refused():
                super().do_POST()

        def do_DELETE(self) -> None:  # noqa: N802
            if not self.refused():
                super().do_DELETE()

        def refused(self) -> bool:
            """Answers a request for another generation of an object than there is: tensorstore's writes are conditional."""
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            found = re.search(r"/b/([^/]+)/o(?:/([^/]+))?$", url.path)
            name = urllib.parse.unquote((found and found[2]) or query.get("name", ""))
            if not found or not name:
                return False
            if fault := self.fault(name):
                return self.answer(fault)
            try:
                there = int(self.storage.get_file_obj(found[1], name)["generation"])
            except NotFound:
                there = 0
            if there and self.command == "GET" and query.get("alt") == "media":
                self.read = there
                # Ranges that count from the end: array_record asks for them.
                if last := re.fullmatch(r"bytes=-(\d+)", self.headers.get("Range", "")):
                    size = len(self.storage.get_file(found[1], name))
                    self.headers.replace_header("Range", f"bytes={max(0, size - int(last[1]))}-")
            code = None
            if "ifGenerationNotMatch" in query and there == int(query["ifGenerationNotMatch"]):
                code = 304 if self.command == "GET" else 412
            elif "ifGenerationMatch" in query and there != int(query["ifGenerationMatch"]):
                code = 412
            return self.answer(code) if code else False

        def fault(self, name: str) -> int | None:
            """The code with which a request for an object fails, where the object FAULT says so: "403 PATTERN"."""
            try:
                code, _, pattern = self.storage.get_file(NAME, FAULT).decode().partition(" ")
            except NotFound:
                return None
            return int(code) if name != FAULT and re.search(pattern, name) else None

        def answer(self, code: int) -> bool:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return True

        def send_response(self, code: int, message: str | None = None) -> None:
            super().send_response(code, message)
            if self.read and code < 300:
                self.send_header("x-goog-generation", str(self.read))

    server.RequestHandler = Handler
    server.server.HTTPServer.request_queue_size = 128  # clients ask for many at a time
    server.server.HTTPServer.handle_error = lambda *_: None  # clients leave as soon as they have what they want
    emulator = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket=NAME)
    emulator.start()
    port = emulator._api._httpd.server_address[1]
    print(port, flush=True)
    for name, value in variables(port).items():
        print(f"export {name}={value}", flush=True)
    signal.pause()


if __name__ == "__main__":
    serve()
    os._exit(0)
