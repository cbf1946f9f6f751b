"""What the recipes of one client share: where the server is, and a line of JSON per recipe.

A recipe is a function that uses a client as its users do and asserts what they would see. ``OCTAVO_URL`` is the server's address
without /v1, ``OCTAVO_MODEL`` a name of its model. This file runs in environments that hold nothing but the client.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable

URL = os.environ["OCTAVO_URL"]
BASE = URL + "/v1"
MODEL = os.environ["OCTAVO_MODEL"]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function", "function": {
        "name": "get_weather", "description": "The weather in a city.", "parameters": {
            "type": "object", "properties": {"city": {"type": "string", "maxLength": 30}}, "required": ["city"],
            "additionalProperties": False}}}

_recipes: list[Callable[[], None]] = []


def recipe(function: Callable[[], None]) -> Callable[[], None]:
    """Mark a recipe; they run in the order in which they stand."""
    _recipes.append(function)
    return function


def run() -> None:
    """Run all recipes and exit, with 1 where one has failed."""
    failed = False
    for function in _recipes:
        start, trouble = time.monotonic(), ""
        try:
            function()
        except Exception as error:
            failed, trouble = True, f"{type(error).__name__}: {error}"
            traceback.print_exc()
        print(json.dumps({"recipe": function.__name__, "seconds": time.monotonic() - start, "trouble": trouble}), flush=True)
    sys.exit(failed)
