"""torch.compile sees one graph, and what it makes of it computes the same.

In a process of its own: the checker of shapes that runs in these tests wraps functions in code that cannot be compiled.
"""

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from lorary.adapters.layer.attach import attach
from lorary.adapters.bank import new_bank
from lorary.adapters.config import BankConfig
from lorary.adapters.router.router import DomainRouter, Temperatures
from lorary.adapters.layer.stack import Stack
from lorary.domains.base_model import find_layout
from lorary.domains.statistics.hashing import PAIR_BUCKETS
from lorary.domains.statistics.statistics import DomainStatistics

torch.manual_seed(0)
config = AutoConfig.for_model(
    "llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2,
)
base = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
ids = torch.randint(3, 64, (2, 12))

def composed(trainable=False, static=False):
    generator = torch.Generator().manual_seed(1)
    settings = BankConfig(rank=2, experts=2.0, expert_free=0.0)
    banks = tuple(new_bank(base, find_layout(base), settings, generator=generator) for _ in range(3))
    for bank in banks:
        for name, tensor in bank.tensors():
            if name.endswith("B"):
                tensor.normal_(generator=generator)
    stack = Stack(names=("general", "a", "b"), banks=banks, trainable=trainable, static=static)
    if static:
        return attach(base, stack, router=None, fixed=torch.tensor([0.2, 0.3, 0.5]))
    eye = torch.eye(32, dtype=torch.float64)
    counts = [torch.randint(5, 90, (64,), generator=generator) for _ in range(3)]
    pairs = torch.zeros(PAIR_BUCKETS, dtype=torch.int64)
    statistics = [DomainStatistics(counts[i], pairs, 50.0, eye[i], eye * 50) for i in range(3)]
    router = DomainRouter(statistics, prior=torch.ones(3), temperatures=Temperatures(), width=32)
    return attach(base, stack, router=router)

def one_graph(model):
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        assert (expected - base(input_ids=ids).logits).abs().max() > 1e-2
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)

def breaks(model):
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        torch._dynamo.reset()
        return torch._dynamo.explain(model)(input_ids=ids[:, -1:], past_key_values=cache).graph_break_count

def steps(model, run, cache):
    # a prompt, which is not compiled, and four tokens after it
    found = [model(input_ids=ids, past_key_values=cache).logits[:, -1:]]
    for step in range(4):
        found.append(run(input_ids=ids[:, step : step + 1], past_key_values=cache).logits)
    return torch.cat(found, 1)

def one_graph_for_all_steps(model):
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    run = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        expected = steps(model, model, DynamicCache(config=config))
        found = steps(model, run, StaticCache(config=config, max_cache_len=20))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1, len(graphs)

def gradients(fullgraph):
    model = composed(trainable=True).train()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if fullgraph else model
    run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

match sys.argv[1]:
    case "routed":
        model = composed()
        one_graph(model)
        with model.reading_prompts(5):
            one_graph(model)
    case "static":
        one_graph(composed(static=True))
    case "decoding":
        assert breaks(composed()) <= breaks(base), (breaks(composed()), breaks(base))
    case "static-cache":
        one_graph_for_all_steps(composed())
        torch._dynamo.reset()
        model = composed()
        with model.reading_prompts():
            one_graph_for_all_steps(model)
    case "training":
        expected, found = gradients(False), gradients(True)
        assert found.keys() == expected.keys() and found
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.parametrize("what", ["routed", "static", "decoding", "static-cache", "training"])
def test_a_composed_model_compiles_without_a_break_of_its_own(what: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, what], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
