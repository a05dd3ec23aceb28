"""`ctxlib plan`: exact numbers are checked against real models, estimates against their bounds."""

import json
import random
import socket
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ctxlib import experiment
from ctxlib.commands import cli, sources
from ctxlib.commands.network import KNOWN, as_config, count
from ctxlib.commands.plan import make_plan, print_plan
from ctxlib.commands.plan.machines import GIB, GPUS
from ctxlib.commands.plan.memory import footprints, training_memory
from ctxlib.commands.plan.texts import frame, needle_contexts
from ctxlib.commands.plan.workload import padding
from ctxlib.finetune import TrainingExample, add_lora, collate, pack, training_order
from ctxlib.finetune.adapters import frozen_rows
from ctxlib.finetune.loss import CHUNK_ELEMENTS
from ctxlib.models import load_model, set_indicator_row
from ctxlib.params import InputError, load_params
from ctxlib.questions.needle import text_needles
from ctxlib.roles import role_map

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
MINIATURE = ROOT / "params" / "miniature.yaml"
SMOKE = ROOT / "params" / "smoke.yaml"  # the miniature with few questions
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
    return "\n".join(print_plan(plan))


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
    for row in frozen_rows(adapted, inputs_too=False):
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


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_layers_keep_for_their_gradients_is_estimated_within_a_quarter(method, checkpointing):
    """Measured: the bytes that autograd saves under autocast, on a CPU, in one decoder layer, or in all of them."""
    config = small(hidden_size=256, intermediate_size=700, num_attention_heads=8, num_key_value_heads=8)
    model, tokens = LlamaForCausalLM(config), 128
    rotary = model.model.rotary_emb
    if method == "lora":
        model = add_lora(model.to(torch.bfloat16), 8, 16, 0.0).get_base_model()  # a CPU's dropout masks are larger
    layers = model.train().model.layers[: 1 if checkpointing else None]
    hidden = torch.randn(1, tokens, 256, dtype=model.dtype, requires_grad=True)
    with torch.no_grad():
        rope = rotary(hidden, torch.arange(tokens)[None])
    weights = {p.untyped_storage().data_ptr() for p in layers.parameters()}
    copied = 2 * sum(p.numel() for p in layers.parameters() if p.requires_grad and p.dim() == 2)  # by autocast
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes(), tensor  # kept alive: no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        for layer in layers:
            hidden = layer(hidden, position_embeddings=rope, attention_mask=None)
    measured = sum(size for size, _ in saved.values()) - copied
    how = {"method": method, "batch_size": 1, "rank": 8, "dropout": 0.0, "checkpointing": checkpointing}
    copies, planned = (training_memory(count(config), length=n, **how)["activations"] for n in (0, tokens))
    inputs = 3 * 256 * model.dtype.itemsize if checkpointing else 0  # of all layers
    passing = 2 * (2 * 700 + 2 * 256)  # gradients on their way
    assert 0.75 < ((planned - copies) / tokens - inputs - passing) / (measured / tokens) < 1.25


def test_a_packed_batch_has_a_mask_of_its_whole_row_squared(model):
    """And a padded one of each conversation's: what is planned beyond it differs by no more than these."""
    masks = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, arguments, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    lengths = (12, 20)
    examples = [TrainingExample(*(torch.ones(n, dtype=torch.long) for _ in range(3))) for n in lengths]
    padded = collate(examples, pad_id=0)
    model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"])
    packed = pack(examples)
    model(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False)
    assert [mask.numel() for mask in masks] == [2 * 20**2, sum(lengths) ** 2]
    how = {"method": "full", "batch_size": 2, "length": 20, "rank": 8, "dropout": 0.0}
    by_packing = [training_memory(count(small()), packing=packing, **how)["activations"] for packing in (False, True)]
    assert by_packing[1] - by_packing[0] == 3 * ((2 * 20) ** 2 - 2 * 20**2)


