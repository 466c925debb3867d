"""Hosts that share nothing but a network: each has its own addresses, processes, host name, /tmp and /dev/shm.

Needs root and Debian's iproute2 and util-linux. The network is a bridge in a namespace of its own. This machine has an
address on it too, for the S3 gateway and for the submitter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.cluster.hosts import HEALTH_CHECKS, Hosts

REPOSITORY = Path(__file__).parents[2]
BOOT = """\
set -e
hostname {name}
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount --bind {temporary}/hosts /etc/hosts
mount --bind {temporary}/resolv.conf /etc/resolv.conf
{keep}
mount --rbind {temporary} /tmp
cd /
exec "$@"
"""


def missing() -> str | None:
    """Why separate hosts cannot be made here."""
    if os.getuid() != 0:
        return "only root can make separate hosts"
    for name in ("ip", "unshare", "mount"):
        if shutil.which(name) is None:
            return f"{name} is not installed (Debian: iproute2 util-linux)"
    name = f"cm-{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"cannot make network namespaces here: {done.stderr.strip()}"
    _ip("netns", "del", name)
    return None


class Network:
    """A bridge with one link to each host and one to this machine.

    Attributes:
        gateway_address: this machine's address on it.
    """

    def __init__(self, num_hosts: int) -> None:
        self._name = f"cm{os.getpid()}"
        self._subnet = f"198.18.{os.getpid() % 256}"  # reserved for benchmarks of networks
        self._num_hosts = num_hosts
        self.gateway_address = f"{self._subnet}.1"
        try:
            self._build()
        except BaseException:
            self.remove()
            raise

    def _build(self) -> None:
        bridge, here, there = f"{self._name}-br", f"{self._name}r", f"{self._name}q"
        _ip("netns", "add", bridge)
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
        _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", bridge)
        _ip("-n", bridge, "link", "set", there, "master", "br0", "up")
        _ip("addr", "add", f"{self.gateway_address}/24", "dev", here)
        _ip("link", "set", here, "up")
        for number in range(self._num_hosts):
            host, port, plug = self.namespace(number), f"{self._name}p{number}", f"{self._name}v{number}"
            _ip("netns", "add", host)
            _ip("link", "add", plug, "netns", host, "type", "veth", "peer", "name", port, "netns", bridge)
            _ip("-n", bridge, "link", "set", port, "master", "br0", "up")
            _ip("-n", host, "addr", "add", f"{self.address_of(number)}/24", "dev", plug)
            _ip("-n", host, "link", "set", plug, "up")
            _ip("-n", host, "link", "set", "lo", "up")

    def namespace(self, number: int) -> str:
        return f"{self._name}-h{number}"

    def address_of(self, number: int) -> str:
        return f"{self._subnet}.{10 + number}"

    def hosts_file(self) -> str:
        """Names of all hosts and of this machine."""
        names = {f"{self.address_of(number)}": self.namespace(number) for number in range(self._num_hosts)}
        lines = {"127.0.0.1": "localhost", self.gateway_address: "gateway", **names}
        return "".join(f"{address} {name}\n" for address, name in lines.items())

    def remove(self) -> None:
        names = [f"{self._name}-br", *map(self.namespace, range(self._num_hosts))]
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"{self._name}r"], capture_output=True, check=False)


class SeparateHosts(Hosts):
    """Hosts on a network of their own, the head first, with Ray's dashboard and Jobs server.

    Args:
        network: with a link for each host.
        count: number of hosts.
        more: variables of their processes.
    """

    def __init__(self, network: Network, count: int, **more: str) -> None:
        self._network = network
        # Ray's workers are nice to other programs of their host; here they would give way to those of all hosts.
        super().__init__(count, **HEALTH_CHECKS, RAY_worker_niceness="0", **more)

    @property
    def jobs(self) -> str:
        """URL of the Jobs server."""
        return f"http://{self.address_of(0)}:8265"

    def address_of(self, number: int) -> str:
        return self._network.address_of(number)

    def _head_port(self) -> int:
        return 6379

    def _head_options(self) -> list[str]:
        return [f"--dashboard-host={self.address_of(0)}", "--dashboard-port=8265", "--temp-dir=/tmp/ray"]

    def _on_host(self, number: int, temporary: Path) -> tuple[list[str], dict[str, str]]:
        name = self._network.namespace(number)
        # Whoever asks for the name of an address gets an answer at once: no name server can be reached from here.
        (temporary / "hosts").write_text(self._network.hosts_file())
        (temporary / "resolv.conf").touch()
        boot = self._folder / f"boot-{number}.sh"
        boot.write_text(BOOT.format(name=name, temporary=temporary, keep=_keep_repository(temporary)))
        enter = ["ip", "netns", "exec", name]
        isolate = ["unshare", "--pid", "--uts", "--mount", "--fork", "--kill-child", "--mount-proc"]
        return [*enter, *isolate, "bash", str(boot)], {"TMPDIR": "/tmp", "HOME": "/tmp"}

    def is_alive(self, number: int) -> bool:
        return self._hosts[number].poll() is None

    def start_again(self, number: int) -> None:
        """A host that was killed, or that has ended because the others gave it up, boots and joins again."""
        assert not self.is_alive(number)
        self._hosts[number] = self._start(number, self._folder / f"host-{number}")


def _keep_repository(temporary: Path) -> str:
    """Shell lines that show a host the code, if that lies below the /tmp of this machine."""
    if not REPOSITORY.is_relative_to("/tmp"):
        return ""
    place = temporary / REPOSITORY.relative_to("/tmp")
    return f"mkdir -p {place}\nmount --bind {REPOSITORY} {place}"


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
