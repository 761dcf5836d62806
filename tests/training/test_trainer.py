"""Adapters trained with a quantized cache lose less with it, and training that fails leaves the last good ones."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from narrowkv import PackedCache, load_model
from narrowkv.errors import TrainingError
from narrowkv.evaluate import cut_windows
from narrowkv.evaluate.sources import read_text
from narrowkv.training.trainer import QuantizedTrainer, divergence

peft = pytest.importorskip("peft")

IDS = torch.arange(8 * 40).view(8, 40) * 31 % 95 + 2


def adapted(model, rank=4):
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))


def trainer(model, folder, ids=IDS, source="int2", distill=True, teacher=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"} | options,
        label_names=["labels"],
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    return QuantizedTrainer(
        model, arguments, train_dataset=rows, eval_dataset=rows[:2], source=source, distill=distill, teacher=teacher
    )


@torch.no_grad()
def loss_with_cache(model, ids, source):
    with model.disable_adapter():
        expected = model(input_ids=ids, use_cache=False).logits
    found = model(input_ids=ids, past_key_values=PackedCache(model, source, strict=True)).logits
    return float(divergence(expected, found))


def test_divergence_is_that_of_distributions_and_leaves_padding_out():
    expected, found = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    each = (expected.softmax(-1) * (expected.softmax(-1) / found.softmax(-1)).log()).sum(-1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    torch.testing.assert_close(divergence(expected, found), each.mean())
    torch.testing.assert_close(divergence(expected, found, mask), each[mask.bool()].mean())
    assert divergence(expected, expected.clone()).abs() < 1e-6


def test_the_built_in_model_loses_less_on_text_that_it_was_not_trained_on(tmp_path):
    model, tokenizer = load_model("narrowkv://demo", "float32")
    ids = cut_windows(tokenizer, read_text("narrowkv://train"), 128, 32)
    held_out = cut_windows(tokenizer, read_text("narrowkv://held-out"), 256, 2)
    model = adapted(model, rank=8)
    before = loss_with_cache(model, held_out, "kivi-2-r32")
    trainer(model, tmp_path, ids, "kivi-2-r32", max_steps=16, learning_rate=5e-3).train()
    assert loss_with_cache(model, held_out, "kivi-2-r32") < 0.95 * before


def test_checkpointing_and_accumulated_steps_learn_the_same(tiny, tmp_path):
    losses = []
    for options in (
        {},
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    ):
        found = trainer(adapted(tiny()), tmp_path, max_steps=3, seed=1, **options)
        found.train()
        losses.append([row["loss"] for row in found.state.log_history if "loss" in row])
        assert found.quantized is None
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-3)


def test_evaluating_is_quantized_too(tiny, tmp_path):
    model = adapted(tiny())
    found = trainer(model, tmp_path).evaluate()["eval_loss"]
    assert found == pytest.approx(loss_with_cache(model, IDS[:2], "int2"), rel=1e-4)


def test_language_modeling_needs_no_teacher(tiny, tmp_path):
    found = trainer(tiny(), tmp_path, distill=False, learning_rate=1e-3)
    found.train()
    losses = [row["loss"] for row in found.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    with pytest.raises(
        TrainingError, match=r"no teacher to distill from: add adapters with peft, or pass the unchanged model\.$"
    ):
        trainer(tiny(), tmp_path)
    student, teacher = tiny(), tiny()
    found = trainer(student, tmp_path, teacher=teacher, max_steps=2, learning_rate=1e-4)
    found.train()
    assert all(torch.equal(*pair) for pair in zip(teacher.parameters(), tiny().parameters(), strict=True))
    assert not torch.equal(student.lm_head.weight, teacher.lm_head.weight)


@pytest.mark.parametrize("where", ["loss", "keys"])
def test_a_loss_that_is_no_number_leaves_the_last_good_adapters(where, tiny, tmp_path, monkeypatch):
    model = adapted(tiny())
    found, seen = trainer(model, tmp_path), []
    step = QuantizedTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.append({name: part.detach().clone() for name, part in model.named_parameters() if part.requires_grad})
        if where == "keys" and self.state.global_step == 2:
            next(part for name, part in model.named_parameters() if "k_proj.lora_B" in name).data.fill_(torch.nan)
        loss = step(self, model, inputs, *args, **kwargs)
        return loss * torch.nan if self.state.global_step == 2 else loss

    monkeypatch.setattr(QuantizedTrainer, "compute_loss", compute_loss)
    with pytest.raises(TrainingError, match=r"^The loss is no number any more at step 3; .* with a lower learning rate\.$"):
        found.train()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    expected = {name.replace(".default", ""): part for name, part in seen[1].items()}
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], part) for name, part in expected.items())


def test_a_loss_that_never_was_a_number_saves_nothing(tiny, tmp_path):
    model = tiny()
    model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(
        TrainingError, match=r"^The loss is no number at the first step; check the model's weights and dtype\.$"
    ):
        trainer(adapted(model), tmp_path).train()
    assert not list(tmp_path.glob("*.safetensors"))
