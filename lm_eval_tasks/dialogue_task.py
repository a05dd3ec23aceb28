"""How a question is put to the model: as in `ctxlib.generate`, where the harness would flatten or cut it otherwise."""

from collections.abc import Callable, Mapping
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from ctxlib.roles import PLAIN_SEPARATOR


class DialogueTask(ConfigurableTask):
    """Documents with `messages`, of which the last is to be answered and those before keep their roles.

    The chat template is the harness's (`--apply_chat_template`), with the whole of its generation prompt: the authors'
    fork of the harness (`wrap_chat_template`) cut off the newline behind `<|assistant|>`, which their models were
    trained with. Without a template, an empty line (PLAIN_SEPARATOR) separates messages, begins the answer and ends it.
    """

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def fewshot_context(
        self,
        doc: Mapping[str, Any],
        num_fewshot: int,
        *,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        chat_template: Callable[..., str] | None = None,
        **_: Any,
    ) -> str:
        system = [{"role": "system", "content": system_instruction}] if system_instruction else []
        messages = [*system, *doc["messages"]]
        if apply_chat_template:
            return chat_template(messages, add_generation_prompt=True)
        return "".join(message["content"] + PLAIN_SEPARATOR for message in messages)

    def construct_requests(
        self, doc: Mapping[str, Any], ctx: str, *, apply_chat_template: bool = False, **kwargs: Any
    ) -> Instance:
        request = super().construct_requests(doc, ctx, apply_chat_template=apply_chat_template, **kwargs)
        if not apply_chat_template:
            request.args[1]["until"].append(PLAIN_SEPARATOR)
        return request
