"""The shipped models and their cards: `ctxlib miniature --out DIR`.

`pretrained` and `instruct` are trained from nothing. `vanilla` and `indicator` are the adapters that notebook 03 trains
on `params/miniature.yaml`: `make reproduce`, then `ctxlib miniature --out DIR --adapters outputs/miniature/work/models`
copies and examines them.
"""

import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

from ctxlib.conversations import Question
from ctxlib.files import file_digest, read_json_object, to_json, write
from ctxlib.finetune import finetune
from ctxlib.generate import answer_questions
from ctxlib.metrics import score_answers, wilson_interval
from ctxlib.miniature import PREFIX, texts
from ctxlib.miniature.pretrain import Recipe, pretrain
from ctxlib.miniature.town import Town
from ctxlib.models import BASE_FROM_HERE, Subject, load_model, load_tokenizer
from ctxlib.params import TRAINED_MODELS, Finetune, InputError
from ctxlib.roles import PLAIN_SEPARATOR

# the same shares as in params/miniature.yaml: `instruct` is the model that such chat data produce
SHARES = {
    "memory_question": 0.22,
    "memory_about": 0.14,
    "agreeing_passage": 0.10,
    "contradicting_passage": 0.22,
    "dependent_passage": 0.12,
    "dependent_change": 0.05,
    "instruction_task": 0.10,
    "multi_turn": 0.05,
}
CHATS = {"n": 6000, "seed": 0}
VANILLA_SFT = {"method": "full", "steps": 300, "batch_size": 32, "learning_rate": 5e-4, "warmup_fraction": 0.1}
VANILLA_SFT |= {"raw_text_share": 0.1}
SETTINGS = Finetune(**VANILLA_SFT, epochs=None, gradient_accumulation=1, schedule="linear")
EXAM = {"lengths": [100, 200, 300, 400], "depths": [0, 25, 50, 75, 100], "per_cell": 26, "seed": 2024}  # n = 520
ANSWER_TOKENS = 64


def build(out: Path, recipe: Recipe | None = None) -> None:
    """Train `pretrained` and `instruct` into `out` and examine them; an interrupted build resumes."""
    if not (out / "pretrained" / "card.json").exists():
        pretrain(out / "pretrained", recipe or Recipe())
        _card(out / "pretrained", examine_pretrained(out / "pretrained"))
    begun = time.monotonic()
    chats = texts.chat_dataset(Town(), shares=SHARES, **CHATS)
    tokenizer = load_tokenizer(out / "pretrained")
    raw = texts.raw_texts(Town(), CHATS["n"], CHATS["seed"])
    log = finetune(out / "pretrained", tokenizer, chats, SETTINGS, raw_texts=raw, out_dir=out / "instruct")
    training = {
        "recipe": VANILLA_SFT | {"chats": CHATS, "shares": SHARES},
        "seconds": time.monotonic() - begun,
        "log": log.to_dict("records"),
    }
    write(out / "instruct" / "training.json", to_json(training))
    _card(out / "instruct", examine_instruct(out / "instruct"))


