"""A TCP proxy before the S3 server: slow lines, cut uploads, lost answers."""

from __future__ import annotations

import socket
import socketserver
import threading
import time

CHUNK_BYTES = 2**14


class Proxy:
    """Forwards connections, as badly as told.

    Attributes:
        bytes_per_second: of each connection and direction; none: unlimited.
        num_cuts: so many of the next connections are cut once they have sent ``cut_after_bytes``.
        num_lost_answers: so many of the next answers to a PUT are swallowed and their connection is closed.
        num_puts: PUT requests seen.
    """

    def __init__(self, port: int) -> None:
        self.bytes_per_second: float | None = None
        self.cut_after_bytes = 0
        self.num_cuts = self.num_lost_answers = self.num_puts = 0
        self._lock = threading.Lock()
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", port)) as server:
                    proxy._forward(self.request, server)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """Connections that break are what this proxy is for."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        loses_answer = threading.Event()

        def up() -> None:
            sent = 0
            while data := client.recv(CHUNK_BYTES):
                if data.startswith(b"PUT "):
                    with self._lock:
                        self.num_puts += 1
                        if self.num_lost_answers:
                            self.num_lost_answers -= 1
                            loses_answer.set()
                server.sendall(data)
                sent += len(data)
                if self._takes_cut(sent):
                    break
                self._throttle(len(data))
            _close(server, client)

        def down() -> None:
            while data := server.recv(CHUNK_BYTES):
                if loses_answer.is_set() and not data.startswith(b"HTTP/1.1 100"):
                    break
                client.sendall(data)
                self._throttle(len(data))
            _close(client, server)

        def quietly(pump) -> None:
            try:
                pump()
            except OSError:
                _close(client, server)

        uploading = threading.Thread(target=quietly, args=(up,), daemon=True)
        uploading.start()
        quietly(down)
        uploading.join()

    def _takes_cut(self, sent: int) -> bool:
        with self._lock:
            if self.num_cuts and sent > self.cut_after_bytes:
                self.num_cuts -= 1
                return True
        return False

    def _throttle(self, num_bytes: int) -> None:
        if self.bytes_per_second:
            time.sleep(num_bytes / self.bytes_per_second)


def _close(*sockets: socket.socket) -> None:
    for one in sockets:
        try:
            one.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue
