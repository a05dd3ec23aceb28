"""The harness's tasks ask and score what ctxlib asks and scores; with the harness, answer by answer."""

import ast
import importlib.util
import json
import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from ctxlib import experiment, models
from ctxlib.generate import question_prompt
from ctxlib.metrics import score_answers
from ctxlib.miniature import MODELS
from ctxlib.miniature.texts import distinct_facts, passage
from ctxlib.params import InputError, load_params
from ctxlib.questions.qa import load_questions

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "lm_eval_tasks"
HUB = {"squad": "rajpurkar/squad", "quac": "allenai/quac", "drop": "EleutherAI/drop"}
PROMPTS, INDICATORS, VARIANTS = ("instruction", "plain"), ("", "[IND]"), ("standard", "authors_code")
SCORES = ["exact_match", "token_f1", "unfiltered_f1", "human_f1", "human_equivalent", "containment"]


def task_name(dataset, prompt="instruction", indicator=""):
    return f"ctxlib_{dataset}{'_plain' * (prompt == 'plain')}{'_indicator' * bool(indicator)}"


def load_module(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_task(path):
    """A task file over those that it includes, the functions as their names."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    content = yaml.load(path.read_text(), Loader)
    included = content.pop("include", None)
    return {**(load_task(path.parent / included) if included else {}), **content}


passage_questions = load_module("passage_questions")
TASKS = {path.stem: load_task(path) for path in sorted(FOLDER.glob("*.yaml"))}


def answers(*texts):
    return [{"text": text, "answer_start": 0} for text in texts]


def quac_qa(id, fact, *references):
    return {
        "id": id,
        "question": fact.question,
        "answers": answers(*references),
        "orig_answer": answers(fact.sentence)[0],
    }


def drop_qa(id, fact, number="", spans=(), **date):
    found = {"number": number, "spans": list(spans), "date": {"day": "", "month": "", "year": ""} | date}
    also = {"number": "", "spans": [fact.predicate], "date": {}}
    return {"query_id": id, "question": fact.question, "answer": found, "validated_answers": [also]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Official files of the three datasets, four passages about the town's people each, as the harness's metadata."""
    rng, folder = random.Random("harness"), tmp_path_factory.mktemp("sources")
    squad, quac, drop = [], [], {}
    for p in range(4):
        facts = distinct_facts(4, rng)
        text = passage([fact.sentence for fact in facts], 3, rng)
        first, second, third, fourth = facts
        qas = [
            {"id": f"s{p}.{q}", "question": fact.question, "answers": answers(fact.sentence, fact.predicate)}
            for q, fact in enumerate(facts)
        ]
        squad.append({"context": text, "qas": qas})
        turns = [
            quac_qa(f"C_{p}_q#0", first, first.sentence, first.predicate, "CANNOTANSWER"),
            quac_qa(f"C_{p}_q#1", second, "CANNOTANSWER", second.sentence),
            quac_qa(f"C_{p}_q#2", third, third.sentence, "rain at night", "nobody saw it"),  # people agree too little
            quac_qa(f"C_{p}_q#3", fourth, fourth.sentence),
        ]
        quac.append({"id": f"C_{p}", "context": f"{text} CANNOTANSWER", "qas": turns})
        pairs = [
            drop_qa(f"d{p}.0", first, spans=[first.sentence]),
            drop_qa(f"d{p}.1", second, spans=second.predicate.split()),
            drop_qa(f"d{p}.2", third, number="3"),
            drop_qa(f"d{p}.3", fourth, day="5", month="May"),
        ]
        drop[f"passage_{p}"] = {"passage": text, "qa_pairs": pairs}
    contents = {
        "squad": {"version": "1.1", "data": [{"title": "Town", "paragraphs": squad}]},
        "quac": {"data": [{"title": "Town", "background": "It is windy.", "paragraphs": [one]} for one in quac]},
        "drop": drop,
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {name: str(folder / f"{name}.json") for name in contents}


@pytest.fixture(scope="module")
def indicator_model(tmp_path_factory):
    """The miniature's instruct model with `[IND]` among its tokens, in a folder."""
    folder = tmp_path_factory.mktemp("models") / "indicator"
    model, tokenizer = models.load_model(MODELS / "instruct", device="cpu"), models.load_tokenizer(MODELS / "instruct")
    models.add_indicator(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_every_dataset_has_a_task_for_each_prompt_with_and_without_the_indicator():
    expected = {}
    for dataset, prompt, indicator in product(HUB, PROMPTS, INDICATORS):
        given = {"prompt": prompt} if prompt == "plain" else {}
        given |= {"indicator": indicator} if indicator else {}
        expected[task_name(dataset, prompt, indicator)] = {"dataset": dataset, **given}
    assert {task["task"]: task["dataset_kwargs"] for task in TASKS.values()} == expected
    assert {f"ctxlib_{stem}" for stem in TASKS} == set(expected)


def test_a_task_is_zero_shot_greedy_and_reads_its_dataset_from_the_hub_by_default():
    for task in TASKS.values():
        dataset = task["dataset_kwargs"]["dataset"]
        assert {key: value for key, value in task["metadata"].items() if key != "version"} == {dataset: HUB[dataset]}
        assert task["num_fewshot"] == 0
        assert task["generation_kwargs"] == {"do_sample": False, "max_gen_toks": 100, "until": []}


def test_every_function_that_a_task_names_is_there():
    named = {task[key] for task in TASKS.values() for key in ("class", "custom_dataset", "process_results")}
    assert len(named) == 3
    for module, _, name in (one.rpartition(".") for one in named):
        body = ast.parse((FOLDER / f"{module}.py").read_text()).body
        assert name in {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize(("dataset", "prompt", "variant"), [*product(HUB, PROMPTS, VARIANTS)])
def test_the_documents_are_ctxlibs_questions(sources, dataset, prompt, variant):
    questions = load_questions(sources[dataset], prompt=prompt, variant=variant)
    for indicator in INDICATORS:
        metadata = {**sources, "version": 1, "pretrained": "./a/model", "variant": variant}
        documents = passage_questions.documents(dataset, prompt, indicator, **metadata)["validation"]
        assert [doc["id"] for doc in documents] == [question.id for question in questions]
        for doc, question in zip(documents, questions, strict=True):
            expected = [(message.role, message.content) for message in question.messages]
            expected[-1] = ("user", question.messages[-1].content + indicator)
            assert [(message["role"], message["content"]) for message in doc["messages"]] == expected
            assert doc["answers"] == list(question.answers)


@pytest.mark.parametrize(("dataset", "indicator"), [*product(HUB, INDICATORS)])
def test_the_templates_text_of_a_document_is_token_for_token_the_prompt_of_the_question(
    sources, indicator_model, dataset, indicator
):
    """Also its last newline, behind `<|assistant|>`, which the authors' harness strips."""
    tokenizer = models.load_tokenizer(indicator_model)
    documents = passage_questions.documents(dataset, indicator=indicator, **sources)["validation"]
    for doc, question in zip(documents, load_questions(sources[dataset]), strict=True):
        text = tokenizer.apply_chat_template(doc["messages"], tokenize=False, add_generation_prompt=True)
        prompt = question_prompt(tokenizer, question, True, indicator or None, False)
        assert tokenizer.encode(text, add_special_tokens=False) == prompt.ids.tolist()
        assert text.endswith(f"{indicator}</s>\n<|assistant|>\n")


@pytest.mark.parametrize("dataset", HUB)
def test_an_answer_is_scored_as_by_score_answers(sources, dataset):
    documents = passage_questions.documents(dataset, **sources)["validation"]
    questions, seen = load_questions(sources[dataset]), set()
    for doc, question in zip(documents, questions, strict=True):
        other = questions[0].answers[0]
        for answer in (question.answers[0], f"{question.answers[-1]} ", f"No. {other}", "CANNOTANSWER", "13. 3", ""):
            frame = pd.DataFrame({"id": [question.id], "answer": [answer.strip()]})
            clean, paper = (score_answers(frame, questions, variant=variant).iloc[0] for variant in VARIANTS)
            expected = {name: clean[name] for name in SCORES if name in clean and not np.isnan(clean[name])}
            scores = passage_questions.scores(doc, [answer])
            assert scores == expected | {"containment_authors_code": paper["containment"]}
            seen |= scores.keys()
    metrics = TASKS[dataset]["metric_list"]
    assert {metric["metric"] for metric in metrics} == seen
    assert all(metric["aggregation"] == "mean" and metric["higher_is_better"] for metric in metrics)


def test_a_question_that_the_quac_script_leaves_out_has_no_share_in_its_means(sources):
    documents = passage_questions.documents("quac", **sources)["validation"]
    left_out = [doc["id"] for doc in documents if "token_f1" not in passage_questions.scores(doc, ["rain"])]
    assert left_out == [f"C_{dialogue}_q#2" for dialogue in range(4)]


def test_metadata_that_would_give_other_numbers_silently_is_refused(sources):
    with pytest.raises(InputError, match=r"metadata drop: .*squad\.json holds questions of squad; name a source of dr"):
        passage_questions.documents("drop", drop=sources["squad"])
    with pytest.raises(InputError, match=r"metadata variant: expected standard or authors_code, got 'papr'"):
        passage_questions.documents("squad", **sources, variant="papr")
    with pytest.raises(InputError, match=r"no file or folder '\./no\.json'; give qa\.sources"):
        passage_questions.documents("squad", squad="./no.json")


# --- with the harness ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval", reason="the extra 'lm-eval' is not installed: pip install -e '.[lm-eval]'")


def ours(folder, sources, out, *, template, variant, prompt="instruction", indicator=None):
    """Scored answers of ctxlib, a frame a dataset; `containment_authors_code` by the paper's variant."""
    frames = {}
    loaded = models.load_model(folder, device="cpu"), models.load_tokenizer(folder)
    subject = models.Subject("ours", *loaded, models.model_hash(folder))
    for dataset, source in sources.items():
        settings = {"qa.sources": [source], "qa.n": 1000, "qa.max_new_tokens": 100, "qa.prompt": prompt}
        params = load_params(ROOT / "params/smoke.yaml", {**settings, "qa.variant": variant, "outputs": str(out)})
        questions = experiment.passage_questions(params)
        asking = {"condition": "", "template": template, "indicator": indicator}
        said = experiment.ask(params, subject, questions, **asking)[["id", "prompt", "answer"]]
        clean, paper = (score_answers(said, questions, variant=variant) for variant in VARIANTS)
        frames[dataset] = clean.assign(containment_authors_code=paper["containment"]).set_index("id")
    return frames


def assert_same(results, samples, frames, tokenizer, *, template, **variant):
    """Prompts, answers and metrics of every question, and the means."""
    for dataset, frame in frames.items():
        task = task_name(dataset, **variant)
        metrics = [metric["metric"] for metric in TASKS[task.removeprefix("ctxlib_")]["metric_list"]]
        assert [sample["doc"]["id"] for sample in samples[task]] == list(frame.index)
        for sample, (_, row) in zip(samples[task], frame.iterrows(), strict=True):
            ((prompt, generation),) = sample["arguments"]
            assert generation["until"] == ([] if template else ["\n\n"])
            ids = tokenizer.encode(prompt, add_special_tokens=not prompt.startswith(tokenizer.bos_token))
            assert tokenizer.decode(ids) == row.prompt
            assert sample["filtered_resps"][0].strip() == row.answer
            assert [sample.get(metric, np.nan) for metric in metrics] == pytest.approx(list(row[metrics]), nan_ok=True)
        assert [results[task][f"{metric},none"] for metric in metrics] == pytest.approx(list(frame[metrics].mean()))


@pytest.mark.filterwarnings("ignore")  # the harness's and its dependencies'
@pytest.mark.parametrize(
    ("template", "variant", "prompt", "indicator"),
    [
        (True, "standard", "instruction", "[IND]"),
        (True, "standard", "plain", None),
        (True, "authors_code", "plain", "[IND]"),
        (False, "standard", "instruction", None),
        (False, "authors_code", "instruction", "[IND]"),
    ],
)
def test_the_harness_gets_our_prompts_answers_and_metrics(
    harness, sources, indicator_model, tmp_path, template, variant, prompt, indicator
):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    variant = {"prompt": prompt, "indicator": indicator}
    frames = ours(indicator_model, sources, tmp_path, template=template, variant=variant, **variant)
    assert frames["squad"].containment.nunique() == 2  # right and wrong answers
    theirs = harness.simple_evaluate(
        HFLM(pretrained=str(indicator_model), device="cpu", batch_size=4),
        tasks=[task_name(dataset, **variant) for dataset in sources],
        task_manager=TaskManager(
            include_path=str(FOLDER), include_defaults=False, metadata={**sources, "variant": variant}
        ),
        apply_chat_template=template,
    )
    tokenizer = models.load_tokenizer(indicator_model)
    assert_same(theirs["results"], theirs["samples"], frames, tokenizer, template=template, **variant)


def test_the_harnesss_command_gets_the_same_from_local_files(harness, sources, indicator_model, tmp_path):
    frames = ours(indicator_model, sources, tmp_path, template=True, variant="standard", indicator="[IND]")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={indicator_model}"]
    command += ["--tasks", ",".join(task_name(dataset, indicator="[IND]") for dataset in sources)]
    command += ["--include_path", str(FOLDER), "--metadata", json.dumps(sources)]
    command += ["--apply_chat_template", "--device", "cpu", "--batch_size", "8"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    samples = {}
    for file in (tmp_path / "out").rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["arguments"] = [list(row["arguments"]["gen_args_0"].values())]
        samples[file.name.removeprefix("samples_").rsplit("_", 1)[0]] = sorted(rows, key=lambda row: row["doc_id"])
    results = json.loads(written.read_text())["results"]
    tokenizer = models.load_tokenizer(indicator_model)
    assert_same(results, samples, frames, tokenizer, template=True, indicator="[IND]")
