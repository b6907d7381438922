"""The evaluation of answers: its tasks, its prompts, its arithmetic; no server."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from benchmarks.common import write_tokenizer
from benchmarks.quality import report as reports
from benchmarks.quality.report import compared, floors, interval, merge, shortfall, summary, table
from benchmarks.quality.run import Asker, Method, Plan, Prompts, budget_of
from benchmarks.quality.tasks import TASKS, Document, Question, exact_number, lines_in_place, prose, recall, sized

CONTEXT = 4096
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant> "


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    """Of a tokenizer that has a token for every word."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 8)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return Prompts(tokenizer)


def made(name: str, prompts: Prompts, seed: int = 0, context: int = CONTEXT) -> Document:
    document = sized(name, context, seed, 8, prose(), lambda document: prompts.tokens(TASKS[name], document))
    assert document
    return document


@pytest.mark.parametrize("name", TASKS)
def test_documents_fill_the_context_and_come_again(name: str, prompts: Prompts) -> None:
    document = made(name, prompts)
    assert 0.98 * CONTEXT <= prompts.tokens(TASKS[name], document) <= CONTEXT
    assert document == made(name, prompts) != made(name, prompts, seed=1)
    assert len(document.questions) == (TASKS[name].per_document or 8)
    assert len({question.text for question in document.questions}) == len(document.questions)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "count"])
def test_what_is_asked_for_is_in_the_document(name: str, prompts: Prompts) -> None:
    document = made(name, prompts)
    for question in document.questions:
        assert recall(document.text, question.expected) == 1


@pytest.mark.parametrize("name", [name for name in TASKS if name != "long"])
def test_the_example_is_right_and_is_no_question(name: str, prompts: Prompts) -> None:
    document = made(name, prompts)
    for question in [*document.questions, *([document.example] if document.example else [])]:
        assert TASKS[name].score(question.prefix, question.expected) == 0
        assert TASKS[name].score(question.prefix + question.rest, question.expected) == 1
    assert document.example not in document.questions
    assert (document.example is None) == (name == "turns")


@pytest.mark.parametrize(
    "name", ["needle_word", "needle_number", "needle_uuid", "needle_noise", "needle_alike", "turns"]
)
def test_a_needle_is_there_once(name: str, prompts: Prompts) -> None:
    document = made(name, prompts)
    for question in document.questions:
        name_of_key = re.split(r" for ", question.text)[1].rstrip("?")
        found = re.findall(rf"The magic \w+ for {name_of_key} is (\S+)\. ", document.text)
        assert tuple(found) == question.expected


def test_look_alikes_are_all_there_is(prompts: Prompts) -> None:
    _, text = made("needle_alike", prompts).text.split("\n\n")
    keys = re.findall(r"The magic number for (\w+ \w+) is \d{7}\. ", text)
    assert len(keys) == len(set(keys)) == text.count(". ") > 300


def test_several_values_and_several_keys_are_asked_for(prompts: Prompts) -> None:
    for question in made("needle_values", prompts).questions:
        assert len(set(question.expected)) == 4
    for question in made("needle_queries", prompts).questions:
        assert len(set(question.expected)) == 4 and question.text.count(",") == 3


def test_chains_lead_to_their_value(prompts: Prompts) -> None:
    document = made("variables", prompts)
    values: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", document.text):
        values[name] = values.get(source, source)  # a source comes before what it gives its value to
    for question in document.questions:
        value = question.text.split()[-1].rstrip("?")
        assert {name for name, own in values.items() if own == value} == set(question.expected)


@pytest.mark.parametrize("name", ["common_words", "frequent_words"])
def test_the_words_that_are_asked_for_are_the_most_frequent(name: str, prompts: Prompts) -> None:
    document = made(name, prompts)
    for question in document.questions:
        place = question.text.split()[-1].rstrip("?")
        counts = Counter(document.text.split(f"The list of {place}:\n")[1].split("\n\n")[0].split())
        top = counts.most_common(len(question.expected) + 1)
        assert {word for word, _ in top[:-1]} == set(question.expected) and top[-2][1] > top[-1][1]


