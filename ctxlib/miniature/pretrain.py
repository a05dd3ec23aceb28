"""Training the base model from nothing: induction first, then facts in texts of growing length, memory last.

The order matters. Copying has to exist before looking up can be learned, and looking up before memory is: facts mixed
in from the start are learned in minutes and looking up never comes. The loss falls only on what can be known.
"""

import json
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ctxlib.files import replacing, write
from ctxlib.miniature import texts
from ctxlib.miniature.tokenizer import SPECIAL, build_tokenizer
from ctxlib.miniature.town import Town
from ctxlib.roles import PLAIN_SEPARATOR

IGNORED = -100
# what the texts are once memory comes in
MIXTURE = {"retrieval": 0.42, "alike": 0.14, "copying": 0.05, "memory": 0.24, "task": 0.11, "domain": 0.04}
COPY_LENGTHS = ((4, 10), (4, 24), (8, 48))
SHARP = len(COPY_LENGTHS)
FIRST_RETRIEVAL = SHARP + 1


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the base model becomes. Steps are batches of about `batch_tokens` tokens.

    The lessons, each passed when its running accuracy is high enough: copying random words, short sequences first; half
    of it with so few words that two or three must be matched; then looking up facts, one fact and six fillers more a
    lesson; after the `top_level`, or from step `lessons_end` on, the mixture.
    """

    seed: int = 0
    layers: int = 6
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 32
    mlp_width: int = 256
    lessons_end: int = 1500
    total_steps: int = 2700
    batch_tokens: int = 4096
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    decay_fraction: float = 0.3
    top_level: int = FIRST_RETRIEVAL + 8
    copying_accuracy: float = 0.9
    sharp_accuracy: float = 0.75
    retrieval_accuracy: float = 0.97
    alike_share: float = 0.25
    mixture: dict[str, float] = field(default_factory=lambda: dict(MIXTURE))

    def passes(self, level: int, accuracy: float) -> bool:
        needed = self.copying_accuracy if level < SHARP else self.sharp_accuracy
        return level < self.top_level and accuracy > (needed if level <= SHARP else self.retrieval_accuracy)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_width,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def encode(document: texts.Document, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids, and labels that are `IGNORED` everywhere but on answers and the separator that ends them."""
    ids, labels = [tokenizer.bos_token_id], [IGNORED]

    def add(text: str, supervised: bool) -> None:
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.extend(new)
        labels.extend(new if supervised else [IGNORED] * len(new))

    if document.opening:
        add(f"{document.opening}\n", False)
    for question, answer in document.exchanges:
        add(question + PLAIN_SEPARATOR, False)
        add(answer + PLAIN_SEPARATOR, True)
    return ids, labels


def copying_sample(vocabulary: int, lengths: tuple[int, int], rng: random.Random) -> tuple[list[int], list[int]]:
    """A random sequence written three times; the second and third copy can be known."""
    first = [rng.randrange(len(SPECIAL) + 256, vocabulary) for _ in range(rng.randint(*lengths))]
    return first * 3, [IGNORED] * len(first) + first * 2


