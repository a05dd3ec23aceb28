from pathlib import Path

import pytest
import yaml

from ctxlib.params import InputError, known_keys, load_params

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "params" / "smoke.yaml"
FILES = sorted((ROOT / "params").glob("*.yaml"))


def dotted(content: dict) -> list[str]:
    """The keys of the file, found without the schema: every section is one level deep."""
    return [
        f"{key}.{inner}" if isinstance(value, dict) else key
        for key, value in content.items()
        for inner in (value if isinstance(value, dict) else [None])
    ]


def write_smoke(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(SMOKE.read_text()) | changes))
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_params_file_has_all_keys(path):
    assert sorted(dotted(yaml.safe_load(path.read_text()))) == sorted(known_keys())
    assert load_params(path).experiment == path.stem


def test_unknown_key_names_the_nearest(tmp_path):
    path = write_smoke(tmp_path, nedle={"lenghts": [100]})
    with pytest.raises(InputError, match=r"x\.yaml: unknown key 'nedle\.lenghts'; did you mean 'needle\.lengths'\?"):
        load_params(path)
    with pytest.raises(InputError, match=r"overrides: unknown key 'needle\.per_cel'; did you mean 'needle\.per_cell'"):
        load_params(SMOKE, {"needle.per_cel": 2})


def test_missing_file_lists_those_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=r"params/minature\.yaml: no such.*params/miniature\.yaml, params/smoke\.yaml"):
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
    with pytest.raises(InputError, match=r"x\.yaml: missing key 'qa\.source'"):
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


def test_digest_changes_with_results_and_not_with_the_folder(tmp_path):
    digest = load_params(SMOKE).digest
    assert len(digest) == 12 and int(digest, 16) >= 0
    assert load_params(SMOKE, {"outputs": str(tmp_path)}).digest == digest
    assert load_params(SMOKE, {"finetune.learning_rate": 0.002}).digest == digest
    assert load_params(SMOKE, {"seed": 1}).digest != digest


@pytest.mark.parametrize("key", ["conversations.source", "qa.source", "models.pretrained", "models.chat_template"])
def test_a_path_that_is_not_there_is_named(key):
    with pytest.raises(InputError, match=rf"{key}: no file or folder './nowhere'"):
        load_params(SMOKE, {key: "./nowhere"}).check_inputs()


def test_hub_names_and_embedded_models_are_not_looked_for():
    load_params(SMOKE, {"models.pretrained": "owner/model"}).check_inputs()
