"""What a row is to write: values that make no sense are refused, without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from statecache.decode.request import Request
from statecache.errors import OptionError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt: it has no token: give at least one"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: give an integer of at least 1"),
        ({"max_new_tokens": True}, "max_new_tokens=True: give an integer"),
        ({"temperature": -0.1}, "temperature=-0.1: give 0 for the likeliest token, or more to draw"),
        ({"temperature": float("nan")}, "temperature=nan: give 0"),
        ({"temperature": "1"}, "temperature='1': give 0"),
        ({"temperature": True}, "temperature=True: give 0"),
        ({"top_p": None}, "top_p=None: give a probability above 0"),
        ({"top_p": 0.0}, "top_p=0.0: give a probability above 0, up to 1 for all tokens"),
        ({"top_p": 1.5}, "top_p=1.5: give a probability"),
        ({"top_k": -1}, "top_k=-1: give the number of tokens to draw from, or 0 for all of them"),
        ({"top_k": 2.0}, "top_k=2.0: give the number of tokens"),
        ({"seed": 2**64}, f"seed={2**64}: give an integer from -2**63 to 2**64 - 1, or None"),
        ({"seed": 1.5}, "seed=1.5: give an integer"),
        ({"before": -1}, "before=-1: give an integer of at least 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(OptionError) as refused:
        Request(**{"prompt": [1], **options})
    assert str(refused.value).startswith(message)


def test_a_request_needs_no_torch():
    code = "import sys, statecache.decode.request, statecache.decode.limits\nprint('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