def sharp_copying_sample(vocabulary: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """The same from so few words that the last one does not tell what comes next: two or three must be matched."""
    few = [rng.randrange(len(SPECIAL) + 256, vocabulary) for _ in range(rng.randint(4, 16))]
    first = [rng.choice(few) for _ in range(rng.randint(16, 64))]
    return first * 3, [IGNORED] * (len(first) + 3) + (first * 2)[3:]


def sample(recipe: Recipe, town: Town, tokenizer, level: int, mixed: bool, rng: random.Random):
    if mixed:
        kind = rng.choices(list(recipe.mixture), list(recipe.mixture.values()))[0]
        level = recipe.top_level
    elif level <= SHARP:
        if level == SHARP and rng.random() < 0.5:
            return sharp_copying_sample(len(tokenizer), rng)
        return copying_sample(len(tokenizer), COPY_LENGTHS[min(level, SHARP - 1)], rng)
    else:
        kind = "alike" if rng.random() < recipe.alike_share else "retrieval"
    level -= FIRST_RETRIEVAL
    here = rng.choice([level, level, rng.randint(0, level)])
    n_facts, n_fillers = rng.randint(2, 2 + here), rng.randint(0, 6 * here)
    if kind == "copying":
        return sharp_copying_sample(len(tokenizer), rng)
    if kind in ("retrieval", "alike"):
        return encode(texts.retrieval_document(town, n_facts, n_fillers, rng, alike=kind == "alike"), tokenizer)
    make = {"memory": texts.memory_document, "task": texts.task_document, "domain": texts.domain_document}[kind]
    return encode(make(town, rng), tokenizer)


def batches(recipe: Recipe, town: Town, tokenizer, step: int, level: int, mixed: bool, pool: int = 4):
    """`pool` batches of samples of like length, each of about `batch_tokens` tokens with its padding."""
    rng = random.Random(f"{recipe.seed}-{step}")
    samples, tokens = [], 0
    while tokens < pool * recipe.batch_tokens:
        samples.append(sample(recipe, town, tokenizer, level, mixed, rng))
        tokens += len(samples[-1][0])
    samples.sort(key=lambda pair: len(pair[0]))
    out, rows = [], []
    for ids, labels in samples:
        rows.append((ids, labels))
        if len(rows) * len(ids) >= recipe.batch_tokens:
            out.append(_pad(rows))
            rows = []
    rng.shuffle(out)
    return out


def _pad(rows):
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in rows])
    return ids, labels


def supervised_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor):
    """Cross-entropy and accuracy at supervised positions only; the head is never run elsewhere."""
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
    target = labels[:, 1:]
    chosen = target != IGNORED
    logits = model.lm_head(hidden[chosen])
    wanted = target[chosen]
    return torch.nn.functional.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted).float().mean()


def learning_rate(recipe: Recipe, step: int) -> float:
    """Warm-up, constant, then a linear fall over the last `decay_fraction`."""
    left = (recipe.total_steps - step) / (recipe.decay_fraction * recipe.total_steps)
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps, max(left, 0.01))


def pretrain(out_dir: Path, recipe: Recipe, checkpoint_every: int = 100, *, progress: bool = True) -> None:
    """Train the base model into `out_dir`; killed and started again it goes on from its last checkpoint.

    `training.json` is written last: recipe, seconds, tokens and the log, where `level` counts the lessons passed.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer, town = build_tokenizer(), Town()
    model = build_model(recipe, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    step, level, running, seconds, log, tokens = 0, 0, 0.0, 0.0, [], 0
    checkpoint = out_dir / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] == asdict(recipe):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step, level, running, seconds, tokens = (
                state[k] for k in ("step", "level", "running", "seconds", "tokens")
            )
            log = json.loads(state["log"])
    saved = step
    bar = tqdm(total=recipe.total_steps, initial=step, desc="pretraining", mininterval=10, disable=not progress)
    while step < recipe.total_steps:
        begun = time.monotonic()
        mixed = step >= recipe.lessons_end or level == recipe.top_level
        for ids, labels in batches(recipe, town, tokenizer, step, level, mixed):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            loss, accuracy = supervised_loss(model, ids, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            running = 0.9 * running + 0.1 * accuracy.item()
            if not mixed and recipe.passes(level, running):
                level, running = level + 1, 0.5
            step += 1
            tokens += ids.numel()
            bar.update()
            if step % 10 == 0:
                log.append({"step": step, "loss": loss.item(), "accuracy": accuracy.item(), "level": level})
                bar.set_postfix(loss=f"{loss.item():.3f}", running=f"{running:.3f}", level=level)
        seconds += time.monotonic() - begun
        if step // checkpoint_every > saved // checkpoint_every:
            saved = step
            state = dict(recipe=asdict(recipe), model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)
            state |= dict(level=level, running=running, seconds=seconds, tokens=tokens, log=json.dumps(log))
            with replacing(checkpoint) as beside:
                torch.save(state, beside)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    told = {"recipe": asdict(recipe), "seconds": seconds, "tokens": tokens, "log": log}
    write(out_dir / "training.json", json.dumps(told, indent=1))
