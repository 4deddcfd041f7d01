"""A token comes from one place, and is never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from dti_ray.config import ServeConfig
from dti_ray.errors import ConfigError
from dti_ray.serve.token import VARIABLE, is_open, is_right, read_token

SECRET = "a-secret-of-ours"


def test_without_a_token_nobody_is_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_token(ServeConfig()) is None


def test_it_comes_from_the_environment_or_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, SECRET)
    assert read_token(ServeConfig()) == SECRET.encode()
    monkeypatch.delenv(VARIABLE)
    (tmp_path / "token").write_text(f"{SECRET}\n")
    assert read_token(ServeConfig(token_file=str(tmp_path / "token"))) == SECRET.encode()


@pytest.mark.parametrize("text", ["", "short", "with a space in it", "nöt-äscii-at-all"])
def test_one_that_cannot_be_used_is_refused_and_not_shown(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match="expected at least 8 printable ASCII") as caught:
        read_token(ServeConfig())
    assert not text or text not in str(caught.value)


def test_two_places_and_a_missing_file_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits = ServeConfig(token_file=str(tmp_path / "none"))
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(limits)
    monkeypatch.setenv(VARIABLE, SECRET)
    with pytest.raises(ConfigError, match="is given beside"):
        read_token(limits)


def test_only_the_whole_token_is_right() -> None:
    assert is_right(SECRET.encode(), SECRET)
    assert not any(is_right(SECRET.encode(), given) for given in ("", SECRET[:-1], SECRET + "x", "ö", SECRET.upper()))


OPEN = {"127.0.0.1": False, "::1": False, "localhost": False, "0.0.0.0": True, "10.1.2.3": True, "gpu7": True}


@pytest.mark.parametrize(("host", "is_told"), OPEN.items())
def test_other_machines_are_told_of_where_there_is_no_token(
    host: str, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert is_open(ServeConfig(host=host)) == is_told
    monkeypatch.setenv(VARIABLE, SECRET)
    assert not is_open(ServeConfig(host=host))
