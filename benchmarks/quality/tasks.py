"""The tasks: documents of any size, several questions about each, and what counts as an answer.

Most follow RULER (Hsieh et al., 2024). Its generators in lm-evaluation-harness fetch essays, questions and a
sentence splitter from the network, and put one question to a document; these use what comes with Python, its own
documentation and source, and put several, as prefill is what costs.

A generator takes a random source, a size, a number of questions and a text in sentences. The size is in units of the
task (sentences, lines, words); `sized` finds the one that fills a context. The same task, context and seed make the
same document wherever Python's minor version is the same. All stand in one long file, as they share words, names and
ways to hide things.

A server prefills densely, so the first token of an answer never depends on what HATA selects. Answers therefore begin
before what is asked for: "The magic number for", and the model names the key itself, by decoding.
"""

from __future__ import annotations

import random
import re
import string
import sysconfig
import uuid
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, cycle, islice
from pathlib import Path

ADJECTIVES = """
amber ancient bitter bold brave bright broken calm clever cold crooked curious dark deep dry eager early empty faint
fancy fierce gentle giant golden happy heavy hidden hollow humble icy jolly keen late lazy little lonely loud lucky
mellow merry narrow noble odd pale patient plain proud quick quiet rapid rare rough royal rusty salty sharp shy silent
silver simple sleepy slow smooth soft stern sudden sunny sweet tall tame tiny vivid warm wild wise young
"""
NOUNS = """
anchor apple arrow badge barrel basket beach bell bottle branch bread bridge bucket butter button candle canyon carpet
castle cherry circle cloud coffee compass copper cotton curtain desert diamond donkey dragon engine falcon feather
field finger flower forest garden glacier guitar hammer harbour helmet honey island jacket kettle ladder lantern lemon
letter lion marble meadow mirror monkey mountain needle ocean orange oyster paper pencil pepper piano pigeon pillow
planet pocket potato rabbit ribbon river rocket saddle sailor shadow spider statue stone sugar table temple thunder
ticket tiger tower trumpet tunnel turtle valley velvet village violin wagon walnut whale window winter
"""
NOISE = ["The tea is hot. ", "The road is long. ", "The night is dark. ", "We sit and wait. ", "Then we go home. "]
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
FACT = re.compile(
    r"(?:(?:Changed|Added|New) in version |\.\. version(?:changed|added):: *)(3\.\d+)(?:: |\n+ +)([^.`:]{25,200})\.\s"
)
RECORDS = 80
HOPS = 3


@dataclass(frozen=True)
class Question:
    """One question, how its answer begins, what it must hold, and how a right one goes on."""

    text: str
    prefix: str
    expected: tuple[str, ...]
    rest: str


@dataclass(frozen=True)
class Document:
    """A text, its questions, and one more that a prompt shows with its answer, as an example of the form."""

    text: str
    questions: tuple[Question, ...]
    example: Question | None = None


Text = Sequence[str]  # sentences, with the space after each
Make = Callable[[random.Random, int, int, Text], Document]
Score = Callable[[str, tuple[str, ...]], float]


def recall(answer: str, expected: tuple[str, ...]) -> float:
    """The share of the expected strings that the answer holds as whole words, in whatever case."""
    found = [re.search(rf"(?<![\w.-]){re.escape(text)}(?![\w-]|\.\d)", answer, re.IGNORECASE) for text in expected]
    return sum(map(bool, found)) / len(expected)


def exact_number(answer: str, expected: tuple[str, ...]) -> float:
    """Whether the first number of the answer, in digits or as a word, is the expected one."""
    words = re.findall(r"\d+|[a-z]+", answer.lower())
    numbers = [str(NUMBER_WORDS.index(word)) if word in NUMBER_WORDS else word for word in words]
    return float(next((number for number in numbers if number.isdigit()), None) == expected[0])


def lines_in_place(answer: str, expected: tuple[str, ...]) -> float:
    """The share of lines that are right and in their place: one left out or repeated spoils all that follow."""
    lines = [line.strip() for line in answer.strip().splitlines()]
    return sum(one == other for one, other in zip(lines, expected, strict=False)) / len(expected)


@dataclass(frozen=True)
class Task:
    """A generator, the most tokens of an answer, and its score.

    Args:
        turns: the questions of a document are the turns of one conversation.
        per_document: questions a document, where not as many as asked for, and with no example.
        shortest: the shortest context that has room.
    """

    make: Make
    answer_tokens: int
    score: Score = recall
    stop: tuple[str, ...] = ()
    turns: bool = False
    per_document: int | None = None
    shortest: int = 0

    @property
    def has_example(self) -> bool:
        """A conversation is its own example."""
        return not self.turns and self.per_document is None