def test_padding_is_that_of_the_batches_that_training_makes():
    section = load_params(NINE[0]).finetune.model_copy(update={"packing": False})
    rng = random.Random(1)
    lengths = [round(rng.expovariate(1 / 300)) + 1 for _ in range(200)]
    for grouped in (False, True):
        changed = section.model_copy(update={"batch_size": 4, "gradient_accumulation": 8, "group_by_length": grouped})
        corpus = [TrainingExample(*(torch.ones(n, dtype=torch.long) for _ in range(3))) for n in lengths * 20]
        order = training_order([len(e.input_ids) for e in corpus], 32, len(corpus), 5, grouped)
        batches = [collate([corpus[row] for row in order[i : i + 4]], pad_id=0) for i in range(0, len(order), 4)]
        read = sum(len(example.input_ids) for example in corpus)
        expected = sum(batch["input_ids"].numel() for batch in batches) / read
        assert padding(changed, lengths) == pytest.approx(expected, rel=0.05)
        assert (expected > 1.5) != grouped
    for without in ({"packing": True, "batch_size": 4}, {"packing": None, "batch_size": 4}, {"batch_size": 1}):
        assert padding(section.model_copy(update=without), lengths) == 1


def plan_of(path, gpu="a6000", **overrides):
    return make_plan(load_params(path, overrides), gpu)


def hours_by_gpu(params):
    plans = on_each_gpu(make_plan(params))
    return pd.DataFrame([[plan.hours(step) for plan in plans] for step in plans[0].steps], columns=list(GPUS))


def on_each_gpu(plan):
    return [replace(plan, gpu=gpu) for gpu in GPUS.values()]


