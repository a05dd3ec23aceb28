import re
from pathlib import Path

import pytest
import yaml

from ctxlib.params import RENAMED, Finetune, InputError, Scoring, known_keys, load_params, locate

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "params" / "smoke.yaml"
FILES = sorted((ROOT / "params").glob("*.yaml"))


def write_smoke(tmp_path: Path, **changes: object) -> Path:
    """The whole of smoke.yaml in one file, with other values."""
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(load_params(SMOKE).model_dump() | changes))
    return path


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_params_file_is_the_experiment_of_its_name_and_can_be_written_out_whole(path, tmp_path):
    params = load_params(path)
    assert params.experiment == path.stem
    whole = load_params(write(tmp_path / "whole.yaml", params.model_dump()))
    assert whole.model_dump() == params.model_dump() and whole.digest == params.digest
    assert whole.files == (str(tmp_path / "whole.yaml"),)


def test_the_known_keys_are_those_of_a_file_written_out_whole():
    content = load_params(ROOT / "params" / "cures.yaml").model_dump()
    keys = [
        f"{k}.{inner}" if isinstance(v, dict) else k
        for k, v in content.items()
        for inner in (v if isinstance(v, dict) else [None])
    ]
    assert sorted(keys) == sorted(known_keys())


# One file extends another


def test_sections_are_merged_key_by_key_and_lists_and_shares_are_replaced_whole(tmp_path):
    base = load_params(SMOKE).model_dump()
    write_smoke(tmp_path)
    more = {
        "extends": "x.yaml",
        "seed": 5,
        "needle": {"per_cell": 9, "lengths": [150]},
        "miniature": {"shares": {"memory_question": 0.5, "memory_about": 0.5}},
    }
    child = load_params(write(tmp_path / "child.yaml", more))
    expected = base | {"seed": 5, "miniature": more["miniature"], "needle": base["needle"] | more["needle"]}
    assert child.model_dump() == expected
    grandchild = load_params(write(tmp_path / "g.yaml", {"extends": "child.yaml", "needle": {"per_cell": 1}}))
    assert grandchild.model_dump() == expected | {"needle": expected["needle"] | {"per_cell": 1}}
    assert [Path(file).name for file in grandchild.files] == ["g.yaml", "child.yaml", "x.yaml"]


def test_the_extended_file_is_looked_for_beside_the_file_and_then_in_the_params_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = load_params(SMOKE).model_dump()
    write(tmp_path / "params" / "base.yaml", whole | {"seed": 1})
    write(tmp_path / "mine" / "x.yaml", {"extends": "base.yaml"})
    assert load_params("mine/x.yaml").seed == 1
    assert load_params("mine/x.yaml").files == ("mine/x.yaml", "params/base.yaml")
    write(tmp_path / "mine" / "base.yaml", whole | {"seed": 2})
    assert load_params("mine/x.yaml").seed == 2
    monkeypatch.chdir(tmp_path / "mine")
    assert load_params("mine/x.yaml").files == ("mine/x.yaml", "mine/base.yaml")
    write(tmp_path / "mine" / "y.yaml", {"extends": "bade.yaml"})
    with pytest.raises(InputError, match=r"mine/y\.yaml: extends: no such params file 'bade\.yaml'; there are: .*base"):
        load_params("mine/y.yaml")


def test_a_circle_names_its_files(tmp_path):
    for name, base in (("a", "b"), ("b", "c"), ("c", "a")):
        write(tmp_path / f"{name}.yaml", {"extends": f"{base}.yaml"})
    with pytest.raises(InputError, match=r"a\.yaml extends .*b\.yaml extends .*c\.yaml extends .*a\.yaml: a circle"):
        load_params(tmp_path / "a.yaml")


def test_a_fault_is_reported_for_the_file_of_the_chain_that_holds_it(tmp_path):
    write_smoke(tmp_path, threads=0)
    child = write(tmp_path / "child.yaml", {"extends": "x.yaml", "seed": 5})
    with pytest.raises(InputError, match=r"/x\.yaml: key 'threads': .* got 0"):
        load_params(child)
    assert load_params(write(tmp_path / "child.yaml", {"extends": "x.yaml", "threads": 2})).threads == 2
    write_smoke(tmp_path, nedle={"lenghts": [100]})
    with pytest.raises(InputError, match=r"/x\.yaml: unknown key 'nedle\.lenghts'; did you mean 'needle\.lengths'"):
        load_params(child)


