"""Runs the Hub until it is interrupted; prints what a shell needs to use it."""

import sys
import time
from pathlib import Path

from .server import HubServer

with HubServer(Path(sys.argv[1])) as hub:
    print(f"export HF_ENDPOINT={hub.url} HF_TOKEN=hf_alice HF_HUB_DISABLE_XET=1", flush=True)
    while True:
        time.sleep(3600)
