"""The sections of a params file: types, defaults and descriptions, from which the options of the commands are made."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as a string: take it as the number that was meant."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Layer = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]  # numpy takes no more than 2**32, and some seeds are derived by addition
Variant = Literal["standard", "authors_code"]  # the paper's text, mended where it is unclear; or what its code computes
HeadReduction = Literal["max_then_mean", "mean_then_max", "mean", "first_token"]
FirstResponseToken = Literal["last_input", "forced_prefix"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Loading(Section):
    """How a model is loaded, whichever it is."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Of the weights.")
    quantisation: Literal["nf4"] | None = Field(None, description="4-bit weights.")
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="eager: for models without sdpa, such as Gemma 2.")
    chat_template: str | None = Field(None, description="A .jinja file; by default the tokenizer's own.")
    revision: str | None = Field(None, description="Commit, tag or branch on the hub; by default the newest.")


class Models(Loading):
    """`revision` is that of `pretrained`."""

    pretrained: str
    instruct: str
    seed_model: str
    instruct_revision: str | None = None
    seed_model_revision: str | None = None
    batch_size: Count
    indicator: Annotated[str, Field(min_length=1)] = "[IND]"

    def revision_of(self, which: str) -> str | None:
        """The commit, tag or branch of `pretrained`, `instruct` or `seed_model`; None: the newest."""
        return self.revision if which == "pretrained" else getattr(self, f"{which}_revision")


class Rows(Section):
    """Which rows of a dataset are read."""

    split: str = Field("train", description="Of a dataset on the hub.")
    on_bad_row: Literal["error", "drop"] = Field("error", description="Stop at a malformed row, or drop and list it.")
    remove_refusals: bool = Field(False, description="Leave out conversations with a refusal.")


class Conversations(Rows):
    source: str
    revision: str | None = None
    n: Count | None = None
    raw_text: str | None = Field(None, description="Plain text to mix in: .txt, a folder of them, or rows.")
    max_length: Count = Field(2048, description="Tokens per conversation, at most.")


class Miniature(Section):
    shares: dict[str, Fraction] | None = None

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> "Miniature":
        total = 1 if self.shares is None else sum(self.shares.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"shares must sum to 1, they sum to {total:g}")
        return self


class Allocation(Section):
    prompts: Count
    layer: Layer
    first_response_token: FirstResponseToken = "last_input"


class Steering(Section):
    alphas: Annotated[list[Annotated[Positive, Field(le=1)]], Field(min_length=1)]
    per_task: Count
    variant: Variant = "standard"


class ScoreRule(Section):
    """From attention to one score per turn and layer."""

    variant: Variant = Field("standard", description="The paper's formula, or what the authors' code computes.")
    head_reduction: HeadReduction = Field(
        "max_then_mean", description="From heads and answer tokens to one number; max_then_mean is the paper's."
    )
    token_budget: Count | None = Field(
        None, description="Tokens per batch, padding included; by default 8192, on a CPU 512."
    )


class Scoring(ScoreRule):
    layer: Layer = 15  # of 22
    thresholds: Annotated[list[Fraction], Field(min_length=1)] = [0.5, 0.6, 0.7, 0.8]  # Table 10
    threshold: Fraction = 0.6


class Finetune(Section):
    """The defaults are LoRA's in the paper's Table 4."""

    method: Literal["full", "lora", "qlora"] = Field("lora", description="What is trained.")
    variant: Variant = Field(
        "standard", description="standard: loss on the answers; authors_code: on every token, the indicator frozen."
    )
    steps: Annotated[Count, Field(le=10**8)] | None = Field(None, description="Instead of epochs.")
    epochs: Positive | None = Field(1.0, description="Passes over the data; unset if steps are given.")
    batch_size: Count = Field(2, le=2**16, description="Conversations per batch and process.")
    gradient_accumulation: Count = Field(8, le=2**16, description="Batches per step.")
    learning_rate: Positive = Field(2e-4, le=1e9, description="Peak of the schedule.")
    warmup_fraction: Fraction = Field(0.1, description="Fraction of the steps over which the rate rises.")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="After the warm-up.")
    lora_rank: Count = Field(16, le=2**16, description="Unused by method full.")
    lora_alpha: Positive = Field(16.0, le=1e9, description="The adapter is scaled by alpha / rank.")
    lora_dropout: Fraction = Field(0.05, lt=1, description="On the adapter's input.")
    max_grad_norm: Positive = Field(1.0, description="Gradients are clipped to this norm.")
    raw_text_share: Fraction = Field(
        0.0, lt=1, description="Fraction of the examples that are plain text, if there is any (raw_text)."
    )
    group_by_length: bool = Field(True, description="Batch conversations of similar length.")
    packing: bool | None = Field(
        None, description="A batch in one row, without padding; same loss up to rounding; by default on CUDA."
    )
    gradient_checkpointing: bool | None = Field(None, description="Slower, in less memory; by default on CUDA.")
    save_every: Count = Field(100, description="Steps per checkpoint, from which an interrupted run resumes.")

    def packs(self, cuda: bool) -> bool:
        """Whether a batch is laid out as one row: by default on CUDA alone."""
        return cuda if self.packing is None else self.packing

    @property
    def raw_text_per_conversation(self) -> float:
        return self.raw_text_share / (1 - self.raw_text_share)

    def examples(self, conversations: int | float, processes: int = 1) -> int | float:
        """How many examples are trained on: all steps or epochs of conversations, and the raw text in addition."""
        read = (self.epochs or 0) * conversations
        if self.steps is not None:
            read = self.steps * self.batch_size * self.gradient_accumulation * processes
        return read * (1 + self.raw_text_per_conversation)

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_the_default_epochs(cls, values: Any) -> Any:
        given = isinstance(values, dict) and values.get("steps") is not None and "epochs" not in values
        return values | {"epochs": None} if given else values

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "Finetune":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of 'steps' and 'epochs', set the other to null")
        return self