def test_a_key_that_is_written_twice_is_named_with_its_lines(tmp_path):
    path = write(tmp_path / "x.yaml", "extends: x\nneedle:\n  per_cell: 1\n  prompt: 1\n  per_cell: 2\n")
    with pytest.raises(InputError, match=r"x\.yaml: key 'per_cell' is in line 3 and again in line 5; remove one"):
        load_params(path)


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_a_renamed_key_names_the_new_one(old, tmp_path):
    section, key = old.split(".")
    now = rf"key '{old}' is now '{RENAMED[old]}'"
    with pytest.raises(InputError, match=rf"x\.yaml: {now}"):
        load_params(write(tmp_path / "x.yaml", {"extends": str(SMOKE), section: {key: "clean"}}))
    with pytest.raises(InputError, match=rf"overrides: {now}"):
        load_params(SMOKE, {old: "clean"})


def test_a_renamed_value_names_the_new_one():
    for old, new in (("clean", "standard"), ("paper", "authors_code")):
        with pytest.raises(InputError, match=rf"key 'qa\.variant': the value '{old}' is now '{new}'"):
            load_params(SMOKE, {"qa.variant": old})


def test_without_values_the_sections_of_the_library_are_the_papers():
    scoring, training = Scoring(), Finetune()
    assert (scoring.variant, scoring.head_reduction, scoring.threshold) == ("standard", "max_then_mean", 0.6)
    assert (training.method, training.lora_rank, training.lora_alpha, training.lora_dropout) == ("lora", 16, 16, 0.05)
    assert (training.steps, training.epochs, training.learning_rate) == (None, 1, 2e-4)
    assert (Finetune(steps=5).steps, Finetune(steps=5).epochs) == (5, None)
    for section in (scoring, training):
        assert type(section).model_validate(section.model_dump()) == section  # the defaults, too, are of their types


# Where a name is


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("gpt2", "hub"),
        ("squad", "hub"),
        ("owner/name", "hub"),
        ("owner/name-1.5_b", "hub"),
        ("miniature", "embedded"),
        ("miniature:instruct", "embedded"),
        ("here", "disk"),
        ("owner/here", "disk"),
        (Path("here"), "disk"),
        ("./name", "nowhere"),
        ("/owner/name", "nowhere"),
        ("~/name", "nowhere"),
        ("name/", "nowhere"),
        ("a/b/c", "nowhere"),
        ("data.json", "nowhere"),
        ("owner/data.parquet", "nowhere"),
        ("two words", "nowhere"),
        ("a--b", "nowhere"),
        (Path("owner/name"), "nowhere"),
    ],
)
def test_a_name_has_one_place(name, place, tmp_path):
    (tmp_path / "owner" / "here").mkdir(parents=True)
    (tmp_path / "here").touch()
    assert locate(name, tmp_path) == place


def test_every_hub_id_is_accepted_and_not_looked_for():
    for name in ("gpt2", "openai-community/gpt2"):
        load_params(SMOKE, {"models.pretrained": name, "qa.sources": ["squad"]}).check_inputs()


def test_unknown_key_names_the_nearest(tmp_path):
    path = write_smoke(tmp_path, nedle={"lenghts": [100]})
    with pytest.raises(InputError, match=r"x\.yaml: unknown key 'nedle\.lenghts'; did you mean 'needle\.lengths'\?"):
        load_params(path)
    with pytest.raises(InputError, match=r"overrides: unknown key 'needle\.per_cel'; did you mean 'needle\.per_cell'"):
        load_params(SMOKE, {"needle.per_cel": 2})


def test_missing_file_lists_those_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(
        InputError, match=r"params/minature\.yaml: no such.*params/miniature\.yaml, .*params/smoke\.yaml"
    ):
        load_params("params/minature.yaml")


