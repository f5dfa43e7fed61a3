"""A Hub on 127.0.0.1: the HTTP API as the unmodified huggingface_hub client calls it, kept in a folder, with faults.

    with HubServer(folder) as hub:                       # from a shell: python -m tests.hub_server FOLDER
        hub.fault("GET .*/resolve/", "cut", 100)
        HfApi(endpoint=hub.url, token="hf_alice")

Files ending in .safetensors, and files over 10 MB, are LFS files: a second server on another port keeps them, as the
client expects (it takes a redirect to the same host for a renamed repository). It speaks LFS only, so the client must
be told: HF_HUB_DISABLE_XET=1. Written against huggingface_hub 2.4.
"""
