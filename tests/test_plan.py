"""`ctxlib plan`: what is exact is held against models that are really built, what is estimated against its bounds."""

import json
import socket
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ctxlib import cli, experiment
from ctxlib.finetune import _frozen_rows, add_lora
from ctxlib.models import load_model, set_indicator_row
from ctxlib.params import InputError, load_params
from ctxlib.plan import fits, hours, make_plan, show, sources
from ctxlib.plan.machines import GIB, GPUS
from ctxlib.plan.memory import footprints, replaced
from ctxlib.plan.network import KNOWN, as_config, count, training_memory

ROOT = Path(__file__).resolve().parents[1]
MINIATURE = ROOT / "params" / "miniature.yaml"
NINE = sorted((ROOT / "params").glob("*llama*-*.yaml"))
# peft 0.21 asks transformers 5.23 for a name that the latter is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the plan asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def hub_cache(monkeypatch, tmp_path):
    """An empty cache of the hub, whatever lies in that of this machine."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(folder))
    sources._cache.cache_clear()
    yield folder
    sources._cache.cache_clear()


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def small(kind=LlamaConfig, **changes):
    shape = {
        "vocab_size": 259, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    return kind(**(shape | changes))


def n_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def text(plan) -> str:
    return "\n".join(show(plan))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", 1_100_048_384),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
    ],
)
def test_the_known_shapes_have_as_many_parameters_as_their_makers_say(name, parameters):
    assert count(as_config(KNOWN[name])).parameters == parameters


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (LlamaForCausalLM, small()),
        (Qwen2ForCausalLM, small(Qwen2Config, tie_word_embeddings=True)),  # biases, and one embedding
    ],
)
def test_counts_are_those_of_the_model_that_is_built(model, config):
    network, built = count(config), model(config)
    assert network.parameters == built.num_parameters()
    assert network.weights("bfloat16") == n_bytes(built.to(torch.bfloat16).parameters())
    assert network.embeddings == len({id(p) for n, p in built.named_parameters() if p.shape[0] == 259})


def test_weights_in_nf4_take_what_bitsandbytes_takes(tmp_path):
    LlamaForCausalLM(small()).save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model", dtype="bfloat16", quantisation="nf4", device="cpu")
    states = [p.quant_state for p in loaded.parameters() if getattr(p, "quant_state", None)]
    beside = [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    assert len(states) == 3 * 7
    assert count(small()).weights("bfloat16", "nf4") == n_bytes([*loaded.parameters(), *beside])


def train_a_step(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    ids = torch.arange(1, 20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    gradients = n_bytes(p.grad for p in model.parameters() if p.grad is not None)
    return gradients, n_bytes(s[m] for s in optimiser.state.values() for m in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("tied", [False, True])
def test_lora_weights_gradients_and_optimiser_take_what_peft_and_adam_take(tied):
    network = count(small(tie_word_embeddings=tied))
    model = LlamaForCausalLM(small(tie_word_embeddings=tied)).to(torch.bfloat16)
    set_indicator_row(model, indicator_id=259, n_tokens=259)
    base = n_bytes(model.parameters())
    adapted = add_lora(model, 8, 16, 0.05, indicator_id=259).train()
    for row in _frozen_rows(adapted, "clean"):
        row.requires_grad_(False)
    planned = training_memory(network, method="lora", batch_size=1, length=19, rank=8, dropout=0.05)
    assert planned["weights"] == base
    assert planned["adapter"] == n_bytes(p for n, p in adapted.named_parameters() if "lora_" in n or "delta" in n)
    assert (planned["gradients"], planned["optimiser"]) == train_a_step(adapted)


def test_full_finetuning_holds_float32_weights_gradients_and_two_moments():
    model = LlamaForCausalLM(small()).train()
    set_indicator_row(model, indicator_id=259, n_tokens=259)
    planned = training_memory(count(small()), method="full", batch_size=1, length=19, rank=8, dropout=0.05)
    assert planned["weights"] == n_bytes(model.parameters()) and planned["adapter"] == 0
    assert (planned["gradients"], planned["optimiser"]) == train_a_step(model)


def test_the_cache_of_keys_and_values_is_as_large_as_the_models_own():
    model = LlamaForCausalLM(small()).to(torch.bfloat16).eval()
    cache = model(torch.ones(3, 17, dtype=torch.long), use_cache=True).past_key_values
    assert count(small()).kv_cache(3 * 17, "bfloat16") == n_bytes(t for x in cache.layers for t in (x.keys, x.values))


def test_operations_are_those_that_torch_counts_with_attention_halved_for_its_mask():
    network, model = count(small()), LlamaForCausalLM(small()).eval()
    model.set_attn_implementation("eager")  # whose products torch counts
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(2, 40, dtype=torch.long), use_cache=False)
    without_attention = network.forward_operations(80, 0, logits=80)
    attention = network.forward_operations(80, 40, logits=80) - without_attention
    assert counter.get_total_flops() == without_attention + 2 * attention


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_a_layer_keeps_for_its_gradients_is_estimated_within_a_quarter(method):
    """Measured: the bytes that autograd saves in one decoder layer under autocast, on a CPU."""
    config = small(hidden_size=256, intermediate_size=700, num_attention_heads=8, num_key_value_heads=8)
    model, tokens = LlamaForCausalLM(config), 128
    rotary = model.model.rotary_emb
    if method == "lora":
        model = add_lora(model.to(torch.bfloat16), 8, 16, 0.0).get_base_model()  # a CPU's dropout masks are larger
    layer = model.train().model.layers[1]
    hidden = torch.randn(1, tokens, 256, dtype=model.dtype, requires_grad=True)
    with torch.no_grad():
        rope = rotary(hidden, torch.arange(tokens)[None])
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    copied = 2 * sum(p.numel() for p in layer.parameters() if p.requires_grad and p.dim() == 2)  # by autocast
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes(), tensor  # kept alive: no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        layer(hidden, position_embeddings=rope, attention_mask=None)
    measured = sum(size for size, _ in saved.values()) - copied
    how = {"method": method, "batch_size": 1, "rank": 8, "dropout": 0.0}
    copies, planned = (training_memory(count(config), length=n, **how)["activations"] for n in (0, tokens))
    inputs, passing = 3 * 256 * model.dtype.itemsize, 2 * (2 * 700 + 2 * 256)  # of all layers; gradients on their way
    assert 0.75 < ((planned - copies) / tokens - inputs - passing) / (measured / tokens) < 1.25


def plan_of(path, **overrides):
    return make_plan(load_params(path, overrides))


@pytest.mark.parametrize("path", [*NINE, MINIATURE, ROOT / "params" / "smoke.yaml"], ids=lambda path: path.stem)
def test_every_params_file_has_a_plan_and_nothing_is_fetched(path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ctxlib", "plan", str(path)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    printed = capsys.readouterr().out
    assert left.value.code in (0, None)
    for title in (
        "Models",
        "Steps",
        "Downloads and disk",
        "GPU memory by batch size",
        "Time, estimated",
        "What is there",
    ):
        assert f"\n{title}" in printed
    assert "nan" not in printed


def test_the_paper_counts_where_the_data_are_on_the_hub():
    plan = plan_of(ROOT / "params" / "llama-2-7b-wizardlm.yaml")
    assert (plan.conversations.n, plan.conversations.length) == (57_523, 484)
    assert "Table 2" in plan.conversations.source and "Table 2" in text(plan)
    trained = [step for step in plan.steps if step.kind == "train"]
    assert [step.rows for step in trained] == [2 * 57_523] * 2  # two epochs, vanilla and indicator
    assert plan.downloads()["yihanwang617/WizardLM_70k_unfiltered"] == 4 * 57_523 * 484


def test_local_conversations_are_counted(tmp_path, model_folder):
    rows = [{"messages": [{"role": "user", "content": "x" * 10}, {"role": "assistant", "content": "y"}]}] * 30
    rows.insert(3, {"messages": [{"role": "assistant", "content": "y"}]})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    local = {f"models.{which}": str(model_folder) for which in ("pretrained", "instruct", "seed_model")}
    local |= {"conversations.source": str(tmp_path / "data.json"), "conversations.on_bad_row": "drop"}
    plan = plan_of(MINIATURE, **local, **{"models.chat_template": None, "allocation.layer": 1, "scoring.layer": 1})
    # a token a byte: BOS, <|user|> and newline, text, </s> and newline, <|assistant|> and newline, text, </s>, newline
    assert plan.conversations.n == 30
    assert plan.conversations.length == 1 + 9 + 10 + 2 + 14 + 1 + 2
    assert "1 × no user turn" in plan.conversations.source or "1 × leading assistant" in plan.conversations.source
    assert plan.downloads() == {} and plan.models["pretrained"].where == "a folder here"


def write_to_cache(cache, name, commit, files, ref="main"):
    folder = cache / f"models--{name.replace('/', '--')}"
    for file, content in files.items():
        path = folder / "snapshots" / commit / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    (folder / "blobs").mkdir(exist_ok=True)


def test_a_model_in_the_hubs_cache_is_read_there_and_not_downloaded_again(hub_cache):
    config = json.dumps(small().to_dict() | {"num_hidden_layers": 20}).encode()
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).encode()
    files = {"config.json": config, "model.safetensors.index.json": index, "one.safetensors": b"0" * 1000}
    write_to_cache(hub_cache, "owner/model", "a" * 40, files)
    params = {"models.pretrained": "owner/model", "models.revision": "a" * 40}
    partly = plan_of(MINIATURE, **params).models["pretrained"]
    assert partly.network.layers == 20 and partly.where.startswith("partly in the hub's cache")
    assert partly.to_download == partly.network.stored_bytes - 1000

    write_to_cache(hub_cache, "owner/model", "a" * 40, {"two.safetensors": b"0"})
    sources._cache.cache_clear()
    whole = plan_of(MINIATURE, **params).models["pretrained"]
    assert whole.where == "in the hub's cache" and whole.to_download == 0
    with pytest.raises(InputError, match="'owner/model' is neither here nor in the hub's cache"):
        plan_of(MINIATURE, **params | {"models.revision": "b" * 40})


def test_what_would_not_fit_names_changes_that_make_it_fit(tmp_path):
    path = ROOT / "params" / "tinyllama-ultrachat.yaml"
    plan = plan_of(path, **{"models.batch_size": 128})
    found = fits(plan)
    usable = {gpu.memory: gpu.usable for gpu in GPUS}
    assert {footprint.notebook for _, footprint, _, _ in found} >= {"01", "03"}
    for memory, footprint, change, size in found:
        assert footprint.total > usable[memory] >= size
        changed = plan_of(path, **{"models.batch_size": 128} | change)
        again = next(f for f in changed.footprints if (f.notebook, f.what) == (footprint.notebook, footprint.what))
        assert again.total == size
        if "finetune.batch_size" in change:
            assert change["finetune.batch_size"] * change["finetune.gradient_accumulation"] == 128
    assert "03 training takes" in text(plan) and "--set" in text(plan)


def test_where_no_setting_helps_a_larger_gpu_is_named():
    plan = plan_of(
        ROOT / "params" / "llama-3-8b-sharegpt.yaml", **{"needle.lengths": [500_000], "models.batch_size": 1}
    )
    assert (24, None) in [(memory, change) for memory, footprint, change, _ in fits(plan) if footprint.notebook == "01"]
    assert "no setting of this file makes it fit" in text(plan)
    assert any(problem.startswith("needle.lengths: 500,000 tokens") for problem in plan.problems)


def test_memory_and_time_grow_with_what_they_depend_on():
    params = load_params(NINE[0])
    plan = make_plan(params)
    double = footprints(
        replaced(params, {"models.batch_size": 2 * params.models.batch_size}), plan.models, plan.questions
    )
    for before, after in zip(plan.footprints, double, strict=True):
        assert (after.total > before.total) == (before.setting == "models.batch_size")
    for step in plan.steps:
        by_gpu = pd.Series(hours(plan, step))
        assert by_gpu.idxmin() == "H100 80 GB" and by_gpu.idxmax() == "RTX 3090 24 GB"


def test_training_takes_the_hours_that_its_operations_take():
    """Llama-2-7B on ShareGPT by hand: three passes of 2 × 6.6 G operations a token, and causal attention's."""
    plan = plan_of(ROOT / "params" / "llama-2-7b-sharegpt.yaml")
    step = next(step for step in plan.steps if step.kind == "train")
    tokens = 93_645 * 1567.68
    operations = 3 * tokens * (2 * (32 * (4 * 4096**2 + 3 * 4096 * 11_008) + 32_000 * 4096) + 2 * 32 * 4096 * 1567.68)
    assert hours(plan, step)["A100 80 GB"] == pytest.approx(operations / (0.35 * 312e12) / 3600)


