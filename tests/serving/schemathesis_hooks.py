"""What schemathesis is told beside the document: which fields contradict each other, and that time limits are no subject here."""

from typing import Any

import schemathesis

# Of each row, a request may have one field: what a schema could say only at the price of being read by nobody.
EXCLUSIVE = (("max_tokens", "max_completion_tokens"),
             ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"))
LEAST_TIMEOUT = 60.0


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    body = case.body
    if not isinstance(body, dict):
        return
    timeout = body.get("timeout")
    if isinstance(timeout, int | float) and 0 < timeout < LEAST_TIMEOUT:  # rightly answered with 503 or 504
        body["timeout"] = LEAST_TIMEOUT
    if case.meta is not None and case.meta.generation.mode.value == "positive":
        for names in EXCLUSIVE:
            for name in [name for name in names if body.get(name) is not None][1:]:
                del body[name]
