from pathlib import Path

import pytest
from harness import Workers


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents and "workers" in item.fixturenames:
            item.add_marker(pytest.mark.distributed)


@pytest.fixture(scope="session")
def workers(request):
    """One process group per number of ranks, which runs all its tests: give the number by indirect parametrisation."""
    group = Workers(request.param)
    yield group
    group.close()
