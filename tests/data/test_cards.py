import pytest

from adamba.data import load_card, load_cards
from adamba.tasks import TASKS

CARD = """---
license: mit
adamba:
  id: mine
  loader: files
  format: text
---
Body.
"""


def test_every_card_reads_and_tasks_have_one():
    cards = load_cards()
    assert {"pydoc_topics", *TASKS} <= cards.keys()
    for card in cards.values():
        assert card.license != "unknown" and card.use and card.size and len(card.body) > 200, card.id


def test_unknown_id_suggests_the_nearest():
    with pytest.raises(ValueError, match="no data card 'calculater' in .*did you mean 'calculator'"):
        load_card("calculater")
    with pytest.raises(ValueError, match="known: .*calculator"):
        load_card("zzzzzz")


def test_a_card_of_ones_own(tmp_path):
    (tmp_path / "mine.md").write_text(CARD)
    card = load_card("mine", tmp_path)
    assert (card.license, card.format, card.body) == ("mit", "text", "Body.")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("---\nlicense", "license", "no front matter"),
        ("license: mit", "license: [", "is not YAML"),
        ("adamba:", "other:", "key 'adamba' is missing"),
        ("  format: text\n", "", "'adamba.format' is missing"),
        ("id: mine", "id: other", "'adamba.id' is 'other', the file's name asks for 'mine'"),
        ("loader: files", "loader: ftp", "'adamba.loader' is 'ftp', expected one of"),
        ("loader: files", "loader: hub", "'adamba.path' is missing"),
        ("format: text", "format: text\n  colour: red", "unknown key 'adamba.colour'"),
        ("format: text", "format: text\n  columns: text", "'adamba.columns' is 'text', expected a mapping"),
    ],
)
def test_bad_cards_are_refused_in_one_line(tmp_path, old, new, message):
    (tmp_path / "mine.md").write_text(CARD.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        load_card("mine", tmp_path)
    assert "mine.md" in str(error.value) and "\n" not in str(error.value)
