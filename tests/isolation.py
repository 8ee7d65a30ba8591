"""Whether this machine can isolate code; tests that run code in the sandbox skip with the reason where it cannot."""

import pytest

from adamba.errors import UserError
from adamba.tools.sandbox import find_backend

try:
    find_backend()
    NO_ISOLATION = ""
except UserError as error:
    NO_ISOLATION = str(error)
isolated = pytest.mark.skipif(bool(NO_ISOLATION), reason=NO_ISOLATION)
