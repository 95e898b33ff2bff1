"""The server against its own OpenAPI document: whatever is made of it, no answer is a server's error or outside the document."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served import KEYS

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def exercise(address: str, max_examples: int) -> list[str]:
    """Ask every operation of the document for so many things; returns the operations. Raises what schemathesis finds."""
    asked = []
    for found in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=max_examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def ask(case):
            if isinstance(case.body, dict):
                case.body.pop("timeout_ms", None)  # a millisecond is rightly answered with 504
            case.call_and_validate(checks=CHECKS, headers={"authorization": f"Bearer {KEYS[0]}"}, timeout=120)

        ask()
        asked.append(f"{operation.method.upper()} {operation.path}")
    return asked


def test_no_answer_is_outside_the_document(server):
    asked = exercise(server[0], 10)
    assert {"POST /v1/images/generations", "POST /v1/images/edits", "POST /v1/images/variations"} < set(asked)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_answer_to_hundreds_of_requests_is_outside_the_document(server):
    exercise(server[0], 300)
