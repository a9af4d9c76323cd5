"""Official benchmarks: their samples, their scores, and the folders of kvpress's leaderboard."""

import csv
import json
import random
import re
from collections import Counter

import pytest
import torch
import yaml

from benchmarks.quality import leaderboard, ruler, scores, suites, tasks, texts
from benchmarks.quality import run as runner
from benchmarks.quality.replay import answer_logits, prefill, write

ROWS = [
    {
        "context": f"The magic number of {name} is {number}. " * 20,
        "question": f"What is the magic number of {name}?",
        "answer_prefix": f"The magic number of {name} is",
        "answer": [str(number)],
        "task": task,
        "max_new_tokens": 4,
    }
    for name, number, task in (("ash", 12, "niah_1"), ("oak", 34, "niah_1"), ("fir", 56, "vt"))
]


def test_suites_are_answered_in_their_own_format(model, tokenizer, few_methods, tmp_path):
    data = tmp_path / "ruler.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    suite = suites.load_suite("ruler", None, data)
    assert {task: len(samples) for task, samples in suite.items()} == {"niah_1": 2, "vt": 1}
    sample = suite["niah_1"][1]
    assert sample == tasks.Sample(
        ROWS[1]["context"],
        ROWS[1]["question"],
        ROWS[1]["answer_prefix"],
        " 34",
        answers=("34",),
        metric="match_all",
        max_new_tokens=4,
    )
    wanted = [
        runner.Cell("niah_1", 4096, 1, m, r) for m, r in ((runner.FULL, 0), ("KnormPress", 0.5))
    ]
    path = tmp_path / "answers.jsonl"
    runner.run(model, tokenizer, wanted, path, from_suite(suite))
    full, half = runner.read_results(path)
    assert full["kl"] == 0 < half["kl"] and half["kept"] / half["pairs"] == pytest.approx(
        0.5, abs=0.01
    )

    assert full["score"] == scores.score(full["text"], sample, "niah_1")
    assert len(full["text"]) <= 4  # a character is a token here

    longbench = [{k: v for k, v in ROWS[0].items() if k not in ("answer", "task")}]
    longbench[0]["answers"] = ["twelve", "12"]
    data.write_text(json.dumps(longbench[0]))
    suite = suites.load_suite("longbench", None, data)
    assert suite["longbench"][0].answer == " twelve"
    wanted = [runner.Cell("longbench", 0, 0, "KnormPress", 0.5)]
    path = tmp_path / "longbench.jsonl"
    runner.run(model, tokenizer, wanted, path, from_suite(suite))
    assert runner.read_results(path)[0]["kl"] > 0
    del longbench[0]["question"]
    data.write_text(json.dumps(longbench[0]))
    with pytest.raises(ValueError, match="a row with question, got answer_prefix, answers"):
        suites.load_suite("longbench", None, data)


def from_suite(suite):
    return lambda cell: suite[cell.task][cell.index]


# RULER's tasks, made here


@pytest.fixture
def local_words(monkeypatch):
    rng = random.Random(0)
    drawn = {"".join(rng.choices("abcdefghij", k=rng.randrange(4, 8))) for _ in range(6000)}
    monkeypatch.setattr(ruler, "words", lambda: tuple(sorted(drawn)))


@pytest.mark.usefixtures("local_texts", "local_words")
@pytest.mark.parametrize("task", ruler.RULER)
def test_tasks_of_ruler_can_be_answered_from_their_context(tokenizer, task):
    def make(index, seed=0):
        return ruler.make_ruler(task, tokenizer, length=6000, index=index, seed=seed)

    sample = make(0)
    assert sample == make(0)
    assert len({sample, make(1), make(0, seed=1)}) == 3
    assert 5400 <= len(tasks.encode(sample, tokenizer)[0]) <= 6600
    assert sample.answer == " " + ", ".join(sample.answers) and sample.max_new_tokens >= 30
    assert scores.score(f"I say: {sample.answer}.", sample, task) == 1
    assert scores.score("Nothing.", sample, task) == 0
    for answer in sample.answers:
        assert re.search(rf"\b{re.escape(answer)}\b", sample.context)
        assert answer not in sample.question and answer not in sample.answer_prefix


