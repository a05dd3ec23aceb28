"""The path of the paper's nine runs, from a params file that names local folders: none of it is the miniature's alone.

Conversations, questions, haystack and tokenizer are real where ../shared/data is present, else a few lines written
here. Models are random. No number means anything; that all of it runs does, and that a kill changes none of them.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
import yaml
from transformers import AutoConfig, GemmaConfig, GPTNeoXConfig, LlamaConfig, Qwen2Config

from ctxlib import experiment, finetune, models
from ctxlib.commands.network import KNOWN, as_config
from ctxlib.commands.rehearse import prepare, shrunk
from ctxlib.params import MODEL_ROLES, InputError, load_params

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
NINE = "tinyllama-sharegpt"
NOTEBOOKS = re.findall(r'"(\d\d_\w+)":', (ROOT / "Snakefile").read_text().split("EVIDENCE =")[0])
# peft 0.21 asks transformers 5.23 for a name that the latter is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def made_data(folder: Path, tokenizer) -> dict[str, list[str]]:
    """Files of every kind that the run reads, and the names of those with questions by kind."""
    chats = [
        {
            "id": f"c{n}",
            "conversations": [
                {"from": "human", "value": f"The {n}th letter says <|user|> hello 🙂.\n\n" + "So it goes. " * n},
                {"from": "gpt", "value": f"It says hello, in line {n}."},
                {"from": "human", "value": "Are you sure?"},
                {"from": "gpt", "value": "Yes."},
            ],
        }
        for n in range(30)
    ]
    asked = [{"id": f"q{n}", "question": "Which day?", "answers": [{"text": f"day {n}"}]} for n in range(20)]
    squad = {"data": [{"paragraphs": [{"context": "It was day 1, then day 2.", "qas": asked}]}]}
    (folder / "chats.json").write_text(json.dumps(chats), encoding="utf-8")
    (folder / "squad.json").write_text(json.dumps(squad))
    (folder / "essays" / "a.txt").write_text(" ".join(f"Nothing much happened on day {n}." for n in range(80)))
    tokenizer.save_pretrained(folder / "model")
    return {"squad": ["squad.json"]}


def real_data(folder: Path) -> dict[str, list[str]]:
    model = folder / "model"
    model.mkdir()
    (model / "tokenizer.model").write_bytes((SHARED / "tokenizers/llama-2/tokenizer.model").read_bytes())
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    squad = json.loads((SHARED / "squad/xquad.en.json").read_text(encoding="utf-8"))
    passages = [paragraph["context"] for article in squad["data"] for paragraph in article["paragraphs"]]
    (folder / "essays" / "a.txt").write_text("\n".join(passages), encoding="utf-8")
    names = {
        "conversations/sharegpt_sample.json": "chats.json",
        "squad/xquad.en.json": "squad.json",
        "quac/quac_sample.json": "quac.json",
        "drop/drop_contrast_sets_test.json": "drop.json",
    }
    for name, copy in names.items():
        (folder / copy).write_bytes((SHARED / name).read_bytes())
    quac = json.loads((folder / "quac.json").read_text(encoding="utf-8"))
    (folder / "quac.json").write_text(json.dumps({"data": quac["data"][:1]}))  # the sample has its dialogue twice
    return {kind: [f"{kind}.json"] for kind in ("squad", "quac", "drop")}


@pytest.fixture(scope="module")
def own_files(tmp_path_factory, tokenizer) -> Path:
    """A user's folder, with spaces in every name: data, a model's configuration and tokenizer, and the params file.

    The params are those of one of the nine runs, with QLoRA; the model has no weights.
    """
    folder = tmp_path_factory.mktemp("all of it") / "my data"
    (folder / "essays").mkdir(parents=True)
    sources = real_data(folder) if SHARED.exists() else made_data(folder, tokenizer)
    shape = KNOWN["TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"]
    vocabulary = {} if SHARED.exists() else {"vocab_size": len(tokenizer)}
    (folder / "model" / "config.json").write_text(json.dumps(shape | vocabulary))
    content = yaml.safe_load((ROOT / "params" / f"{NINE}.yaml").read_text())
    content["outputs"] = str(folder / "out puts")
    content["models"] |= {name: str(folder / "model") for name in ("pretrained", "seed_model")}
    content["models"]["instruct"] = str(folder / "out puts" / NINE / "work" / "models" / "vanilla")
    content["conversations"]["source"] = str(folder / "chats.json")
    content["needle"]["haystack"] = str(folder / "essays")
    content["qa"]["sources"] = [str(folder / name) for names in sources.values() for name in names]
    content["finetune"]["method"] = "qlora"
    if not SHARED.exists():
        content["needle"]["lengths"] = [200, 1000]  # a token is a byte
    (folder / "my params.yaml").write_text(yaml.safe_dump(content))
    return folder


def kill(command: list[str], when: Callable[[], bool], log: Path, cwd: Path = ROOT) -> None:
    """Starts the command, and ends it and all that it started in one blow, as a lost machine does."""
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=cwd, stdout=output, stderr=output, start_new_session=True)
        while not when():
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.01)
        started = psutil.Process(process.pid).children(recursive=True)  # a kernel has a session of its own
        os.killpg(process.pid, signal.SIGKILL)
        for child in started:
            if child.is_running():
                child.kill()
        process.wait()


@pytest.fixture(scope="module")
def rehearsed(own_files) -> Path:
    """The results of `ctxlib rehearse`, which was killed in the middle of the first training and called again."""
    arguments = [
        str(own_files / "my params.yaml"),
        "--set",
        "finetune.steps=20",
        "--set",
        "threads=1",
        "--width",
        "32",
        "--layers",
        "2",
    ]
    command = [sys.executable, "-m", "ctxlib", "rehearse", *arguments]
    outputs = own_files / "out puts" / f"rehearsal-{NINE}"
    trained = outputs / "work" / "models"
    kill(command, lambda: any(trained.glob("vanilla.training-*/checkpoint-*/trainer_state.json")), own_files / "log")
    assert not (trained / "vanilla").exists()
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert all(name in finished.stdout for name in NOTEBOOKS)
    return outputs


@pytest.mark.notebooks
def test_every_notebook_runs_on_the_users_own_files(rehearsed):
    assert sorted(json.loads((rehearsed / "manifest.json").read_text())["notebooks"]) == NOTEBOOKS
    params = load_params(rehearsed / "params.yaml")
    scores = pd.read_csv(rehearsed / "tables" / "scores.csv")
    assert scores.score.between(0, 1).all()
    marked = (scores.score > params.scoring.threshold).mean()
    assert 0.2 < marked < 0.8
    passages = pd.read_csv(rehearsed / "tables" / "passages.csv")
    assert set(passages.dataset) == {Path(name).stem for name in params.qa.sources}
    evaluation = pd.read_csv(rehearsed / "tables" / "evaluation.csv")
    assert set(evaluation.task) == {"needle", "qa", "instructions"}


@pytest.mark.notebooks
def test_a_killed_training_ends_with_the_same_losses_and_weights(rehearsed, tmp_path):
    params = load_params(rehearsed / "params.yaml")
    threads = torch.get_num_threads()
    torch.set_num_threads(params.threads)
    finetune.finetune(
        experiment.model_path(params, "pretrained"),
        experiment.tokenizer(params),
        experiment.conversations(params).conversations,
        params.finetune,
        out_dir=tmp_path / "never killed",
        max_length=params.conversations.max_length,
        seed=params.seed,
        progress=False,
    )
    torch.set_num_threads(threads)
    for name in ("loss.csv", "adapter_model.safetensors"):
        resumed, straight = (folder / name for folder in (rehearsed / "work/models/vanilla", tmp_path / "never killed"))
        assert resumed.read_bytes() == straight.read_bytes(), name


@pytest.mark.parametrize(
    "config",
    [
        *(as_config(KNOWN[name]) for name in KNOWN),
        LlamaConfig(head_dim=96, num_key_value_heads=1),
        Qwen2Config(use_sliding_window=True, max_window_layers=2, num_hidden_layers=8),
        GemmaConfig(),
        GPTNeoXConfig(num_hidden_layers=5),
    ],
    ids=lambda config: f"{config.model_type}-{config.hidden_size}-{config.num_hidden_layers}",
)
def test_a_smaller_model_has_the_vocabulary_the_window_and_the_grouping_of_heads(config):
    small = shrunk(config, width=64, layers=3)
    for name in ("vocab_size", "max_position_embeddings", "tie_word_embeddings", "model_type"):
        assert getattr(small, name) == getattr(config, name)
    if hasattr(config, "num_key_value_heads"):
        grouping = [c.num_attention_heads // c.num_key_value_heads for c in (small, config)]
        assert grouping[0] == grouping[1]
    assert small.num_hidden_layers == 3
    assert small.hidden_size <= 128
    widths = [c.intermediate_size / c.hidden_size for c in (small, config)]
    assert widths[0] == pytest.approx(widths[1], rel=0.02)


def test_what_cannot_be_made_smaller_says_so():
    factors = {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}  # one for every two numbers of a head
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 1.0, "original_max_position_embeddings": 4096}
    config = AutoConfig.for_model("phi3", num_hidden_layers=4, rope_parameters=rope | factors, pad_token_id=0)
    with pytest.raises(InputError, match=r"a phi3 of width 64 and 2 layers cannot be made: .*; choose another"):
        shrunk(config, width=64, layers=2)
    assert shrunk(config, width=192, layers=2).hidden_size == 192


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring.layer": 22}, "scoring.layer: 22 does not exist, models.seed_model has layers 0 to 21"),
        ({"needle.haystack": "./absent"}, "needle.haystack: no file or folder './absent'"),
        ({"models.seed_model": "./absent"}, "models.seed_model: no file or folder './absent'"),
        ({"models.chat_template": "absent.jinja"}, "models.chat_template: no file or folder"),
        ({"finetune.stepz": 3}, "did you mean 'finetune.steps'"),
    ],
)
def test_bad_input_is_found_before_anything_is_written(own_files, tmp_path, changes, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=message):
        prepare(own_files / "my params.yaml", {"outputs": str(tmp_path / "out")} | changes)
    assert not (tmp_path / "out").exists()


def test_what_is_small_already_is_not_rehearsed(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match="small already"):
        prepare("params/smoke-evidence.yaml")


def test_bad_questions_are_found_before_any_notebook_runs(own_files, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    twice = json.loads((own_files / "squad.json").read_text(encoding="utf-8"))
    (tmp_path / "twice.json").write_text(json.dumps({"data": twice["data"][:1] * 2}))
    with pytest.raises(InputError, match="names more than one question"):
        prepare(own_files / "my params.yaml", {"outputs": str(tmp_path), "qa.sources": [str(tmp_path / "twice.json")]})
    assert not list(tmp_path.rglob("*.ipynb"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_settings_stay_and_its_numbers_come_down_but_for_what_the_user_says(own_files, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    said = {"outputs": str(tmp_path / "out put"), "finetune.steps": 40, "needle.lengths": [300], "qa": {"n": 14}}
    full = load_params(own_files / "my params.yaml")
    prepared = prepare(own_files / "my params.yaml", said, width=32, layers=2)
    small = prepared.params
    assert (small.finetune.steps, small.needle.lengths, small.qa.n) == (40, [300], 14)
    assert (small.needle.depths, small.conversations.n, small.finetune.epochs) == ([0, 100], 24, None)
    assert (small.scoring.layer, small.allocation.layer) == (1, 1)  # 15 of 22 layers
    for section, names in {
        "models": ("chat_template", "dtype", "quantisation", "attention", "indicator"),
        "conversations": ("source", "max_length", "on_bad_row", "remove_refusals"),
        "scoring": ("variant", "head_reduction", "thresholds"),
        "steering": ("alphas", "variant"),
        "finetune": ("method", "variant", "learning_rate", "schedule", "group_by_length", "packing"),
        "needle": ("haystack", "prompt", "needle", "question", "keywords", "response_prefix", "variant"),
        "qa": ("sources", "prompt", "variant"),
    }.items():
        for name in names:
            assert getattr(getattr(small, section), name) == getattr(getattr(full, section), name), name
    assert "  finetune.steps: null → 40" in prepared.description
    first = files(tmp_path)
    assert prepare(own_files / "my params.yaml", said, width=32, layers=2) == prepared
    assert files(tmp_path) == first


def test_every_model_is_random_in_its_own_way_and_what_03_trains_is_left_to_it(own_files, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    prepared = prepare(own_files / "my params.yaml", {"outputs": str(tmp_path)}, width=32, layers=2)
    named = prepared.params.models
    hashes = [models.model_hash(folder) for folder in (named.pretrained, named.seed_model)]
    assert len(set(hashes)) == 2
    assert Path(named.instruct) == tmp_path / f"rehearsal-{NINE}" / "work" / "models" / "vanilla"
    assert prepared.params.trains("instruct")
    with pytest.raises(InputError, match="notebook 03 trains it: run it first"):
        experiment.model_path(prepared.params, "instruct")
    tokenizer = experiment.tokenizer(prepared.params)
    assert tokenizer.get_vocab() == models.load_tokenizer(own_files / "model").get_vocab()
    Path(named.instruct).mkdir(parents=True)
    scored_by_itself = {
        "outputs": str(tmp_path),
        "models.seed_model": load_params(own_files / "my params.yaml").models.instruct,
    }
    again = prepare(own_files / "my params.yaml", scored_by_itself, width=32, layers=2)
    assert again.params.models == named


def test_embedded_models_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    prepared = prepare("params/smoke.yaml", {"outputs": str(tmp_path)})
    named, given = prepared.params.models, load_params("params/smoke.yaml").models
    assert all(getattr(named, which) == getattr(given, which) for which in MODEL_ROLES)
    assert prepared.params.scoring.layer == load_params("params/smoke.yaml").scoring.layer