def test_all_that_is_missing_is_told_with_its_remedy():
    problems = plan_of(ROOT / "params" / "llama-2-7b-sharegpt.yaml").problems
    supplied = ["needle.haystack", "models.instruct", *(f"qa.sources[{number}]" for number in range(3))]
    assert [problem.split(":")[0] for problem in problems] == supplied
    assert (
        "put a folder of .txt there" in problems[0] and "--set models.instruct=meta-llama/Llama-2-7b-hf" in problems[1]
    )
    assert all("SQuAD, QuAC or DROP" in problem for problem in problems[2:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"needle.lenghts": [1]}, "unknown key 'needle.lenghts'"),
        ({"models.pretrained": "./nowhere"}, "models.pretrained: no folder './nowhere'"),
        ({"models.pretrained": "owner/unknown"}, "its shape is not known; fetch that alone"),
        ({"models.pretrained": "tests/"}, "no readable config.json"),
        ({"models.seed_model": "miniature:nobody"}, "the miniature has no such model"),
        ({"conversations.source": "nowhere.json"}, "conversations.source: no file or folder 'nowhere.json'"),
        ({"conversations.source": "params/templates/"}, "no data file in this folder"),
        ({"models.chat_template": "nowhere.jinja"}, "models.chat_template: no file or folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(changes, message, capsys, monkeypatch):
    settings = [f"--set={key}={json.dumps(value)}" for key, value in changes.items()]
    monkeypatch.setattr("sys.argv", ["ctxlib", "plan", str(MINIATURE), *settings])
    with pytest.raises(SystemExit) as left:
        cli.main()
    printed = capsys.readouterr()
    assert left.value.code == 2 and not printed.out
    assert message in printed.err and printed.err.count("\n") == 1


def test_layers_windows_and_lengths_that_cannot_be_are_told():
    changes = {"allocation.layer": 6, "scoring.layer": 9, "needle.lengths": [2040], "conversations.max_length": 4096}
    problems = plan_of(MINIATURE, **changes).problems
    assert [problem.split(":")[0] for problem in problems] == [*list(changes)[:2], *list(changes)[2:]]
    assert "0 to 5" in problems[0] and "set it to 2048" in problems[3]


def test_what_is_there_is_counted(tmp_path):
    work = tmp_path / "outputs" / "miniature" / "work"
    for path in ("models/vanilla", "models/indicator.training-0123", "scores/abc", "answers", "receipts"):
        (work / path).mkdir(parents=True)
    (work / "answers" / "a.jsonl").write_text("{}\n{}\n{}\n")
    (work / "scores" / "abc" / "part-00000.parquet").write_bytes(b"")
    (work / "receipts" / "00_the_miniature.json").write_text("{}")
    manifest = json.loads((ROOT / "outputs" / "miniature" / "manifest.json").read_text())
    (work.parent / "manifest.json").write_text(json.dumps(manifest))
    plan = plan_of(MINIATURE, outputs=str(tmp_path / "outputs"))
    printed = text(plan)
    assert "3 of" in next(line for line in printed.split("What is there")[1].splitlines() if "answers" in line)
    assert "1 parts" in printed and "indicator.training-0123" in printed and "00_the_miniature" in printed
    assert "vanilla" in printed.split("fine-tuned models")[1].splitlines()[0]
    assert "work/models/vanilla" not in plan.results() and "work/models/indicator" in plan.results()
    entry = manifest["notebooks"]["04_evaluation"]
    assert f"04_evaluation: {entry['wall_seconds']:.0f} s, {entry['peak_memory_mib']:,} MiB" in printed


def test_the_miniature_fits_everywhere_and_needs_no_download():
    plan = plan_of(MINIATURE)
    assert plan.downloads() == {} and plan.problems == [] and fits(plan) == []
    assert text(plan).endswith("Everything fits.")
    assert max(footprint.total for footprint in plan.footprints) < 10 * GIB
    needles = len(experiment.needles(plan.params, experiment.tokenizer(plan.params)))
    assert plan.questions["needle"].n == needles