def test_documents_are_counted(prompts: Prompts) -> None:
    document = made("count", prompts)
    for question in document.questions:
        subject = question.text.split()[-1].rstrip("?")
        assert question.expected == (str(document.text.count(f"A document about the {subject}:")),)


def test_facts_stand_in_the_documentation_once(prompts: Prompts) -> None:
    document = made("facts", prompts)
    text = " ".join(document.text.split())
    for question in document.questions:
        statement = question.text.split('"', 1)[1].rsplit('"', 1)[0]
        assert text.count(f"in version {question.expected[0]}: {statement}") == text.count(statement) == 1


def test_facts_come_from_other_documents_too(tmp_path: Path) -> None:
    for i in range(9):
        text = (
            f"Function {i}\n\n.. versionadded:: 3.{i}\n   The function number {i} of this library.\n\n" + "More. " * 99
        )
        (tmp_path / f"{i}.rst").write_text(text)
    document = sized("facts", 600, 0, 8, prose(tmp_path), lambda document: len(document.text.split()))
    assert document and all(recall(document.text, question.expected) == 1 for question in document.questions)
    with pytest.raises(SystemExit, match="9 changes"):
        sized("facts", 600, 0, 10, prose(tmp_path), lambda document: len(document.text.split()))


def test_functions_are_defined_once_and_called_nowhere(prompts: Prompts) -> None:
    document = made("code", prompts)
    for question in document.questions:
        (parameter,) = question.expected
        name = re.search(r"(\w+)\(\)", question.text)
        assert name and document.text.count(name[1]) == 1
        assert f"def {name[1]}({parameter}):\n    return {parameter}\n" in document.text


def test_records_come_in_order(prompts: Prompts) -> None:
    document = made("long", prompts)
    assert tuple(re.findall(r"Record \d+ is \d{7}\.", document.text)) == document.questions[0].expected


def test_a_task_that_does_not_fit_is_left_out(prompts: Prompts) -> None:
    assert sized("long", 2048, 0, 8, prose(), lambda document: prompts.tokens(TASKS["long"], document)) is None
    assert sized("needle_values", 64, 0, 8, prose(), lambda document: len(document.text.split())) is None


def test_answers_are_scored() -> None:
    assert recall("The values are 12, 34 and 56.", ("12", "56", "78", "3")) == 0.5
    assert recall("since version 3.8.", ("3.8",)) == 1
    assert recall("since version 3.80 or 13.8", ("3.8",)) == 0
    assert recall("An APPLE-pie and an apple", ("apple",)) == 1 and recall("pineapple, apple-pie", ("apple",)) == 0
    assert exact_number("about the river is seven, not 8", ("7",)) == 1 == exact_number(" river: 7", ("7",))
    assert exact_number("is 17", ("7",)) == 0 == exact_number("unknown", ("7",))
    assert lines_in_place("a\nb\nc\n", ("a", "b", "c", "d")) == 0.75
    assert lines_in_place("a\nc\nd", ("a", "b", "c", "d")) == 0.25


def test_intervals_are_over_documents() -> None:
    assert interval([[40.0] * 5]) == (40, 40)
    low, high = interval([[0.0, 100.0] * 50])  # 50 +- 1.96 * 50 / sqrt(100)
    assert low == pytest.approx(40.2, abs=1.5) and high == pytest.approx(59.8, abs=1.5)
    one, four = interval([[0.0, 100.0] * 8]), interval([[0.0, 100.0] * 8] * 4)  # four cells: half as wide
    assert (four[1] - four[0]) == pytest.approx((one[1] - one[0]) / 2, rel=0.15)