@pytest.mark.parametrize("path", [*NINE, MINIATURE, ROOT / "params" / "smoke.yaml"], ids=lambda path: path.stem)
def test_every_params_file_has_a_plan_and_nothing_is_fetched(path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ctxlib", "plan", str(path)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    printed = capsys.readouterr().out
    assert left.value.code in (0, None)
    for title in ("Models", "Texts", "Time on one A6000", "Downloads and disk", "GPU memory by batch size"):
        assert f"\n{title}" in printed
    assert "nan" not in printed


def test_the_paper_counts_where_the_data_are_on_the_hub():
    plan = plan_of(ROOT / "params" / "llama-2-7b-wizardlm.yaml")
    conversations = plan.texts["conversations"]
    assert (conversations.n, conversations.length) == (57_523, 484)
    assert "Table 2" in conversations.source and "Table 2" in text(plan)
    trained = [step for step in plan.steps if step.what == "training"]
    assert [step.rows for step in trained] == [2 * 57_523] * 2  # two epochs, vanilla and indicator
    assert plan.downloads()["yihanwang617/WizardLM_70k_unfiltered"] == 4 * 57_523 * 484


def test_a_dataset_of_unknown_size_is_planned_as_not_known():
    plan = plan_of(NINE[0], **{"conversations.source": "somebody/something"})
    assert "not here" in plan.texts["conversations"].source
    training = next(line for line in text(plan).splitlines() if line.startswith("  training"))
    assert training.endswith("not known") and plan.downloads()["somebody/something"] == 0


def test_local_conversations_are_counted(tmp_path, model_folder):
    rows = [{"messages": [{"role": "user", "content": "x" * 10}, {"role": "assistant", "content": "y"}]}] * 30
    rows.insert(3, {"messages": [{"role": "assistant", "content": "y"}]})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    local = {f"models.{which}": str(model_folder) for which in ("pretrained", "instruct", "seed_model")}
    local |= {"conversations.source": str(tmp_path / "data.json"), "conversations.on_bad_row": "drop"}
    plan = plan_of(MINIATURE, **local, **{"models.chat_template": None, "allocation.layer": 1, "scoring.layer": 1})
    # a token a byte: BOS, <|user|> and newline, text, </s> and newline, <|assistant|> and newline, text, </s>, newline
    conversations = plan.texts["conversations"]
    assert conversations.n == 30
    assert conversations.length == 1 + 9 + 10 + 2 + 14 + 1 + 2
    assert "1 × no user turn" in conversations.source or "1 × leading assistant" in conversations.source
    assert plan.downloads() == {} and plan.models["pretrained"].where == "local folder"


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
    partly = plan_of(SMOKE, **params).models["pretrained"]
    assert partly.network.layers == 20 and partly.where.startswith("partly in the hub's cache")
    assert partly.to_download == partly.network.stored_bytes - 1000

    write_to_cache(hub_cache, "owner/model", "a" * 40, {"two.safetensors": b"0"})
    sources._cache.cache_clear()
    whole = plan_of(SMOKE, **params).models["pretrained"]
    assert whole.where == "in the hub's cache" and whole.to_download == 0
    with pytest.raises(InputError, match="'owner/model' is neither here nor in the hub's cache"):
        plan_of(SMOKE, **params | {"models.revision": "b" * 40})


def test_what_would_not_fit_names_changes_that_make_it_fit():
    path = ROOT / "params" / "tinyllama-ultrachat.yaml"
    plan = plan_of(path, **{"models.batch_size": 128})
    smallest, *_, largest = on_each_gpu(plan)
    found = smallest.remedies()
    assert [footprint.what for footprint, _, _ in found] == ["training", "answering"] and largest.remedies() == []
    for footprint, change, size in found:
        assert footprint.total > smallest.gpu.usable >= size
        changed = plan_of(path, **{"models.batch_size": 128} | change)
        assert next(other for other in changed.footprints if other.what == footprint.what).total == size
    assert "training takes" in text(smallest) and "  all of these: --set" in text(smallest)
    assert text(largest).endswith("every step fits on H100 80 GB")


def test_training_that_does_not_fit_keeps_the_product_of_batch_and_accumulation():
    (training,) = [row for row in plan_of(ROOT / "params" / "tinyllama-ultrachat.yaml", "rtx3090").remedies()]
    assert training[0].what == "training"
    assert training[1]["finetune.batch_size"] * training[1]["finetune.gradient_accumulation"] == 128


def test_where_quantisation_alone_is_enough_the_batch_stays():
    found = plan_of(ROOT / "params" / "llama-2-7b-wizardlm.yaml", "rtx4090").remedies()
    changes = {footprint.what: change for footprint, change, _ in found}
    assert changes["answering"] == changes["comparing embeddings"] == {"models.quantisation": "nf4"}


def test_where_no_setting_helps_a_larger_gpu_is_named():
    changes = {"needle.lengths": [500_000], "models.batch_size": 1}
    plan = plan_of(ROOT / "params" / "llama-3-8b-sharegpt.yaml", "rtx3090", **changes)
    assert ("answering", None) in [(footprint.what, change) for footprint, change, _ in plan.remedies()]
    assert "no setting makes it fit: use a larger GPU" in text(plan)
    assert any(problem.startswith("needle.lengths: 500,000 tokens") for problem in plan.problems)


def test_memory_and_time_grow_with_what_they_depend_on():
    params = load_params(NINE[0])
    plan = make_plan(params)
    double = footprints(params.changed({"models.batch_size": 2 * params.models.batch_size}), plan.models, plan.texts)
    for before, after in zip(plan.footprints, double, strict=True):
        assert (after.total > before.total) == (before.setting == "models.batch_size")
    by_gpu = hours_by_gpu(params)
    assert set(by_gpu.idxmin(axis=1)) == {"h100"} and set(by_gpu.idxmax(axis=1)) == {"rtx3090"}


def test_training_takes_the_hours_that_its_operations_take():
    """Llama-2-7B on ShareGPT by hand: three passes of 2 × 6.6 G operations a token, and causal attention's."""
    plan = plan_of(ROOT / "params" / "llama-2-7b-sharegpt.yaml", "a100-80", **{"finetune.packing": False})
    step = next(step for step in plan.steps if step.what == "training")
    assert 1 <= step.padding < 1.02  # conversations of like length in each batch
    tokens = step.padding * 93_645 * 1567.68
    operations = 3 * tokens * (2 * (32 * (4 * 4096**2 + 3 * 4096 * 11_008) + 32_000 * 4096) + 2 * 32 * 4096 * 1567.68)
    assert plan.hours(step) == pytest.approx(operations / (0.35 * 312e12) / 3600)


def test_a_gpu_that_is_not_in_the_table_is_refused_with_those_that_are():
    with pytest.raises(InputError, match=r"--gpu: 'abacus' is not in the table; choose one of rtx3090, .*h100"):
        plan_of(SMOKE, "abacus")
    assert plan_of(SMOKE, "H100").gpu.name == "H100 80 GB"


def test_evidence_is_no_experiment_to_plan():
    with pytest.raises(InputError, match="evidence: only 00 to 05 can be planned"):
        plan_of(ROOT / "params" / "smoke-evidence.yaml")


def test_all_that_is_missing_is_told_with_its_remedy():
    problems = plan_of(ROOT / "params" / "llama-2-7b-sharegpt.yaml").problems
    supplied = ["needle.haystack", *(f"qa.sources[{number}]" for number in range(3))]
    assert [problem.split(":")[0] for problem in problems] == supplied
    assert "put a folder of .txt there" in problems[0]
    assert all("SQuAD, QuAC or DROP" in problem for problem in problems[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"needle.lenghts": [1]}, "unknown key 'needle.lenghts'"),
        ({"models.pretrained": "./nowhere"}, "models.pretrained: no file or folder './nowhere'"),
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
    problems = plan_of(SMOKE, **changes).problems
    assert [problem.split(":")[0] for problem in problems] == [*list(changes)[:2], *list(changes)[2:]]
    assert "0 to 5" in problems[0] and "set it to 2048" in problems[3]


def test_models_that_are_there_take_no_more_room(tmp_path):
    (tmp_path / "outputs" / "miniature" / "work" / "models" / "vanilla").mkdir(parents=True)
    plan = plan_of(MINIATURE, outputs=str(tmp_path / "outputs"))
    assert "work/models/vanilla" not in plan.results() and "work/models/indicator" in plan.results()


def test_rows_are_read_as_often_as_in_the_rehearsal(tmp_path):
    """Two models answered all needles, one of them half of the facts, too; all was scored, and a third again."""
    content = load_params(ROOT / "params" / "smoke.yaml").model_dump(mode="json")
    small = content | {"experiment": "rehearsal-mine", "outputs": str(tmp_path)}
    folder = tmp_path / "rehearsal-mine"
    (folder / "work" / "answers").mkdir(parents=True)
    (folder / "params.yaml").write_text(json.dumps(small))
    plan = plan_of(SMOKE, experiment="mine", outputs=str(tmp_path))
    assert plan.times == {} and "run `ctxlib rehearse" in text(plan)  # nothing has been answered yet
    params = load_params(folder / "params.yaml")
    needles = experiment.needles(params, experiment.tokenizer(params))
    facts = experiment.fact_questions(params)
    for name, asked in (("a", needles), ("b", [*needles, *facts[::2]])):
        lines = [json.dumps({"id": question.id}) + "\n" for question in asked]
        (folder / "work" / "answers" / f"{name}.jsonl").write_text("".join([*lines, lines[0]]))  # one of them again
    ids = [conversation.id for conversation in experiment.conversations(params).conversations]
    for name, scored in (("a", ids), ("b", ids[: len(ids) // 4])):
        (folder / "work" / "scores" / name).mkdir(parents=True)
        pd.DataFrame({"conversation": scored * 2}).to_parquet(folder / "work" / "scores" / name / "part-00000.parquet")
    again = plan_of(SMOKE, experiment="mine", outputs=str(tmp_path))
    assert again.times == {"conversations": 1.25, "needle": 2, "facts": 0.5, "qa": 0, "instructions": 0}
    for before, after in zip(plan.steps, again.steps, strict=True):
        times = {"scoring": 1.25, "training": 1, "needle": 2, "facts": 0.5}
        assert after.rows == before.rows * times.get(before.what, times.get(before.subject, 0))
    assert "needle 2×" in text(again)


def test_the_miniature_fits_everywhere_and_needs_no_download():
    plan = plan_of(MINIATURE)
    assert plan.downloads() == {} and plan.problems == []
    assert not any(on_gpu.remedies() for on_gpu in on_each_gpu(plan))
    assert text(plan).endswith("Everything fits.")
    assert max(footprint.total for footprint in plan.footprints) < 10 * GIB
    needles = len(experiment.needles(plan.params, experiment.tokenizer(plan.params)))
    assert plan.texts["needle"].n == needles


def test_an_8b_model_trains_under_qlora_at_4096_in_24_gb_with_checkpointing_and_that_is_offered():
    path = ROOT / "params" / "llama-3-8b-sharegpt.yaml"
    one = {"finetune.batch_size": 1, "finetune.gradient_accumulation": 64}
    rtx = GPUS["rtx3090"].usable

    def training(**overrides):
        return next(f for f in plan_of(path, **one, **overrides).footprints if f.what == "training").total

    all_logits = 14 * (4096 * 128_256 - CHUNK_ELEMENTS)  # which the loss no longer holds
    assert training() + all_logits > 14 * GIB and training() < rtx
    assert training(**{"finetune.gradient_checkpointing": True}) == training()
    without = {"finetune.gradient_checkpointing": False}
    assert training(**without) + all_logits > 2 * rtx and training(**without) > rtx
    plan = plan_of(path, "rtx3090", **one, **without)
    changes = [change for footprint, change, _ in plan.remedies() if footprint.what == "training"]
    assert changes == [{"finetune.gradient_checkpointing": True}]
    assert "--set finetune.gradient_checkpointing=true" in text(plan)


def test_what_is_not_recomputed_takes_less_time():
    path = ROOT / "params" / "tinyllama-sharegpt.yaml"
    ratios = {}
    for method in ("full", "lora"):
        by_checkpointing = []
        for checkpointing in (True, False):
            plan = plan_of(path, **{"finetune.method": method, "finetune.gradient_checkpointing": checkpointing})
            step = next(step for step in plan.steps if step.what == "training")
            by_checkpointing.append(plan.hours(step))
        ratios[method] = by_checkpointing[1] / by_checkpointing[0]
    assert ratios == {"full": pytest.approx(3 / 4), "lora": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("source", "variant", "n"),
    [
        ("data/squad/dev-v1.1.json", "standard", 10_570),
        ("rajpurkar/squad", "authors_code", 10_570),
        ("data/squad/dev-v2.0.json", "standard", 11_873),
        ("rajpurkar/squad_v2", "standard", 11_873),
        ("data/quac/val_v0.2.json", "standard", 7_354),
        ("allenai/quac", "authors_code", 1_000),
        ("data/drop/drop_dataset_dev.json", "standard", 9_536),
        ("squad_study/drop_dataset_dev.json", "standard", 9_536),
        ("EleutherAI/drop", "standard", 9_536),
        ("owner/unheard_of", "standard", 20_000),
    ],
)
def test_sources_that_are_not_here_count_as_their_official_development_sets(source, variant, n):
    changes = {"qa.sources": [source], "qa.variant": variant, "qa.n": 20_000}
    plan = plan_of(ROOT / "params" / "llama-2-7b-sharegpt.yaml", **changes)
    assert plan.texts[source].n == n
    line = next(line for line in text(plan).splitlines() if line.startswith(f"  {source} "))
    assert f"{n:,}" in line and "assumed" in line
    capped = plan_of(ROOT / "params" / "llama-2-7b-sharegpt.yaml", **changes | {"qa.n": 700})
    assert capped.texts[source].n == 700


def squad_file(path, ids):
    qas = [{"id": id, "question": "Who?" * (1 + number), "answers": [{"text": "Ada"}]} for number, id in enumerate(ids)]
    paragraphs = [{"context": "Ada wrote it.", "qas": qas}]
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    return str(path)


def test_sources_that_are_here_are_counted_beside_those_that_are_not_and_must_not_share_a_question(tmp_path):
    here = squad_file(tmp_path / "mine.json", "abc")
    plan = plan_of(ROOT / "params" / "llama-2-7b-sharegpt.yaml", **{"qa.sources": [here, "allenai/quac"]})
    parts = plan.texts
    assert (parts[here].n, parts["allenai/quac"].n) == (3, 7_354)
    assert parts[here].known == "counted" and parts["allenai/quac"].known == "assumed"
    assert "allenai/quac" in plan.downloads() and here not in plan.downloads()
    other = squad_file(tmp_path / "other.json", "cd")
    with pytest.raises(InputError, match="two of them hold the question 'c'"):
        plan_of(MINIATURE, **{"qa.sources": [here, other]})


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real questions in ../shared/data")
def test_real_questions_are_counted_and_assumed_lengths_are_near_theirs():
    here = {"squad": "squad/xquad.en.json", "drop": "drop/drop_contrast_sets_test.json"}
    path = ROOT / "params" / "llama-2-7b-sharegpt.yaml"
    counted = plan_of(path, **{"qa.sources": [str(SHARED / file) for file in here.values()]}).texts
    counted = [texts for texts in counted.values() if texts.family == "qa"]
    assert [texts.n for texts in counted] == [1_190, 947]
    for name, texts in zip(here, counted, strict=True):
        assumed = plan_of(path, **{"qa.sources": [f"owner/{name}"]}).texts[f"owner/{name}"]
        assert 0.7 < assumed.length / texts.length < 1.3 and assumed.longest > texts.longest


def test_a_question_that_is_longer_than_the_window_is_told_before_a_model_is_loaded():
    problems = plan_of(ROOT / "params" / "tinyllama-sharegpt.yaml", **{"qa.sources": ["allenai/quac"]}).problems
    (found,) = [problem for problem in problems if problem.startswith("qa.sources: ")]
    assert "'allenai/quac': its longest prompt" in found and "(assumed)" in found and "window of 2,048" in found


@pytest.mark.parametrize("prompt", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", ["standard", "authors_code"])
@pytest.mark.parametrize("needles", ["The best thing is to eat a sandwich.", ["One is here.", "The other is there."]])
def test_needles_are_as_long_as_those_that_are_made(tokenizer, prompt, variant, needles):
    """The cells, the paper's slicing, and what stands around a context, in tokens: a byte each here."""
    lengths = [200, 242, 284, 700]
    changes = {"lengths": lengths, "variant": variant, "prompt": prompt, "needle": needles, "response_prefix": None}
    params = load_params(NINE[0], {f"needle.{key}": value for key, value in changes.items()})
    section = params.needle
    made = text_needles(
        [f"This is sentence number {number}." for number in range(200)],
        tokenizer,
        needle=needles,
        question=section.question,
        keywords=section.keywords,
        lengths=lengths,
        depths=[50],
        per_cell=1,
        seed=0,
        prompt=prompt,
        variant=variant,
    )
    planned = needle_contexts(section, tokenizer)
    assert planned == [question.context_length_tokens for question in made]
    sentence = len("This is sentence number 100. ")
    for question, context in zip(made, planned, strict=True):
        rendered = len(role_map(tokenizer, question.messages))
        assert rendered - 1 <= context + frame(params, tokenizer) <= rendered + sentence


def test_the_towns_needles_are_the_same_in_both_variants():
    clean, paper = (
        plan_of(SMOKE, **{"needle.variant": variant}).texts["needle"] for variant in ("standard", "authors_code")
    )
    assert clean == paper


def test_needles_that_do_not_fit_the_shortest_length_are_told():
    changes = {"needle.lengths": [40, 400], "needle.needle": ["A needle of some words is here."] * 6}
    problems = plan_of(ROOT / "params" / "llama-2-7b-sharegpt.yaml", **changes).problems
    assert any("needle.lengths: 40 is less than the 48 tokens of all needles" in problem for problem in problems)


def test_a_haystack_and_a_tokenizer_that_are_here_are_counted(tmp_path, model_folder):
    (tmp_path / "hay").mkdir()
    (tmp_path / "hay" / "a.txt").write_text(" ".join(f"This is sentence number {n}." for n in range(100)))
    changes = {f"models.{which}": str(model_folder) for which in ("pretrained", "instruct", "seed_model")}
    changes |= {"models.chat_template": None, "needle.haystack": str(tmp_path / "hay"), "needle.lengths": [100, 200]}
    path = ROOT / "params" / "llama-2-7b-sharegpt.yaml"
    needle = plan_of(path, **changes).texts["needle"]
    assert (needle.n, needle.known) == (2 * 20, "counted")
    with pytest.raises(InputError, match="its texts hold"):
        plan_of(path, **changes | {"needle.lengths": [100_000]})


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("qwen3-0.6b", 596_049_920),
        ("olmo-2-1b", 1_484_916_736),
    ],
)
def test_the_open_models_have_their_published_sizes(name, parameters):
    plan = plan_of(ROOT / "params" / f"{name}.yaml", "rtx3090", **{"qa.sources": [], "conversations.source": "a/b"})
    told = "\n".join(print_plan(plan))
    assert told.count(f"{parameters / 1e9:.2f} B parameters") == 3