def test_a_notebook_opened_in_its_folder_finds_the_same_file_and_outputs(monkeypatch):
    monkeypatch.chdir(ROOT)
    from_root = load_params("params/smoke.yaml").output_dir.resolve()
    monkeypatch.chdir(ROOT / "tests")
    assert load_params("params/smoke.yaml").output_dir.resolve() == from_root


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seed": "zero"}, "key 'seed': input should be a valid integer, got 'zero'"),
        ({"seed": True}, "key 'seed'"),
        ({"seed": 1.0}, "key 'seed'"),
        ({"needle.per_cell": "2"}, "key 'needle.per_cell'"),
        ({"needle.per_cell": 0}, "key 'needle.per_cell': input should be greater than or equal to 1, got 0"),
        ({"needle.lengths": []}, "key 'needle.lengths'"),
        ({"needle.source": "text"}, "needs haystack, needle, question, keywords"),
        ({"finetune.learning_rate": "1e400"}, "key 'finetune.learning_rate'"),
        ({"finetune.learning_rate": "fast"}, "got 'fast'"),
        ({"finetune.method": "Lora"}, "'full', 'lora' or 'qlora', got 'Lora'"),
        ({"finetune.epochs": 1.0}, "exactly one of 'steps' and 'epochs'"),
        ({"scoring.threshold": 1.5}, "less than or equal to 1"),
        ({"conversations.remove_refusals": "no"}, "key 'conversations.remove_refusals'"),
        ({"miniature.shares": {"memory": 0.5}}, "sum to 0.5"),
        ({"experiment": "../x"}, "key 'experiment'"),
        ({"qa": None}, "key 'qa'"),
    ],
)
def test_ill_typed_values_are_one_line_errors(overrides, message):
    with pytest.raises(InputError) as error:
        load_params(SMOKE, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "smoke.yaml" in str(error.value) or str(error.value).startswith("overrides")


def test_missing_key_is_named(tmp_path):
    with pytest.raises(InputError, match=r"x\.yaml: missing key 'qa\.sources'"):
        load_params(write_smoke(tmp_path, qa={"n": 3, "max_new_tokens": 3}))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [1\n", "just words"])
def test_a_file_without_keys_is_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=r"x\.yaml: (not readable as YAML|expected keys)"):
        load_params(tmp_path / "x.yaml")


def test_exponents_that_yaml_reads_as_text_are_numbers():
    assert yaml.safe_load("1e-4") == "1e-4"
    assert load_params(SMOKE, {"finetune.learning_rate": "1e-4"}).finetune.learning_rate == 1e-4


def test_overrides_dotted_or_nested_are_the_same():
    dotted_params = load_params(SMOKE, {"needle.per_cell": 7, "seed": 3})
    nested_params = load_params(SMOKE, {"needle": {"per_cell": 7}, "seed": 3})
    assert dotted_params == nested_params
    assert dotted_params.needle.lengths == load_params(SMOKE).needle.lengths


def test_changed_parameters_are_checked_as_those_of_a_file_and_leave_the_others_as_they_were():
    params = load_params(SMOKE)
    changed = params.changed({"needle.per_cell": 7, "seed": 3})
    assert changed == load_params(SMOKE, {"needle.per_cell": 7, "seed": 3}) != params == load_params(SMOKE)
    assert (changed.file, changed.root) == (params.file, params.root)
    with pytest.raises(InputError, match=r"smoke\.yaml with overrides: key 'needle\.per_cell'"):
        params.changed({"needle.per_cell": 0})


def test_the_section_of_the_evidence_is_whole_or_null():
    assert load_params(SMOKE).evidence is None
    section = load_params(ROOT / "params" / "evidence.yaml").evidence.model_dump()
    assert load_params(SMOKE, {"evidence": section}).evidence.model_dump() == section
    with pytest.raises(InputError, match=r"missing key 'evidence\.\w+'"):
        load_params(SMOKE, {"evidence.seeds": [0, 1]})
    with pytest.raises(InputError, match="a seed that is named twice is no second run"):
        load_params(SMOKE, {"evidence": section | {"seeds": [1, 1]}})


def test_digest_changes_with_results_and_not_with_the_folder(tmp_path):
    digest = load_params(SMOKE).digest
    assert len(digest) == 12 and int(digest, 16) >= 0
    assert load_params(SMOKE, {"outputs": str(tmp_path)}).digest == digest
    assert load_params(SMOKE, {"finetune.learning_rate": 0.002}).digest == digest
    assert load_params(SMOKE, {"seed": 1}).digest != digest


@pytest.mark.parametrize("key", ["conversations.source", "models.pretrained", "models.chat_template"])
def test_a_path_that_is_not_there_is_named(key):
    with pytest.raises(InputError, match=rf"{key}: no file or folder './nowhere'"):
        load_params(SMOKE, {key: "./nowhere"}).check_inputs()


def test_of_several_sources_of_passages_the_missing_one_is_named():
    load_params(SMOKE, {"qa.sources": ["miniature", "rajpurkar/squad"]}).check_inputs()
    params = load_params(SMOKE, {"qa.sources": ["miniature", "./nowhere.json", "rajpurkar/squad"]})
    with pytest.raises(InputError, match=r"qa\.sources\[1\]: no file or folder './nowhere.json'; put an official JSON"):
        params.check_inputs()


def test_hub_names_and_embedded_models_are_not_looked_for():
    load_params(SMOKE, {"models.pretrained": "owner/model"}).check_inputs()


def test_a_hubs_dataset_is_not_looked_for_and_a_missing_data_file_is():
    load_params(SMOKE, {"conversations.source": "owner/data"}).check_inputs()
    for missing in ("data/chats.json", "data/chats.parquet", "data/", "./chats"):
        with pytest.raises(InputError, match=f"conversations.source: no file or folder '{missing}'"):
            load_params(SMOKE, {"conversations.source": missing}).check_inputs()


def test_the_miniatures_conversations_need_their_shares():
    load_params(SMOKE, {"miniature.shares": None, "conversations.source": "owner/data"})
    with pytest.raises(InputError, match=r"conversations\.source 'miniature' needs miniature\.shares"):
        load_params(SMOKE, {"miniature.shares": None})


BASES = {
    "tinyllama": ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", 2048),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", 4096),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", 4096),
}
DATA = {"sharegpt": 1, "ultrachat": 1, "wizardlm": 2}  # epochs
NINE = [(base, data) for base in BASES for data in DATA]


