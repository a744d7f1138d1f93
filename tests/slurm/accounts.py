"""What sacct remembers: slurmdbd over a MariaDB, both the lab's own."""

import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab import Lab, run, until

NEEDED = ("slurmdbd", "sacct", "mariadbd", "mariadb", "mariadb-install-db")
PORT, DATABASE_PORT = 36819, 36816
FORGETS_S = 2  # after that the controller need not remember a job that has ended

CONF = """\
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
LogFile={root}/log/slurmdbd.log
PidFile={root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""
GRANTS = """\
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY 'slurm';
CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';
GRANT ALL ON slurm_acct_db.* TO slurm@localhost;
"""


def missing() -> str:
    """Why this machine can have no accounting; "" where it can."""
    absent = [name for name in NEEDED if shutil.which(name) is None]
    return f"{', '.join(absent)} not found; apt-get install slurmdbd mariadb-server" * bool(absent)


@dataclass
class Accounts:
    """Accounting for a lab, while it is on."""

    lab: Lab

    @property
    def folder(self) -> Path:
        return self.lab.root / "database"

    def start(self) -> None:
        self._database()
        conf = self.lab.root / "etc/slurmdbd.conf"
        conf.write_text(CONF.format(root=self.lab.root, port=PORT, database_port=DATABASE_PORT))
        conf.chmod(0o600)  # else it does not start
        self.lab.daemons["slurmdbd"] = self.lab.daemon("slurmdbd", "-D")
        until(lambda: _listens(PORT), self.lab.log)
        self.lab.configure(
            AccountingStorageType="accounting_storage/slurmdbd", AccountingStorageHost="127.0.0.1",
            AccountingStoragePort=PORT, AccountingStoragePass=self.lab.root / "run/munge.sock",
            MinJobAge=FORGETS_S,
        )  # fmt: skip
        self.lab.restart_controller()

    def _database(self) -> None:
        data, at = self.folder / "data", self.folder / "socket"
        self.folder.mkdir()
        run(
            "mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root",
            "--auth-root-authentication-method=normal", "--skip-test-db",
        )  # fmt: skip
        self.lab.daemons["mariadbd"] = self.lab.daemon(
            "mariadbd", "--no-defaults", f"--datadir={data}", "--user=root", f"--socket={at}",
            "--bind-address=127.0.0.1", f"--port={DATABASE_PORT}", "--skip-log-bin",
            f"--pid-file={self.folder}/pid", "--innodb-buffer-pool-size=32M",
            "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0",
        )  # fmt: skip
        root = ["mariadb", "--no-defaults", f"--socket={at}", "--user=root"]

        def granted() -> bool:
            done = subprocess.run([*root, "--execute", GRANTS], capture_output=True)
            return done.returncode == 0

        until(granted, self.lab.log)

    def stop(self) -> None:
        self.lab.configure()
        self.lab.restart_controller()
        for name in ("slurmdbd", "mariadbd"):
            process = self.lab.daemons.pop(name)
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
