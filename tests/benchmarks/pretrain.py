"""Pretrain the pocket base: the small bundled Llama for tests and demos without network or GPU.

    python tests/benchmarks/pretrain.py --general DIR --tokenizer-text FILE ... --out DIR --steps 3600
    python tests/benchmarks/pretrain.py --out DIR --score FILE ...

`--general` is a folder with `general.train*` and `general.validation*` as JSONL, optionally .gz or .xz, one
`{"text": ...}` per line. `--tokenizer-text` files are used for the vocabulary only (15 % of its training text) and
never for the model: domains that are added later must be new to it. Python files may be among them, so that
indentation gets tokens.

Recipe: Muon (Jordan et al. 2024) for the hidden matrices, AdamW for embeddings and norms, warm-up, constant, linear
decay; 256-token blocks at first, 512-token blocks for the last third.
"""

import argparse
import copy
import gzip
import hashlib
import json
import lzma
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Shape of the model and hyperparameters of the run."""

    hidden_size: int = 192
    layers: int = 8
    heads: int = 6
    intermediate_size: int = 512
    vocabulary: int = 4096
    tokens_per_step: int = 4096
    short_block: int = 256  # tokens
    long_block: int = 512  # tokens, for the last third of the run
    matrix_lr: float = 0.02
    vector_lr: float = 3e-3
    warmup_steps: int = 60
    decay_from: float = 0.45  # fraction of the run after which the learning rate falls linearly to zero
    seed: int = 0


def read_texts(path: Path) -> Iterator[str]:
    """Yield the `text` fields of a JSONL file, or a whole Python file as one text."""
    if path.suffix == ".py":
        yield path.read_text(encoding="utf-8", errors="replace")
        return
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def train_tokenizer(general: list[str], others: list[str], config: PretrainConfig) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with single digits on 85 % general and 15 % other text (by characters)."""
    rng = random.Random(config.seed)
    others = rng.sample(others, len(others))
    budget = round(sum(map(len, general)) * 0.15 / 0.85)
    chosen, size = [], 0
    for text in others:
        if size >= budget:
            break
        chosen.append(text)
        size += len(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(general + chosen, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Concatenate the token ids of all texts, each between the begin token and the end token."""
    rows = []
    for start in range(0, len(texts), 512):
        for ids in tokenizer(texts[start : start + 512])["input_ids"]:
            rows.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16))
    return np.concatenate(rows)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, texts: list[str], tokenizer: PreTrainedTokenizerFast, *, windows: int = 160):
    """Return bits per UTF-8 byte on the first 256 tokens of the first `windows` texts."""
    nats, size = 0.0, 0
    for text in texts[:windows]:
        ids = tokenizer(text)["input_ids"][:257]
        block = torch.tensor([ids])
        loss = model(input_ids=block, labels=block).loss.item()
        nats += loss * (len(ids) - 1)
        size += len(str(tokenizer.decode(ids, skip_special_tokens=True)).encode())
    return nats / math.log(2) / size


def learning_rate_factor(fraction: float, step: int, config: PretrainConfig) -> float:
    """Return the factor on the learning rate: warm-up by steps, constant, then linear decay by completed fraction."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    cool = min(1.0, (1.0 - fraction) / (1.0 - config.decay_from))
    return max(0.0, warm * cool)


def build_model(tokenizer: PreTrainedTokenizerFast, config: PretrainConfig) -> LlamaForCausalLM:
    """Create a randomly initialised Llama of the configured size with tied embeddings."""
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=SPECIAL_TOKENS.index("<|begin|>"),
            eos_token_id=SPECIAL_TOKENS.index("<|end|>"),
            pad_token_id=SPECIAL_TOKENS.index("<|pad|>"),
        )
    )


