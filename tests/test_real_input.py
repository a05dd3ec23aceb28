"""Nothing on the path is special to the miniature: the same notebooks, from a params file that names local folders.

The conversations are a few lines in ShareGPT's format written here, or the real sample where ../shared/data is present;
the model is a small Llama with random weights. No number means anything; that all of it runs does.
"""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def write_model(folder, tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def made_conversations(path):
    rows = [
        {
            "id": f"c{n}",
            "conversations": [
                {"from": "human", "value": f"The {n}th letter says <|user|> hello 🙂.\n\nWhat does it say?"},
                {"from": "gpt", "value": f"It says hello, in line {n}."},
                {"from": "human", "value": "Are you sure?"},
                {"from": "gpt", "value": "Yes."},
            ],
        }
        for n in range(40)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_params(folder, changes):
    content = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    content["experiment"] = "real"
    content["outputs"] = str(folder / "outputs")
    content["models"] |= {name: str(folder / "model") for name in ("pretrained", "instruct", "seed_model")}
    essays = folder / "essays"
    essays.mkdir()
    (essays / "a.txt").write_text(" ".join(f"Nothing much happened on day {n}." for n in range(80)))
    content["needle"] |= {
        "source": "text",
        "haystack": str(essays),
        "needle": "The best thing to do in town is to eat a sandwich.",
        "question": "What is the best thing to do in town?",
        "keywords": ["eat", "sandwich"],
        "response_prefix": "The best thing to do in town is",
    }
    for section, values in changes.items():
        content[section] |= values
    (folder / "real.yaml").write_text(yaml.safe_dump(content))
    return folder / "real.yaml"


def reproduce(folder, params_file):
    command = [sys.executable, "-m", "ctxlib.cli", "reproduce", "--params", str(params_file)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    outputs = folder / "outputs" / "real"
    assert sorted(json.loads((outputs / "manifest.json").read_text())["notebooks"]) == NOTEBOOKS
    return outputs


@pytest.mark.notebooks
def test_the_notebooks_run_on_local_folders(tmp_path, tokenizer):
    write_model(tmp_path / "model", tokenizer)
    made_conversations(tmp_path / "chats.json")
    changes = {"conversations": {"source": str(tmp_path / "chats.json"), "n": 40}, "qa": {"sources": []}}
    outputs = reproduce(tmp_path, write_params(tmp_path, changes))
    scores = pd.read_csv(outputs / "tables" / "scores.csv")
    assert len(scores) == 80 and scores.score.between(0, 1).all()


@pytest.mark.notebooks
@pytest.mark.skipif(not SHARED.exists(), reason="needs real conversations and a real tokenizer in ../shared/data")
def test_the_notebooks_run_on_real_conversations_with_the_tokenizer_of_llama_2(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "tokenizer.model").write_bytes((SHARED / "tokenizers/llama-2/tokenizer.model").read_bytes())
    (tmp_path / "raw" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    llama = AutoTokenizer.from_pretrained(tmp_path / "raw")
    llama.chat_template = (SHARED / "chat_templates/zephyr.jinja").read_text()
    write_model(tmp_path / "model", llama)
    changes = {
        "conversations": {
            "source": str(SHARED / "conversations/sharegpt_sample.json"), "n": 30, "on_bad_row": "drop",
            "remove_refusals": True, "max_length": 1024,
        },
        "qa": {"sources": [str(SHARED / "squad/xquad.en.json")], "n": 6},
    }  # fmt: skip
    outputs = reproduce(tmp_path, write_params(tmp_path, changes))
    assert (outputs / "tables" / "score_coverage.csv").is_file()