@pytest.mark.usefixtures("local_texts", "local_words")
@pytest.mark.parametrize(
    "task, asked, answers, least",
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 1, 1, 4),
        ("niah_multikey_2", 1, 1, 30),
        ("niah_multikey_3", 1, 1, 20),
        ("niah_multivalue", 1, 4, 4),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_needles_say_what_keys_stand_for(tokenizer, task, asked, answers, least):
    sample = ruler.make_ruler(task, tokenizer, length=4000, index=3)
    needles = re.findall(r"One access (?:number|code) of (\S+) is (\S+)\.", sample.context)
    keys = [key for key in dict.fromkeys(key for key, _ in needles) if key in sample.question]
    assert len(keys) == asked and len(needles) >= least
    wanted = [value for key, value in needles if key in keys]
    assert len(wanted) == answers and sorted(wanted) == sorted(sample.answers)


@pytest.mark.usefixtures("local_texts", "local_words")
def test_words_of_ruler_are_counted(tokenizer):
    for length, often, seldom in ((4096, 30, 3), (2000, 10, 1)):
        common = ruler.make_ruler("cwe", tokenizer, length=length, index=0)
        counts = Counter(re.findall(r"\d+\. (\w+)", common.context))
        assert {counts[word] for word in common.answers} == {often}
        assert {n for word, n in counts.items() if word not in common.answers} <= {seldom}
    frequent = ruler.make_ruler("fwe", tokenizer, length=4000, index=0)
    (dots, most), *rest = Counter(frequent.context.split()).most_common()
    assert dots == "..." and tuple(word for word, _ in rest[:3]) == frequent.answers
    assert [round(most / n) for _, n in rest[:3]] == [4, 9, 16]  # Zipf's law, squared
    chain = ruler.make_ruler("vt", tokenizer, length=2000, index=0)
    links = dict(re.findall(r"VAR (\w+) = (\w+)", chain.context))
    (value,) = re.findall(r"\d+", chain.question)
    found = value
    for name in chain.answers:
        assert links[name] == found
        found = name


@pytest.mark.usefixtures("local_texts", "local_words")
def test_persons_of_ruler_have_teachers(tokenizer):
    hops = ruler.make_ruler("qa_2", tokenizer, length=4000, index=0)
    cities = dict(re.findall(r"(\w+ \w+) grew up in (\w+)", hops.context))
    (who,) = re.findall(r"taught (\w+ \w+) to", hops.question)
    (teacher,) = re.findall(rf"As a child, {who} learnt the \w+ from (\w+ \w+)\.", hops.context)
    assert hops.answers == (cities[teacher],)


def test_short_contexts_of_ruler_are_refused(tokenizer):
    with pytest.raises(ValueError, match="at least 512 tokens, got 100"):
        ruler.make_ruler("cwe", tokenizer, length=100, index=0)


def test_words_come_from_a_package(tmp_path, monkeypatch):
    listed = tmp_path / "root" / "usr/share/dict/american-english-small"
    listed.parent.mkdir(parents=True)
    listed.write_text("Anna\nbook\nbook's\nébène\nat\nelephantine\nstory\n")
    monkeypatch.setattr(texts, "_debian", lambda package, folder: tmp_path / "root")
    assert texts._words(texts._fetch(texts.WORDS.package, texts.WORDS.member)) == "book\nstory"


# Scores


