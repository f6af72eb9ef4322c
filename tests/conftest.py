from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Films that tests make are signed with a key of the tests, not with the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        for name in ("CINEMA_SIGNING_KEY", "CINEMA_SIGNING_CERTIFICATE", "CINEMA_POLICY"):
            patch.delenv(name, raising=False)
        yield
