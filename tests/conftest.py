"""Fixtures that all tests share: a random model and a tokenizer, both tiny.

torch is imported inside the fixtures, so that tests of files without torch start fast.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# Before torch or transformers are imported. `HF_HUB_OFFLINE=0 pytest -m network` still wins.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read where Triton's functions are defined, so before anything imports it

# a busy machine is no failure: how long one example takes is not what is tested
settings.register_profile("lorary", deadline=None)
settings.load_profile("lorary")

# the same names and numbers as in the pocket base (tests/benchmarks/pretrain.py)
SPECIAL_TOKENS = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SENTENCES = [
    "The patient was given five milligrams twice a day for the pain in the chest.",
    "The court finds that the party which broke the contract pays for the damage.",
    "The bank raised the rate, and the price of the bond fell on the same day.",
    "def add(left, right):\n    return left + right\n",
    "The children walked down to the river, and the dog ran after the ball.",
]


@pytest.fixture(scope="session")
def tiny_llama() -> "Callable[..., LlamaForCausalLM]":
    """`tiny_llama(seed=0, **config)` makes a new random Llama of 43,000 weights: same seed, same weights.

    Every call returns a model of its own, which the test may change. `vocab_size=len(tiny_tokenizer)` fits the
    tokenizer below. The global random state stays as it was.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)

    def make(seed: int = 0, **config: Any) -> LlamaForCausalLM:
        shape: dict[str, Any] = {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**(shape | config))).eval()

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of 300 tokens with begin, end, pad and a chat template; tests must not change it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A running Hub of our own (tests/hub_server), which the client in this process takes for the real one.

    The token is alice's, who may write to alice and acme; the client's cache is empty. `local_hub.env` is the same for
    a subprocess.
    """
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import close_session

    if "hub_server" not in sys.modules:  # a package beside the tests, which are no package
        folder = Path(__file__).parent / "hub_server"
        spec = importlib.util.spec_from_file_location(
            "hub_server", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        sys.modules["hub_server"] = importlib.util.module_from_spec(spec)
    server = importlib.import_module("hub_server.server")
    home = tmp_path / "hf-home"
    with server.HubServer(tmp_path / "hub") as hub:
        hub.env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_alice", "HF_HUB_DISABLE_XET": "1"}
        hub.env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        settings = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # what the functions of the module use
        yield hub
        close_session()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited between tries; nobody really waits."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited
