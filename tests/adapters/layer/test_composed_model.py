"""A composed model under what people do to ordinary models: it works, or is refused before anything happens."""

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lorary.adapters.kernels.dispatch import use_kernels
from lorary.adapters.layer.active import SLOT_THRESHOLD, close_small_gates
from lorary.adapters.layer.attach import attach, detach
from lorary.adapters.layer.base_check import BaseCheck
from lorary.adapters.layer.composed_model import ComposedModel
from lorary.adapters.layer.forward_state import running_state
from lorary.adapters.layer.gates import LayerGates
from lorary.adapters.layer.merge import merge_experts, unmerge_experts
from lorary.adapters.layer.routing import recording_routes
from lorary.domains.errors import IncompatibleError, InputError

RENAMED = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # in 5.23
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module")
def static(random_stack: Any) -> Any:
    """`static(base)`: the base with three random banks and constant gates."""

    def make(base: Any) -> Any:
        return attach(base, random_stack(base, static=True), router=None, fixed=torch.tensor([0.2, 0.3, 0.5]))

    return make


class Texts(Dataset):
    """Eight rows of random tokens with labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(3, 64, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def trainer(model: Any, folder: Any, **changes: Any) -> Trainer:
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, **(settings | changes))
    return Trainer(model=model, args=arguments, train_dataset=Texts(), eval_dataset=Texts())


# --- the class ---


def test_it_is_an_instance_of_its_bases_class_and_of_that_name(any_base: Any, compose: Any) -> None:
    composed = compose(any_base)

    assert isinstance(composed, type(any_base))
    assert isinstance(composed, ComposedModel)
    assert type(composed).__name__ == type(any_base).__name__
    assert type(composed) is type(compose(any_base))
    assert composed.can_generate()
    assert type(composed).config_class is type(any_base).config_class
    assert type(detach(composed)) is type(any_base)


def test_composing_over_a_composed_model_is_refused(base: Any, compose: Any, random_stack: Any) -> None:
    with pytest.raises(InputError, match="is a composed model"):
        attach(compose(base), random_stack(base), router=None, fixed=torch.ones(3))


# --- saving ---


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    "save",
    [
        lambda model, folder: model.save_pretrained(folder),
        lambda model, folder: model.save_pretrained(folder, state_dict=model.state_dict()),
        lambda model, folder: model.push_to_hub("me/mine"),
        lambda model, folder: trainer(model, folder.parent / "out")._save(str(folder.parent / "out")),
        lambda model, folder: model.__reduce_ex__(2),  # what torch.save calls
        lambda model, folder: copy.copy(model),
    ],
)
def test_saving_is_refused_with_the_command_that_saves(
    base: Any, compose: Any, tmp_path: Any, save: Any, trainable: bool
) -> None:
    composed = compose(base, trainable=trainable)

    with pytest.raises(InputError) as refusal:
        save(composed, tmp_path / "saved")

    assert "registry compose medicine+legal --out FOLDER" in str(refusal.value)
    assert not (tmp_path / "saved").exists()
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size]


def test_a_merged_model_is_saved_as_an_ordinary_folder(
    any_base: Any, static: Any, some_ids: Any, logits: Any, tmp_path: Any
) -> None:
    merged = merge_experts(static(any_base))
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained

    merged.save_pretrained(tmp_path / "saved")
    loaded, info = from_pretrained(tmp_path / "saved", output_loading_info=True)

    assert not any(info.values()), info
    assert type(loaded) is type(any_base)
    assert torch.equal(logits(loaded, input_ids=some_ids(2)), logits(merged, input_ids=some_ids(2)))
    assert merged.state_dict().keys() == any_base.state_dict().keys()
    assert merged.num_parameters() == any_base.num_parameters()


def test_an_unmerged_model_is_not_saved_again(base: Any, static: Any, tmp_path: Any) -> None:
    model = unmerge_experts(merge_experts(static(base)))

    with pytest.raises(InputError, match="save_pretrained"):
        model.save_pretrained(tmp_path / "saved")


def test_config_and_generation_config_are_saved(base: Any, compose: Any, tmp_path: Any) -> None:
    composed = compose(base)

    composed.config.save_pretrained(tmp_path)
    composed.generation_config.save_pretrained(tmp_path)

    assert type(composed.config).from_pretrained(tmp_path).to_dict() == composed.config.to_dict()


# --- what it says about its tensors ---


def test_the_state_dict_has_every_tensor_of_the_composition(any_base: Any, compose: Any) -> None:
    composed = compose(any_base, seed=1)
    held = {t.data_ptr() for t in composed.state_dict().values() if t.numel()}

    expected = [*composed.parameters(), *composed.routing.router.buffers()]
    expected += [
        buffer for name, buffer in composed.named_buffers() if ".expert_groups." in name or ".expert_gates." in name
    ]
    assert held >= {tensor.data_ptr() for tensor in expected if tensor.numel()}
    assert all(name.startswith("outer.") for name in composed.state_dict(prefix="outer."))


def test_the_number_of_parameters_counts_experts_and_gates(base: Any, random_stack: Any, compose: Any) -> None:
    composed, twice = compose(base, all_targets=True), compose(base, all_targets=True, trainable=True)
    banks = random_stack(base, all_targets=True).banks

    own = [layer for bank in banks for layer in bank.layers.values()]
    experts = sum(t.numel() for layer in own for t in [*layer.A.values(), *layer.B.values(), layer.expert_gate])
    ranks = sum(layer.rank * layer.expert_gate.shape[1] for layer in own)
    assert composed.num_parameters() == base.num_parameters() + experts + ranks
    assert composed.num_parameters(only_trainable=True) == 0
    assert twice.num_parameters(only_trainable=True) == sum(p.numel() for p in twice.parameters() if p.requires_grad)


def test_loading_a_state_dict_is_refused_and_writes_nothing(base: Any, compose: Any, digest: Any) -> None:
    composed, before = compose(base), digest(base)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in composed.state_dict().items()}

    for options in ({}, {"assign": True}, {"strict": False}):
        with pytest.raises(InputError, match="state dict"):
            composed.load_state_dict(zeros, **options)

    assert digest(base) == before


def test_a_copy_computes_alone(base: Any, compose: Any, some_ids: Any, logits: Any, generated: Any) -> None:
    composed = compose(base)
    expected, text = logits(composed, input_ids=some_ids()), generated(composed, input_ids=some_ids())

    twin = copy.deepcopy(composed)
    base.lm_head.weight.zero_()
    base.model.norm.weight = nn.Parameter(torch.zeros(32), requires_grad=False)

    assert torch.equal(logits(twin, input_ids=some_ids()), expected)
    assert torch.equal(generated(twin, input_ids=some_ids()), text)
    assert isinstance(twin, ComposedModel)
    assert (logits(twin.half().float(), input_ids=some_ids()) - expected).abs().max() < 0.05
    assert isinstance(twin.base_check, BaseCheck)
    twin.model.layers[2].self_attn.o_proj = nn.Linear(32, 32)
    with pytest.raises(IncompatibleError, match="o_proj"):
        logits(twin, input_ids=some_ids())


# --- moving and casting ---


@pytest.mark.parametrize("kind", ["routed", "static", "merged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_casting_a_composition_is_composing_over_the_cast_base(
    make_base: Any, compose: Any, static: Any, some_ids: Any, logits: Any, digest: Any, kind: str, dtype: torch.dtype
) -> None:
    make = compose if kind == "routed" else static
    base, ids = make_base("llama"), some_ids(2)
    composed: Any = make(base)
    sibling: Any = make(base)
    before, expected = digest(base), logits(sibling, input_ids=ids)
    wanted = make(make_base("llama").to(dtype))
    if kind == "merged":
        composed = merge_experts(composed)
        wanted = merge_experts(wanted)

    found = logits(composed.to(dtype), input_ids=ids)

    assert found.dtype == composed.dtype == dtype
    if kind == "merged":  # rounded once after the sum, or before it as well
        assert (found - logits(wanted, input_ids=ids)).abs().max() < 0.1
    else:
        assert torch.equal(found, logits(wanted, input_ids=ids))
    assert digest(base) == before
    assert torch.equal(logits(sibling, input_ids=ids), expected)
    gates = [module for module in composed.modules() if isinstance(module, LayerGates)]
    buffers = [b for module in gates for b in module.buffers()]
    buffers += [] if composed.routing.router is None else [*composed.routing.router.buffers()]
    assert {buffer.dtype for buffer in buffers if buffer.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float", "cpu"])
def test_every_way_to_cast_leaves_base_and_siblings_alone(
    base: Any, compose: Any, digest: Any, some_ids: Any, logits: Any, cast: str
) -> None:
    composed, sibling, before = compose(base, seed=1), compose(base, seed=1), digest(base)
    expected = logits(sibling, input_ids=some_ids())

    getattr(composed, cast)()
    getattr(composed.model.layers[1], cast)()  # a part of it, too
    getattr(composed.lm_head, cast)()

    assert digest(base) == before
    assert torch.equal(logits(sibling, input_ids=some_ids()), expected)
    assert (logits(composed.float(), input_ids=some_ids()) - expected).abs().max() < 0.2  # rounded to 16 bits


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_casting_the_base_leaves_its_compositions_alone(
    base: Any, compose: Any, some_ids: Any, logits: Any, dtype: torch.dtype
) -> None:
    first = compose(base)
    expected = logits(first, input_ids=some_ids())

    base.to(dtype)
    second = compose(base)

    assert torch.equal(logits(first, input_ids=some_ids()), expected)
    assert second.dtype == logits(second, input_ids=some_ids()).dtype == dtype
    assert not {p.data_ptr() for p in first.parameters()} & {p.data_ptr() for p in second.parameters()}


def test_casting_to_the_same_dtype_copies_nothing(base: Any, compose: Any) -> None:
    composed = compose(base)

    composed.to("cpu", torch.float32)

    assert {p.data_ptr() for p in composed.parameters()} == {p.data_ptr() for p in base.parameters()}


def test_a_bank_in_training_stays_float32(base: Any, compose: Any, some_ids: Any) -> None:
    composed = compose(base, trainable=True)
    optimizer = torch.optim.AdamW([p for p in composed.parameters() if p.requires_grad], lr=1e-2)

    composed.bfloat16().train()
    composed(input_ids=some_ids(), labels=some_ids()).loss.backward()
    optimizer.step()

    new = [p for p in composed.parameters() if p.requires_grad]
    assert {parameter.dtype for parameter in new} == {torch.float32}
    assert {id(p) for p in new} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert composed.lm_head.weight.dtype == torch.bfloat16


# --- training ---


def train_with_trainer(model: Any, folder: Any) -> None:
    trainer(model, folder).train()


def train_by_hand(model: Any, folder: Any) -> None:
    model.train()
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()


def train_weights_of_the_base(model: Any, folder: Any) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()


@RENAMED
@pytest.mark.parametrize(
    ("train", "kind", "prepare"),
    [
        (train_with_trainer, "routed", "nothing"),
        (train_with_trainer, "merged", "enable_input_require_grads"),
        (train_by_hand, "static", "gradient_checkpointing_enable"),
        (train_by_hand, "merged", "nothing"),
        (train_weights_of_the_base, "routed", "enable_input_require_grads"),
        (train_weights_of_the_base, "merged", "nothing"),
    ],
)
def test_training_a_frozen_composition_is_refused(
    base: Any, compose: Any, static: Any, digest: Any, tmp_path: Any, kind: str, prepare: str, train: Any
) -> None:
    composed = compose(base) if kind == "routed" else static(base)
    composed = merge_experts(composed) if kind == "merged" else composed
    before = digest(base)
    if prepare != "nothing":
        getattr(composed, prepare)()

    with pytest.raises(InputError, match="frozen") as refusal:
        train(composed, tmp_path)

    assert "registry add-domain and registry retrain" in str(refusal.value)
    assert digest(base) == before
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_trainer_evaluates_and_predicts(base: Any, compose: Any, tmp_path: Any) -> None:
    composed = compose(base)
    rows = [Texts()[index] for index in range(8)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        expected = composed(**batch)

    found = trainer(composed, tmp_path)

    assert found.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    predictions: Any = found.predict(Texts()).predictions  # type: ignore[arg-type]
    torch.testing.assert_close(torch.as_tensor(predictions), expected.logits)


def test_several_gpus_do_not_become_data_parallel(base: Any, compose: Any, some_ids: Any, logits: Any) -> None:
    composed = compose(base)

    wrapped = nn.DataParallel(composed)  # without a GPU: the model itself
    assert torch.equal(logits(wrapped, input_ids=some_ids()), logits(composed, input_ids=some_ids()))
    with pytest.raises(InputError, match="DataParallel"):  # what it calls for each of several GPUs
        composed._replicate_for_data_parallel()


# --- other changes ---


PEFT = {
    "q_proj": peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "all": peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    "lm_head": peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"),
    "no task": peft.LoraConfig(target_modules="all-linear"),
    "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", PEFT)
@pytest.mark.parametrize("kind", ["routed", "merged"])
def test_an_adapter_of_peft_is_refused_before_anything_changes(
    base: Any, compose: Any, static: Any, some_ids: Any, logits: Any, name: str, kind: str
) -> None:
    composed = compose(base) if kind == "routed" else merge_experts(static(base))
    expected, modules = logits(composed, input_ids=some_ids()), list(composed.modules())

    with pytest.raises(InputError, match="PEFT adapter") as refusal:
        peft.get_peft_model(composed, copy.deepcopy(PEFT[name]))

    assert "registry import NAME FOLDER" in str(refusal.value)
    assert list(composed.modules()) == modules
    assert not any(parameter.requires_grad for parameter in composed.parameters())
    assert torch.equal(logits(composed, input_ids=some_ids()), expected)


@pytest.mark.parametrize(
    "load",
    [
        lambda model, folder: peft.PeftModel.from_pretrained(model, folder),
        lambda model, folder: model.load_adapter(folder),
        lambda model, folder: model.add_adapter(PEFT["all"]),
        lambda model, folder: peft.inject_adapter_in_model(PEFT["q_proj"], model),
    ],
)
def test_a_saved_adapter_is_refused(make_base: Any, compose: Any, tmp_path: Any, load: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(make_base("llama"), copy.deepcopy(PEFT["q_proj"])).save_pretrained(tmp_path / "adapter")
    composed = compose(make_base("llama"))

    with pytest.raises(InputError, match="PEFT adapter"):
        load(composed, str(tmp_path / "adapter"))


def test_the_vocabulary_is_not_resized(base: Any, compose: Any, some_ids: Any, logits: Any) -> None:
    composed = compose(base)
    expected = logits(composed, input_ids=some_ids())

    with pytest.raises(InputError, match="cannot be resized"):
        composed.resize_token_embeddings(80)

    assert composed.resize_token_embeddings() is composed.get_input_embeddings()
    assert composed.resize_token_embeddings(64) is composed.get_input_embeddings()
    assert torch.equal(logits(composed, input_ids=some_ids()), expected)


@RENAMED
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.tie_weights(),
        lambda model: model.enable_input_require_grads(),
        lambda model: model.gradient_checkpointing_enable(),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: model.requires_grad_(False),
        lambda model: model.share_memory(),
    ],
)
def test_changes_without_a_meaning_for_experts_change_nothing(
    base: Any, compose: Any, some_ids: Any, logits: Any, change: Any
) -> None:
    composed = compose(base)
    expected, plain = logits(composed, input_ids=some_ids()), logits(base, input_ids=some_ids())

    change(composed)

    torch.testing.assert_close(logits(composed, input_ids=some_ids()), expected)
    assert torch.equal(logits(base, input_ids=some_ids()), plain)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("is_training", [False, True])
def test_gates_and_router_are_float32_under_autocast(
    make_base: Any, compose: Any, some_ids: Any, family: str, is_training: bool
) -> None:
    base = make_base(family)
    composed = compose(base, trainable=is_training).train(is_training)
    first = composed.routing.stack.layers[0]
    layer = composed.get_submodule(f"{composed.routing.layout.layers}.{first}")
    found: dict[str, Any] = {}

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        state = running_state()
        assert state is not None
        found.update(hidden=args[0] if args else kwargs["hidden_states"], gates=state.gates[module.expert_gates])

    layer.register_forward_pre_hook(keep, with_kwargs=True)
    ids = some_ids(2)
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.set_grad_enabled(is_training),
        recording_routes(composed) as routes,
    ):
        composed(input_ids=ids, use_cache=False)

    with torch.no_grad():
        hidden, router = found["hidden"], composed.routing.router
        slots = router.text_gates(ids, hidden, torch.ones_like(ids, dtype=torch.bool))
        slots = close_small_gates(slots, SLOT_THRESHOLD)
        expected = layer.expert_gates(hidden, slots)
    gates = found["gates"]
    if not is_training:
        gates = torch.zeros(24, expected.shape[-1])
        for part in found["gates"]:
            start, stop = part.slots or (0, 3)
            of_slots = (layer.expert_gates.slot_of_rank >= start) & (layer.expert_gates.slot_of_rank < stop)
            gates[part.start : part.stop, of_slots] = part.gates
        gates = gates.view_as(expected)
    assert gates.dtype == routes[0].slot_gate.dtype == torch.float32
    torch.testing.assert_close(routes[0].slot_gate, slots, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gates, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_training", [False, True])
def test_logits_under_autocast_are_those_of_the_reference(
    base: Any, compose: Any, some_ids: Any, is_training: bool
) -> None:
    composed = compose(base, trainable=is_training).train(is_training)

    def run(*, is_cast: bool = True) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast), torch.set_grad_enabled(is_training):
            return composed(input_ids=some_ids(2), use_cache=False).logits.detach().float()

    found, exact = run(), run(is_cast=False)
    with use_kernels("reference"):
        expected = run()

    # each rounds elsewhere: as close to the reference, and to the exact logits, as the reference is to these
    error = (expected - exact).abs().max()
    assert error <= 2**-4 * exact.abs().max()
    assert (found - exact).abs().max() <= 1.5 * error
    assert (found - expected).abs().max() <= error