@pytest.mark.parametrize(
    "metric, text, answers, classes, wanted",
    [
        ("match_all", "It is SEVEN, or eight", ("seven", "nine"), (), 0.5),
        ("match_any", "It is SEVEN, or eight", ("seven", "nine"), (), 1.0),
        ("match_any", "six", ("seven", "nine"), (), 0.0),
        ("f1", "The cat, a dog", ("cat", "cat bird"), (), 2 / 3),
        ("f1", "", ("cat",), (), 0.0),
        ("rouge", "the cat sat on the mat", ("the cat sat on the mat", "no"), (), 1.0),
        ("rouge", " . ", ("the cat",), (), 0.0),
        ("count", "There are 3, or 4 of 3", ("3",), (), 2 / 3),
        ("count", "Paragraph 12", ("Paragraph 12",), (), 1.0),
        ("count", "none", ("3",), (), 0.0),
        ("edit", "# so\nx = f(1)\ny = 2", ("x = f(1)",), (), 1.0),
        ("edit", "abcd", ("abxy",), (), 0.5),
        ("classes", "a Food of sport", ("Food",), ("Food", "sport", "music"), 0.5),
        ("classes", "Fast Food", ("Fast Food",), ("Food", "Fast Food"), 1.0),
        ("classes", "music", ("Food",), ("Food", "music"), 0.0),
    ],
)
def test_scores_are_those_that_benchmarks_publish(metric, text, answers, classes, wanted):
    sample = tasks.Sample("", "", "", "", answers=answers, metric=metric, classes=classes)
    assert scores.score(text, sample, "any") == pytest.approx(wanted, abs=1e-6)


def test_models_that_go_on_with_examples_are_judged_by_their_first_line():
    sample = tasks.Sample("", "", "", "", answers=("cat",), metric="f1")
    assert scores.score("\ncat\nQuestion: dog", sample, "triviaqa_e") == 1
    assert scores.score("\ncat\nQuestion: dog", sample, "hotpotqa") < 1


def test_the_text_is_what_greedy_decoding_gives(model):
    ids = torch.randint(0, 256, (1, 90), generator=torch.Generator().manual_seed(0))
    context, question = ids[:, :80], ids[:, 80:]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 90:]
    told = write(model, prefill(model, context, None), 80, question, 6)
    assert told == expected.tolist()
    logits = answer_logits(model, prefill(model, context, None), 80, question, expected[None])
    assert logits.argmax(-1).tolist() == told
    model.generation_config.eos_token_id = [999, told[3]]
    try:
        assert write(model, prefill(model, context, None), 80, question, 6) == told[:3]
    finally:
        model.generation_config.eos_token_id = None


# What kvpress's leaderboard takes


@pytest.mark.parametrize("suite", ["ruler", "longbench"])
def test_folders_of_the_leaderboard(few_methods, tmp_path, suite, monkeypatch):
    monkeypatch.setattr(leaderboard, "METHODS", few_methods)
    sample = tasks.Sample("long", "q?", "It is", " 7", answers=("7",), metric="f1")
    cells = [
        runner.Cell(task, 4096, i, method, ratio)
        for task in ("qasper", "trec")
        for i in range(2)
        for method, ratio in ((runner.FULL, 0.0), ("KnormPress", 0.5))
    ]
    rows = [
        {"cell": vars(cell), "score": (1 + cell.index) / 4, "text": "7\nso", "kl": 0.1}
        for cell in cells
    ]
    rows.append({"cell": vars(cells[0]), "kl": 0.1})  # has no score
    options = {"suite": suite, "subset": None, "model": "a/b", "seen": True, "seed": 3}
    paths = leaderboard.write_leaderboard(rows, lambda cell: sample, tmp_path, **options)
    parts = ["4096"] if suite == "ruler" else ["qasper", "trec"]
    ends = ["no_press__0.00", "KnormPress__0.50"]
    names = {f"{suite}__{p}__a--b__{end}__compressed_questions" for p in parts for end in ends}
    assert {path.name for path in paths} == names
    metrics = json.loads((paths[-1] / "metrics.json").read_text())
    each = {"string_match": 37.5}
    assert metrics == ({"qasper": each, "trec": each} if suite == "ruler" else 37.5)
    config = yaml.safe_load((paths[-1] / "config.yaml").read_text())
    assert config["data_dir"] == parts[-1] and config["compression_ratio"] == 0.5
    assert config["press_init_command"].startswith("KnormPress(")
    with (paths[-1] / "predictions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 // len(parts)
    assert lines[0]["predicted_answer"] == "7\nso" and lines[0]["answer"] == "['7']"
