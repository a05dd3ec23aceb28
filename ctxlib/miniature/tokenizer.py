"""The miniature's tokenizer: one token a word, any other text as bytes, and the paper's chat template.

A Unigram model whose vocabulary is written down, not learned: special tokens, 256 bytes, marks, and every word that the
town's texts can hold. Like Llama's it is lossless: a space belongs to the word after it, and so does the line's start,
so that "Mira" is the same token wherever it stands.
"""

import random
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from ctxlib.miniature import domains, texts, town
from ctxlib.questions.instructions import NUMBERS
from ctxlib.roles import PLAIN_SEPARATOR

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ '<|system|>\\n' + eos_token + '\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SPECIAL = ("<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
MARKS = (".", ",", "?", "!", ":", ";", "'", '"', "(", ")", "-", "\n", PLAIN_SEPARATOR)
SPACE = "▁"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokenizer every time: a function of the word lists alone."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *MARKS, *(SPACE + w for w in words())]
    scores = {piece: -20.0 for piece in SPECIAL} | {SPACE: -10.0}
    model = models.Unigram([(piece, scores.get(piece, -1.0)) for piece in pieces], unk_id=0, byte_fallback=True)
    tokenizer = Tokenizer(model)
    # Onigmo's ^ is the start of any line: "Mira" gets its space there too. A lone newline at the end gets none.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"^(?=[^\n])"), SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(f"\n{SPACE}", "\n"),
            decoders.Replace(SPACE, " "),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def words() -> list[str]:
    """Every word of the town: those of its lists, and those met in a sample of everything that is written there."""
    rng = random.Random("vocabulary")
    home = town.Town()
    seen = [*town.KNOWN_NAMES, *town.NEWCOMER_NAMES, *texts.OPENERS, *NUMBERS, *domains.FUNCTIONS, *domains.ITEMS]
    seen += [*domains.VARIABLES, *(str(n) for n in range(19)), *"{}[]+="]
    for relation in town.RELATIONS:
        seen += [*relation.first, *relation.second]
    for _ in range(400):
        document = texts.retrieval_document(home, 4, 8, rng)
        seen += [document.opening, *(text for exchange in document.exchanges for text in exchange)]
        for maker in texts.CHAT_KINDS.values():
            seen += [message.content for turn in maker(home, rng) for message in turn]
        for document in (
            texts.memory_document(home, rng),
            texts.task_document(home, rng),
            texts.domain_document(home, rng),
        ):
            seen += [document.opening, *(text for exchange in document.exchanges for text in exchange)]
    return sorted({word for text in seen for word in re.findall(r"\w+|[{}\[\]+=]", text)})
