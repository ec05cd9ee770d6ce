"""A real Slurm of several nodes on this host, each with a network, a host name and processes of its own.

Every node is a set of namespaces that a holder process keeps: network (``10.77.0.0/24``, joined by a bridge in the
controller's), host name, and mounts (its own ``/etc/hosts``). Nothing of it is visible in the host's network, and all
is gone once the holders and the daemons are. A node's daemon and its jobs live in a process namespace below, whose end
kills them all, as a power cut would.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.slurm import COMMON_CONF, missing, munge, search_path

__all__ = ["Cluster", "slurm_nodes", "why_not"]

_CONTROLLER = "mtctl"
_CONF = """
ClusterName=nodes
SlurmctldHost={controller}(10.77.0.1)
SlurmUser=root
SlurmdUser=root
SlurmdSpoolDir={home}/spool_%n
SlurmdPidFile={home}/slurmd_%n.pid
SlurmdLogFile={home}/slurmd_%n.log
SlurmdTimeout={timeout}
MessageTimeout=5
KillWait=3
UnkillableStepTimeout=10
{nodes}
"""


def why_not() -> str:
    """Why this machine cannot have such a cluster; empty if it can."""
    if lacking := missing():
        return f"Slurm is not installed: {', '.join(lacking)} missing"
    tools = ("ip", "unshare", "nsenter", "mount")
    if lacking := [name for name in tools if shutil.which(name, path=search_path()) is None]:
        return f"{', '.join(lacking)} missing"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "add", "probe", "type", "veth"],
        env=dict(os.environ, PATH=search_path()), capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"namespaces cannot be made: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass
class Node:
    """A machine of its own, as far as Slurm and the ranks see.

    Attributes:
        name: of the host.
        holder: keeps its namespaces.
        daemon: its ``slurmd``, and with it every process that runs on the node; None while it is off.
    """

    name: str
    holder: subprocess.Popen[bytes]
    daemon: subprocess.Popen[bytes] | None = None

    def inside(self, *command: str) -> list[str]:
        """A command, run on the node."""
        return ["nsenter", f"--target={self.holder.pid}", "--net", "--uts", "--mount", "--wd=/", *command]

    def pids(self) -> list[int]:
        """Processes that run on the node, but for the holder."""
        own = Path(f"/proc/{self.holder.pid}/ns/net").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and (entry / "ns/net").readlink() == own:
                    found.append(int(entry.name))
        return [pid for pid in found if pid != self.holder.pid]


@dataclass
class Cluster:
    """A running Slurm.

    Attributes:
        home: holds its configuration and logs.
        env: environment in which Slurm's commands find it.
        controller: runs ``slurmctld``, and the users' commands.
        nodes: by name.
    """

    home: Path
    env: dict[str, str]
    controller: Node
    nodes: dict[str, Node] = field(default_factory=dict)

    def run(self, *command: str, check: bool = True, timeout: float = 120) -> str:
        """Run a command on the controller.

        Returns:
            What it printed.

        Raises:
            AssertionError: if it failed.
        """
        done = subprocess.run(
            self.controller.inside(*command), env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: ``JobState``, ``NodeList``, ``Restarts``, ``Reason``, ..."""
        for attempt in range(4):  # a controller with much to do does not answer now and then
            line = self.run("scontrol", "show", "job", "-o", number, check=attempt == 3)
            if line:
                break
            time.sleep(2)
        return dict(part.split("=", 1) for part in line.split() if "=" in part)

    def state(self, node: str) -> str:
        """Of a node, as ``sinfo`` says it: "idle", "down*", "draining", ..."""
        return self.run("sinfo", "-h", "-N", "-n", node, "-o", "%T").strip()

    def update(self, node: str, state: str) -> None:
        """Drain a node, or resume it."""
        self.run("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")

    def start(self, name: str) -> None:
        """Switch a node on."""
        node = self.nodes[name]
        below = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "slurmd", "-D", "-N", name]
        node.daemon = _start(node.inside(*below), self.env, self.home / f"slurmd_{name}.out")

    def kill(self, name: str) -> None:
        """Switch a node off, with all that runs on it."""
        node = self.nodes[name]
        for pid in node.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if node.daemon is not None:
            node.daemon.kill()
            node.daemon.wait()
            node.daemon = None

    def freeze(self, name: str) -> None:
        """Stop every process of a node: it answers nothing any more, and nothing on it ends."""
        for pid in self.nodes[name].pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """Let a frozen node go on."""
        for pid in self.nodes[name].pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def wait(self, what: str, done: Callable[[], Any], limit: float) -> Any:
        """Wait until ``done()`` is true, and return it.

        Raises:
            AssertionError: if it is not within ``limit`` seconds; the message holds the daemons' last words.
        """
        deadline = time.monotonic() + limit
        while not (found := done()):
            if time.monotonic() > deadline:
                queue = self.run("squeue", "-h", "-o", "%i %j %T %r %N %S", check=False)
                nodes = self.run("sinfo", "-N", "-h", "-o", "%N %T %E", check=False)
                raise AssertionError(f"no {what} within {limit:g} s\n{queue}\n{nodes}\n{self.logs()}")
            time.sleep(0.3)
        return found

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted(path for path in self.home.glob("*.[lo]*") if path.is_file())
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in files)


