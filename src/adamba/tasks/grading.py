"""Whether an answer in words, numbers or LaTeX means the right one.

Texts and plain numbers are compared here; what else there is (fractions, roots, intervals, …) by `math-verify` when
it is installed (`pip install adamba[math]`), and counts as wrong when it is not. Only short texts reach that library
and none with towers of powers, so that no answer can hold up a training.
"""

import re
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec

MAX_CHARACTERS = 100
MARKER = "Answer:"
NUMBER = re.compile(r"-?(?:\d{1,15}(?:\.\d{1,15})?|\.\d{1,15})(?:/\d{1,15})?")
THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
# More than one power, an exponent of three digits or an exponent in brackets with digits, a factorial.
COSTLY = re.compile(r"(?:\^|\*\*).*(?:\^|\*\*)|(?:\^|\*\*)\s*[{(]?\s*-?\d{3}|!|\d{16}")


def answer_of(text: str) -> str | None:
    """What stands after `Answer:` in a text; None when that is missing, empty, or there more than once."""
    if text.count(MARKER) != 1:
        return None
    answer = text.partition(MARKER)[2].strip()
    return answer if answer and "\n" not in answer else None


def is_same_answer(answer: str, gold: str) -> bool:
    """Whether `answer` equals `gold` as text, as a number, or for math-verify."""
    gold = gold.strip()
    most = max(MAX_CHARACTERS, len(gold))
    answer = answer[: most + 1].strip()
    if len(answer) > most:
        return False
    if _plain(answer) == _plain(gold):
        return True
    numbers = _number(answer), _number(gold)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1]
    if len(answer) > MAX_CHARACTERS or COSTLY.search(answer) or not has_math_verify():
        return False
    return _verify(answer, gold)


@lru_cache
def has_math_verify() -> bool:
    """Whether `math-verify` is installed."""
    return find_spec("math_verify") is not None


@lru_cache(maxsize=4096)
def _verify(answer: str, gold: str) -> bool:
    from math_verify import parse, verify

    # Their time limits need the main thread's alarm signal; the checks above bound the work instead.
    parsed = [parse(f"${text.strip('$')}$", parsing_timeout=None, raise_on_error=False) for text in (gold, answer)]
    return all(parsed) and bool(verify(*parsed, timeout_seconds=None, raise_on_error=False))


def _plain(text: str) -> str:
    return " ".join(text.casefold().rstrip(".").split())


def _number(text: str) -> Fraction | None:
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text.strip("$ ").removesuffix(".").rstrip("$ "))
    if not NUMBER.fullmatch(text):
        return None
    numerator, _, denominator = text.partition("/")
    return None if denominator and not int(denominator) else Fraction(numerator) / Fraction(denominator or 1)
