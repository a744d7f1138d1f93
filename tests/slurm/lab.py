"""A real Slurm on one Debian machine: a controller and nodes that are machines of their own.

    python tests/slurm/lab.py FOLDER    starts one, and stops it at Ctrl-C; `. FOLDER/env` to use it

Every node has its own network address, host name, processes and /dev/shm, by Linux namespaces; the
disk is what they share, but for a node's folders of Ray. So a node can be cut off its power by a
kill, and nothing outside FOLDER is touched but for links and namespaces whose names begin with
`mfl`. It needs root, and apt-get install slurm-wlm munge.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from processes import kill  # noqa: E402

NEEDED = ("slurmctld", "slurmd", "munged", "scontrol", "ip", "unshare", "nsenter")
MARK = "mambaflow-slurm-lab"  # in the environment of all that it starts, and of nothing else
CONTROLLER_PORT, NODE_PORT = 36817, 36818
NET, BRIDGE = "10.79.0", "mflbr"
START_S, STOP_S = 60.0, 15.0
# What a machine has for itself of /tmp: Ray's folders, ours and its own.
OWN = (Path("/tmp/ray"), Path(f"/tmp/mf-{os.getuid()}"))

CONF = """\
ClusterName=lab
SlurmctldHost={host}({net}.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/nodes/%n/spool
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/%n.slurmd.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
SlurmctldDebug=info
SlurmdDebug=info
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
MaxArraySize=5
SlurmctldTimeout=30
SlurmdTimeout=15
BatchStartTimeout=20
UnkillableStepTimeout=15
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=1 GraceTime=15
PartitionName=abrupt Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=1 GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=10 PreemptMode=OFF
"""
# cred_expire: a requeued job is held that long, 120 s by default.
# preempt_send_user_signal: else a preempted job gets SIGTERM, and no signal that it asked for.

# What Python needs may lie in a home that is shut to others, and a node's other users must get
# there: on a node that home is empty but for what is needed.
NODE = """\
root=$1; name=$2; home=$3; needed=$4; shift 4
hostname $name; ip link set lo up
mount --bind $root/etc/hosts /etc/hosts
if [ "$home" ]; then
    mkdir -p $root/needed
    mount --rbind $home $root/needed
    mount -t tmpfs -o mode=755 tmpfs $home
    for path in $needed; do mkdir -p $path; mount --bind $root/needed${path#$home} $path; done
fi
mount -t tmpfs -o size=1g tmpfs /dev/shm
for own in "$@"; do mount -t tmpfs -o mode=1777 tmpfs $own; done
chmod 700 "${!#}"
trap : TERM
slurmd -N $name -f $root/etc/slurm.conf
while :; do sleep infinity & wait $!; done
"""


def missing() -> str:
    """Why this machine can have no lab; "" where it can."""
    if sys.platform != "linux" or os.getuid() != 0:
        return "a Slurm of its own needs root on Linux"
    if absent := [name for name in NEEDED if shutil.which(name) is None]:
        return f"{', '.join(absent)} not found; apt-get install slurm-wlm munge iproute2"
    done = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True)
    return "" if done.returncode == 0 else f"no namespaces here: {done.stderr.decode().strip()}"


def shut_home() -> tuple[str, str]:
    """The home that keeps other users from Python or from this code, "" where there is none; and
    what of it they need."""
    needed = {sys.base_prefix, sys.prefix, str(Path(__file__).resolve().parents[2])}
    for path in sorted(needed):
        for parent in reversed(Path(path).parents):
            if not parent.stat().st_mode & stat.S_IXOTH:
                inside = sorted(p for p in needed if Path(p).is_relative_to(parent))
                return str(parent), " ".join(inside)
    return "", ""


def run(*command: str, check: bool = True, timeout: float = 60) -> str:
    """What a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done.stdout


def alive(process: "subprocess.Popen[bytes] | None") -> bool:
    return process is not None and process.poll() is None


def until(what: Callable[[], bool], why: Callable[[], str], seconds: float = START_S) -> None:
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise TimeoutError(f"not in {seconds} s: {why()}")
        time.sleep(0.1)


@dataclass
class Lab:
    """A cluster of `nodes` nodes called node1, node2, …, all of its state in `root`."""

    root: Path
    nodes: int = 3
    cpus: int = 2
    daemons: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    nodes_conf: str = ""

    @property
    def conf(self) -> Path:
        return self.root / "etc/slurm.conf"

    @property
    def names(self) -> list[str]:
        return [f"node{i + 1}" for i in range(self.nodes)]

    def start(self) -> None:
        """All daemons, and wait until every node is idle."""
        self._clear()
        os.environ["SLURM_CONF"] = str(self.conf)
        self._write()
        self._munge()
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        self.start_controller()
        for name in self.names:
            self.start_node(name)
        until(self.idle, lambda: run("sinfo", "-N", "-l", check=False) + self.log())

    def _clear(self) -> None:
        """What a lab left whose process was killed."""
        kill(MARK)
        for space in Path("/run/netns").glob("mfl*"):
            run("ip", "netns", "del", space.name, check=False)
        for link in [*Path("/sys/class/net").glob("mflv*"), Path(BRIDGE)]:
            run("ip", "link", "del", link.name, check=False)

    def _write(self) -> None:
        for name in ("etc", "log", "state", "run", "munge"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        lines, hosts = [], ["127.0.0.1 localhost", f"{NET}.1 {socket.gethostname()}"]
        for i, name in enumerate(self.names):
            (self.root / "nodes" / name / "spool").mkdir(parents=True, exist_ok=True)
            address = f"{NET}.{11 + i}"
            lines.append(
                f"NodeName={name} NodeAddr={address} Port={NODE_PORT} CPUs={self.cpus} "
                "RealMemory=4000 State=UNKNOWN"
            )
            hosts.append(f"{address} {name}")
        self.nodes_conf = "\n".join(lines)
        self.configure()
        (self.root / "etc/hosts").write_text("\n".join([*hosts, ""]))
        (self.root / "etc/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (self.root / "env").write_text(f"export SLURM_CONF={self.conf}\n")

    def configure(self, **settings: object) -> None:
        """Write slurm.conf, with settings in place of its own, for the controller's next start."""
        text = CONF.format(
            host=socket.gethostname().split(".")[0], net=NET, root=self.root,
            controller_port=CONTROLLER_PORT, nodes=self.nodes_conf,
        )  # fmt: skip
        for name, value in settings.items():
            text = re.sub(rf"^{name}=.*\n", "", text, flags=re.MULTILINE) + f"{name}={value}\n"
        self.conf.write_text(text)

    def _munge(self) -> None:
        # A daemon of its own with a key of its own: the machine's, if it has one, is left alone.
        key = self.root / "munge/key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o600)
        socket_, log = self.root / "run/munge.sock", self.root / "log/munged.log"
        self.daemons["munged"] = self.daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_}",
            f"--pid-file={self.root}/run/munged.pid", f"--log-file={log}",
            f"--seed-file={self.root}/munge/seed",
        )  # fmt: skip
        until(socket_.exists, lambda: "munged has no socket")

    def daemon(self, *command: str) -> "subprocess.Popen[bytes]":
        # Without a test's mark: what has it must end with the test.
        environment = {k: v for k, v in os.environ.items() if k != "MAMBAFLOW_TEST_MARK"}
        with (self.root / "log" / f"{command[0]}.out").open("ab") as out:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                env=environment | {"MAMBAFLOW_LAB": MARK},
            )  # fmt: skip

    def start_controller(self) -> None:
        if not alive(self.daemons.get("slurmctld")):
            self.daemons["slurmctld"] = self.daemon("slurmctld", "-D", "-f", str(self.conf))

    def restart_controller(self) -> None:
        """As an administrator does, for settings that it reads at its start."""
        process = self.daemons["slurmctld"]
        process.terminate()
        process.wait(START_S)
        self.start_controller()
        until(self.resumed, self.log)

    def kill_controller(self) -> None:
        """kill -9 of slurmctld."""
        self.daemons["slurmctld"].kill()
        assert self.daemons["slurmctld"].wait(STOP_S) == -signal.SIGKILL

    def start_node(self, name: str) -> None:
        if alive(self.daemons.get(name)):
            return
        number = self.names.index(name)
        space, link = f"mfl{name}", f"mflv{number}"
        if not Path(f"/run/netns/{space}").exists():
            run("ip", "netns", "add", space)
            run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            run("ip", "link", "set", link, "master", BRIDGE, "up")
            run("ip", "-n", space, "addr", "add", f"{NET}.{11 + number}/24", "dev", "eth0")
            run("ip", "-n", space, "link", "set", "eth0", "up")
        for own in OWN:
            own.mkdir(exist_ok=True)
        self.daemons[name] = self.daemon(
            "nsenter", f"--net=/run/netns/{space}", "unshare", "--uts", "--ipc", "--mount", "--pid",
            "--fork", "--kill-child", "--mount-proc", "bash", "-c", NODE, "node", str(self.root),
            name, *shut_home(), *map(str, OWN),
        )  # fmt: skip

    def kill_node(self, name: str) -> None:
        """The power cord: every process of the node is gone at once."""
        process = self.daemons.pop(name)
        # unshare itself: the kernel kills its child, and with that the node's whole pid namespace.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_S)
        (self.root / "run" / f"{name}.slurmd.pid").unlink(missing_ok=True)

    def idle(self) -> bool:
        """Whether every node waits for work."""
        shown = subprocess.run(
            ["sinfo", "-h", "-p", "main", "-N", "-o", "%T"], capture_output=True, text=True
        ).stdout.split()
        return shown == ["idle"] * self.nodes

    def restore(self) -> None:
        """Every daemon up again, no job left, every node idle: as a test finds it."""
        self.start_controller()
        for name in self.names:
            self.start_node(name)
        self.cancel_all()
        until(self.resumed, lambda: run("sinfo", "-N", "-l", check=False) + self.log())

    def cancel_all(self) -> None:
        for _ in range(20):
            jobs = run("squeue", "-h", "-o", "%A", check=False).split()
            if not jobs:
                return
            run("scancel", *set(jobs), check=False)
            time.sleep(0.5)

    def resumed(self) -> bool:
        if self.idle():
            return True
        for name in self.names:  # a crash can leave a node drained: "Duplicate jobid"
            run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
        return False

    def listening(self, name: str) -> set[int]:
        """The TCP ports that somebody listens at on a node."""
        found = run("ip", "netns", "exec", f"mfl{name}", "cat", "/proc/net/tcp").splitlines()[1:]
        fields = [line.split() for line in found]
        return {int(f[1].rpartition(":")[2], 16) for f in fields if f[3] == "0A"}

    def own(self, name: str) -> list[Path]:
        """What there is in a node's folders of Ray; nothing where it has no power."""
        if name not in self.daemons:
            return []
        seen = [Path(f"/proc/{self._first(name)}/root{own}") for own in OWN]
        return [path for folder in seen for path in folder.iterdir()]

    def _first(self, name: str) -> int:
        """The process with which a node began."""
        unshare = self.daemons[name].pid
        return int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0])

    def on_node(self, name: str, user: str, *command: str) -> list[str]:
        """A command line that runs another on a node, as one of its users."""
        who = pwd.getpwnam(user)
        return [
            "nsenter", f"--target={self._first(name)}", "--mount", "--uts", "--ipc", "--net",
            "--pid", f"--setuid={who.pw_uid}", f"--setgid={who.pw_gid}", "--wd=/", *command,
        ]  # fmt: skip

    def log(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted((self.root / "log").glob("*"))
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-1500:]}" for f in files)

    def stop(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired, FileNotFoundError):
            self.cancel_all()
        for name in [n for n in self.names if n in self.daemons]:
            self.kill_node(name)
        for name in self.names:
            run("ip", "netns", "del", f"mfl{name}", check=False)
        for process in self.daemons.values():
            process.kill()
            process.wait(STOP_S)
        run("ip", "link", "del", BRIDGE, check=False)


if __name__ == "__main__":
    lab = Lab(Path(sys.argv[1]).resolve())
    signal.signal(signal.SIGINT, lambda *_: sys.exit())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        lab.start()
        sys.stdout.write(f"up: . {lab.root}/env\n")
        sys.stdout.flush()
        signal.pause()
    finally:
        lab.stop()
