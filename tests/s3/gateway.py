"""A real S3 server for tests: Ceph's RADOS gateway over one monitor and one object store in memory, all of it ours.

Debian: ``apt-get install --no-install-recommends radosgw ceph-mon ceph-osd``. The configuration is the least that lets
a single store serve without replicas, as root, on loopback ports.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from tests.ports import free_port

PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool")
ACCESS_KEY, SECRET_KEY = "key-of-tests", "secret-of-tests"
START_SECONDS = 90

_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = {monitor}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
auth allow insecure global id reclaim = false
keyring = {folder}/keyring
run dir = {folder}/run
admin socket = {folder}/run/$name.$pid.asok
log file = {folder}/log/$name.log
setuser = {user}
setgroup = {group}
mon initial members = a
mon allow pool size one = true
mon data avail crit = 1
mon max pg per osd = 1000
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
osd crush update on start = false
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
[client.rgw]
rgw frontends = beast endpoint={host}:{port}
rgw data = {folder}/rgw
"""


def missing_programs() -> list[str]:
    """What has to be installed before a gateway can start."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Gateway:
    """Starts in ten to twenty seconds; `kill` and `serve` take its front away and bring it back, with its objects."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self._folder, self.host = folder, host
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._front: subprocess.Popen[bytes] | None = None
        self.port = free_port(host)
        self.endpoint = f"http://{host}:{self.port}"

    def start(self) -> None:
        folder, keyring = self._folder, self._folder / "keyring"
        for name in ("mon", "osd", "run", "log", "rgw"):
            (folder / name).mkdir(parents=True)
        fsid, store_id = str(uuid.uuid4()), str(uuid.uuid4())
        monitor = f"[v2:127.0.0.1:{free_port()},v1:127.0.0.1:{free_port()}]"
        configuration = _CONFIGURATION.format(
            fsid=fsid,
            monitor=monitor,
            folder=folder,
            host=self.host,
            port=self.port,
            user=pwd.getpwuid(os.getuid())[0],
            group=grp.getgrgid(os.getgid())[0],
        )
        (folder / "ceph.conf").write_text(configuration)
        everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        for name in ("client.admin", "client.rgw"):
            self._run("ceph-authtool", keyring, "--gen-key", "-n", name, *everything)
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", monitor, folder / "monmap")
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", folder / "monmap", "--keyring", keyring)
        self._daemons.append(self._spawn("ceph-mon", "-i", "a", "-f"))
        secret = self._run("ceph-authtool", "--gen-print-key").strip()
        (folder / "osd.json").write_text(json.dumps({"cephx_secret": secret}))
        self._run("ceph", "osd", "new", store_id, "0", "-i", folder / "osd.json")
        capabilities = ["--cap", "mon", "allow profile osd", "--cap", "osd", "allow *"]
        self._run("ceph-authtool", keyring, "-n", "osd.0", "--add-key", secret, *capabilities)
        self._run("ceph", "osd", "crush", "add", "osd.0", "1", "root=default")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", store_id)
        self._daemons.append(self._spawn("ceph-osd", "-i", "0", "-f"))
        self.serve()
        keys = ["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY]
        self._run("radosgw-admin", "user", "create", "--uid", "tests", "--display-name", "tests", *keys)

    def serve(self) -> None:
        """Starts the front and waits until it answers."""
        self._front = self._spawn("radosgw", "-n", "client.rgw", "-f")
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(self.endpoint, timeout=5).close()
                return
            except (urllib.error.URLError, OSError) as error:
                if time.monotonic() > deadline or self._front.poll() is not None:
                    raise RuntimeError(f"the gateway does not serve; see {self._folder}/log") from error
                time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to the front, as a machine that loses power."""
        assert self._front is not None
        self._front.kill()
        self._front.wait()

    def stop(self) -> None:
        for daemon in [*([self._front] if self._front else []), *reversed(self._daemons)]:
            daemon.kill()
            daemon.wait()

    def _run(self, program: str, *arguments: object) -> str:
        done = subprocess.run(self._command(program, *arguments), capture_output=True, text=True, timeout=START_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{program} {arguments[0]}: {done.stderr[-500:]}")
        return done.stdout

    def _spawn(self, program: str, *arguments: object) -> subprocess.Popen[bytes]:
        with (self._folder / "log" / f"{program}.out").open("ab") as log:
            return subprocess.Popen(self._command(program, *arguments), stdout=log, stderr=log)

    def _command(self, program: str, *arguments: object) -> list[str]:
        needs_configuration = program not in ("ceph-authtool", "monmaptool")
        return [program, *(["-c", f"{self._folder}/ceph.conf"] if needs_configuration else []), *map(str, arguments)]


def main() -> None:
    """Serves until Ctrl-C or SIGTERM, for whoever wants a bucket to try things on."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="gateway-") as folder:
        gateway = Gateway(Path(folder))
        try:
            gateway.start()
            keys = f"AWS_ACCESS_KEY_ID={ACCESS_KEY} AWS_SECRET_ACCESS_KEY={SECRET_KEY} AWS_DEFAULT_REGION=us-east-1"
            print(f"export AWS_ENDPOINT_URL={gateway.endpoint} {keys} NO_PROXY=127.0.0.1", flush=True)
            signal.pause()
        except KeyboardInterrupt:
            pass
        finally:
            gateway.stop()


if __name__ == "__main__":
    main()
