"""Real documents that every CPython carries: the language reference, by topic."""

from pydoc_data.topics import topics


def section(topic: str, start: int, length: int) -> str:
    """A stretch of a topic; about four characters make a token."""
    return topics[topic][start : start + length]


# Prompts of about 500 to 3,000 tokens, each of another document.
PROMPTS = [
    section("assignment", 0, 2_400) + "\n\nIn one sentence, an assignment",
    section("formatstrings", 1_000, 5_000) + "\n\nIn one sentence, a format string",
    section("specialnames", 20_000, 11_600) + "\n\nIn one sentence, a descriptor",
]
