import pytest
from transformers import PreTrainedTokenizerFast

from adamba.data import train_tokenizer
from adamba.data.python_docs import python_docs_rows


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [row["text"] for row in python_docs_rows("test")]
    texts += ['Calculate 12 + 7? calculator {"expression": "5 + 3"} Answer: play {"cell": 3}'] * 5
    return train_tokenizer(texts, 1024)