class Needle(Section):
    source: Literal["miniature", "text"]
    haystack: str | None = None
    prompt: Annotated[int, Field(ge=1, le=4)] = 1
    needle: str | list[str] | None = None
    question: str | None = None
    keywords: list[str] | None = None
    response_prefix: str | None = None
    lengths: Annotated[list[Count], Field(min_length=1)]
    depths: Annotated[list[Annotated[Number, Field(ge=0, le=100)]], Field(min_length=1)]
    per_cell: Count
    max_new_tokens: Count = 100
    variant: Variant = "standard"

    @model_validator(mode="after")
    def _text_needs_its_parts(self) -> "Needle":
        missing = [key for key in ("haystack", "needle", "question", "keywords") if not getattr(self, key)]
        if self.source == "text" and missing:
            raise ValueError(f"source 'text' needs {', '.join(missing)}")
        return self


class Qa(Section):
    sources: list[str]
    split: str = "validation"
    n: Count
    prompt: Literal["instruction", "plain"] = "instruction"
    variant: Variant = "standard"
    max_new_tokens: Count = 100


class Facts(Section):
    n: Count = 300


class Instructions(Section):
    n: Count = 300
    max_new_tokens: Count = 64


class Bootstrap(Section):
    samples: Count = 2000


class Evidence(Section):
    """What the notebooks from 06 on vary; the other sections hold everything that they keep."""

    seeds: Annotated[list[Seed], Field(min_length=2)]
    ablation_seeds: Annotated[list[Seed], Field(min_length=2)]
    raw_text_shares: Annotated[list[Fraction], Field(min_length=2)]
    doses: Annotated[list[Fraction], Field(min_length=2)]
    thresholds: Annotated[list[Fraction], Field(min_length=1)]
    marked_shares: Annotated[list[Fraction], Field(min_length=1)]
    compared_scores: Count
    step_factors: Annotated[list[Count], Field(min_length=2)]
    second_stage_steps: Annotated[list[Count], Field(min_length=1)]
    head_counts: Annotated[list[Count], Field(min_length=1)]
    head_draws: Count
    widths: Annotated[list[Annotated[int, Field(ge=8, multiple_of=8)]], Field(min_length=2)]
    pretraining_seeds: Annotated[list[Seed], Field(min_length=2)]
    pretraining_steps: Count

    @model_validator(mode="after")
    def _each_seed_once(self) -> "Evidence":
        for name in ("seeds", "ablation_seeds", "pretraining_seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must differ from one another: a seed that is named twice is no second run")
        return self


class Cures(Section):
    """What the bench of cures asks, and at which seeds; the other sections hold everything that it keeps."""

    seeds: Annotated[list[Seed], Field(min_length=1)]
    trained_seeds: Annotated[list[Seed], Field(min_length=1)]  # of cures that need a training of their own
    contexts: Count  # known facts, each asked under four contexts
    long_tokens: Count  # of the long haystacks, at needle.depths, needle.per_cell each
    files: list[str] = []  # further cures, as path.py:Name

    @model_validator(mode="after")
    def _each_seed_once(self) -> "Cures":
        for name in ("seeds", "trained_seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must differ from one another: a seed that is named twice is no second run")
        if not set(self.trained_seeds) <= set(self.seeds):
            raise ValueError("trained_seeds must be among seeds: a cure is compared with no cure in the same seed")
        return self
