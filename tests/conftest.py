"""Fixtures that several rooms share: a byte-level tokenizer with the paper's chat template, and a tiny random Llama."""

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import matplotlib
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ctxlib.conversations import Conversation, Message
from ctxlib.roles import RoleMap

matplotlib.use("agg")

# Files that take longest, in this order: with several workers they begin first, so that none waits for one at the end.
SLOWEST_FILES = ("test_notebooks.py", "test_rehearsal.py", "test_base_models.py", "test_trials.py", "test_doctor.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOWEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


PAPER_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny models are fastest on one thread, and workers share the cores; an experiment sets its own number."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, after `<unk>`, `<s>` and `</s>`; a BOS in front, as Llama's tokenizer does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        chat_template=PAPER_TEMPLATE,
    )


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A random Llama with grouped-query attention: 2 layers, width 32, 4 heads over 2 kv heads. New each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def greedy_loop() -> Callable[..., tuple[str, int]]:
    """An oracle for answers and their lengths in tokens."""

    def unbatched_unpadded_uncached(model, tokenizer, prompt: RoleMap, max_new_tokens: int) -> tuple[str, int]:
        """The whole sequence through the model for every token."""
        ids, written = prompt.ids.tolist(), []
        for _ in range(max_new_tokens):
            with torch.no_grad():
                token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
            written.append(token)
        return tokenizer.decode(written, skip_special_tokens=True).strip(), len(written)

    return unbatched_unpadded_uncached


@pytest.fixture(scope="session")
def conversation() -> Callable[..., Conversation]:
    """Makes one of texts, the user's and the assistant's in turns."""

    def of_texts(*texts: str, indicated: bool = False, name: str = "c") -> Conversation:
        roles = ("user", "assistant")
        return Conversation(
            name,
            tuple(Message(roles[n % 2], text, indicated=indicated and n % 2 == 0) for n, text in enumerate(texts)),
        )

    return of_texts


@pytest.fixture
def conversations(conversation: Callable[..., Conversation]) -> list[Conversation]:
    """Seven short ones to train on, every other one indicated."""
    return [
        conversation(f"what is {n}?" * (1 + n % 3), f"It is {n}.", indicated=n % 2 == 0, name=str(n)) for n in range(7)
    ]


@pytest.fixture
def model_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The two of them in a folder, as `from_pretrained` reads it."""
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager]:
    """`with full_disk(n)`: no file can grow beyond n bytes, whoever writes it, as on a disk that is full."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