def ship_adapters(trained: Path, out: Path) -> None:
    """Copies `vanilla` and `indicator`, adapters over `pretrained`, into `out`, where that model is, and examines them.

    No path of the machine that trained them remains. Raises InputError for a folder without them.
    """
    for name in TRAINED_MODELS:
        if not (trained / name / "adapter_config.json").is_file():
            raise InputError(f"{trained}: no adapter '{name}' there; run notebook 03 first (make reproduce)")
        config = read_json_object(trained / name / "adapter_config.json")
        config["base_model_name_or_path"] = f"{PREFIX}pretrained"
        config["target_modules"] = sorted(config["target_modules"])  # peft writes a set: every time in another order
        record = read_json_object(trained / name / "finetune.json") | {BASE_FROM_HERE: "../pretrained"}
        write(out / name / "adapter_config.json", to_json(config))
        write(out / name / "finetune.json", to_json(record))
        for file in ("adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            write(out / name / file, (trained / name / file).read_bytes())
        log = pd.read_csv(trained / name / "loss.csv")
        write(out / name / "training.json", to_json({"recipe": record, "log": log.to_dict("records")}))
        _card(out / name, examine_instruct(out / name, record["indicator"]), _MADE_BY_03)


def examine_pretrained(folder: Path) -> pd.DataFrame:
    """Raw text: known facts, and needles in haystacks of up to 400 tokens."""
    needles = texts.needles(Town(), **EXAM)
    facts = texts.known_fact_questions(Town(), 512, EXAM["seed"])
    scored = _answers(folder, [*needles, *facts], template=False)
    rows = [("known facts, raw text", scored[scored.family == "facts"].containment)]
    for kind in ("unknown", "contradicting"):
        rows.append((f"{kind} needle, raw text", (scored[scored.kind == kind].needle_recall == 1).astype(float)))
    return _measures(rows)


def examine_instruct(folder: Path, indicator: str | None = None) -> pd.DataFrame:
    """In the chat template: format, known facts; and the needles, with the template and without.

    With an `indicator` all is asked in the template once more, each question carrying it.
    """
    needles = texts.needles(Town(), **EXAM)
    facts = texts.known_fact_questions(Town(), 512, EXAM["seed"])
    tasks = texts.instruction_questions(Town(), 500, EXAM["seed"])
    chats = {"chat": _answers(folder, [*needles, *facts, *tasks], template=True)}
    if indicator:
        chats[f"chat + {indicator}"] = _answers(folder, [*needles, *facts, *tasks], template=True, indicator=indicator)
    raw = _answers(folder, needles, template=False)
    well_formed = (chats["chat"].answer_tokens < ANSWER_TOKENS) & chats["chat"].answer.str.fullmatch(
        r"[A-Za-z][^<>\n]*\."
    )
    rows = [("follows the chat format", well_formed.astype(float))]
    for name, chat in chats.items():
        rows.append((f"known facts, {name}", chat[chat.family == "facts"].containment))
        rows.append((f"instruction tasks, {name}", chat[chat.family == "instructions"].exact_match))
    for kind in ("unknown", "contradicting"):
        for name, frame in {**chats, "raw text": raw}.items():
            rows.append((f"{kind} needle, {name}", (frame[frame.kind == kind].needle_recall == 1).astype(float)))
    for name, chat in chats.items():
        memory = chat[chat.kind == "contradicting"].says_memory
        rows.append((f"contradicting needle, {name}: answers from memory", memory))
    return _measures(rows)


def _answers(folder: Path, questions: list[Question], template: bool, indicator: str | None = None) -> pd.DataFrame:
    answers = answer_questions(
        Subject(folder.name, load_model(folder), load_tokenizer(folder), folder.name), questions,
        template=template, indicator=indicator, use_prefix=False, max_new_tokens=ANSWER_TOKENS, batch_size=64,
        stop_text=None if template else PLAIN_SEPARATOR,
    )  # fmt: skip
    return score_answers(answers, questions)


def _measures(rows: list[tuple[str, pd.Series]]) -> pd.DataFrame:
    measured = [(name, v.mean(), *wilson_interval(v.sum(), len(v)), len(v)) for name, v in rows]
    return pd.DataFrame(measured, columns=["measure", "value", "ci_low", "ci_high", "n"])


_MADE_BY_03 = (
    "A LoRA adapter over `pretrained`, trained by notebook 03 on `params/miniature.yaml` (seed 0) over 4-bit weights "
    "(QLoRA), as `finetune.json` says. `miniature:{name}` is the base model in float32 together with this adapter, and "
    "so it was measured here; the notebooks ask over 4-bit weights. It is shipped for the class, which trains nothing. "
    "Licence: Apache-2.0.",
    "Made by `make reproduce`, then `ctxlib miniature --adapters outputs/miniature/work/models --out DIR`. On another "
    "kind of processor the training rounds otherwise, and other weights come of it.",
)


def _card(folder: Path, measures: pd.DataFrame, told: tuple[str, str] | None = None) -> None:
    """`card.json` for programs, `README.md` with the curve for people; `told`: what it is, and how it is made again."""
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    log = pd.DataFrame(training["log"])
    figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
    axes.plot(log.step, log.loss, lw=1)
    axes.set(xlabel="step", ylabel="loss (nats a supervised token)", title=f"{folder.name}: training loss")
    figure.savefig(folder / "curve.png", dpi=110)
    plt.close(figure)
    for leftover in ("checkpoint.pt", "loss.csv"):
        (folder / leftover).unlink(missing_ok=True)
    hashes = {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
    hashes |= {path.name: file_digest(path) for path in sorted(folder.glob("*.json")) if path.name != "card.json"}
    model = load_model(folder)
    facts = {
        "name": folder.name,
        "parameters": model.num_parameters(),
        "recipe": training["recipe"],
        "seconds": round(training["seconds"]) if "seconds" in training else None,
        "tokens": training.get("tokens"),
        "torch_threads": torch.get_num_threads(),
        "measures": measures.round(4).to_dict("records"),
        "sha256": hashes,
    }
    write(folder / "card.json", to_json(facts))
    table = measures.assign(
        value=measures.value.map("{:.1%}".format),
        interval=[f"{row.ci_low:.1%} – {row.ci_high:.1%}" for row in measures.itertuples()],
    )[["measure", "value", "interval", "n"]]
    what, made = told or (
        f"A `LlamaForCausalLM` of {model.num_parameters():,} parameters, trained in {training['seconds'] / 60:.0f} "
        f"minutes on {torch.get_num_threads()} CPU threads from nothing but the texts of the invented town. It knows "
        "the English of that town, and is of no use but for this package's experiments. Licence: Apache-2.0.",
        "Retrained by `ctxlib miniature --out DIR`; an interrupted run resumes from its last checkpoint.",
    )
    lines = [
        f"# Model card: `{folder.name}` of the miniature",
        "",
        what.replace("{name}", folder.name),
        "",
        "Greedy decoding; 95 % Wilson intervals. A needle counts when both words of its value are said.",
        "",
        table.to_markdown(index=False),
        "",
        "![training loss](curve.png)",
        "",
        "Recipe: `" + json.dumps(training["recipe"]) + "`",
        "",
        "Files: " + ", ".join(f"`{name}` sha256 `{digest[:16]}…`" for name, digest in hashes.items()),
        "",
        made,
    ]
    write(folder / "README.md", "\n".join(lines) + "\n")
