"""Where a registry is found: by name, by environment, above, at home."""

from pathlib import Path

from lorary.registry.store.location import locate_store


def test_what_is_asked_comes_first_then_environment_then_parents_then_home(tmp_path):
    project = tmp_path / "project"
    (project / ".lorary").mkdir(parents=True)
    (project / "deep" / "er").mkdir(parents=True)
    environ = {"LORARY_STORE": "/env", "XDG_DATA_HOME": "/xdg", "HOME": "/home/me"}
    without = {key: value for key, value in environ.items() if key != "LORARY_STORE"}

    assert locate_store("/asked", environ, project) == Path("/asked")
    assert locate_store("asked", environ, project) == project / "asked"
    assert locate_store(None, environ, project) == Path("/env")
    assert locate_store(None, without, project / "deep" / "er") == project / ".lorary"
    assert locate_store(None, without, tmp_path) == Path("/xdg/lorary")
    assert locate_store(None, {"HOME": "/home/me"}, tmp_path) == Path("/home/me/.local/share/lorary")
    assert locate_store(None, {"HOME": "/home/me", "XDG_DATA_HOME": "rel"}, tmp_path).is_relative_to("/home/me")


def test_it_passes_over_empty_variables_and_files_named_lorary(tmp_path):
    (tmp_path / ".lorary").write_bytes(b"")
    environ = {"LORARY_STORE": "", "XDG_DATA_HOME": "", "HOME": "/home/me"}

    assert locate_store("", environ, tmp_path) == Path("/home/me/.local/share/lorary")
