# Who needs whom. `make reproduce` calls this; by hand: snakemake --cores 1 --config experiment=smoke
import json
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)

from ctxlib.params import load_params

STORY = {
    "00_the_miniature": [],
    "01_attention_shift": [],
    "01_two_tokens": [],  # an appendix
    "02_context_dependency": [],
    "03_indicator_sft": ["02_context_dependency"],
    "04_evaluation": ["01_attention_shift", "01_two_tokens", "03_indicator_sft"],  # its last figure shows the claims of all
    "05_figures_and_tables": ["04_evaluation"],
}
# they share trials, not tables: none waits for another
EVIDENCE = {
    "06_dose_response": [],
    "07_seeds": [],
    "08_threshold": [],
    "09_layer_head_reading": [],
    "10_seed_model": [],
    "11_size": [],
    "12_generalisation": [],
    "13_lasting_effect": [],
    "14_cause": [],
}
CURES = {
    "15_cures": [],
}

params_file = config.get("params_file", f"params/{config.get('experiment', 'miniature')}.yaml")
overrides = config.get("overrides", {})
experiment = load_params(params_file, overrides)
if experiment.trains("instruct"):
    STORY |= dict.fromkeys(("01_attention_shift", "01_two_tokens"), ["03_indicator_sft"])
NEEDS = CURES if experiment.cures else EVIDENCE if experiment.evidence else STORY
HOME = Path(os.path.relpath(workflow.basedir))  # of notebooks and code; the working directory may be another
OUTPUTS = experiment.output_dir
# receipts are not committed: a fresh clone, which holds the committed outputs, runs everything once
RECEIPT = f"{OUTPUTS}/work/receipts/{{notebook}}.json"


rule all:
    input:
        expand(RECEIPT, notebook=NEEDS),


rule notebook:
    input:
        lambda wildcards: expand(RECEIPT, notebook=NEEDS[wildcards.notebook]),
        notebook=str(HOME / "notebooks" / "{notebook}.ipynb"),
        params_files=[str(experiment.root / file) for file in experiment.files],  # those that it extends, too
        code=sorted(str(path) for path in (HOME / "ctxlib").rglob("*.py")),
        # the models are over 1 MB, where snakemake looks at times instead of contents; their cards hold their hashes
        models=sorted(str(path) for path in (HOME / "ctxlib" / "miniature" / "models").glob("*/card.json")),
    # the executed notebook is neither an output, which a failed run deletes, nor a log, which it leaves empty:
    # the runner puts it in its place when every cell has completed
    output:
        RECEIPT,
    threads: experiment.threads
    wildcard_constraints:
        notebook="|".join(NEEDS),
    params:
        file=params_file,
        overrides=lambda wildcards: " ".join(
            "--set " + shlex.quote(f"{key}={json.dumps(value)}") for key, value in overrides.items()
        ),
    shell:
        "{sys.executable:q} -m ctxlib run {input.notebook:q} --params {params.file:q} {params.overrides}"
