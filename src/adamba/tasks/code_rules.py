"""Small functions over lists of whole numbers: the specification in words, a solution, and what it returns.

A specification is a filter, a map and a result, e.g. "the sum of the squares of the even numbers in xs". What it
returns is computed here, by the package's own functions: no code is run.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

Value = int | list[int]


@dataclass(frozen=True)
class Part:
    """A piece of a specification: words, Python text, and the same as a function."""

    words: str
    text: str
    function: Callable


def filters(k: int) -> list[Part]:
    """Which numbers; the text is a condition on `x`, empty for all."""
    return [
        Part("numbers", "", lambda x: True),
        Part("even numbers", "x % 2 == 0", lambda x: x % 2 == 0),
        Part("odd numbers", "x % 2 == 1", lambda x: x % 2 == 1),
        Part("positive numbers", "x > 0", lambda x: x > 0),
        Part("negative numbers", "x < 0", lambda x: x < 0),
        Part(f"numbers greater than {k}", f"x > {k}", lambda x: x > k),
        Part(f"numbers less than {k}", f"x < {k}", lambda x: x < k),
        Part(f"multiples of {k + 2}", f"x % {k + 2} == 0", lambda x: x % (k + 2) == 0),
    ]


def maps(k: int) -> list[Part]:
    """What of each; the text is an expression in `x`."""
    return [
        Part("{}", "x", lambda x: x),
        Part("squares of the {}", "x * x", lambda x: x * x),
        Part("doubles of the {}", "2 * x", lambda x: 2 * x),
        Part("absolute values of the {}", "abs(x)", abs),
        Part(f"{{}}, each plus {k},", f"x + {k}", lambda x: x + k),
    ]


RESULTS = (
    Part("the sum of the {} in xs", "sum({})", sum),
    Part("the list of the {} in xs", "list({})", list),
    Part("the {} in xs, sorted from small to large", "sorted({})", sorted),
    Part("the {} in xs in reverse order", "list({})[::-1]", lambda values: list(values)[::-1]),
    Part("the largest of the {} in xs, or 0 if there are none", "max({}, default=0)", lambda v: max(v, default=0)),
    Part("the smallest of the {} in xs, or 0 if there are none", "min({}, default=0)", lambda v: min(v, default=0)),
)
COUNT = Part("how many {} there are in xs", "len(list({}))", lambda values: len(list(values)))


@dataclass(frozen=True)
class Specification:
    """What `solve(xs)` must return."""

    words: str
    solution: str
    function: Callable[[list[int]], Value]


def random_specification(rng: random.Random) -> Specification:
    """One of several hundred."""
    k = rng.randint(1, 5)
    which, what, result = rng.choice(filters(k)), rng.choice(maps(k)), rng.choice((*RESULTS, COUNT))
    if result is COUNT:
        what = maps(k)[0]
    items = f"{what.text} for x in xs" + (f" if {which.text}" if which.text else "")
    text = result.text.format(items if result.text.endswith("({})") else f"({items})")

    def function(xs: list[int]) -> Value:
        return result.function([what.function(x) for x in xs if which.function(x)])

    return Specification(
        words=result.words.format(what.words.format(which.words)).replace(", in xs", " in xs"),
        solution=f"def solve(xs):\n    return {text}",
        function=function,
    )


def random_inputs(rng: random.Random, count: int) -> list[list[int]]:
    """Lists of up to eight numbers from -9 to 9; the first is empty, the second holds both signs."""
    longer = [[rng.randint(-9, 9) for _ in range(rng.randint(1, 8))] for _ in range(count - 2)]
    return [[], rng.sample(range(-9, 10), 6), *longer]