def _ends_with_us() -> None:
    """In a child: be killed when the process that started it is gone, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _start(command: Sequence[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, preexec_fn=_ends_with_us,
            start_new_session=True,
        )  # fmt: skip


def _machine(name: str, home: Path, env: dict[str, str], stack: ExitStack) -> Node:
    """Namespaces with a host name and an ``/etc/hosts`` of their own; on loopback alone at first."""
    ready = home / f"{name}.ready"
    script = (
        f"mount --make-rprivate / && mount --bind {home}/hosts /etc/hosts && hostname {name} && ip link set lo up"
        f" && touch {ready} && exec sleep infinity"
    )
    holder = _start(["unshare", "--net", "--uts", "--mount", "sh", "-c", script], env, home / f"{name}.out")
    stack.callback(holder.wait)
    stack.callback(holder.kill)
    deadline = time.monotonic() + 10
    while not ready.exists():
        assert holder.poll() is None and time.monotonic() < deadline, (home / f"{name}.out").read_text()
        time.sleep(0.02)
    return Node(name, holder)


@contextmanager
def slurm_nodes(
    home: Path, names: Sequence[str], *, cpus: int = 2, timeout: int = 10, patience: float = 120.0
) -> Iterator[Cluster]:
    """Start it, and end it with all that runs on it.

    Args:
        home: empty directory with a short path (munge's socket lies in it).
        names: of the nodes.
        cpus: of each node, as Slurm shall believe.
        timeout: seconds after which a node that does not answer is down.
        patience: seconds until all nodes must be idle.

    Raises:
        AssertionError: if a node does not come up; the message holds the daemons' logs.
    """
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o755)
    (home / "state").mkdir()
    for name in names:
        (home / f"spool_{name}").mkdir()
    addresses = {_CONTROLLER: "10.77.0.1", **{name: f"10.77.0.{11 + n}" for n, name in enumerate(names)}}
    (home / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
    )
    lines = "\n".join(f"NodeName={name} NodeAddr={addresses[name]} CPUs={cpus} State=UNKNOWN" for name in names)
    conf = home / "slurm.conf"
    conf.write_text((_CONF + COMMON_CONF).format(controller=_CONTROLLER, home=home, nodes=lines, timeout=timeout))
    env = dict(os.environ, SLURM_CONF=str(conf), PATH=search_path())
    with ExitStack() as stack:
        controller = _machine(_CONTROLLER, home, env, stack)
        cluster = Cluster(home, env, controller)
        cluster.run("ip", "link", "add", "bridge", "type", "bridge")
        cluster.run("ip", "addr", "add", "10.77.0.1/24", "dev", "bridge")
        cluster.run("ip", "link", "set", "bridge", "up")
        for number, name in enumerate(names):
            node = cluster.nodes[name] = _machine(name, home, env, stack)
            peer = f"port{number}"
            cluster.run(
                "ip", "link", "add", peer, "type", "veth", "peer", "name", "eth0", "netns", str(node.holder.pid)
            )  # fmt: skip
            cluster.run("ip", "link", "set", peer, "master", "bridge", "up")
            for words in (["addr", "add", f"{addresses[name]}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
                subprocess.run(node.inside("ip", *words), env=env, check=True)
        daemon = _start(munge(home), env, home / "munged.out")
        stack.callback(daemon.wait)
        stack.callback(daemon.kill)
        time.sleep(0.5)
        daemon = _start(controller.inside("slurmctld", "-D"), env, home / "slurmctld.out")
        stack.callback(daemon.wait)
        stack.callback(daemon.kill)
        for name in names:
            stack.callback(cluster.kill, name)
            cluster.start(name)
        cluster.wait(
            "idle nodes",
            lambda: cluster.run("sinfo", "-h", "-N", "-o", "%T", check=False).split() == ["idle"] * len(names),
            patience,
        )
        yield cluster
