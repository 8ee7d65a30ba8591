"""Word problems as pure functions: a short story about whole numbers, and the expression that answers it.

A story is a start and some events; each event knows its sentence and what it does to the expression. All intermediate
results are whole and not negative, and shares leave no rest.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from adamba.tasks.expressions import Number, Operation, Tree, symbols

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Finn", "Grace", "Hugo")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "shells", "stamps")
PACKS = ("bags", "boxes", "packs")


@dataclass(frozen=True)
class Problem:
    """A question in words, its expression and its value."""

    question: str
    tree: Tree
    value: int


def whole(number: int) -> Tree:
    """A number as a leaf."""
    return Number(str(number))


@dataclass(frozen=True)
class Event:
    """A sentence, the expression after it, and its value."""

    sentence: str
    tree: Tree
    value: int


def buys(rng: random.Random, tree: Tree, value: int, thing: str, most: int) -> Event | None:
    """Packs of equal size come along."""
    packs, each = rng.randint(2, most), rng.randint(2, most)
    more = Operation("*", (whole(packs), whole(each)))
    sentence = f"Then come {packs} {rng.choice(PACKS)} of {each} {thing} each."
    return Event(sentence, Operation("+", (tree, more)), value + packs * each)


def finds(rng: random.Random, tree: Tree, value: int, thing: str, most: int) -> Event | None:
    """Some come along."""
    more = rng.randint(1, most)
    return Event(f"Then come {more} more {thing}.", Operation("+", (tree, whole(more))), value + more)


def gives(rng: random.Random, tree: Tree, value: int, thing: str, most: int) -> Event | None:
    """Some go."""
    if value < 2:
        return None
    less = rng.randint(1, min(value - 1, most))
    return Event(f"Then {less} of the {thing} are given away.", Operation("-", (tree, whole(less))), value - less)


def multiplies(rng: random.Random, tree: Tree, value: int, thing: str, most: int) -> Event | None:
    """The number grows by a factor."""
    times, word = rng.choice(((2, "doubles"), (3, "triples")))
    return Event(f"Then the number of {thing} {word}.", Operation("*", (tree, whole(times))), value * times)


def shares(rng: random.Random, tree: Tree, value: int, thing: str, most: int) -> Event | None:
    """Friends share all, and one share is kept."""
    friends = [count for count in range(2, most + 1) if value and value % count == 0]
    if not friends:
        return None
    count = rng.choice(friends)
    sentence = f"Then {count} friends share all {thing} equally, and one share is kept."
    return Event(sentence, Operation("/", (tree, whole(count))), value // count)


EVENTS: tuple[Callable[..., Event | None], ...] = (buys, finds, gives, multiplies, shares)


def random_problem(rng: random.Random, num_events: int, max_number: int) -> Problem | None:
    """A story of `num_events` events with numbers up to `max_number`; None when one of them does not fit."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    value = rng.randint(2, max_number)
    tree: Tree = whole(value)
    sentences = [f"{name} has {value} {thing}."]
    for _ in range(num_events):
        event = rng.choice(EVENTS)(rng, tree, value, thing, max_number)
        if event is None:
            return None
        sentences.append(event.sentence)
        tree, value = event.tree, event.value
    sentences.append(f"How many {thing} does {name} have now?")
    return Problem(" ".join(sentences), tree, value)


def random_expression(rng: random.Random, num_operators: int, max_number: int) -> Problem:
    """An expression of sums, differences and products, asked as it is."""
    tree: Tree = whole(rng.randint(1, max_number))
    value = int(tree.text)  # type: ignore[union-attr]
    for _ in range(num_operators):
        operator, number = rng.choice("+-*"), rng.randint(1, max_number)
        on_left = rng.random() < 0.5
        tree = Operation(operator, (whole(number), tree) if on_left else (tree, whole(number)))
        left, right = (number, value) if on_left else (value, number)
        value = left + right if operator == "+" else left - right if operator == "-" else left * right
    return Problem(f"What is {symbols(tree)}?", tree, value)
