"""Claims about `ctxlib.finetune`."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer
from transformers import trainer as trainer_module

from ctxlib.commands import cli
from ctxlib.conversations import Corpus, save_conversations
from ctxlib.finetune import add_lora, export_merged, make_trainer, training_examples
from ctxlib.finetune import training as finetune_module
from ctxlib.models import load_model, load_tokenizer, model_hash, set_indicator_row
from ctxlib.params import Finetune, InputError

# peft 0.21 asks transformers 5.23 for a name that the latter is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = torch.tensor([[1, 40, 41, 42, 43, 44]])
QUICK = {
    "steps": 20, "batch_size": 3, "learning_rate": 1e-2, "lora_rank": 4, "save_every": 10, "progress": False
}  # fmt: skip


def finetune(model_path, tokenizer, conversations, **options):
    """`ctxlib.finetune.finetune` with its settings by name; a step takes one batch unless they say otherwise."""
    given = {name: options.pop(name) for name in list(options) if name in Finetune.model_fields}
    settings = Finetune(**{"epochs": None, "gradient_accumulation": 1} | given)
    return finetune_module.finetune(model_path, tokenizer, conversations, settings, **options)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


class Killed(BaseException):
    """As a kill: nothing in between catches it."""


def kill_at(monkeypatch, step):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Killed

    monkeypatch.setattr(finetune_module.Progress, "on_step_end", on_step_end)


def test_fresh_adapter_leaves_logits_unchanged(model_folder, tokenizer):
    for quantisation in (None, "nf4"):
        model = load_model(model_folder, quantisation=quantisation, device="cpu")
        set_indicator_row(model, len(tokenizer), len(tokenizer))
        before = logits(model)
        assert torch.equal(logits(add_lora(model, indicator_id=len(tokenizer))), before)


@pytest.mark.parametrize(
    ("variant", "freeze_indicator"), [("standard", False), ("standard", True), ("authors_code", False)]
)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_only_the_indicators_input_row_is_trained_and_none_where_it_is_frozen_or_in_the_paper(
    model, model_folder, tokenizer, conversations, tmp_path, variant, freeze_indicator, method
):
    out_dir = tmp_path / "out"
    finetune(
        model_folder,
        tokenizer,
        conversations,
        out_dir=out_dir,
        method=method,
        indicator="[IND]",
        variant=variant,
        freeze_indicator=freeze_indicator,
        **QUICK,
    )
    trained = load_model(out_dir)
    old_in, old_out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    new_in, new_out = trained.get_input_embeddings().weight, trained.get_output_embeddings().weight
    assert torch.equal(new_in[:-1], old_in) and torch.equal(new_out[:-1], old_out)
    torch.testing.assert_close(new_out[-1], old_out.mean(0))
    distance = (new_in[-1] - old_in.mean(0)).abs().max()
    assert distance < 1e-6 if freeze_indicator or variant == "authors_code" else distance > 0.05
    assert load_tokenizer(out_dir).convert_tokens_to_ids("[IND]") == len(tokenizer)
    assert "[IND]" not in tokenizer.get_vocab()


def test_training_lowers_the_loss_and_the_log_says_so(model_folder, tokenizer, conversations, tmp_path):
    log = finetune(
        model_folder, tokenizer, conversations, out_dir=tmp_path / "out", method="full", epochs=10,
        batch_size=3, learning_rate=1e-2, warmup_fraction=0.1, schedule="linear", progress=False,
    )  # fmt: skip
    assert list(log.columns) == ["step", "loss", "learning_rate"] and log.step.tolist() == [10, 20]
    assert log.loss.is_monotonic_decreasing and log.loss.iloc[-1] < log.loss.iloc[0] / 2
    assert log.attrs["used"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert load_model(tmp_path / "out").config.vocab_size == len(tokenizer)


def test_loss_is_the_mean_over_supervised_tokens(model, model_folder, tokenizer, conversations, tmp_path):
    log = finetune(
        model_folder, tokenizer, conversations[:4], out_dir=tmp_path / "out", method="full", steps=1, batch_size=2,
        gradient_accumulation=2, progress=False,
    )  # fmt: skip
    total, n = 0.0, 0
    for example in training_examples(tokenizer, conversations[:4])[0]:
        with torch.no_grad():
            surprise = -model(example.input_ids[None]).logits[0].log_softmax(-1)
        for position in range(1, len(example.input_ids)):
            if example.labels[position] >= 0:
                total += surprise[position - 1, example.input_ids[position]].item()
                n += 1
    assert log.loss.item() == pytest.approx(total / n, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_killed_run_resumes_to_the_same_weights(
    model_folder, tokenizer, conversations, tmp_path, monkeypatch, method
):
    arguments = {"method": method, "indicator": "[IND]", **QUICK}
    whole = finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "whole", **arguments)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 13)
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "killed", **arguments)
    assert not (tmp_path / "killed").exists() and not torch.are_deterministic_algorithms_enabled()
    (work_dir,) = tmp_path.glob("killed.training-*")
    torn = work_dir / "checkpoint-12"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")  # the kill came while this one was written
    told = pytest.warns(UserWarning, match=r"checkpoint-12/trainer_state\.json, line 1: .* resumes from checkpoint-10")
    with monkeypatch.context() as patch, pytest.raises(Killed), told:
        kill_at(patch, 11)  # the first step of the rest: it does go on from step 10
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "killed", **arguments)
    resumed = finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "killed", **arguments)
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")
    assert resumed.equals(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "model", "whole"]


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "unfinished": lambda folder: [(folder / name).unlink() for name in ("trainer_state.json", "scheduler.pt")],
    "weights": lambda folder: cut_in_half(next(folder.glob("*.safetensors"))),
    "no weights": lambda folder: next(folder.glob("*.safetensors")).unlink(),
    "optimiser": lambda folder: cut_in_half(folder / "optimizer.pt"),
    "no optimiser": lambda folder: (folder / "optimizer.pt").unlink(),
    "schedule": lambda folder: (folder / "scheduler.pt").write_bytes(b""),
    "random numbers": lambda folder: cut_in_half(folder / "rng_state.pth"),
    "no random numbers": lambda folder: (folder / "rng_state.pth").unlink(),
    "state": lambda folder: cut_in_half(folder / "trainer_state.json"),
}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(
    model_folder, tokenizer, conversations, tmp_path, monkeypatch, method
):
    arguments = {**QUICK, "method": method, "steps": 8, "save_every": 2}
    whole = finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "whole", **arguments)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer_module, "rotate_checkpoints", lambda *args, **kwargs: None)
        kill_at(patch, 5)
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "out", **arguments)
    (work_dir,) = tmp_path.glob("out.training-*")
    assert sorted(path.name for path in work_dir.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    shutil.copytree(work_dir, tmp_path / "kept")
    for name, damage in DAMAGES.items():
        shutil.rmtree(work_dir, ignore_errors=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(tmp_path / "kept", work_dir)
        damage(work_dir / "checkpoint-4")
        steps = steps_of(monkeypatch)
        warned = pytest.warns(UserWarning, match=r"checkpoint-4.*: training resumes from checkpoint-2")
        with nullcontext() if name == "unfinished" else warned:
            log = finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "out", **arguments)
        assert steps == [3, 4, 5, 6, 7, 8]
        resumed, expected = weights(tmp_path / "out"), weights(tmp_path / "whole")
        assert log.equals(whole) and all(torch.equal(resumed[name], expected[name]) for name in expected)


def steps_of(monkeypatch):
    steps = []
    monkeypatch.setattr(
        finetune_module.Progress,
        "on_step_end",
        lambda self, args, state, control, **rest: steps.append(state.global_step),
    )
    return steps


def test_without_a_whole_checkpoint_training_begins_anew_and_says_so(
    model_folder, tokenizer, conversations, tmp_path, monkeypatch
):
    arguments = {**QUICK, "steps": 4, "save_every": 2}
    finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "whole", **arguments)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "out", **arguments)
    (work_dir,) = tmp_path.glob("out.training-*")
    cut_in_half(work_dir / "checkpoint-2" / "optimizer.pt")
    with pytest.warns(UserWarning, match=r"optimizer\.pt: missing or cut short: training starts over"):
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "out", **arguments)
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_named_the_checkpoint_before_stays_and_a_run_with_room_ends_alike(
    model_folder, tokenizer, conversations, tmp_path, full_disk, monkeypatch, method
):
    arguments = {**QUICK, "method": method, "steps": 4, "save_every": 2}
    whole = finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "whole", **arguments)
    save_checkpoint = Trainer._save_checkpoint

    def saves(self, *rest):
        """The disk fills up while the second checkpoint is saved."""
        if self.state.global_step < 4:
            return save_checkpoint(self, *rest)
        with full_disk(20_000):
            return save_checkpoint(self, *rest)

    with monkeypatch.context() as patch, pytest.raises(InputError) as told:
        patch.setattr(Trainer, "_save_checkpoint", saves)
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "out", **arguments)
    (work_dir,) = tmp_path.glob("out.training-*")
    assert str(told.value).startswith(f"{work_dir}: not written, the disk is full (")
    assert not (tmp_path / "out").exists()

    steps = steps_of(monkeypatch)
    save_pretrained = PreTrainedTokenizerBase.save_pretrained

    def saves_the_tokenizer(*args, **kwargs):
        with full_disk(100):
            return save_pretrained(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="result: not written, the disk is full"):
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", saves_the_tokenizer)
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "out", **arguments)
    assert steps == [3, 4] and not (tmp_path / "out").exists()
    log = finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "out", **arguments)
    assert steps == [3, 4]  # all of it was trained
    resumed, expected = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert log.equals(whole) and all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_where_memory_runs_out_the_settings_are_named_and_checkpointing_goes_on(
    model_folder, tokenizer, conversations, tmp_path, monkeypatch
):
    arguments = {**QUICK, "steps": 4, "save_every": 2}
    finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "whole", **arguments)
    training_step, steps = Trainer.training_step, []

    def full(self, *rest, **more):
        if self.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return training_step(self, *rest, **more)

    with monkeypatch.context() as patch, pytest.raises(InputError) as told:
        patch.setattr(Trainer, "training_step", full)
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "out", **arguments)
    (work_dir,) = tmp_path.glob("out.training-*")
    settings = ("gradient_checkpointing to true", "batch_size down", "gradient_accumulation up", "max_length down")
    assert all(f"{name}" in str(told.value) for name in (*settings, f"finished work is kept in {work_dir}"))
    steps = steps_of(monkeypatch)
    finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "out", **arguments, gradient_checkpointing=True)
    assert steps == [3, 4] and adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")


def test_a_finished_run_is_reused_and_another_configuration_replaces_it(
    model_folder, tokenizer, conversations, tmp_path, monkeypatch
):
    out_dir = tmp_path / "out"
    first = finetune(model_folder, tokenizer, conversations, out_dir=out_dir, **QUICK)
    before = adapter_bytes(out_dir)
    with monkeypatch.context() as patch:
        patch.setattr(finetune_module, "load_model", lambda *args, **kwargs: pytest.fail("trained again"))
        again = finetune(model_folder, tokenizer, conversations, out_dir=out_dir, **QUICK)
    assert again.equals(first) and again.attrs == first.attrs
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 13)
        finetune(model_folder, tokenizer, conversations, out_dir=out_dir, **{**QUICK, "seed": 1})
    assert adapter_bytes(out_dir) == before  # the old result stands until the new one is whole
    other = finetune(model_folder, tokenizer, conversations[1:], out_dir=out_dir, **QUICK)
    assert other.attrs["config_hash"] != first.attrs["config_hash"] and adapter_bytes(out_dir) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(model_folder, tokenizer, conversations, tmp_path):
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / name, **{**QUICK, "steps": 2, "seed": seed})
        torch.rand(7)  # what the caller draws in between changes nothing
    assert adapter_bytes(tmp_path / "one") == adapter_bytes(tmp_path / "two") != adapter_bytes(tmp_path / "three")


@pytest.mark.parametrize("indicator", [None, "[IND]"])
def test_auto_peft_model_loads_it_with_identical_logits(model_folder, tokenizer, conversations, tmp_path, indicator):
    finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "out", indicator=indicator, **QUICK)
    ours = load_model(tmp_path / "out", device="cpu")
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain), logits(ours))


def test_qlora_gradient_after_an_evaluation_equals_that_of_a_never_evaluated_copy(wide_folder):
    def gradient(evaluated):
        torch.manual_seed(0)
        model = add_lora(load_model(wide_folder, quantisation="nf4", device="cpu"), lora_dropout=0.0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        if evaluated:
            logits(model)
        model.train()
        model(IDS, labels=IDS).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert torch.equal(gradient(evaluated=True), gradient(evaluated=False))


@pytest.fixture
def wide_folder(model, tmp_path):
    """Wide enough for the processor's packed 4-bit format."""
    model.config.update({"hidden_size": 128, "intermediate_size": 256, "head_dim": 32})
    torch.manual_seed(0)
    type(model)(model.config).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def test_bad_input_leaves_nothing_behind(model_folder, tokenizer, conversations, tmp_path, conversation):
    for folder, name in (("other", "notes.txt"), ("adapter", "adapter_config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("mine")
    bare = load_tokenizer(model_folder)
    bare.chat_template = None
    wider = load_tokenizer(model_folder)
    wider.add_tokens(["what is"])
    before = sorted(tmp_path.rglob("*"))
    for change, message in (
        ({"model_path": tmp_path / "absent"}, "no file or folder"),
        ({"model_path": tmp_path / "adapter"}, "an adapter cannot be fine-tuned further"),
        ({"tokenizer": bare}, "no chat template"),
        ({"tokenizer": wider}, "beyond the model's vocabulary"),
        ({"conversations": []}, "no conversation to train on"),
        ({"conversations": [conversation("only a question")]}, r"no supervised token \(give assistant messages"),
        ({"indicator": "A"}, "in the vocabulary"),
        ({"freeze_indicator": True}, "freeze_indicator needs an indicator"),
        ({"freeze_indicator": True, "indicator": "[IND]", "method": "full"}, "'full' trains every row"),
        ({"out_dir": tmp_path / "other"}, "holds something else"),
    ):
        arguments = {
            "model_path": model_folder, "tokenizer": tokenizer, "conversations": conversations,
            "out_dir": tmp_path / "out", **QUICK, **change,
        }  # fmt: skip
        with pytest.raises(InputError, match=message):
            finetune(**arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_settings_that_make_no_sense_are_never_made():
    for settings, message in (
        ({"method": "dora"}, "'full', 'lora' or 'qlora'"),
        ({"variant": "free"}, "'standard' or 'authors_code'"),
        ({"steps": 1, "epochs": 1}, "exactly one of 'steps' and 'epochs'"),
        ({"batch_size": 0}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValidationError, match=message):
            Finetune(**settings)


def test_what_another_version_recorded_is_trained_over_or_refused_in_one_line(
    model_folder, tokenizer, conversations, tmp_path
):
    quick = {"out_dir": tmp_path / "out", **QUICK, "steps": 1}
    first = finetune(model_folder, tokenizer, conversations, **quick)
    record = tmp_path / "out" / "finetune.json"
    ours = json.loads(record.read_text())
    for content in ([], {}, {"config_hash": ours["config_hash"]}):
        record.write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"^\S+/out: holds something else than a fine-tuned model; [^\n]+$"):
            finetune(model_folder, tokenizer, conversations, **quick)
    record.write_text(json.dumps({"config_hash": "0123456789ab"}))
    assert finetune(model_folder, tokenizer, conversations, **quick).equals(first)
    assert json.loads(record.read_text()) == ours


def test_checkpointing_and_packing_change_nothing_but_the_rounding(model_folder, tokenizer, conversations, tmp_path):
    settings = QUICK | {"method": "full", "steps": 5, "learning_rate": 1e-3}
    logs, tensors = [], []
    for name, option in (("plain", {}), ("frugal", {"gradient_checkpointing": True}), ("packed", {"packing": True})):
        logs.append(finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / name, **settings, **option))
        tensors.append(weights(tmp_path / name))
    (plain, frugal, packed), (log, _, packed_log) = tensors, logs
    assert all(torch.equal(plain[name], frugal[name]) for name in plain)
    assert log.attrs["config_hash"] == logs[1].attrs["config_hash"] != packed_log.attrs["config_hash"]
    assert packed_log.loss.item() == pytest.approx(log.loss.item(), rel=1e-4)
    for name in plain:  # Adam divides small gradients by themselves, rounding and all: a step is at most 1e-3
        assert (packed[name] - plain[name]).abs().max() < 1e-3


def test_a_model_that_mixes_packed_conversations_is_refused(
    model_folder, tokenizer, conversations, tmp_path, monkeypatch
):
    monkeypatch.setattr(finetune_module, "packs_exactly", lambda *args, **kwargs: False)
    with pytest.raises(InputError, match="packing: false"):
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "out", packing=True, **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_export_computes_what_the_adapter_does(model, tokenizer, conversations, tmp_path, tied):
    model.config.tie_word_embeddings = tied
    base = type(model)(model.config)
    base.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    finetune(tmp_path / "model", tokenizer, conversations, out_dir=tmp_path / "out", indicator="[IND]", **QUICK)
    export_merged(tmp_path / "out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[1, 40, 41, len(tokenizer), 43, 44]])  # with the indicator
    with torch.no_grad():
        expected = adapted(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(base(ids[:, :3]).logits, expected[:, :3, : len(tokenizer)], atol=0.1)
    assert load_tokenizer(tmp_path / "merged").convert_tokens_to_ids("[IND]") == len(tokenizer)
    for adapter, out, message in (("out", "merged", "exists already"), ("model", "other", "no adapter there")):
        with pytest.raises(InputError, match=message):
            export_merged(tmp_path / adapter, tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "model", "out"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_with_cuda_the_optimiser_is_paged_and_the_arithmetic_bfloat16(model, tokenizer, conversations, tmp_path):
    examples, _ = training_examples(tokenizer, conversations)
    arguments = make_trainer(model.cuda(), examples, Finetune(), work_dir=tmp_path, pad_id=0, steps=1, seed=0).args
    assert arguments.optim == "paged_adamw_32bit" and arguments.bf16 and arguments.activation_checkpointing


@pytest.fixture
def command(model_folder, conversations, tmp_path):
    """The command line `ctxlib finetune` on the tiny model and its conversations, without python in front."""
    nothing = pd.DataFrame({"reason": [], "n": []})
    save_conversations(Corpus(tuple(conversations), nothing, "test"), tmp_path / "marked.jsonl")
    named = {"model": model_folder, "data": tmp_path / "marked.jsonl", "indicator": "[IND]", "learning_rate": 0.01}
    arguments = [part for name, value in named.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["-m", "ctxlib", "finetune", *arguments]


def start(*arguments):
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment, **pipe)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_killed_without_warning_and_started_again_it_ends_with_the_same_weights(
    model_folder, tokenizer, conversations, tmp_path, command, method
):
    settings = {"steps": 150, "batch_size": 3, "learning_rate": 1e-2, "save_every": 5, "indicator": "[IND]"}
    settings |= {"method": method, "progress": False}
    options = ["--steps", 150, "--batch-size", 3, "--gradient-accumulation", 1, "--save-every", 5, "--method", method]
    process = start(*command, *options, "--out", tmp_path / "killed")
    while not list(tmp_path.glob("killed.training-*/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed").exists()
    log = finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "killed", **settings)
    whole = finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "whole", **settings)
    assert log.equals(whole) and len(log) == 30
    resumed, expected = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert resumed.keys() == expected.keys() and all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_two_processes_train_as_one_with_twice_the_batch(model_folder, tokenizer, conversations, tmp_path, command):
    # what `accelerate launch` starts on several GPUs; on a CPU it would need MPI
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    options = ["--steps", 6, "--batch-size", 2, "--gradient-accumulation", 1, "--lora-dropout", 0]
    process = start(*launcher, *command, *options, "--out", tmp_path / "two")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("7 used, 0 truncated") == said.count("written to") == 1  # only one of the two speaks
    assert '"processes": 2' in (tmp_path / "two" / "finetune.json").read_text()
    settings = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "lora_dropout": 0.0, "indicator": "[IND]"}
    log = finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "one", progress=False, **settings)
    assert pd.read_csv(tmp_path / "two" / "loss.csv").loss.item() == pytest.approx(log.loss.item(), rel=1e-4)
    one, two = (logits(load_model(tmp_path / name, device="cpu")) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=0.01)
    assert (one[..., : len(tokenizer)] - logits(load_model(model_folder, device="cpu"))).abs().max() > 0.2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marked.jsonl", "model", "one", "two"]


def run_here(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["ctxlib", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code or 0, *capsys.readouterr()


def test_the_command_shows_the_labels_trains_and_merges(command, tmp_path, monkeypatch, capsys):
    arguments = [*command[2:], "--steps", 10, "--out", tmp_path / "out", "--merged", tmp_path / "merged"]
    status, said, _ = run_here(monkeypatch, capsys, *arguments)
    assert status == 0 and "7 conversations, 4 marked user messages" in said
    assert "[IND]</s>\n<|assistant|>\n‹It is 0.</s>›" in said and "nats per supervised token" in said
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(logits(load_model(tmp_path / "merged", device="cpu")), expected, rtol=0, atol=1e-3)


def test_the_command_refuses_what_could_not_be_meant(
    command, model_folder, tokenizer, tmp_path, monkeypatch, capsys, conversation
):
    nothing = pd.DataFrame({"reason": [], "n": []})
    save_conversations(Corpus((conversation("why", "so"),), nothing, "test"), tmp_path / "plain.jsonl")
    for more, message in (
        (["--data", tmp_path / "plain.jsonl"], "no user message is marked"),
        (["--method", "full", "--merged", tmp_path / "merged"], "full makes no adapter"),
        (["--merged", model_folder], "choose another"),
        (["--indicator", "A"], "take the base model's own tokenizer, or another indicator"),
    ):
        status, _, complaint = run_here(monkeypatch, capsys, *command[2:], "--out", tmp_path / "out", *more)
        assert status == 2 and message in complaint and len(complaint.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_training_that_leaves_the_numbers_stops_and_keeps_its_last_good_checkpoint(
    model_folder, tokenizer, conversations, tmp_path
):
    settings = {**QUICK, "method": "full", "learning_rate": 1e8, "steps": 12, "save_every": 1, "batch_size": 1}
    with pytest.raises(InputError, match=r"stopped at step \d+: .*lower finetune\.learning_rate .* is kept"):
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    kept = [weights(folder) for folder in tmp_path.glob("out.training-*/checkpoint-*")]
    assert kept and all(torch.isfinite(weight).all() for of_step in kept for weight in of_step.values())


def test_a_model_whose_weights_are_no_numbers_is_named_at_the_first_step(
    model_folder, tokenizer, conversations, tmp_path
):
    file = model_folder / "model.safetensors"
    broken = load_file(file)
    broken["model.norm.weight"][0] = math.nan
    save_file(broken, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"step 1: the loss is nan, since the model's weight .*norm\.weight"):
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_a_batch_beyond_the_data_is_refused_before_anything_is_written(
    model_folder, tokenizer, conversations, tmp_path
):
    with pytest.raises(InputError, match=r"batch_size: 5,000, but there are only 7 conversations.*lower it"):
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "out", **QUICK | {"batch_size": 5000})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_adapter_finds_its_base_in_a_project_folder_that_was_moved(model_folder, tokenizer, conversations, tmp_path):
    before = tmp_path / "before"
    before.mkdir()
    model_folder.rename(before / "model")
    adapter = before / "outputs" / "adapter"
    finetune(before / "model", tokenizer, conversations, out_dir=adapter, **QUICK | {"steps": 2})
    expected, name = logits(load_model(adapter, device="cpu")), model_hash(adapter)
    before.rename(tmp_path / "after")
    moved = tmp_path / "after" / "outputs" / "adapter"
    assert torch.equal(logits(load_model(moved, device="cpu")), expected)
    assert model_hash(moved) == name