def sized(
    name: str, context: int, seed: int, questions: int, text: Text, tokens: Callable[[Document], int]
) -> Document | None:
    """The largest document of a task that is at most ``context`` tokens by ``tokens``; None if none is so small.

    Sizes are tried along a straight line through the last two that enclose the goal, until within 1.5 %.
    """
    task = TASKS[name]
    count = (task.per_document or questions) + task.has_example

    def make(size: int) -> tuple[Document, int]:
        document = task.make(random.Random(f"{name} {context} {seed}"), size, count, text)
        if task.has_example:
            example, *others = document.questions
            document = Document(document.text, tuple(others), example)
        return document, tokens(document)

    low, high, guess = 0, 2**31, 64
    best, filled = make(low)
    if filled > context or context < task.shortest:
        return None
    while high - low > 1 and filled < 0.985 * context:
        document, length = make(guess)
        slope = (length - filled) / (guess - low)
        if length <= context:
            low, best, filled = guess, document, length
        else:
            high = guess
        guess = max(low + 1, min(high - 1, low + int(0.995 * (context - filled) / max(slope, 0.1))))
    return best


@cache
def prose(folder: Path | None = None) -> tuple[str, ...]:
    """Real documentation, in sentences: that of Python's language, or all text files of a folder."""
    if folder is None:
        from pydoc_data.topics import topics

        texts = [topics[name] for name in sorted(topics)]
    else:
        files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".md", ".rst"))
        texts = [path.read_text("utf-8", "replace") for path in files]
    if sentences := re.findall(r"(?s).{1,300}?(?:[.:?!]\s+|\n\n)|.{1,300}\s|.{1,300}", "\n\n".join(texts)):
        return tuple(sentences)
    raise SystemExit(f"{folder} holds no documents: give a folder with .txt, .md or .rst files.")


