"""The judge: a server that speaks OpenAI's chat protocol, and the remedies when it fails."""

import ipaddress
import os
from typing import Any
from urllib.parse import urlsplit

from ctxlib.commands.settings import Judge
from ctxlib.params import InputError


def open_judge(judge: Judge) -> Any:
    """The client, once a server has answered at `base_url`.

    Raises InputError if a number is out of range, the `openai` package or the key is missing, the key is refused, or no
    server can be reached.
    """
    for name, least in (("repeats", 1), ("workers", 1), ("max_retries", 0)):
        if getattr(judge, name) < least:
            raise InputError(f"judge.{name}: expected at least {least}, got {getattr(judge, name)}")
    if judge.temperature is not None and not 0 <= judge.temperature <= 2:
        raise InputError(f"judge.temperature: expected 0 to 2, got {judge.temperature}")
    try:
        import openai
    except ImportError:
        raise InputError("the judge is asked through the package openai: pip install 'ctxlib[judge]'") from None
    key = os.environ.get(judge.api_key_variable)
    if not key and not _is_near(judge.base_url):
        raise InputError(
            f"no API key for {judge.base_url}: put it into the environment variable {judge.api_key_variable}, name "
            "another variable, or give the base URL of a server of your own, such as http://localhost:8000/v1"
        )
    client = openai.OpenAI(
        base_url=judge.base_url, api_key=key or "none", timeout=judge.timeout, max_retries=judge.max_retries
    )
    try:
        client.with_options(max_retries=0, timeout=min(judge.timeout, 30.0)).models.list()
    except openai.APITimeoutError:
        pass  # there, and busy
    except (openai.APIConnectionError, openai.AuthenticationError) as error:
        raise stopped(judge, error) from None
    except (openai.OpenAIError, ValueError, AttributeError, TypeError):
        pass  # it answered; not every server lists its models, nor to every key
    return client


def _is_near(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".local"))


def stopped(judge: Judge, error: Exception) -> InputError:
    import openai

    what = " ".join(str(error).split())[:300]
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        remedy = f"check the key in {judge.api_key_variable}"
    elif isinstance(error, openai.NotFoundError):
        remedy = f"check the judge's name '{judge.model}', and that the base URL ends as the server has it, mostly /v1"
    else:
        remedy = "check the server and its base URL; run the same command again to resume from the stored judgements"
    return InputError(f"judge at {judge.base_url}: {what}: {remedy}")
