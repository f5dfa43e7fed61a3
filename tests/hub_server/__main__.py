"""Run the server until interrupted, and print the environment variables for a client."""

import sys
import time
from pathlib import Path

from .server import HubServer

with HubServer(Path(sys.argv[1])) as hub:
    print(f"export HF_ENDPOINT={hub.url} HF_TOKEN=hf_alice HF_HUB_DISABLE_XET=1", flush=True)
    while True:
        time.sleep(3600)