def test_methods_are_flags() -> None:
    trained = Method.parse("trained@1/64", "folder")
    assert (trained.name, trained.budget, trained.label) == ("trained", "1/64", "trained@1/64")
    assert "--hata-budget 1.5625% --hata-weights folder" in " ".join(trained.flags)
    assert "--hata-min-context 0" in " ".join(trained.flags)
    assert "--hata-bits 256 --hata-weights none" in " ".join(Method.parse("untrained256@1/128", "auto").flags)
    assert "--hata-budget 2048 " in " ".join(Method.parse("trained@2048", "auto").flags)
    assert Method.parse("dense", "auto").flags == ()
    assert (whole := Method.parse("whole", "auto")).label == "whole" and "100.0000%" in whole.flags
    for wrong in ("trained", "trained@64%", "trained@1/0", "trained@0", "trained@-64", "trained@2/64", "exact@1/64"):
        with pytest.raises(SystemExit, match="not a method"):
            Method.parse(wrong, "auto")


def test_budgets_of_servers_are_fractions() -> None:
    budgets = ["1.5625%", "0.7812%", "0.7813%", "100%", "12.5%", "1.6%", "2048"]
    assert [budget_of({"budget": text}) for text in budgets] == ["1/64", "1/128", "1/128", "all", "1/8", "1.6%", "2048"]
    assert budget_of(None) == "all"


