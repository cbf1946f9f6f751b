"""The exception tree: whose fault it is, and what a caller may read from it."""

from octavo.errors import CapacityError, ConfigError, EngineDead, ModelError, OctavoError, RequestError


def test_the_tree() -> None:
    for kind in (ConfigError, ModelError, RequestError, CapacityError, EngineDead):
        assert issubclass(kind, OctavoError)
    assert issubclass(ModelError, ConfigError)
    assert issubclass(ConfigError, ValueError) and issubclass(RequestError, ValueError)  # as vLLM's users catch them
    assert not issubclass(CapacityError, ValueError)


def test_what_they_carry() -> None:
    error = RequestError("n must be 1.", "n", "code")
    assert (str(error), error.param, error.code) == ("n must be 1.", "n", "code")
    assert RequestError("x").param is None and RequestError("x").code is None
    assert (str(ConfigError("y", "seed")), ConfigError("y", "seed").param) == ("y", "seed")
    assert CapacityError("full").retry_after == 1.0 and CapacityError("full", 5.0).retry_after == 5.0
