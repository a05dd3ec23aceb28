"""Settings that only commands have; those that an experiment has, too, are the sections of `ctxlib.params`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import Field

from ctxlib.params import Count, Fraction, Rows, Section, Variant


class ScoredRows(Rows):
    format: Literal["sharegpt", "messages", "instruction"] | None = Field(
        None, description="Of the rows; by default recognised by their keys."
    )
    max_bad_rows: Fraction = Field(0.05, description="Stop if a greater fraction of the rows is bad.")
    limit: Count | None = Field(None, description="Only the first conversations, this many.")


class ScoreRun(Section):
    max_length: Count | None = Field(
        None, description="Tokens per conversation; by default all positions (variant authors_code: 2047)."
    )
    conversations_per_part: Count = Field(256, description="Conversations per checkpoint.")


@dataclass(frozen=True)
class Judge:
    """Who grades, and how.

    base_url: of OpenAI, or of a server of your own ("http://localhost:8000/v1"). The key is read from the environment
    variable `api_key_variable`; a server on this machine or in a private network needs none.
    temperature, max_tokens: of a judgement; None leaves them to the server (some models take no others).
    max_retries: after a time-out, a lost connection, or a busy or failing server, with the client's growing pauses.
    """

    model: Annotated[str, Parameter(name="--judge", help="The judge's name on its server.")]
    base_url: Annotated[str, Parameter(help="Any server with OpenAI's protocol: http://localhost:8000/v1")] = (
        "https://api.openai.com/v1"
    )
    api_key_variable: Annotated[
        str, Parameter(help="The environment variable that holds the key; a local server needs none.")
    ] = "OPENAI_API_KEY"
    temperature: Annotated[float | None, Parameter(help="Of the judge; none: the server's own.")] = 0.0
    max_tokens: Annotated[int | None, Parameter(help="Per judgement; none: the server's own limit.")] = 2048
    repeats: Annotated[int, Parameter(help="Judgements per answer.")] = 1
    workers: Annotated[int, Parameter(help="Simultaneous requests.")] = 4
    timeout: Annotated[float, Parameter(help="Seconds per judgement.")] = 300.0
    max_retries: Annotated[int, Parameter(help="After a time-out or a failure of the server.")] = 5


class Answering(Section):
    """How the model under test answers MT-Bench."""

    variant: Variant = Field("standard", description="Both turns, or, as in the paper (authors_code), only the first.")
    indicator: str | None = Field(None, description="Put after every user message: [IND]")
    max_new_tokens: Count = Field(1024, description="Per answer.")
    batch_size: Count = Field(8, description="Answers generated at a time.")