@cache
def repository() -> tuple[str, ...]:
    """The source of Python's own library, line by line, each file under its name."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    return tuple(
        line + "\n" for path in files for line in [f"# {path.name}", *path.read_text("utf-8", "replace").splitlines()]
    )


def stretch(rng: random.Random, units: Sequence[str], size: int) -> list[str]:
    """``size`` units from a random one on, around the end if need be."""
    start = rng.randrange(len(units))
    return list(islice(cycle([*units[start:], *units[:start]]), size))


def names(rng: random.Random, count: int, between: str = " ") -> list[str]:
    return [
        between.join(pair) for pair in rng.sample([(a, n) for a in ADJECTIVES.split() for n in NOUNS.split()], count)
    ]


def nouns(rng: random.Random, count: int) -> list[str]:
    return rng.sample(NOUNS.split(), count)


def numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(10**6, 10**7), count)]


def uuids(rng: random.Random, count: int) -> list[str]:
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def letters(rng: random.Random, count: int, length: int) -> list[str]:
    return ["".join(rng.sample(string.ascii_lowercase, length)) for _ in range(count)]


VALUES = {"word": nouns, "number": numbers, "uuid": uuids}


def woven(rng: random.Random, haystack: list[str], needles: list[str]) -> str:
    """The haystack with the needles, in their order, at random places."""
    places = sorted(rng.randrange(len(haystack) + 1) for _ in needles)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        haystack.insert(place, needle)
    return "".join(haystack)


def noise(size: int) -> list[str]:
    return list(islice(cycle(NOISE), size))


def needles(
    rng: random.Random,
    size: int,
    questions: int,
    text: Text,
    kind: str = "number",
    haystack: str = "prose",
    values: int = 1,
    asked: int = 1,
    turns: bool = False,
) -> Document:
    """Keys and their values hidden in a text, as in RULER's needle tasks.

    Args:
        kind: of the values: "word", "number" or "uuid".
        haystack: "prose", "noise", or "alike" for other needles.
        values: of each key.
        asked: keys in one question.
        turns: later questions are short, and lean on the first one.
    """
    magic = f"magic {kind}"

    def lines(keys: Sequence[str], values: Sequence[str]) -> list[str]:
        return [f"The {magic} for {key} is {value}. " for key, value in zip(keys, values, strict=True)]

    count = max(questions, 2 * asked)
    keys = names(rng, count) if haystack == "alike" else nouns(rng, count)
    pairs = list(zip([key for key in keys for _ in range(values)], VALUES[kind](rng, count * values), strict=True))
    made = []
    for i in range(questions):
        group = [keys[i]] if asked == 1 else rng.sample(keys, asked)
        several = f"are all the {magic}s" if values > 1 else f"are the {magic}s" if asked > 1 else f"is the {magic}"
        words = f"And for {group[0]}?" if turns and i else f"What {several} for {', '.join(group)}?"
        prefix = f"The {magic}{'s' if values * asked > 1 else ''} for"
        wanted = [value for key in group for own, value in pairs if own == key]
        rest = f" {', '.join(group)} {'are' if len(wanted) > 1 else 'is'} {', '.join(wanted)}."
        made.append(Question(words, prefix, tuple(wanted), rest))
    rng.shuffle(pairs)
    hidden = lines(*zip(*pairs, strict=True))
    if haystack == "alike":
        others = [key for key in names(rng, size + count) if key not in keys][:size]
        hay = lines(others, VALUES[kind](rng, size))
    else:
        hay = noise(size) if haystack == "noise" else stretch(rng, text, size)
    intro = f"Some {magic}s are hidden in the following text. Remember them: you will be asked for them.\n\n"
    return Document(intro + woven(rng, hay, hidden), tuple(made))


def variables(rng: random.Random, size: int, questions: int, text: Text) -> Document:
    """Chains of assignments in noise; a question asks for all variables of one value (RULER's variable tracking)."""
    lines, made = [], []
    for value in numbers(rng, questions):
        chain = [name.upper() for name in letters(rng, HOPS, 5)]
        sources = [value, *(f"VAR {name}" for name in chain)]
        lines.append([f"VAR {name} = {source}. " for name, source in zip(chain, sources, strict=False)])
        rest = f" with the value {value} are {', '.join(chain)}."
        made.append(Question(f"Which variables have the value {value}?", "The variables", tuple(chain), rest))
    order = [i for i, chain in enumerate(lines) for _ in chain]
    rng.shuffle(order)  # each chain keeps its own
    shuffled = [lines[i].pop(0) for i in order]
    intro = "The following text assigns values to variables. Follow them through all of the text.\n\n"
    return Document(intro + woven(rng, noise(size), shuffled), tuple(made))


def word_lists(
    rng: random.Random, size: int, questions: int, kind: str, draw: Callable[[int], tuple[list[str], list[str]]]
) -> Document:
    """Lists of words, ``size`` in all; a question asks for those that occur most often in one of them."""
    parts, made = [], []
    for i, place in enumerate(nouns(rng, questions)):
        words, top = draw((size + i) // questions)
        parts.append(f"The list of {place}:\n{' '.join(rng.sample(words, len(words)))}\n\n")
        what = f"{NUMBER_WORDS[len(top)]} words that occur most often in the list of"
        rest = f" {place} are {', '.join(top)}."
        made.append(Question(f"Which are the {what} {place}?", f"The {what}", tuple(top), rest))
    intro = f"Here are lists of {kind}. In each of them, some words occur more often than others.\n\n"
    return Document(intro + "".join(parts), tuple(made))


def common_words(rng: random.Random, size: int, questions: int, text: Text) -> Document:
    """Five words that occur often among others that hardly repeat (RULER's common words)."""
    vocabulary = sorted(set(re.findall(r"\b[a-z]{4,9}\b", "".join(text))))

    def draw(count: int) -> tuple[list[str], list[str]]:
        top = nouns(rng, 5)
        often = top * (2 + count // 16)
        return often + [word for word in rng.choices(vocabulary, k=count) if word not in top], top

    return word_lists(rng, size, questions, "words", draw)


def frequent_words(rng: random.Random, size: int, questions: int, text: Text) -> Document:
    """Invented words whose counts fall with the square of their rank (RULER's frequent words)."""

    def draw(count: int) -> tuple[list[str], list[str]]:
        words = letters(rng, 24, 5)
        often = [word for rank, word in enumerate(words[:3], 1) for _ in range(int((20 + count) * 0.6 / rank**2))]
        return often + rng.choices(words[3:], k=count // 6), words[:3]

    return word_lists(rng, size, questions, "invented words", draw)


def count(rng: random.Random, size: int, questions: int, text: Text) -> Document:
    """Many short documents, each about something; a question asks how many are about one thing."""
    subjects = nouns(rng, questions + 8)
    wanted = {subject: rng.randint(2, 9) for subject in subjects[:questions]}
    about = [subject for subject, times in wanted.items() for _ in range(times)]
    about += rng.choices(subjects[questions:], k=max(8, len(about) // 4))
    rng.shuffle(about)
    made = [
        Question(
            f"How many of the documents are about the {subject}?",
            "The number of documents about",
            (str(times),),
            f" the {subject} is {times}.",
        )
        for subject, times in wanted.items()
    ]
    heads = [f"\n\nA document about the {subject}:\n" for subject in about]
    return Document("Here are some documents." + woven(rng, stretch(rng, text, size), heads), tuple(made))


def facts(rng: random.Random, size: int, questions: int, text: Text) -> Document:
    """The parts of real documentation around what it says of versions; a question quotes a change and asks when."""
    whole, ends = "".join(text), list(accumulate(map(len, text)))
    found = [(" ".join(match[2].split()), match) for match in FACT.finditer(whole)]
    times = Counter(statement for statement, _ in found)
    once = [(statement, match) for statement, match in found if times[statement] == 1]
    if len(once) < questions:
        raise SystemExit(f"The documents tell {len(once)} changes of versions, and {questions} are asked for.")
    chosen = rng.sample(once, questions)
    spans = [(bisect_right(ends, match.start()), bisect_right(ends, match.end() - 1)) for _, match in chosen]
    distance = [min(max(first - i, i - last, 0) for first, last in spans) for i in range(len(text))]
    nearest = sorted(range(len(text)), key=distance.__getitem__)
    kept = sorted(nearest[: distance.count(0) + size])
    made = [
        Question(
            f'The text says: "{statement}." Since which version is that so?',
            "That is so since version",
            (match[1],),
            f" {match[1]}",
        )
        for statement, match in chosen
    ]
    return Document("".join(text[i] for i in kept), tuple(made))


def code(rng: random.Random, size: int, questions: int, text: Text) -> Document:
    """Real source with small functions between its own; a question calls one by its parameter's name."""
    lines = stretch(rng, repository(), size)
    starts = [i for i, line in enumerate(lines) if re.match(r"def |class |@|# \w+\.py$", line)] or [0]
    functions, parameters = (names(rng, questions, "_") for _ in range(2))
    places = sorted(rng.choices(starts, k=questions))
    made = []
    for place, function, parameter in reversed(list(zip(places, functions, parameters, strict=True))):
        lines.insert(place, f"def {function}({parameter}):\n    return {parameter}\n\n\n")
        call = f"Complete the line by a call of {function}(), its parameter by name, as in f(x=1):"
        made.append(
            Question(
                call, f"value = {function.split('_')[0]}", (parameter,), f"_{function.split('_')[1]}({parameter}=1)"
            )
        )
    return Document("Here are files of a repository.\n\n" + "".join(lines), tuple(made))


def long(rng: random.Random, size: int, questions: int, text: Text) -> Document:
    """Records all over a text, to be listed in order: more than 1,000 tokens, in which each line leads to the next."""
    records = [f"Record {i} is {value}." for i, value in enumerate(numbers(rng, RECORDS), 1)]
    woven_in = woven(rng, stretch(rng, text, size), [f"{record} " for record in records])
    question = f"List all {RECORDS} records of the text, in order, one a line."
    return Document(
        f"The following text has {RECORDS} records.\n\n{woven_in}", (Question(question, "Record", tuple(records), ""),)
    )


ONE = (".",)  # where an answer of one value ends
TASKS = {
    "needle_word": Task(partial(needles, kind="word"), 24, stop=ONE),
    "needle_number": Task(needles, 32, stop=ONE),
    "needle_uuid": Task(partial(needles, kind="uuid"), 64, stop=ONE),
    "needle_noise": Task(partial(needles, haystack="noise"), 32, stop=ONE),
    "needle_alike": Task(partial(needles, haystack="alike"), 32, stop=ONE),
    "needle_values": Task(partial(needles, values=4), 96),
    "needle_queries": Task(partial(needles, asked=4), 128),
    "variables": Task(variables, 48),
    "common_words": Task(common_words, 64),
    "frequent_words": Task(frequent_words, 64),
    "count": Task(count, 24, exact_number, stop=ONE),
    "facts": Task(facts, 12, stop=("\n",)),
    "code": Task(code, 24, stop=("\n",)),
    "turns": Task(partial(needles, turns=True), 32, stop=ONE, turns=True),
    "long": Task(long, 16 * RECORDS, lines_in_place, per_document=1, shortest=4096),
}