def fake_server(asked: list[Any]) -> httpx.Client:
    """Answers every prompt with the number of its words, and keeps the requests."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/completions":
            asked.append(json.loads(request.content))
            choices = [{"index": i, "text": f" {len(p)}"} for i, p in enumerate(asked[-1]["prompt"])]
            return httpx.Response(200, json={"choices": choices[::-1]})
        return httpx.Response(200, json={"internal_states": [{}]})

    return httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server")


def test_the_first_question_brings_the_document_into_the_cache(prompts: Prompts) -> None:
    asked: list[Any] = []
    document = made("needle_number", prompts, context=512)
    answers = Asker(fake_server(asked), prompts, "m").answers(TASKS["needle_number"], document)
    assert [len(request["prompt"]) for request in asked] == [1, 7]
    sent = [prompt for request in asked for prompt in request["prompt"]]
    assert answers == [f" {len(prompt)}" for prompt in sent] and max(map(len, sent)) <= 512 - 32
    assert all(request["temperature"] == 0 and request["max_tokens"] == 32 for request in asked)
    head = prompts.document(document)
    assert all(prompt[: len(head)] == head for prompt in sent)


def test_later_turns_hold_the_answers_of_the_model(prompts: Prompts) -> None:
    one, two = (
        Question("What is the one?", "The one", ("1",), " is 1."),
        Question("And the two?", "The two", ("2",), " is 2."),
    )
    before, after = prompts.halves([(one, " is 5.")], two)
    assert before == "<user> "
    assert after == "\n\nWhat is the one? <assistant> The one is 5. <user> And the two? <assistant> The two"
    bare = Prompts(AutoTokenizer.from_pretrained(prompts.tokenizer.name_or_path))
    assert bare.halves([], one) == ("", "\n\nWhat is the one?\nThe one")


def test_a_cell_is_measured_cold_and_cached(prompts: Prompts, tmp_path: Path) -> None:
    kept = tmp_path / "answers.jsonl"
    plan = Plan(2, 8, 0, prose(), cold_only=False, concurrency=2, answers=kept)
    rows = plan.cell(Asker(fake_server([]), prompts, "m"), "count", 512, "dense", "all")
    assert [(row["cached"], row["n"], len(row["documents"])) for row in rows] == [(False, 16, 2), (True, 16, 2)]
    assert rows[0]["answers"] == rows[1]["answers"] and len(rows[0]["answers"]) == 4 * 16
    assert rows[0]["attended"] == 1 and len(kept.read_text().splitlines()) == 32


def row(task: str, method: str, budget: str, documents: list[float], **more: Any) -> dict[str, Any]:
    score = sum(documents) / len(documents)
    fields = {"task": task, "context": 4096, "method": method, "budget": budget, "score": score, "low": 0, "high": 100}
    fields |= {"n": 2 * len(documents), "cached": False, "attended": 1.0, "documents": documents}
    return fields | {"answers": "abcdefgh" * len(documents)} | more


def rows(loss: float) -> list[dict[str, Any]]:
    """Dense and trained codes on two tasks of evidence, of which one loses, and on one that is none."""
    return [
        row("facts", "trained", "1/32", [80 - loss, 90 - loss], attended=0.1, answers="abcdefghabcdXXXX"),
        row("facts", "dense", "all", [80, 90]),
        row("code", "trained", "1/32", [100, 100], attended=0.1),
        row("code", "dense", "all", [100, 100]),
        row("count", "trained", "1/32", [0, 0]),
        row("count", "dense", "all", [40, 50]),
    ]


def test_differences_are_document_by_document_and_only_evidence_counts() -> None:
    facts, *_ = [each for each in compared(rows(1.0)) if each["task"] == "facts" and each["method"] == "trained"]
    assert (facts["difference"], facts["difference_low"], facts["difference_high"]) == (-1, -1, -1)
    assert facts["same_text"] == 0.75 and facts["evidence"]
    assert [each["task"] for each in compared(rows(1.0)) if not each["evidence"]] == ["count", "count"]
    text = summary(compared(rows(1.0)))
    assert "| trained 1/32 | 10.0% | 92.0 | -0.50 (-0.50 to -0.50) | 88% | 2 of 2 |" in text
    assert "*45.0 (0-100)*" in table(compared(rows(1.0)), 4096)


def test_floors_hold_or_fail() -> None:
    assert floors(compared(rows(1.0)))[0] == (
        True,
        "trained 1/32: -0.50 on average (floor -0.5), worst task facts -1.00 (floor -2): holds",
    )
    assert [holds for holds, _ in floors(compared(rows(1.2)))] == [False]  # the average
    steady = [row(f"task{i}", method, budget, [90.0]) for i in range(9) for method, budget in [("dense", "all")]]
    steady += [row(f"task{i}", "trained", "1/64", [90.0 - 4 * (i == 0)]) for i in range(9)]
    assert [holds for holds, _ in floors(compared(steady))] == [False]  # one task
    assert shortfall(compared(rows(1.0)), 0.5) is None
    assert shortfall(compared(rows(8.0)), 3) == "trained 1/32 falls 4.00 points below dense, and 3 are allowed."
    assert "No task tells" in str(shortfall(compared(rows(1.0)[1::2]), 3))


def test_files_of_one_model_become_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = {"gpu": "G", "versions": {"sglang": "1"}, "commit": "c", "model": "M", "plan": {"seed": 0}, "hata": {}}
    cached = [each | {"cached": True} for each in rows(2.0)]
    parts = {"dense": [*rows(1.0)[1::2], *cached[1::2]], "trained": [*rows(1.0)[::2], *cached[::2]]}
    paths = [tmp_path / f"{name}.json" for name in parts]
    for path, (name, part) in zip(paths, parts.items(), strict=True):
        path.write_text(json.dumps(head | {"command": f"python {name}", "rows": part}))
    (report,) = merge(paths).values()
    assert len(report["rows"]) == 12 and report["command"] == "python dense && python trained"

    monkeypatch.setattr(reports, "ROOT", tmp_path)
    monkeypatch.setattr(reports, "DOCS", tmp_path / "docs" / "quality.md")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    reports.draw(report)
    reports.write_docs([report])
    text = (tmp_path / "docs" / "quality.md").read_text()
    assert "holds" in text and "python dense\npython trained" in text and "| facts | 4 | 85.0" in text
    assert "trained 1/32: 0 of 12 answers differ, -0.33 points" in text
    assert (tmp_path / "benchmarks" / "results" / "quality-m.png").stat().st_size > 10_000

    paths[1].write_text(paths[1].read_text().replace('"c"', '"d"'))
    with pytest.raises(SystemExit, match="its commit differs"):
        merge(paths)