def train(
    model: LlamaForCausalLM,
    data: np.ndarray,
    *,
    config: PretrainConfig,
    steps: int,
    minutes: float,
    on_step: Callable[[int, float, float, int], None],
) -> int:
    """Train in place until `steps` or `minutes` are used up; return the number of steps taken.

    Args:
        on_step: Called with the step, the completed fraction of the run, the loss in nats and the tokens read.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    vectors = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=config.matrix_lr, weight_decay=0.01),
        torch.optim.AdamW(vectors, lr=config.vector_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    rng = np.random.default_rng(config.seed)
    began = time.monotonic()
    for step in range(steps):
        fraction = max(step / steps, (time.monotonic() - began) / 60 / minutes)
        if fraction >= 1.0:
            return step
        length = config.short_block if fraction < 2 / 3 else config.long_block
        starts = rng.integers(0, len(data) - length, size=config.tokens_per_step // length)
        block = torch.from_numpy(np.stack([data[s : s + length] for s in starts]).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=block, labels=block, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = learning_rate_factor(fraction, step, config)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, base_rates, strict=True):
            group["lr"] = rate * factor
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        on_step(step, fraction, loss.item(), (step + 1) * config.tokens_per_step)
    return steps


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save the model in bfloat16 and its tokenizer as a transformers checkpoint."""
    rounded: Any = copy.deepcopy(model)
    rounded.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


class _Monitor:
    """Step callback that prints progress, scores the model and saves it every 400 steps."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, validation: list[str], out: Path):
        self.model, self.tokenizer, self.validation, self.out = model, tokenizer, validation, out
        self.history: list[dict[str, float]] = []
        self.began = time.monotonic()

    def __call__(self, step: int, fraction: float, loss: float, tokens: int) -> None:
        """Print, score and save when due."""
        if step % 50 == 0:
            rate = tokens / (time.monotonic() - self.began)
            print(f"step {step} ({fraction:.1%}) loss {loss:.3f} {rate:.0f} tokens/s", flush=True)
        if step and step % 400 == 0:
            score = round(bits_per_byte(self.model, self.validation, self.tokenizer), 4)
            self.history.append({"step": step, "tokens": tokens, "bits_per_byte": score})
            print(f"step {step} validation {score:.4f} bits per byte", flush=True)
            save(self.model, self.tokenizer, self.out)


def pretrain(args: argparse.Namespace) -> dict[str, Any]:
    """Train tokenizer and model, save both, and return the record of the run."""
    config = PretrainConfig()
    train_files = sorted(args.general.glob("general.train*"))
    general = [text for path in train_files for text in read_texts(path)]
    validation = [text for path in sorted(args.general.glob("general.validation*")) for text in read_texts(path)]
    tokenizer = train_tokenizer(general, [t for p in args.tokenizer_text for t in read_texts(p)], config)
    data = pack(general, tokenizer)
    characters = sum(map(len, general)) / len(data)
    print(f"{len(general)} texts, {len(data)} tokens, {characters:.2f} characters a token", flush=True)

    model = build_model(tokenizer, config)
    args.out.mkdir(parents=True, exist_ok=True)
    monitor = _Monitor(model, tokenizer, validation, args.out)
    taken = train(model, data, config=config, steps=args.steps, minutes=args.minutes, on_step=monitor)
    save(model, tokenizer, args.out)
    return {
        "config": asdict(config),
        "steps": taken,
        "tokens": taken * config.tokens_per_step,
        "minutes": round((time.monotonic() - monitor.began) / 60, 1),
        "threads": args.threads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation_bits_per_byte": round(bits_per_byte(model, validation, tokenizer), 4),
        "history": monitor.history,
        "data": [{"file": p.name, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in train_files],
        "torch": torch.__version__,
    }


def score(folder: Path, files: list[Path]) -> dict[str, float]:
    """Return bits per byte of the saved model on the first 256 tokens of up to 160 texts per file."""
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return {
        f"{path.parent.name}/{path.name}": round(bits_per_byte(model, list(read_texts(path)), tokenizer), 4)
        for path in files
    }


def main() -> None:
    """Pretrain, or score an earlier run with `--score`; write the record to `pretraining.json`."""
    parser = argparse.ArgumentParser(description="Pretrain the pocket base, or score it.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--general", type=Path, help="folder with general.train* and general.validation*")
    parser.add_argument("--tokenizer-text", type=Path, nargs="*", default=[], help="JSONL or .py, for the vocabulary")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop, decayed, after this long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--score", type=Path, nargs="+", help="only score the model in --out on these files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.out / "pretraining.json"
    if args.score:
        record = json.loads(path.read_text(encoding="utf-8")) | {"scores": score(args.out, args.score)}
    elif args.general:
        record = pretrain(args)
    else:
        parser.error("give --general to pretrain, or --score to measure")
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2), flush=True)


if __name__ == "__main__":
    main()
