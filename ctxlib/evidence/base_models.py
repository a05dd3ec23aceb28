"""Base models like the shipped one, but of other widths or from another seed, trained from scratch by the same recipe.

Like a trial, a base model is computed once, by whichever process asks first, and stored in `work/pretrainings/<key>`
under a hash of everything that can change it. Code is not part of that hash, except for `VERSION`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from filelock import FileLock

from ctxlib.files import digest
from ctxlib.miniature import MODELS
from ctxlib.miniature.pretrain import Recipe, pretrain
from ctxlib.models import load_model
from ctxlib.params import Params

VERSION = 1  # raise it with a change of code after which a base model would come out otherwise
PACKAGES = ("torch", "transformers")
SHIPPED = Recipe()


def scaled(width: int, *, seed: int = SHIPPED.seed, steps: int = SHIPPED.total_steps) -> Recipe:
    """The shipped recipe at another width: the same number of layers and heads, heads and MLP wider in proportion.

    width: of the hidden states, a multiple of 8, so that a head's is even. steps: batches of `Recipe.batch_tokens`.
    """
    return replace(
        SHIPPED,
        seed=seed,
        total_steps=steps,
        width=width,
        head_width=width // SHIPPED.heads,
        mlp_width=width * SHIPPED.mlp_width // SHIPPED.width,
    )


def pretrained(params: Params, recipe: Recipe, *, progress: bool = False) -> Path:
    """The folder of the recipe's model, trained first unless it is the shipped one; interrupted training resumes.

    For `models.pretrained` of a trial. Another process that asks for the same model waits for it.
    """
    if recipe == SHIPPED:
        return MODELS / "pretrained"
    packages = {name: version(name) for name in PACKAGES}
    made_by = {"version": VERSION, "packages": packages, "threads": params.threads, "recipe": asdict(recipe)}
    folder = params.output_dir / "work" / "pretrainings" / digest(made_by)
    training = folder.with_suffix(".training")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            if not (training / "training.json").exists():  # it is written last
                pretrain(training, recipe, progress=progress)
            (training / "checkpoint.pt").unlink(missing_ok=True)  # it would be part of the model's hash
            training.rename(folder)
    return folder


def model_table(folders: Mapping[str, Path]) -> pd.DataFrame:
    """One row per model: model, width, pretraining_seed, parameters, lessons, tokens, minutes.

    folders: of `pretrained`, by the models' names. lessons: passed, of `top_level`; tokens: seen, padding included.
    """
    rows = []
    for name, folder in folders.items():
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        recipe, log = training["recipe"], training["log"]
        rows.append(
            {
                "model": name,
                "width": recipe["width"],
                "pretraining_seed": recipe["seed"],
                "parameters": load_model(folder).num_parameters(),
                "lessons": f"{log[-1]['level'] if log else 0} of {recipe['top_level']}",
                "tokens": training["tokens"],
                "minutes": training["seconds"] / 60,
            }
        )
    return pd.DataFrame(rows)
