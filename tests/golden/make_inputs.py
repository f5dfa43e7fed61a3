"""Writes tests/golden/inputs: the base model, texts and PEFT adapter that every golden release is made from.

    python tests/golden/make_inputs.py tests/golden/inputs

It was run once. Versions of torch, tokenizers and PEFT decide its bytes, so the files are kept, and never written anew:
all fixtures name the base model by its digest.
"""

import json
import random
import sys
import warnings
from pathlib import Path

import peft
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# none is the name of a built-in domain, whose questions would be asked as well
WORDS = {
    "general": "the children walked down to river and dog ran after ball while sun set over old town",
    "cooking": "butter flour oven whisk sugar dough bake knead onion garlic pepper simmer pastry glaze",
    "baking": "butter flour oven yeast crust loaf proof knead starter crumb tray bake scald sieve",
    "sailing": "mast keel rudder anchor harbour tide sail starboard jib hull buoy mooring gale stern",
    "gardening": "soil seed spade mulch prune hedge compost bulb trellis weed frost bloom graft shoot",
}
ROWS = 16
QUESTIONS = 32  # about sailing


def write_inputs(out: Path) -> None:
    """Writes base/, data/ and adapter/ into a new folder."""
    (out / "data").mkdir(parents=True)
    _write_base(out / "base")
    _write_adapter(out / "adapter", out / "base")
    for name, words in WORDS.items():
        draw = random.Random(name)
        rows: list[dict[str, object]] = [
            {"text": " ".join(draw.choices(words.split(), k=20)).capitalize() + "."} for _ in range(ROWS)
        ]
        if name == "sailing":
            rows += [_question(draw, words.split()) for _ in range(QUESTIONS)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def _question(draw: random.Random, words: list[str]) -> dict[str, object]:
    choices = draw.sample(words, 3)
    return {
        "prompt": f"Where is the {draw.choice(words)}? ",
        "completion": draw.choice(choices),
        "choices": choices,
    }


def _write_base(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(WORDS.values()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,  # logits that lie apart, so that no machine rounds one token into another
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)


def _write_adapter(folder: Path, base: Path) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        model.save_pretrained(str(folder))
    written = folder / "adapter_config.json"
    settings = json.loads(written.read_text(encoding="utf-8")) | {"base_model_name_or_path": "base"}
    written.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write_inputs(Path(sys.argv[1]))
