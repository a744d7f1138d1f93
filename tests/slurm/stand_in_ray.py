"""`ray start` in milliseconds, for tests of what is around it: a head listens, a node joins it, and
each has a child that ends with nobody."""

import argparse
import os
import socket
import subprocess
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--address")
parser.add_argument("--node-ip-address")
flags, others = parser.parse_known_args()
sys.stdout.write(f"started with {sys.argv[1:]}\n")
assert os.environ["RAY_AUTH_MODE"] == "token" and os.environ["RAY_AUTH_TOKEN_PATH"]
if "FAILING_NODE" in os.environ and os.environ["FAILING_NODE"] == os.environ["SLURMD_NODENAME"]:
    sys.exit("no GPU found")
# As Ray's agents: in a session of its own, and still there when its parent is killed.
SLEEP = [sys.executable, "-c", "import time; time.sleep(1000)"]
subprocess.Popen(SLEEP, start_new_session=True)
if flags.port:
    server = socket.create_server((flags.node_ip_address, flags.port))
else:
    host, _, port = flags.address.rpartition(":")
    link = socket.create_connection((host, int(port)), 10)
sys.stdout.write("Ray runtime started.\n")
sys.stdout.flush()
while True:
    time.sleep(1)