@pytest.mark.parametrize(("base", "data"), NINE, ids="-".join)
def test_the_nine_runs_have_the_papers_values(base, data):
    params = load_params(ROOT / "params" / f"{base}-{data}.yaml")
    section, needle = params.finetune, params.needle
    assert (params.models.pretrained, params.conversations.max_length) == BASES[base]
    assert len(bytes.fromhex(params.models.revision)) == 20  # a whole commit
    assert (params.scoring.layer, params.scoring.threshold, params.scoring.head_reduction) == (15, 0.6, "max_then_mean")
    small = base == "tinyllama"
    assert section.method == ("full" if small else "qlora")
    assert section.batch_size * section.gradient_accumulation == (128 if small else 64)
    assert section.learning_rate == (2e-5 if small else 2e-4)
    assert (section.epochs, section.warmup_fraction, section.schedule) == (DATA[data], 0.1, "cosine")
    assert (section.lora_rank, section.lora_alpha, section.lora_dropout, params.seed) == (16, 16, 0.05, 42)
    assert len(needle.lengths) * len(needle.depths) * needle.per_cell == 400
    window = {"tinyllama": 2048, "llama-2-7b": 4096, "llama-3-8b": 8192}[base]
    limit = 1000 if data == "wizardlm" else 2000 if small else 4000  # the paper's
    assert (needle.lengths[0], needle.lengths[-1]) == (200, limit if limit + 200 <= window else limit - 200)
    assert needle.depths[0] == 0 and needle.depths[-1] == 100 and needle.max_new_tokens == 100


@pytest.mark.parametrize(("base", "data"), NINE, ids="-".join)
def test_the_nine_runs_say_what_is_not_pinned_and_what_the_user_supplies(base, data):
    path = ROOT / "params" / f"{base}-{data}.yaml"
    params = load_params(path)
    lines = [line for file in params.files for line in Path(file).read_text().splitlines()]
    noted = {key: [line for line in lines if line.strip().startswith(f"{key}:")] for key in ("seed_model_revision",)}
    unpinned = [line for line in lines if "revision: null" in line and "instruct" not in line]
    assert len(unpinned) == 2 and all("NOT PINNED" in line for line in [*unpinned, *noted["seed_model_revision"]])
    assert Path(params.files[-1]).name == "tinyllama-sharegpt.yaml"
    supplied = [line.split(":")[0].strip() for line in lines if "YOU SUPPLY" in line]
    assert supplied == ["haystack", "sources"]
    with pytest.raises(InputError, match=r"needle\.haystack: .* put a folder of \.txt there"):
        params.check_inputs()
    supplied = {"needle.haystack": str(ROOT), "qa.sources": []}
    load_params(path, supplied).check_inputs()  # models.instruct: 03 trains it
    assert load_params(path, supplied).trains("instruct")
    own = params.models.instruct
    for role, said in (("instruct", "correct the path"), ("seed_model", "trained here: first run 02 and 03")):
        name = f"{own}s" if role == "instruct" else own
        with pytest.raises(InputError, match=rf"models\.{role}: no file or folder '{re.escape(name)}'; .*{said}"):
            load_params(path, supplied | {f"models.{role}": name}).check_inputs()


OPEN = ("smollm2-135m", "smollm2-360m", "qwen3-0.6b", "olmo-2-1b")


@pytest.mark.parametrize("name", OPEN)
def test_the_open_models_say_what_is_not_pinned_and_share_the_data_of_smollm2(name):
    path = ROOT / "params" / f"{name}.yaml"
    params, shared = load_params(path), load_params(ROOT / "params" / "smollm2.yaml")
    unpinned = [line for line in path.read_text().splitlines() if "revision: null" in line]
    assert len(unpinned) == 3 and all("NOT PINNED" in line for line in unpinned)
    assert (params.conversations, params.qa.sources) == (shared.conversations, shared.qa.sources)
    assert params.models.pretrained != params.models.instruct == params.models.seed_model


def test_smollm2_without_a_hub_has_no_base_model_and_says_so():
    path = ROOT / "params" / "smollm2.yaml"
    models = load_params(path).models
    assert models.pretrained == models.instruct == models.seed_model and "in no package" in path.read_text()
    cut = load_params(ROOT / "params" / "smollm2-cpu.yaml")
    assert cut.models.model_copy(update={"batch_size": models.batch_size}) == models and cut.threads == 1
