"""A local Hub server for tests: the HTTP API that the unmodified huggingface_hub client uses, with fault injection.

    with HubServer(folder) as hub:                       # from a shell: python -m tests.hub_server FOLDER
        hub.fault("GET .*/resolve/", "cut", 100)
        HfApi(endpoint=hub.url, token="hf_alice")

Repositories are kept in a folder. Files ending in .safetensors, and files over 10 MB, are LFS files on a second server
with another port, because the client takes a redirect to the same host for a renamed repository. Xet is not supported,
so set HF_HUB_DISABLE_XET=1. Written against huggingface_hub 2.4.
"""
