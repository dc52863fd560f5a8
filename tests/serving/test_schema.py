"""The server does what its own OpenAPI schema says, whatever schemathesis makes of it."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from serving_cases import MakeClient

# A schema cannot say what a file of text is: what is none is refused, as it should be.
NOT_FOR_FILES = ["positive_data_acceptance"]


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_schema(make_client: MakeClient, mode: GenerationMode) -> None:
    client = make_client(requests_per_minute=1_000_000)
    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app)
    num_cases = 0

    def check(case: schemathesis.Case) -> None:
        nonlocal num_cases
        num_cases += 1
        names = NOT_FOR_FILES if case.path == "/translate_file" else []
        case.call_and_validate(excluded_checks=[CHECKS.get_one(name) for name in names])

    options = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    for operation in schema.get_all_operations():
        of_one = operation.ok()
        if of_one.body:  # without one nothing can be wrong
            options(given(of_one.as_strategy(generation_mode=mode))(check))()
    assert num_cases >= 20
