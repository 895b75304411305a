import pytest

from tests.models import random_defender_folder


@pytest.fixture(scope="session")
def defender_folder(tmp_path_factory):
    return random_defender_folder(tmp_path_factory.mktemp("models") / "defender")
