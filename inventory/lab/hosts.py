#!/usr/bin/env python3
"""Inventory of the lab that `make up` creates: its addresses and key, as the lab tool recorded them.

LAB_NAME chooses among several labs. A script rather than variables with lookups, because Ansible evaluates those anew
for every task: literal values make a run a third faster.
"""

import json
import os
import sys
from pathlib import Path

name = os.environ.get("LAB_NAME") or "appliance"
record = Path(__file__).resolve().parents[2] / ".lab" / name / "lab.json"
try:
    lab = json.loads(record.read_text())
except FileNotFoundError:
    # Not an error of its own: playbooks then say that no host matched, and linters read inventories too.
    others = sorted(path.parent.name for path in record.parents[1].glob("*/lab.json"))
    choose = f", or choose with LAB_NAME: {', '.join(others)}" if others else ""
    print(f"There is no lab named '{name}'. Create it with `make up LAB_NAME={name}`{choose}.", file=sys.stderr)
    json.dump({"appliance": {"hosts": []}, "_meta": {"hostvars": {}}}, sys.stdout)
    sys.exit()

options = ["-o", f'UserKnownHostsFile="{lab["directory"]}/known_hosts"']
options += ["-o", "StrictHostKeyChecking=yes", "-o", "IdentitiesOnly=yes"]
variables = {
    "ansible_host": "127.0.0.1",
    "ansible_port": lab["ssh_port"],
    "ansible_user": lab["ssh_user"],
    "ansible_ssh_private_key_file": f"{lab['directory']}/id_ed25519",
    "ansible_ssh_common_args": " ".join(options),
    "lab_state": lab,
}
json.dump({"appliance": {"hosts": ["lab"]}, "_meta": {"hostvars": {"lab": variables}}}, sys.stdout)
